// Global average pooling of several feature maps in one launch: the maps' descriptions are a parameter of the kernel,
// and each block finds the map that it works for.
//
// A mean's order of additions follows from the map's shape and strides; where the tensor begins only decides whether it
// is read 16 bytes at a time.
#include "common.cuh"

namespace aep::kernels::cuda {
namespace {

constexpr int kRows = kMaxThreads / static_cast<int>(kWarpSize);

enum class Walk : int32_t {
  image,          // positions lie beside each other without gaps: a group of lanes takes an (n, c) pair
  image_wide,     // the same, and every image begins at a multiple of a pack
  channels,       // channels lie beside each other: a lane takes a channel, the warps of a block share the image
  channels_wide,  // the same, a lane takes a pack of channels
  any,            // other strides: a warp takes an (n, c) pair
};

struct Pool {
  GlobalAvgPoolParams p;
  Walk walk;
  bool aligned;     // input begins at a multiple of 16 bytes
  int32_t lanes;    // image: the size of a group
  int64_t blocks;   // that work for this map
};

struct Pools {
  Pool pool[kPoolsPerLaunch];
  int32_t count;
};

// The lanes of a group read along the image; V values at a time.
template <int V, class S>
__device__ void pool_along_image(const Pool& pool, int64_t block) {
  using A = Acc<S>;
  const GlobalAvgPoolParams& p = pool.p;
  const int64_t items = p.N * p.C, spatial = p.H * p.W, groups = kMaxThreads / pool.lanes;
  const int lane = static_cast<int>(threadIdx.x) % pool.lanes;
  for (int64_t first = block * groups; first < items; first += pool.blocks * groups) {
    const int64_t item = first + threadIdx.x / static_cast<unsigned>(pool.lanes);
    const int64_t n = item / p.C, c = item % p.C;
    A sum = 0;
    if (item < items) {
      const S* x = static_cast<const S*>(p.input) + n * p.stride_n + c * p.stride_c;
#pragma unroll 4
      for (int64_t i = int64_t(lane) * V; i < spatial; i += int64_t(pool.lanes) * V) {
        const int count = pack_count<V>(i, spatial);
        const Pack<V, S> pack = load_pack<V>(x + i, 1, count, pool.aligned);
        for (int v = 0; v < V; ++v) {
          if (v < count) sum += value_of(pack.value[v]);
        }
      }
    }
    for (int half = pool.lanes / 2; half > 0; half /= 2) sum += __shfl_down_sync(kAllLanes, sum, half, pool.lanes);
    if (lane == 0 && item < items) {
      put(static_cast<S*>(p.output) + n * p.out_stride_n + c * p.out_stride_c, sum / static_cast<A>(spatial));
    }
  }
}

// A tile is 32 packs of channels of one sample.
template <int V, class S>
__device__ void pool_along_channels(const Pool& pool, int64_t block, Acc<S>* partial) {
  using A = Acc<S>;
  const GlobalAvgPoolParams& p = pool.p;
  const int64_t width = int64_t(kWarpSize) * V, tiles = (p.C + width - 1) / width, spatial = p.H * p.W;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize), row = static_cast<int>(threadIdx.x / kWarpSize);
  for (int64_t tile = block; tile < p.N * tiles; tile += pool.blocks) {
    const int64_t n = tile / tiles, c = tile % tiles * width + int64_t(lane) * V;
    const int count = c < p.C ? pack_count<V>(c, p.C) : 0;
    A sum[V] = {};
    if (count > 0) {
      const S* x = static_cast<const S*>(p.input) + n * p.stride_n + c;
      // Every kRows-th position, without a division for each.
      int64_t h = row / p.W, w = row % p.W;
      const int64_t down = kRows / p.W, right = kRows % p.W;
      for (int64_t i = row; i < spatial; i += kRows) {
        const Pack<V, S> pack = load_pack<V>(x + h * p.stride_h + w * p.stride_w, 1, count, pool.aligned);
        for (int v = 0; v < V; ++v) sum[v] += value_of(pack.value[v]);
        h += down, w += right;
        if (w >= p.W) w -= p.W, ++h;
      }
    }
    for (int v = 0; v < V; ++v) partial[(row * V + v) * static_cast<int>(kWarpSize) + lane] = sum[v];
    __syncthreads();
    if (row == 0 && count > 0) {
      for (int v = 0; v < V; ++v) {
        for (int other = 1; other < kRows; ++other)
          sum[v] += partial[(other * V + v) * static_cast<int>(kWarpSize) + lane];
        if (v < count)
          put(static_cast<S*>(p.output) + n * p.out_stride_n + (c + v) * p.out_stride_c,
              sum[v] / static_cast<A>(spatial));
      }
    }
    __syncthreads();
  }
}

template <class S>
__device__ void pool_anyhow(const Pool& pool, int64_t block) {
  using A = Acc<S>;
  const GlobalAvgPoolParams& p = pool.p;
  const int64_t items = p.N * p.C, spatial = p.H * p.W;
  const unsigned lane = threadIdx.x % kWarpSize;
  for (int64_t item = block * kRows + threadIdx.x / kWarpSize; item < items; item += pool.blocks * kRows) {
    const int64_t n = item / p.C, c = item % p.C;
    const S* x = static_cast<const S*>(p.input) + n * p.stride_n + c * p.stride_c;
    A sum = 0;
    for (int64_t i = lane; i < spatial; i += kWarpSize)
      sum += value_of(x[(i / p.W) * p.stride_h + (i % p.W) * p.stride_w]);
    for (int half = kWarpSize / 2; half > 0; half /= 2) sum += __shfl_down_sync(kAllLanes, sum, half);
    if (lane == 0)
      put(static_cast<S*>(p.output) + n * p.out_stride_n + c * p.out_stride_c, sum / static_cast<A>(spatial));
  }
}

template <class S>
__global__ void __launch_bounds__(kMaxThreads) pools_kernel(const __grid_constant__ Pools all) {
  constexpr int V = kWide<S>;
  AEP_SHARED(Acc<S>, partial, kMaxThreads * V);
  int64_t block = blockIdx.x;
  int i = 0;
  while (block >= all.pool[i].blocks) block -= all.pool[i++].blocks;
  const Pool& pool = all.pool[i];
  switch (pool.walk) {
    case Walk::image:
      return pool_along_image<1, S>(pool, block);
    case Walk::image_wide:
      return pool_along_image<V, S>(pool, block);
    case Walk::channels:
      return pool_along_channels<1, S>(pool, block, partial);
    case Walk::channels_wide:
      return pool_along_channels<V, S>(pool, block, partial);
    case Walk::any:
      return pool_anyhow<S>(pool, block);
  }
}

// How a map is walked over, and by how many blocks. At most 2^20 blocks each: they loop over the rest.
template <class S>
Pool plan(const GlobalAvgPoolParams& p) {
  constexpr int64_t V = kWide<S>;
  Pool pool{};
  pool.p = p;
  pool.aligned = aligned_to_16(p.input);
  pool.lanes = static_cast<int32_t>(kWarpSize);
  const int64_t items = p.N * p.C, spatial = p.H * p.W;
  const bool dense_image = (p.W == 1 || p.stride_w == 1) && (p.H == 1 || p.stride_h == p.W);
  const bool packs_begin = (p.N == 1 || p.stride_n % V == 0);
  const auto split = [](int64_t count, int64_t each) { return (count + each - 1) / each; };
  if (p.stride_c == 1 && spatial > 1) {
    const bool wide = p.C % V == 0 && packs_begin && (p.H == 1 || p.stride_h % V == 0) &&
                      (p.W == 1 || p.stride_w % V == 0);
    // Few wide blocks would leave most of the device idle; a channel's order of additions is the same in both.
    const int64_t wide_blocks = p.N * split(p.C, kWarpSize * V);
    pool.walk = wide && wide_blocks >= 128 ? Walk::channels_wide : Walk::channels;
    pool.blocks = blocks_for(pool.walk == Walk::channels_wide ? wide_blocks : p.N * split(p.C, kWarpSize));
  } else if (dense_image) {
    const bool wide = spatial % V == 0 && packs_begin && (p.C == 1 || p.stride_c % V == 0);
    pool.walk = wide ? Walk::image_wide : Walk::image;
    const int64_t reads = wide ? spatial / V : spatial;
    while (pool.lanes > 1 && pool.lanes / 2 >= reads) pool.lanes /= 2;
    pool.blocks = blocks_for(split(items, kMaxThreads / pool.lanes));
  } else {
    pool.walk = Walk::any;
    pool.blocks = blocks_for(split(items, kRows));
  }
  return pool;
}

template <class S>
cudaError_t launch(const GlobalAvgPoolParams* pools, int64_t count, cudaStream_t stream) {
  for (int64_t first = 0; first < count;) {
    Pools all{};
    int64_t blocks = 0;
    for (; first < count && all.count < kPoolsPerLaunch; ++first) {
      if (pools[first].dtype != pools[0].dtype) return cudaErrorInvalidValue;
      if (pools[first].N * pools[first].C == 0) continue;
      all.pool[all.count] = plan<S>(pools[first]);
      blocks += all.pool[all.count++].blocks;
    }
    if (blocks == 0) continue;
    const cudaError_t error =
        enqueue(pools_kernel<S>, static_cast<unsigned>(blocks), kMaxThreads, 0, stream, all);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_global_avg_pools(const GlobalAvgPoolParams* pools, int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  AEP_CUDA_BY_DTYPE(pools[0].dtype, launch, pools, count, stream);
}
cudaError_t launch_global_avg_pool(const GlobalAvgPoolParams& p, cudaStream_t stream) {
  return launch_global_avg_pools(&p, 1, stream);
}

}  // namespace aep::kernels::cuda

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
  image,          // positions lie beside each other without gaps: a group of lanes takes an (n, c) pair, in packs
  image_aligned,  // the same, and packs are read with one load
  channels,       // channels lie beside each other: columns of one channel each
  channels_wide,  // the same, columns of a pack of channels, and H is 1: positions follow each other at one distance
  any,            // other strides: a warp takes an (n, c) pair
};

struct Pool {
  GlobalAvgPoolParams p;
  Walk walk;
  int32_t lanes;   // image: the size of a group; channels: the columns of a tile; a power of two up to 32
  int64_t blocks;  // that work for this map
};

struct Pools {
  Pool pool[kPoolsPerLaunch];
  int32_t count;
};

// The lanes of a group read along the image, kBatch packs at a time each. An image has less than kMostInImage values.
constexpr int64_t kMostInImage = int64_t(1) << 30;

template <int V, bool kAligned, class S>
__device__ void pool_along_image(const Pool& pool, int64_t block) {
  using A = Acc<S>;
  const GlobalAvgPoolParams& p = pool.p;
  const int spatial = static_cast<int>(p.H * p.W), lanes = pool.lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t items = p.N * p.C, groups = kMaxThreads / lanes;
  for (int64_t first = block * groups; first < items; first += pool.blocks * groups) {
    const int64_t item = first + threadIdx.x / static_cast<unsigned>(lanes);
    const int64_t n = p.N == 1 ? 0 : item / p.C, c = item - n * p.C;
    A part[kBatch] = {};
    if (item < items) {
      const int64_t begin = n * p.stride_n + c * p.stride_c;
      const S* x = static_cast<const S*>(p.input) + begin;
      const RowParts<V, int> parts(begin, spatial);
      S edge[kBatch] = {};
      if (parts.edges > 0) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          if (lane + j * lanes < parts.edges) edge[j] = x[parts.edge(lane + j * lanes)];
        }
      }
#pragma unroll 1
      for (int i = lane; i < parts.packs; i += kBatch * lanes) {
        Pack<V, S> pack[kBatch] = {};
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          if (i + j * lanes < parts.packs) pack[j] = load_whole<V, kAligned>(x + parts.pack(i + j * lanes));
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
#pragma unroll
          for (int j = 0; j < kBatch; ++j) part[j] += value_of(pack[j].value[v]);
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) part[j] += value_of(edge[j]);
#pragma unroll 1
      for (int i = lane + kBatch * lanes; i < parts.edges; i += lanes) part[0] += value_of(x[parts.edge(i)]);
    }
    A sum = (part[0] + part[1]) + (part[2] + part[3]);
    for (int half = lanes / 2; half > 0; half /= 2) sum += __shfl_down_sync(kAllLanes, sum, half, lanes);
    if (lane == 0 && item < items) {
      put(static_cast<S*>(p.output) + n * p.out_stride_n + c * p.out_stride_c, sum / static_cast<A>(spatial));
    }
  }
}

// A tile is `lanes` columns of V channels of one sample; the block's threads beneath each other take the positions in
// turn. A channel's sum does not depend on V.
template <int V, class S>
__device__ void pool_along_channels(const Pool& pool, int64_t block, Acc<S>* partial) {
  using A = Acc<S>;
  const GlobalAvgPoolParams& p = pool.p;
  const int lanes = pool.lanes, width = lanes * V, rows = kMaxThreads / lanes;
  const int column = static_cast<int>(threadIdx.x) % lanes, row = static_cast<int>(threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize), warp = static_cast<int>(threadIdx.x / kWarpSize);
  const int64_t tiles = (p.C + width - 1) / width, spatial = p.H * p.W;
  for (int64_t tile = block; tile < p.N * tiles; tile += pool.blocks) {
    const int64_t n = tile / tiles, c = (tile - n * tiles) * width;
    A sum[V] = {};
    if (c + column * V < p.C) {  // C is a multiple of V
      const S* x = static_cast<const S*>(p.input) + n * p.stride_n + c + column * V;
#pragma unroll 1
      for (int64_t i = row; i < spatial; i += kBatch * rows) {
        Pack<V, S> pack[kBatch] = {};
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int64_t at = i + j * rows;
          if (at >= spatial) continue;
          const int64_t h = V > 1 || p.H == 1 ? 0 : at / p.W, w = at - h * p.W;
          pack[j] = load_whole<V, true>(x + h * p.stride_h + w * p.stride_w);
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += value_of(pack[j].value[v]);
        }
      }
    }
    for (int step = lanes; step < static_cast<int>(kWarpSize); step *= 2) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += __shfl_xor_sync(kAllLanes, sum[v], step);
    }
    if (lane < lanes) {
#pragma unroll
      for (int v = 0; v < V; ++v) partial[warp * width + column * V + v] = sum[v];
    }
    __syncthreads();
    const int channel = static_cast<int>(threadIdx.x);  // of the tile, whose width is kMaxThreads at most
    if (channel < width && c + channel < p.C) {
      A total = 0;
      for (int other = 0; other < kRows; ++other) total += partial[other * width + channel];
      put(static_cast<S*>(p.output) + n * p.out_stride_n + (c + channel) * p.out_stride_c,
          total / static_cast<A>(spatial));
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
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtOnce<S>) pools_kernel(const __grid_constant__ Pools all) {
  constexpr int V = kWide<S>;
  static_assert(kWarpSize * V <= kMaxThreads, "a thread a channel of a tile");
  AEP_SHARED(Acc<S>, partial, kMaxThreads * V);
  int64_t block = blockIdx.x;
  int i = 0;
  while (block >= all.pool[i].blocks) block -= all.pool[i++].blocks;
  const Pool& pool = all.pool[i];
  switch (pool.walk) {
    case Walk::image:
      return pool_along_image<V, false, S>(pool, block);
    case Walk::image_aligned:
      return pool_along_image<V, true, S>(pool, block);
    case Walk::channels:
      return pool_along_channels<1, S>(pool, block, partial);
    case Walk::channels_wide:
      return pool_along_channels<V, S>(pool, block, partial);
    case Walk::any:
      return pool_anyhow<S>(pool, block);
  }
}

constexpr int64_t kEnoughBlocks = 512;  // about what a large device holds at once

// How a map is walked over, and by how many blocks. At most 2^20 blocks each: they loop over the rest.
template <class S>
Pool plan(const GlobalAvgPoolParams& given) {
  constexpr int64_t V = kWide<S>;
  Pool pool{};
  GlobalAvgPoolParams& p = pool.p;
  p = given;
  pool.lanes = static_cast<int32_t>(kWarpSize);
  const int64_t items = p.N * p.C, spatial = p.H * p.W;
  const bool dense_image = (p.W == 1 || p.stride_w == 1) && (p.H == 1 || p.stride_h == p.W);
  const bool aligned = aligned_to_16(p.input);
  const auto split = [](int64_t count, int64_t each) { return (count + each - 1) / each; };
  if (p.stride_c == 1 && spatial > 1) {
    if (p.W == 1) p.W = p.H, p.H = 1, p.stride_w = p.stride_h;
    if (p.H > 1 && p.stride_h == p.W * p.stride_w) p.W = spatial, p.H = 1;
    const bool packs = p.H == 1 && p.C % V == 0 && p.stride_w % V == 0 && (p.N == 1 || p.stride_n % V == 0);
    const int64_t wide = packs ? V : 1;
    // Narrow tiles make more blocks. Four packs are 64 bytes, less is no way to read memory.
    const auto too_wide = [&](int64_t lanes) {
      return lanes / 2 * wide >= p.C || p.N * split(p.C, lanes * wide) < kEnoughBlocks;
    };
    while (pool.lanes > (packs ? 4 : 16) && too_wide(pool.lanes)) pool.lanes /= 2;
    pool.walk = packs && aligned ? Walk::channels_wide : Walk::channels;
    pool.blocks = blocks_for(p.N * split(p.C, pool.lanes * (pool.walk == Walk::channels_wide ? V : 1)));
  } else if (dense_image && spatial < kMostInImage) {
    if (p.stride_n == p.C * p.stride_c && p.out_stride_n == p.C * p.out_stride_c) p.C = items, p.N = 1;
    pool.walk = aligned ? Walk::image_aligned : Walk::image;
    // A few packs for each lane, unless the device would be left idle.
    const auto too_wide = [&](int64_t lanes) {
      return lanes / 2 * V >= spatial ||
             (lanes / 2 * V * kBatch >= spatial && items * lanes > kEnoughBlocks * kMaxThreads);
    };
    while (pool.lanes > 1 && too_wide(pool.lanes)) pool.lanes /= 2;
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

// Linear layers of a few rows, those of all exits in one launch: the layers' descriptions are a parameter of the
// kernel, and each block finds the layer that it works for.
//
// For few rows a product is the reading of its matrix, which a warp does once: it holds a class or two and several
// rows, whose features come from the caches. A sum's order of additions follows from C and from whether rows and
// weights lie in packs (a matter of strides): neither the other layers at hand, nor the number of rows, nor where a
// tensor begins changes a bit.
#include "common.cuh"

namespace aep::kernels::cuda {
namespace {

constexpr unsigned kThreads = 128, kWarps = kThreads / kWarpSize;  // small blocks: layers of unequal size even out

struct Layer {
  SmallLinearParams p;
  bool wide;        // every row and every class begins at a multiple of a pack, and is a number of packs long
  bool aligned;     // and both matrices begin at a multiple of 16 bytes
  int64_t warps;    // pieces of work: groups of classes times groups of rows
  int64_t blocks;
};

struct Layers {
  Layer layer[kSmallLinearsPerLaunch];
  int32_t count;
};

__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Some steps of a lane through the channels, for kClasses classes and kRows rows: a pack each, 32 packs apart. kFull:
// all of them lie before C; the others add 0 * 0. The weights of all steps are asked for at once, since there may be
// few warps to wait with.
template <int V, bool kAligned, bool kFull, int kSteps, int kRows, int kClasses, class S>
__device__ void take_steps(const S* const (&x)[kRows], const S* const (&weight)[kClasses], int64_t first, int64_t C,
                           Acc<S> (&sum)[kRows][kClasses]) {
  const auto load = [&](const S* p, int step) {
    const int64_t c = first + step * int64_t(kWarpSize) * V;
    return kFull || c < C ? load_pack<V>(p + c, 1, V, kAligned) : Pack<V, S>{};
  };
  Pack<V, S> w[kSteps][kClasses];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int j = 0; j < kClasses; ++j) w[step][j] = load(weight[j], step);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Pack<V, S> values = load(x[r], step);
#pragma unroll
      for (int j = 0; j < kClasses; ++j) {
#pragma unroll
        for (int i = 0; i < V; ++i)
          sum[r][j] = multiply_add(value_of(values.value[i]), value_of(w[step][j].value[i]), sum[r][j]);
      }
    }
  }
}

// All steps of a lane. A row is a number of packs long.
template <int V, bool kAligned, int kRows, int kClasses, class S>
__device__ void dot_products(const S* const (&x)[kRows], const S* const (&weight)[kClasses], int64_t C,
                             Acc<S> (&sum)[kRows][kClasses]) {
  constexpr int kSteps = kRows == 1 ? 4 : kRows <= 4 ? 2 : 1;
  constexpr int64_t kBatch = int64_t(kWarpSize) * V * kSteps;
  const int64_t lane = threadIdx.x % kWarpSize;
  int64_t begin = 0;
#pragma unroll 1  // unrolled further, fewer loads would be under way at a time
  for (; begin + kBatch <= C; begin += kBatch)
    take_steps<V, kAligned, true, kSteps>(x, weight, begin + lane * V, C, sum);
  if (begin < C) take_steps<V, kAligned, false, kSteps>(x, weight, begin + lane * V, C, sum);
}

// A warp's piece of a layer. Rows and classes beyond the last are computed as the last, and not written.
template <int kRows, int kClasses, class S>
__device__ void piece_of_layer(const Layer& layer, int64_t piece) {
  using A = Acc<S>;
  const SmallLinearParams& p = layer.p;
  const int64_t row_groups = (p.N + kRows - 1) / kRows;
  const int64_t first_row = piece % row_groups * kRows, first_class = piece / row_groups * kClasses;
  const S *x[kRows], *weight[kClasses];
  A sum[kRows][kClasses] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    x[r] = static_cast<const S*>(p.input) + smaller<int64_t>(first_row + r, p.N - 1) * p.stride_n;
#pragma unroll
  for (int j = 0; j < kClasses; ++j)
    weight[j] = static_cast<const S*>(p.weight) + smaller<int64_t>(first_class + j, p.K - 1) * p.weight_stride_k;
  if (layer.aligned) {
    dot_products<kWide<S>, true>(x, weight, p.C, sum);
  } else if (layer.wide) {
    dot_products<kWide<S>, false>(x, weight, p.C, sum);
  } else {
    dot_products<1, false>(x, weight, p.C, sum);
  }
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      A total = sum[r][j];
      for (int step = 1; step < static_cast<int>(kWarpSize); step *= 2)
        total += __shfl_xor_sync(kAllLanes, total, step);
      const int64_t n = first_row + r, k = first_class + j;
      if (lane != r * kClasses + j || n >= p.N || k >= p.K) continue;  // a lane each
      if (p.bias) total += value_of(static_cast<const S*>(p.bias)[k * p.bias_stride]);
      put(static_cast<S*>(p.output) + n * p.out_stride_n + k, total);
    }
  }
}

// So few blocks are asked of a multiprocessor that registers are left for all loads of a batch; without that number the
// compiler waits for each load before it sends the next.
template <int kRows, int kClasses, class S>
__global__ void __launch_bounds__(kThreads, kRows == 1 ? 6 : kRows <= 4 ? 4 : 3)
    small_linears_kernel(const __grid_constant__ Layers all) {
  static_assert(kRows * kClasses <= static_cast<int>(kWarpSize), "a lane writes one value");
  int64_t block = blockIdx.x;
  int i = 0;
  while (block >= all.layer[i].blocks) block -= all.layer[i++].blocks;
  const Layer& layer = all.layer[i];
  for (int64_t piece = block * kWarps + threadIdx.x / kWarpSize; piece < layer.warps; piece += layer.blocks * kWarps)
    piece_of_layer<kRows, kClasses, S>(layer, piece);
}

template <class S>
Layer plan(const SmallLinearParams& p, int64_t rows, int64_t classes) {
  constexpr int64_t V = kWide<S>;
  Layer layer{};
  layer.p = p;
  layer.wide = p.C % V == 0 && p.stride_n % V == 0 && p.weight_stride_k % V == 0;
  layer.aligned = layer.wide && aligned_to_16(p.input) && aligned_to_16(p.weight);
  layer.warps = ((p.N + rows - 1) / rows) * ((p.K + classes - 1) / classes);
  layer.blocks = blocks_for((layer.warps + kWarps - 1) / kWarps);
  return layer;
}

template <int kRows, int kClasses, class S>
cudaError_t launch_by(const SmallLinearParams* layers, int64_t count, cudaStream_t stream) {
  for (int64_t first = 0; first < count;) {
    Layers all{};
    int64_t blocks = 0;
    for (; first < count && all.count < kSmallLinearsPerLaunch; ++first) {
      if (layers[first].N == 0) continue;
      all.layer[all.count] = plan<S>(layers[first], kRows, kClasses);
      blocks += all.layer[all.count++].blocks;
    }
    if (blocks == 0) continue;
    const cudaError_t error = enqueue(small_linears_kernel<kRows, kClasses, S>, static_cast<unsigned>(blocks), kThreads,
                                      0, stream, all);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class S>
cudaError_t launch(const SmallLinearParams* layers, int64_t count, cudaStream_t stream) {
  int64_t rows = 0, classes = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (layers[i].dtype != layers[0].dtype) return cudaErrorInvalidValue;
    rows = rows < layers[i].N ? layers[i].N : rows;
    classes += layers[i].K;
  }
  // How many rows and classes a warp holds. One each where there are few of them: more would leave most of the device
  // idle, while the matrices are small enough to be read again from the caches.
  const auto fills = [&](int64_t r, int64_t k) { return (rows + r - 1) / r * (classes / k) >= 1000; };
  if (rows > 4 && fills(8, 2)) return launch_by<8, 2, S>(layers, count, stream);
  if (rows > 1 && fills(4, 2)) return launch_by<4, 2, S>(layers, count, stream);
  return launch_by<1, 1, S>(layers, count, stream);
}

}  // namespace

cudaError_t launch_small_linears(const SmallLinearParams* layers, int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  AEP_CUDA_BY_DTYPE(layers[0].dtype, launch, layers, count, stream);
}

}  // namespace aep::kernels::cuda

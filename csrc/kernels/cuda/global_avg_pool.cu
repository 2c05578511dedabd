// Global average pooling: a block of 32 x 8 threads takes 32 (n, c) pairs, 8 threads each, or, where positions lie
// beside each other, one warp takes one pair.
#include "common.cuh"

namespace aep::kernels::cuda {
namespace {

constexpr int kWarp = 32, kRows = 8;

// Spatial neighbours are adjacent in memory: the lanes of a warp read along the image.
template <class S>
__global__ void pool_along_image(GlobalAvgPoolParams p) {
  using A = Acc<S>;
  const int64_t items = p.N * p.C, spatial = p.H * p.W;
  const S* input = static_cast<const S*>(p.input);
  S* output = static_cast<S*>(p.output);
  for (int64_t item = int64_t(blockIdx.x) * kRows + threadIdx.y; item < items; item += int64_t(gridDim.x) * kRows) {
    const int64_t n = item / p.C, c = item % p.C;
    const S* x = input + n * p.stride_n + c * p.stride_c;
    A sum = 0;
    for (int64_t i = threadIdx.x; i < spatial; i += kWarp)
      sum += value_of(x[(i / p.W) * p.stride_h + (i % p.W) * p.stride_w]);
    for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_down_sync(0xffffffffu, sum, half);
    if (threadIdx.x == 0) put(output + n * p.out_stride_n + c * p.out_stride_c, sum / static_cast<A>(spatial));
  }
}

// Channels are adjacent in memory: the lanes of a warp read along the channels, the warps of a block share the image.
template <class S>
__global__ void pool_along_channels(GlobalAvgPoolParams p) {
  using A = Acc<S>;
  AEP_SHARED(A, partial, kRows * kWarp);
  const int64_t items = p.N * p.C, spatial = p.H * p.W;
  const S* input = static_cast<const S*>(p.input);
  S* output = static_cast<S*>(p.output);
  for (int64_t first = int64_t(blockIdx.x) * kWarp; first < items; first += int64_t(gridDim.x) * kWarp) {
    const int64_t item = first + threadIdx.x, n = item / p.C, c = item % p.C;
    A sum = 0;
    if (item < items) {
      const S* x = input + n * p.stride_n + c * p.stride_c;
      for (int64_t i = threadIdx.y; i < spatial; i += kRows)
        sum += value_of(x[(i / p.W) * p.stride_h + (i % p.W) * p.stride_w]);
    }
    partial[threadIdx.y * kWarp + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && item < items) {
      for (int row = 1; row < kRows; ++row) sum += partial[row * kWarp + threadIdx.x];
      put(output + n * p.out_stride_n + c * p.out_stride_c, sum / static_cast<A>(spatial));
    }
    __syncthreads();
  }
}

template <class S>
cudaError_t launch(const GlobalAvgPoolParams& p, cudaStream_t stream) {
  const int64_t items = p.N * p.C;
  if (items == 0) return cudaSuccess;
  const dim3 threads(kWarp, kRows);
  if (p.stride_c == 1 && p.H * p.W > 1) {
    return enqueue(pool_along_channels<S>, blocks_for((items + kWarp - 1) / kWarp), threads, 0, stream, p);
  }
  return enqueue(pool_along_image<S>, blocks_for((items + kRows - 1) / kRows), threads, 0, stream, p);
}

}  // namespace

cudaError_t launch_global_avg_pool(const GlobalAvgPoolParams& p, cudaStream_t stream) {
  AEP_CUDA_BY_DTYPE(p.dtype, launch, p, stream);
}

}  // namespace aep::kernels::cuda

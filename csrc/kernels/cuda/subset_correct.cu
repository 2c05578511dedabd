// Top-1 and top-5 counts of every subset of the exits: a block a sample, a thread a subset.
//
// The sample's weighted logits are held in shared memory, a tile of classes at a time; every thread adds up its
// subset's exits in ascending order for each class, and counts the classes that stand before the target. Counts are
// integers: their atomics commute.
#include "common.cuh"

namespace aep::kernels::cuda {
namespace {

constexpr int kSharedBytes = 40 * 1024;  // below the 48 KiB that every device grants without asking

template <class A>
__device__ A subset_sum(const A* products, int64_t E, int64_t stride, uint32_t mask) {
  A sum = 0;  // 0 + x is x, but for the sign of a zero, which no comparison sees
  for (int64_t e = 0; e < E; ++e) {
    if (mask >> e & 1u) sum = add(sum, products[e * stride]);
  }
  return sum;
}

template <class S>
__global__ void subset_correct_kernel(SubsetCorrectParams p, int64_t tile) {
  using A = Acc<S>;
  AEP_DYNAMIC_SHARED(A, products);  // (E, tile)
  AEP_SHARED(A, target_products, kMaxSubsetExits);
  const A* weights = static_cast<const A*>(p.weights);
  const uint32_t subsets = (1u << p.E) - 1u;
  for (int64_t n = blockIdx.x; n < p.N; n += gridDim.x) {
    const int64_t y = p.target[n * p.target_stride];
    if (y < 0 || y >= p.K) continue;  // the same for the whole block: wrong at every k
    const S* x = static_cast<const S*>(p.logits) + n * p.stride_n;
    __syncthreads();
    if (threadIdx.x < p.E) {
      target_products[threadIdx.x] =
          product(weights[threadIdx.x], value_of(x[threadIdx.x * p.stride_e + y * p.stride_k]));
    }
    for (uint32_t group = 0; group < subsets; group += blockDim.x) {
      const uint32_t mask = group + threadIdx.x + 1u;
      const bool mine = mask <= subsets;
      int64_t rank = 0;
      bool nan = false;
      for (int64_t first = 0; first < p.K; first += tile) {
        const int64_t width = smaller(tile, p.K - first);
        if (group == 0 || p.K > tile) {  // one tile stays for all groups
          __syncthreads();
          for (int64_t i = threadIdx.x; i < p.E * width; i += blockDim.x) {
            const int64_t e = i / width, k = i % width;
            products[e * tile + k] = product(weights[e], value_of(x[e * p.stride_e + (first + k) * p.stride_k]));
          }
          __syncthreads();
        }
        if (!mine) continue;
        const A own = subset_sum(target_products, p.E, 1, mask);
        for (int64_t k = 0; k < width; ++k) {
          const A sum = subset_sum(products + k, p.E, tile, mask);
          nan |= sum != sum;
          rank += sum > own || (sum == own && first + k < y);
        }
      }
      if (!mine || nan) continue;
      unsigned long long* counts = reinterpret_cast<unsigned long long*>(p.counts) + (mask - 1u) * 2ull;
      if (rank < 1) atomicAdd(counts, 1ull);
      if (rank < 5) atomicAdd(counts + 1, 1ull);
    }
  }
}

template <class S>
cudaError_t launch(const SubsetCorrectParams& p, cudaStream_t stream) {
  using A = Acc<S>;
  if (p.N == 0) return cudaSuccess;
  if (p.E < 1 || p.E > kMaxSubsetExits) return cudaErrorInvalidValue;
  const int64_t most = kSharedBytes / static_cast<int64_t>(sizeof(A)) / p.E, tile = p.K < most ? p.K : most;
  const unsigned threads = threads_for((int64_t(1) << p.E) * 4);
  return enqueue(subset_correct_kernel<S>, blocks_for(p.N), threads, static_cast<size_t>(p.E * tile) * sizeof(A), stream,
                 p, tile);
}

}  // namespace

cudaError_t launch_subset_correct(const SubsetCorrectParams& p, cudaStream_t stream) {
  AEP_CUDA_BY_DTYPE(p.dtype, launch, p, stream);
}

}  // namespace aep::kernels::cuda

// Top-1 and top-5 counts of every subset of the exits: a block takes samples one after the other, whose weighted logits
// are held in shared memory, a tile of classes at a time.
//
// Some lanes share a prefix (a subset of all exits but the last three) and take the classes in turn: the prefix's sum
// is formed once for each class, and the eight sums that the last exits make of it follow by one addition each, in
// ascending order of the exits as a plain sum has it. They count the classes that stand before the target. Counts are
// integers: the order in which blocks add theirs does not matter.
#include "common.cuh"

namespace aep::kernels::cuda {
namespace {

constexpr int kSharedBytes = 40 * 1024;  // below the 48 KiB that every device grants without asking
constexpr int kLast = 3, kLeaves = 1 << kLast;
constexpr int64_t kSubsetBlocks = 2048;  // each adds its counts of several samples
constexpr int64_t kCountedSubsets = 256;  // up to so many, a block keeps counts of its own

// The sums of the subsets {prefix} + each subset of the last `last` exits, bit i of whose index is the i-th of these.
// products: one class, exits `stride` apart.
template <class A>
__device__ void leaf_sums(const A* products, int64_t stride, int64_t E, int64_t last, uint32_t prefix,
                          A (&sums)[kLeaves]) {
  A sum = 0;  // 0 + x is x, but for the sign of a zero, which no comparison sees
  for (int64_t e = 0; e < E - last; ++e) {
    if (prefix >> e & 1u) sum = add(sum, products[e * stride]);
  }
  sums[0] = sum;
  for (int i = 0; i < kLast; ++i) {
    const A x = i < last ? products[(E - last + i) * stride] : A(0);
    for (int leaf = 0; leaf < 1 << i; ++leaf) sums[leaf + (1 << i)] = add(sums[leaf], x);
  }
}

struct SubsetPlan {
  int64_t tile;     // classes in shared memory
  int64_t last;     // exits behind the prefix, at most kLast
  int32_t lanes;    // threads that share a prefix
  bool own_counts;  // the block keeps counts in shared memory until its last sample
};

template <class S>
__global__ void __launch_bounds__(kMaxThreads) subset_correct_kernel(SubsetCorrectParams p, SubsetPlan plan) {
  using A = Acc<S>;
  AEP_DYNAMIC_SHARED(A, products);  // (E, tile)
  AEP_SHARED(A, target_products, kMaxSubsetExits);
  AEP_SHARED(int, own_counts, kCountedSubsets * 2);
  const A* weights = static_cast<const A*>(p.weights);
  const uint32_t subsets = (1u << p.E) - 1u, prefixes = 1u << (p.E - plan.last);
  const unsigned lane = threadIdx.x % static_cast<unsigned>(plan.lanes);
  const unsigned group = threadIdx.x / static_cast<unsigned>(plan.lanes), groups = blockDim.x / plan.lanes;
  if (plan.own_counts) {
    for (uint32_t i = threadIdx.x; i < subsets * 2; i += blockDim.x) own_counts[i] = 0;
  }
  for (int64_t n = blockIdx.x; n < p.N; n += gridDim.x) {
    const int64_t y = p.target[n * p.target_stride];
    if (y < 0 || y >= p.K) continue;  // the same for the whole block: wrong at every k
    const S* x = static_cast<const S*>(p.logits) + n * p.stride_n;
    __syncthreads();
    if (threadIdx.x < p.E) {
      target_products[threadIdx.x] =
          product(weights[threadIdx.x], value_of(x[threadIdx.x * p.stride_e + y * p.stride_k]));
    }
    for (uint32_t start = 0; start < prefixes; start += groups) {
      const uint32_t prefix = start + group;
      const bool mine = prefix < prefixes;
      int rank[kLeaves] = {}, wrong = 0;  // bit: a NaN was seen
      for (int64_t first = 0; first < p.K; first += plan.tile) {
        const int64_t width = smaller(plan.tile, p.K - first);
        if (start == 0 || p.K > plan.tile) {  // one tile stays for all prefixes
          __syncthreads();
          for (int64_t e = 0; e < p.E; ++e) {
            for (int64_t k = threadIdx.x; k < width; k += blockDim.x)
              products[e * plan.tile + k] = product(weights[e], value_of(x[e * p.stride_e + (first + k) * p.stride_k]));
          }
          __syncthreads();
        }
        if (!mine) continue;
        A own[kLeaves], sums[kLeaves];
        leaf_sums(target_products, 1, p.E, plan.last, prefix, own);
        for (int64_t k = lane; k < width; k += plan.lanes) {
          leaf_sums(products + k, plan.tile, p.E, plan.last, prefix, sums);
          const bool ahead = first + k < y;
          for (int leaf = 0; leaf < kLeaves; ++leaf) {
            wrong |= static_cast<int>(sums[leaf] != sums[leaf]) << leaf;
            rank[leaf] += sums[leaf] > own[leaf] || (ahead && sums[leaf] == own[leaf]);
          }
        }
      }
      // Every lane of the warp takes part, those without a prefix too.
      for (int step = 1; step < plan.lanes; step *= 2) {
        wrong |= __shfl_xor_sync(kAllLanes, wrong, step);
        for (int leaf = 0; leaf < kLeaves; ++leaf) rank[leaf] += __shfl_xor_sync(kAllLanes, rank[leaf], step);
      }
      if (!mine || lane != 0) continue;
      for (uint32_t leaf = 0; leaf < 1u << plan.last; ++leaf) {
        const uint32_t mask = prefix | leaf << (p.E - plan.last);
        if (mask == 0 || wrong >> leaf & 1) continue;
        const uint32_t at = (mask - 1u) * 2u;
        for (uint32_t top = 0; top < 2; ++top) {
          if (rank[leaf] >= (top == 0 ? 1 : 5)) continue;
          if (plan.own_counts) {
            own_counts[at + top] += 1;  // no other thread has this subset
          } else {
            atomicAdd(reinterpret_cast<unsigned long long*>(p.counts) + at + top, 1ull);
          }
        }
      }
    }
  }
  if (!plan.own_counts) return;  // the same for the whole grid
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < subsets * 2; i += blockDim.x) {
    if (own_counts[i] != 0)
      atomicAdd(reinterpret_cast<unsigned long long*>(p.counts) + i, static_cast<unsigned long long>(own_counts[i]));
  }
}

template <class S>
cudaError_t launch(const SubsetCorrectParams& p, cudaStream_t stream) {
  using A = Acc<S>;
  if (p.N == 0) return cudaSuccess;
  if (p.E < 1 || p.E > kMaxSubsetExits) return cudaErrorInvalidValue;
  SubsetPlan plan{};
  const int64_t most = kSharedBytes / static_cast<int64_t>(sizeof(A)) / p.E;
  plan.tile = p.K < most ? p.K : most;
  plan.last = p.E < kLast ? p.E : kLast;
  plan.lanes = 1;
  while (plan.lanes < static_cast<int32_t>(kWarpSize) && plan.lanes < p.K) plan.lanes *= 2;
  // Where a row is longer than a tile, prefixes that wait for a second turn would have it read again: all take the
  // first one, with fewer lanes each, up to kMaxThreads prefixes (11 exits).
  const int64_t prefixes = int64_t(1) << (p.E - plan.last);
  if (p.K > plan.tile) {
    while (plan.lanes > 1 && plan.lanes * prefixes > kMaxThreads) plan.lanes /= 2;
  }
  plan.own_counts = (int64_t(1) << p.E) <= kCountedSubsets;
  // Blocks of one to eight warps: as many threads as there are prefixes and lanes.
  int64_t threads = kWarpSize;
  while (threads < kMaxThreads && threads < prefixes * plan.lanes) threads *= 2;
  return enqueue(subset_correct_kernel<S>, static_cast<unsigned>(p.N < kSubsetBlocks ? p.N : kSubsetBlocks),
                 static_cast<unsigned>(threads), static_cast<size_t>(p.E * plan.tile) * sizeof(A), stream, p, plan);
}

}  // namespace

cudaError_t launch_subset_correct(const SubsetCorrectParams& p, cudaStream_t stream) {
  AEP_CUDA_BY_DTYPE(p.dtype, launch, p, stream);
}

}  // namespace aep::kernels::cuda

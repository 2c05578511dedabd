// Weighted sums over the exits, with or without statistics, and their gradients.
#include "row_stats.cuh"

namespace aep::kernels::cuda {
namespace {

// V classes of a row that begin at x in exit 0: the products added up in ascending order of the exits, rounded once.
template <int V, bool kAligned, class S>
__device__ Pack<V, S> weighted_sums(const EnsembleParams& p, const S* x) {
  const Acc<S>* weights = static_cast<const Acc<S>*>(p.weights);
  Acc<S> sum[V];
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = Acc<S>(-0.0);  // -0 + x is x, to the bit
#pragma unroll 1
  for (int64_t left = p.E; left > 0; left -= kBatch) {
    Pack<V, S> packs[kBatch];
    Acc<S> weight[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (j >= left) continue;
      packs[j] = load_whole<V, kAligned>(x);
      weight[j] = *weights;
      x += p.stride_e;
      ++weights;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (j >= left) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] = add(sum[i], product(weight[j], value_of(packs[j].value[i])));
    }
  }
  Pack<V, S> result;
#pragma unroll
  for (int i = 0; i < V; ++i) put(&result.value[i], sum[i]);
  return result;
}

template <int V, class S>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtOnce<S>) ensemble_kernel(EnsembleParams p) {
  const int64_t packs = (p.K + V - 1) / V, count = p.N * packs, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t n = p.N == 1 ? 0 : i / packs, k = (i - n * packs) * V;
    const S* x = static_cast<const S*>(p.logits) + n * p.stride_n + k * p.stride_k;
    S* out = static_cast<S*>(p.output) + n * p.out_stride_n + k;
    if (k + V <= p.K) {
      store_whole<V, true>(out, weighted_sums<V, true>(p, x));
    } else {
#pragma unroll 1
      for (int64_t j = 0; j < p.K - k; ++j) out[j] = weighted_sums<1, false>(p, x + j * p.stride_k).value[0];
    }
  }
}

// A sum is of one class alone: where rows follow each other without gaps, they are one row.
inline EnsembleParams joined_rows(EnsembleParams p) {
  if (p.K == 1) p.stride_k = 1;
  if (p.N > 1 && p.stride_k == 1 && p.stride_n == p.K && p.out_stride_n == p.K) p.K *= p.N, p.N = 1;
  return p;
}

template <class S>
cudaError_t launch_sum(const EnsembleParams& given, cudaStream_t stream) {
  constexpr int64_t V = kWide<S>;
  if (given.N == 0) return cudaSuccess;
  const EnsembleParams p = joined_rows(given);
  const bool wide = p.stride_k == 1 && p.K >= V && (p.E == 1 || p.stride_e % V == 0) &&
                    (p.N == 1 || (p.stride_n % V == 0 && p.out_stride_n % V == 0)) && aligned_to_16(p.logits) &&
                    aligned_to_16(p.output);
  if (wide) {
    const int64_t packs = p.N * ((p.K + V - 1) / V);
    return enqueue(ensemble_kernel<kWide<S>, S>, blocks_for_elements(packs), kMaxThreads, 0, stream, p);
  }
  return enqueue(ensemble_kernel<1, S>, blocks_for_elements(p.N * p.K), kMaxThreads, 0, stream, p);
}

// Writes and judges V classes of row n from k on: what is judged is what is returned.
template <int V, bool kAligned, class S>
__device__ void take(const EnsembleParams& p, int64_t n, int64_t k, const Divisor<Acc<S>>& divisor,
                     RowState<Acc<S>>& row) {
  const S* x = static_cast<const S*>(p.logits) + n * p.stride_n + k * p.stride_k;
  const Pack<V, S> stored = weighted_sums<V, kAligned>(p, x);
  store_whole<V, kAligned>(static_cast<S*>(p.output) + n * p.out_stride_n + k, stored);
  Acc<S> values[V];
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = value_of(stored.value[i]);
  add_pack(row, values, k, divisor);
}

// In two bytes a thread judges eight values at a time, and needs more registers.
template <class S>
constexpr int kStatsAtOnce = sizeof(S) == 2 ? 3 : kBlocksAtOnce<S>;

// A team (a warp, or a block) a row: each logit is read once, the sum is written and judged on the way.
template <bool kBlock, int V, bool kAligned, class S>
__global__ void __launch_bounds__(kMaxThreads, kStatsAtOnce<S>) ensemble_stats_kernel(EnsembleStatsParams q) {
  using A = Acc<S>;
  AEP_SHARED(RowState<A>, shared, kRowsOfBlock);
  const EnsembleParams& p = q.ensemble;
  const Divisor<A> divisor(read<A>(q.normalizer) * read<A>(q.temperature));
  const int64_t teams = kBlock ? 1 : blockDim.x / kWarpSize, team = kBlock ? 0 : threadIdx.x / kWarpSize;
  const unsigned size = kBlock ? blockDim.x : kWarpSize, rank = kBlock ? threadIdx.x : threadIdx.x % kWarpSize;
  for (int64_t n = blockIdx.x * teams + team; n < p.N; n += gridDim.x * teams) {
    RowState<A> row = empty_row<A>();
    const RowParts<V> parts(p.N == 1 ? 0 : n * p.stride_n, p.K);
    if constexpr (V > 1) {
#pragma unroll 1
      for (int64_t i = rank; i < parts.edges; i += size) take<1, false, S>(p, n, parts.edge(i), divisor, row);
    }
#pragma unroll 1
    for (int64_t i = rank; i < parts.packs; i += size) take<V, kAligned, S>(p, n, parts.pack(i), divisor, row);
    row = merge_team<kBlock>(row, shared);
    if (rank == 0) {
      const RowResult result = finish_row(row);
      q.stats[n * 3 + 0] = result.confidence;
      q.stats[n * 3 + 1] = result.entropy;
      q.stats[n * 3 + 2] = result.margin;
      q.argmax[n] = result.argmax;
    }
  }
}

template <int V, bool kAligned, class S>
cudaError_t launch_stats_by(const EnsembleStatsParams& q, cudaStream_t stream) {
  const int64_t N = q.ensemble.N, packs = (q.ensemble.K + V - 1) / V;
  if (row_needs_block(N, packs)) {
    return enqueue(ensemble_stats_kernel<true, V, kAligned, S>, blocks_for(N), threads_for(packs * 4), 0, stream, q);
  }
  const int64_t blocks = (N + kRowsOfBlock - 1) / kRowsOfBlock;
  return enqueue(ensemble_stats_kernel<false, V, kAligned, S>, blocks_for(blocks), kMaxThreads, 0, stream, q);
}

// Shape and strides decide which values make a pack, and so the order of additions; where the tensors begin only
// decides whether packs are read with one load.
template <class S>
cudaError_t launch_stats(const EnsembleStatsParams& q, cudaStream_t stream) {
  constexpr int V = kWide<S>;
  const EnsembleParams& p = q.ensemble;
  if (p.N == 0) return cudaSuccess;
  const bool packs = (p.K == 1 || p.stride_k == 1) && p.K >= V && (p.E == 1 || p.stride_e % V == 0) &&
                     (p.N == 1 || (p.out_stride_n - p.stride_n) % V == 0);
  if (!packs) return launch_stats_by<1, false, S>(q, stream);
  return aligned_to_16(p.logits) && aligned_to_16(p.output) ? launch_stats_by<V, true, S>(q, stream)
                                                            : launch_stats_by<V, false, S>(q, stream);
}

// V gradients of logits from each gradient: products with the exits' weights.
template <int V, class S>
__global__ void __launch_bounds__(kMaxThreads) backward_logits_kernel(EnsembleBackwardParams p) {
  using A = Acc<S>;
  const A* weights = static_cast<const A*>(p.weights);
  const int64_t packs = p.K / V, count = p.N * packs, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t n = p.N == 1 ? 0 : i / packs, k = (i - n * packs) * V;
    const S* given = static_cast<const S*>(p.grad) + n * p.grad_stride_n + k * p.grad_stride_k;
    A grad[V];
    if (V > 1 && p.grad_stride_k == 0) {
      const A one = value_of(*given);
      for (int j = 0; j < V; ++j) grad[j] = one;
    } else {
      const Pack<V, S> pack = load_whole<V, true>(given);
      for (int j = 0; j < V; ++j) grad[j] = value_of(pack.value[j]);
    }
    S* out = static_cast<S*>(p.grad_logits) + n * p.out_stride_n + k;
    for (int64_t e = 0; e < p.E; ++e) {
      const A weight = weights[e];
      Pack<V, S> pack;
      for (int j = 0; j < V; ++j) put(&pack.value[j], product(weight, grad[j]));
      store_whole<V, true>(out + e * p.out_stride_e, pack);
    }
  }
}

// Whether the gradient's rows follow each other without gaps, or are one value.
inline bool one_row(const EnsembleBackwardParams& p) {
  if (p.N == 1 || p.K == 1) return p.N == 1 || p.grad_stride_n <= 1;
  return p.grad_stride_k <= 1 && p.grad_stride_n == p.K * p.grad_stride_k;
}

template <class S>
cudaError_t launch_backward_logits(EnsembleBackwardParams p, cudaStream_t stream) {
  constexpr int V = kWide<S>;
  if (p.N == 0) return cudaSuccess;
  if (one_row(p) && (p.N == 1 || p.out_stride_n == p.K)) {
    if (p.K == 1) p.grad_stride_k = p.grad_stride_n;
    p.K *= p.N, p.N = 1;
  }
  const bool wide = p.N == 1 && p.K % V == 0 && p.grad_stride_k <= 1 && (p.E == 1 || p.out_stride_e % V == 0) &&
                    (p.grad_stride_k == 0 || aligned_to_16(p.grad)) && aligned_to_16(p.grad_logits);
  if (wide)
    return enqueue(backward_logits_kernel<V, S>, blocks_for_elements(p.K / V), kMaxThreads, 0, stream, p);
  return enqueue(backward_logits_kernel<1, S>, blocks_for_elements(p.N * p.K), kMaxThreads, 0, stream, p);
}

// A block a part of the N * K classes: the dot products of gradient and logits, for kBatch exits at a time. kWide: both
// tensors are without gaps, and packs are read with one load; else the same values, one by one.
template <bool kWide, class S>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtOnce<S>)
    backward_weights_kernel(EnsembleBackwardParams p, int64_t parts) {
  using A = Acc<S>;
  constexpr int V = aep::kernels::cuda::kWide<S>;
  AEP_SHARED(A, shared, kRowsOfBlock * kBatch);
  const int64_t values = p.N * p.K, packs = (values + V - 1) / V, each = (packs + parts - 1) / parts;
  for (int64_t part = blockIdx.x; part < parts; part += gridDim.x) {
    const int64_t begin = part * each, end = smaller(packs, begin + each);
    for (int64_t first = 0; first < p.E; first += kBatch) {
      A sum[kBatch] = {};
      for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        Pack<V, S> grad{}, x[kBatch] = {};
        const S* logits = static_cast<const S*>(p.logits) + first * p.stride_e;
        if constexpr (kWide) {
          grad = load_whole<V, true>(static_cast<const S*>(p.grad) + i * V);
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            if (first + j < p.E) x[j] = load_whole<V, true>(logits + j * p.stride_e + i * V);
          }
        } else {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            if (i * V + v >= values) continue;
            const int64_t n = (i * V + v) / p.K, k = (i * V + v) % p.K;
            grad.value[v] = static_cast<const S*>(p.grad)[n * p.grad_stride_n + k * p.grad_stride_k];
            for (int j = 0; j < kBatch; ++j) {
              if (first + j < p.E) x[j].value[v] = logits[j * p.stride_e + n * p.stride_n + k * p.stride_k];
            }
          }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A g = value_of(grad.value[v]);
#pragma unroll
          for (int j = 0; j < kBatch; ++j) sum[j] += g * value_of(x[j].value[v]);
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        for (int step = 1; step < static_cast<int>(kWarpSize); step *= 2)
          sum[j] += __shfl_xor_sync(kAllLanes, sum[j], step);
        if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize * kBatch + j] = sum[j];
      }
      __syncthreads();
      if (threadIdx.x < kBatch && first + threadIdx.x < p.E) {
        A total = 0;
        for (int64_t warp = 0; warp < kRowsOfBlock; ++warp) total += shared[warp * kBatch + threadIdx.x];
        static_cast<A*>(p.partials)[part * p.E + first + threadIdx.x] = total;
      }
      __syncthreads();
    }
  }
}

// A block an exit: the sum of its partial sums.
template <class A>
__global__ void __launch_bounds__(kMaxThreads) finish_weights_kernel(const A* partials, A* grad_weights, int64_t parts,
                                                                      int64_t E) {
  AEP_SHARED(double, shared, kMaxThreads);
  for (int64_t e = blockIdx.x; e < E; e += gridDim.x) {
    double sum = 0;
    for (int64_t part = threadIdx.x; part < parts; part += blockDim.x)
      sum += static_cast<double>(partials[part * E + e]);
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) grad_weights[e] = static_cast<A>(sum);
  }
}

template <class S>
cudaError_t launch_backward_weights(const EnsembleBackwardParams& p, cudaStream_t stream) {
  using A = Acc<S>;
  constexpr int64_t V = kWide<S>;
  const int64_t parts = ensemble_backward_parts(p.N, p.K);
  if (parts > 0) {
    const bool rows_joined = (p.K == 1 || (p.stride_k == 1 && p.grad_stride_k == 1)) &&
                             (p.N == 1 || (p.stride_n == p.K && p.grad_stride_n == p.K));
    const bool wide = rows_joined && p.N * p.K % V == 0 && (p.E == 1 || p.stride_e % V == 0) &&
                      aligned_to_16(p.grad) && aligned_to_16(p.logits);
    const auto kernel = wide ? backward_weights_kernel<true, S> : backward_weights_kernel<false, S>;
    const cudaError_t error = enqueue(kernel, blocks_for(parts), kMaxThreads, 0, stream, p, parts);
    if (error != cudaSuccess) return error;
  }
  return enqueue(finish_weights_kernel<A>, blocks_for(p.E), kMaxThreads, 0, stream,
                 static_cast<const A*>(p.partials), static_cast<A*>(p.grad_weights), parts, p.E);
}

template <class S>
cudaError_t launch_backward(const EnsembleBackwardParams& p, cudaStream_t stream) {
  const cudaError_t error = p.grad_logits ? launch_backward_logits<S>(p, stream) : cudaSuccess;
  if (error != cudaSuccess || !p.grad_weights) return error;
  return launch_backward_weights<S>(p, stream);
}

}  // namespace

cudaError_t launch_ensemble(const EnsembleParams& p, cudaStream_t stream) {
  AEP_CUDA_BY_DTYPE(p.dtype, launch_sum, p, stream);
}
cudaError_t launch_ensemble_stats(const EnsembleStatsParams& p, cudaStream_t stream) {
  AEP_CUDA_BY_DTYPE(p.ensemble.dtype, launch_stats, p, stream);
}
cudaError_t launch_ensemble_backward(const EnsembleBackwardParams& p, cudaStream_t stream) {
  AEP_CUDA_BY_DTYPE(p.dtype, launch_backward, p, stream);
}

}  // namespace aep::kernels::cuda

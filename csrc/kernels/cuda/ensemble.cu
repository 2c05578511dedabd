// Weighted sums over the exits, with or without statistics, and their gradients.
#include "row_stats.cuh"

namespace aep::kernels::cuda {
namespace {

// V classes of a row, from class k on: the products added up in ascending order of the exits, rounded once.
template <int V, class S>
__device__ Pack<V, S> weighted_sums(const EnsembleParams& p, int64_t n, int64_t k, int count, bool aligned) {
  const S* x = static_cast<const S*>(p.logits) + n * p.stride_n + k * p.stride_k;
  const Acc<S>* weights = static_cast<const Acc<S>*>(p.weights);
  Acc<S> sum[V];
#pragma unroll 4
  for (int64_t e = 0; e < p.E; ++e) {
    const Pack<V, S> pack = load_pack<V>(x + e * p.stride_e, p.stride_k, count, aligned);
    const Acc<S> weight = weights[e];
    for (int i = 0; i < V; ++i) {
      const Acc<S> term = product(weight, value_of(pack.value[i]));
      sum[i] = e == 0 ? term : add(sum[i], term);
    }
  }
  Pack<V, S> result;
  for (int i = 0; i < V; ++i) put(&result.value[i], sum[i]);
  return result;
}

// Whether rows can be read in packs (a matter of strides), and whether these begin at multiples of 16 bytes.
template <class S>
bool in_packs(const EnsembleParams& p) {
  constexpr int64_t V = kWide<S>;
  return (p.K == 1 || p.stride_k == 1) && p.K >= V && (p.E == 1 || p.stride_e % V == 0) &&
         (p.N == 1 || (p.stride_n % V == 0 && (!p.output || p.out_stride_n % V == 0)));
}
inline bool packs_aligned(const EnsembleParams& p) { return aligned_to_16(p.logits) && aligned_to_16(p.output); }

template <int V, class S>
__global__ void ensemble_kernel(EnsembleParams p, bool aligned) {
  S* out = static_cast<S*>(p.output);
  const int64_t packs = (p.K + V - 1) / V, count = p.N * packs, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t n = i / packs, k = i % packs * V;
    const int values = pack_count<V>(k, p.K);
    store_pack<V>(out + n * p.out_stride_n + k, 1, weighted_sums<V, S>(p, n, k, values, aligned), values, aligned);
  }
}

template <class S>
cudaError_t launch_sum(const EnsembleParams& p, cudaStream_t stream) {
  constexpr int V = kWide<S>;
  if (p.N == 0) return cudaSuccess;
  if (in_packs<S>(p)) {
    const int64_t packs = p.N * ((p.K + V - 1) / V);
    return enqueue(ensemble_kernel<V, S>, blocks_for_elements(packs), kMaxThreads, 0, stream, p, packs_aligned(p));
  }
  return enqueue(ensemble_kernel<1, S>, blocks_for_elements(p.N * p.K), kMaxThreads, 0, stream, p, false);
}

// A team (a warp, or a block) a row: each logit is read once, the sum is written and judged on the way.
template <bool kBlock, int V, class S>
__global__ void ensemble_stats_kernel(EnsembleStatsParams q, bool aligned) {
  using A = Acc<S>;
  AEP_SHARED(RowState<A>, shared, kRowsOfBlock);
  const EnsembleParams& p = q.ensemble;
  const A divisor = read<A>(q.normalizer) * read<A>(q.temperature);
  const int64_t teams = kBlock ? 1 : blockDim.x / kWarpSize, team = kBlock ? 0 : threadIdx.x / kWarpSize;
  const unsigned size = kBlock ? blockDim.x : kWarpSize, rank = kBlock ? threadIdx.x : threadIdx.x % kWarpSize;
  for (int64_t n = blockIdx.x * teams + team; n < p.N; n += gridDim.x * teams) {
    RowState<A> row = empty_row<A>();
    for (int64_t k = int64_t(rank) * V; k < p.K; k += int64_t(size) * V) {
      const int count = pack_count<V>(k, p.K);
      const Pack<V, S> stored = weighted_sums<V, S>(p, n, k, count, aligned);
      if (p.output) store_pack<V>(static_cast<S*>(p.output) + n * p.out_stride_n + k, 1, stored, count, aligned);
      A values[V];  // what is judged is what is returned
      for (int i = 0; i < V; ++i) values[i] = value_of(stored.value[i]);
      add_values(row, values, k, count, divisor);
    }
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

template <int V, class S>
cudaError_t launch_stats_by(const EnsembleStatsParams& q, cudaStream_t stream) {
  const EnsembleParams& p = q.ensemble;
  const bool aligned = V > 1 && packs_aligned(p);
  const int64_t packs = (p.K + V - 1) / V;
  if (row_needs_block(p.N, packs)) {
    return enqueue(ensemble_stats_kernel<true, V, S>, blocks_for(p.N), threads_for(packs * 4), 0, stream, q, aligned);
  }
  const int64_t blocks = (p.N + kRowsOfBlock - 1) / kRowsOfBlock;
  return enqueue(ensemble_stats_kernel<false, V, S>, blocks_for(blocks), kMaxThreads, 0, stream, q, aligned);
}

template <class S>
cudaError_t launch_stats(const EnsembleStatsParams& q, cudaStream_t stream) {
  if (q.ensemble.N == 0) return cudaSuccess;
  return in_packs<S>(q.ensemble) ? launch_stats_by<kWide<S>, S>(q, stream) : launch_stats_by<1, S>(q, stream);
}

template <class S>
__global__ void backward_logits_kernel(EnsembleBackwardParams p) {
  using A = Acc<S>;
  const A* weights = static_cast<const A*>(p.weights);
  const int64_t count = p.N * p.K, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t n = i / p.K, k = i % p.K;
    const A grad = value_of(static_cast<const S*>(p.grad)[n * p.grad_stride_n + k * p.grad_stride_k]);
    S* out = static_cast<S*>(p.grad_logits) + n * p.out_stride_n + k;
    for (int64_t e = 0; e < p.E; ++e) put(out + e * p.out_stride_e, product(weights[e], grad));
  }
}

// A block a (chunk of rows, exit): the dot product of gradient and logits.
template <class S>
__global__ void backward_weights_kernel(EnsembleBackwardParams p, int64_t chunks) {
  using A = Acc<S>;
  AEP_SHARED(A, shared, kMaxThreads);
  for (int64_t task = blockIdx.x; task < chunks * p.E; task += gridDim.x) {
    const int64_t chunk = task / p.E, e = task % p.E;
    const int64_t begin = chunk * kEnsembleChunkRows, end = smaller(p.N, begin + kEnsembleChunkRows);
    A sum = 0;
    for (int64_t n = begin; n < end; ++n) {
      const S* grad = static_cast<const S*>(p.grad) + n * p.grad_stride_n;
      const S* x = static_cast<const S*>(p.logits) + e * p.stride_e + n * p.stride_n;
      for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x)
        sum += value_of(grad[k * p.grad_stride_k]) * value_of(x[k * p.stride_k]);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) static_cast<A*>(p.partials)[task] = sum;
  }
}

// A block an exit: the sum of its partial sums.
template <class A>
__global__ void finish_weights_kernel(const A* partials, A* grad_weights, int64_t chunks, int64_t E) {
  AEP_SHARED(double, shared, kMaxThreads);
  for (int64_t e = blockIdx.x; e < E; e += gridDim.x) {
    double sum = 0;
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x)
      sum += static_cast<double>(partials[chunk * E + e]);
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) grad_weights[e] = static_cast<A>(sum);
  }
}

template <class S>
cudaError_t launch_backward(const EnsembleBackwardParams& p, cudaStream_t stream) {
  using A = Acc<S>;
  cudaError_t error = cudaSuccess;
  if (p.grad_logits && p.N > 0)
    error = enqueue(backward_logits_kernel<S>, blocks_for_elements(p.N * p.K), kMaxThreads, 0, stream, p);
  if (error != cudaSuccess || !p.grad_weights) return error;
  const int64_t chunks = ensemble_backward_chunks(p.N);
  if (chunks > 0)
    error = enqueue(backward_weights_kernel<S>, blocks_for(chunks * p.E), kMaxThreads, 0, stream, p, chunks);
  if (error != cudaSuccess) return error;
  return enqueue(finish_weights_kernel<A>, blocks_for(p.E), kMaxThreads, 0, stream,
                 static_cast<const A*>(p.partials), static_cast<A*>(p.grad_weights), chunks, p.E);
}

}  // namespace

int64_t ensemble_backward_chunks(int64_t N) { return (N + kEnsembleChunkRows - 1) / kEnsembleChunkRows; }

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

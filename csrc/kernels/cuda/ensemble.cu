// Weighted sums over the exits, with or without statistics, and their gradients.
#include "row_stats.cuh"

namespace aep::kernels::cuda {
namespace {

template <class S>
__device__ Acc<S> weighted_sum(const EnsembleParams& p, int64_t n, int64_t k) {
  const S* x = static_cast<const S*>(p.logits) + n * p.stride_n + k * p.stride_k;
  const Acc<S>* weights = static_cast<const Acc<S>*>(p.weights);
  Acc<S> sum = product(weights[0], value_of(x[0]));
  for (int64_t e = 1; e < p.E; ++e) sum = add(sum, product(weights[e], value_of(x[e * p.stride_e])));
  return sum;
}

template <class S>
__global__ void ensemble_kernel(EnsembleParams p) {
  S* out = static_cast<S*>(p.output);
  const int64_t count = p.N * p.K, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t n = i / p.K, k = i % p.K;
    put(out + n * p.out_stride_n + k, weighted_sum<S>(p, n, k));
  }
}

template <class S>
cudaError_t launch_sum(const EnsembleParams& p, cudaStream_t stream) {
  if (p.N == 0) return cudaSuccess;
  return enqueue(ensemble_kernel<S>, blocks_for_elements(p.N * p.K), kMaxThreads, 0, stream, p);
}

// A block a row: each logit is read once, the sum is written and judged on the way.
template <class S>
__global__ void ensemble_stats_kernel(EnsembleStatsParams q) {
  using A = Acc<S>;
  AEP_SHARED(RowState<A>, shared, kMaxThreads);
  const EnsembleParams& p = q.ensemble;
  const A divisor = read<A>(q.normalizer) * read<A>(q.temperature);
  for (int64_t n = blockIdx.x; n < p.N; n += gridDim.x) {
    RowState<A> row = empty_row<A>();
    for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x) {
      S stored;
      put(&stored, weighted_sum<S>(p, n, k));
      if (p.output) static_cast<S*>(p.output)[n * p.out_stride_n + k] = stored;
      add_value(row, value_of(stored), k, divisor);  // what is judged is what is returned
    }
    row = block_reduce(row, shared, merge_rows<A>);
    if (threadIdx.x == 0) {
      const RowResult result = finish_row(row);
      q.stats[n * 3 + 0] = result.confidence;
      q.stats[n * 3 + 1] = result.entropy;
      q.stats[n * 3 + 2] = result.margin;
      q.argmax[n] = result.argmax;
    }
  }
}

template <class S>
cudaError_t launch_stats(const EnsembleStatsParams& q, cudaStream_t stream) {
  if (q.ensemble.N == 0) return cudaSuccess;
  return enqueue(ensemble_stats_kernel<S>, blocks_for(q.ensemble.N), threads_for(q.ensemble.K), 0, stream, q);
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

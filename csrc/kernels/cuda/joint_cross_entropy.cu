// Cross entropy of every (exit, sample) row by an online log-sum-exp, its final sums, and its gradient by
// recomputation.
#include "common.cuh"

namespace aep::kernels::cuda {
namespace {

template <class A>
struct LogSum {
  A top, sum;  // sum of e^(x - top)
  bool nan;
};

template <class A>
__device__ LogSum<A> merge_sums(LogSum<A> a, LogSum<A> b) {
  const A top = larger(a.top, b.top);
  if (a.sum != A(0) && a.top != top) a.sum *= exponential(a.top - top);
  if (b.sum != A(0) && b.top != top) b.sum *= exponential(b.top - top);
  return {top, a.sum + b.sum, a.nan || b.nan};
}

template <class S>
__global__ void forward_kernel(JointCrossEntropyParams p) {
  using A = Acc<S>;
  __shared__ LogSum<A> shared[kMaxThreads];
  __shared__ A shared_sum[kMaxThreads];
  const A* class_weight = static_cast<const A*>(p.class_weight);
  const A smoothing = static_cast<A>(p.label_smoothing);
  for (int64_t i = blockIdx.x; i < p.E * p.N; i += gridDim.x) {
    const int64_t e = i / p.N, n = i % p.N;
    const S* x = static_cast<const S*>(p.logits) + e * p.stride_e + n * p.stride_n;
    LogSum<A> row = {-infinity<A>(), A(0), false};
    for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x) {
      const A v = value_of(x[k * p.stride_k]);
      row.nan |= v != v;
      if (v > row.top) {
        if (row.sum != A(0)) row.sum *= exponential(row.top - v);
        row.top = v;
      }
      if (v > -infinity<A>() && finite(row.top)) row.sum += exponential(v - row.top);
    }
    row = block_reduce(row, shared, merge_sums<A>);
    // As the softmax: NaN for a row with NaN or +inf, or of nothing but -inf.
    const bool proper = !row.nan && finite(row.top);
    const A log_sum = proper ? logarithm(row.sum) : not_a_number<A>();
    const int64_t y = p.target[n * p.target_stride];
    const bool ignored = y == p.ignore_index, valid = y >= 0 && y < p.K;
    A weight_sum = 0, rest = 0;
    if (p.label_smoothing > 0 && valid && !ignored) {  // the same for the whole block
      for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x) {
        const A w = class_weight ? class_weight[k] : A(1);
        weight_sum += w;
        rest += w * (value_of(x[k * p.stride_k]) - row.top);
      }
      weight_sum = block_sum(weight_sum, shared_sum);
      rest = block_sum(rest, shared_sum);
    }
    if (threadIdx.x == 0) {
      A loss = 0;
      if (!ignored && !valid) {
        loss = not_a_number<A>();
      } else if (!ignored) {
        loss = (class_weight ? class_weight[y] : A(1)) * ((row.top - value_of(x[y * p.stride_k])) + log_sum);
        if (p.label_smoothing > 0)
          loss = (A(1) - smoothing) * loss + smoothing / static_cast<A>(p.K) * (weight_sum * log_sum - rest);
      }
      static_cast<A*>(p.row_losses)[i] = loss;
      static_cast<A*>(p.log_sum_exp)[i] = row.top + log_sum;
    }
  }
}

template <class S>
cudaError_t launch_forward(const JointCrossEntropyParams& p, cudaStream_t stream) {
  if (p.E * p.N == 0) return cudaSuccess;
  forward_kernel<S><<<blocks_for(p.E * p.N), threads_for(p.K), 0, stream>>>(p);
  return cudaGetLastError();
}

template <class S>
__global__ void backward_kernel(JointCrossEntropyBackwardParams p) {
  using A = Acc<S>;
  __shared__ A shared_sum[kMaxThreads];
  const A* class_weight = static_cast<const A*>(p.class_weight);
  const A smoothing = static_cast<A>(p.label_smoothing), share = smoothing / static_cast<A>(p.K);
  A total = static_cast<A>(p.K);
  if (p.label_smoothing > 0 && class_weight) {
    total = 0;
    for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x) total += class_weight[k];
    total = block_sum(total, shared_sum);
  }
  for (int64_t i = blockIdx.x; i < p.E * p.N; i += gridDim.x) {
    const int64_t e = i / p.N, n = i % p.N, y = p.target[n * p.target_stride];
    const S* x = static_cast<const S*>(p.logits) + e * p.stride_e + n * p.stride_n;
    S* out = static_cast<S*>(p.grad_logits) + e * p.out_stride_e + n * p.out_stride_n;
    if (y == p.ignore_index || y < 0 || y >= p.K) {
      for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x) put(out + k, A(0));
      continue;
    }
    const A c = static_cast<const A*>(p.coefficients)[e * p.coef_stride_e + n * p.coef_stride_n];
    const A lse = static_cast<const A*>(p.log_sum_exp)[i];
    const A own = (A(1) - smoothing) * (class_weight ? class_weight[y] : A(1));  // the target's part of the loss
    const A scale = p.label_smoothing > 0 ? own + share * total : own;
    for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x) {
      // Read and written by the same thread: `out` may be `x`.
      A grad = scale * exponential(value_of(x[k * p.stride_k]) - lse);
      if (p.label_smoothing > 0) grad -= share * (class_weight ? class_weight[k] : A(1));
      if (k == y) grad -= own;
      put(out + k, c * grad);
    }
  }
}

template <class S>
cudaError_t launch_backward(const JointCrossEntropyBackwardParams& p, cudaStream_t stream) {
  if (p.E * p.N == 0) return cudaSuccess;
  backward_kernel<S><<<blocks_for(p.E * p.N), threads_for(p.K), 0, stream>>>(p);
  return cudaGetLastError();
}

template <class A>
__global__ void losses_per_sample_kernel(JointCrossEntropyReduceParams p) {
  const A* rows = static_cast<const A*>(p.row_losses);
  const A* exit_weights = static_cast<const A*>(p.exit_weights);
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t n = first; n < p.N; n += int64_t(gridDim.x) * blockDim.x) {
    A sum = product(exit_weights[0], rows[n]);
    for (int64_t e = 1; e < p.E; ++e) sum = add(sum, product(exit_weights[e], rows[e * p.N + n]));
    static_cast<A*>(p.loss)[n] = sum;
  }
  if (first == 0 && p.denominator) *static_cast<A*>(p.denominator) = A(1);
}

// One block: the divisor, then exit after exit.
template <class A>
__global__ void total_loss_kernel(JointCrossEntropyReduceParams p) {
  __shared__ double shared[kMaxThreads];
  const A* rows = static_cast<const A*>(p.row_losses);
  const A* class_weight = static_cast<const A*>(p.class_weight);
  A denominator = 1;
  if (p.reduction == Reduction::mean) {
    double total = 0;
    for (int64_t n = threadIdx.x; n < p.N; n += blockDim.x) {
      const int64_t y = p.target[n * p.target_stride];
      if (y == p.ignore_index) continue;
      // A label out of range has no weight to read; its row's NaN decides the loss.
      total += class_weight && y >= 0 && y < p.K ? static_cast<double>(class_weight[y]) : 1.0;
    }
    total = block_sum(total, shared);
    denominator = total == 0 ? not_a_number<A>() : static_cast<A>(total);
  }
  A loss = 0;
  for (int64_t e = 0; e < p.E; ++e) {
    double total = 0;
    for (int64_t n = threadIdx.x; n < p.N; n += blockDim.x) total += static_cast<double>(rows[e * p.N + n]);
    total = block_sum(total, shared);
    if (threadIdx.x == 0) {
      const A exit_loss = static_cast<A>(total / static_cast<double>(denominator));
      static_cast<A*>(p.exit_losses)[e] = exit_loss;
      loss = add(loss, product(static_cast<const A*>(p.exit_weights)[e], exit_loss));
    }
  }
  if (threadIdx.x == 0) {
    *static_cast<A*>(p.loss) = loss;
    if (p.denominator) *static_cast<A*>(p.denominator) = denominator;
  }
}

template <class A>
cudaError_t launch_reduce(const JointCrossEntropyReduceParams& p, cudaStream_t stream) {
  if (p.reduction == Reduction::none) {
    const unsigned blocks = blocks_for_elements(p.N > 0 ? p.N : 1);  // N == 0 still writes the divisor
    losses_per_sample_kernel<A><<<blocks, kMaxThreads, 0, stream>>>(p);
  } else {
    total_loss_kernel<A><<<1, kMaxThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

__global__ void find_bad_label_kernel(const int64_t* target, int64_t stride, int64_t N, int64_t K, bool has_ignore,
                                      int64_t ignore, int64_t* result) {
  __shared__ int64_t shared[kMaxThreads];
  int64_t first = N;
  for (int64_t n = threadIdx.x; n < N && first == N; n += blockDim.x) {
    const int64_t y = target[n * stride];
    if ((y < 0 || y >= K) && !(has_ignore && y == ignore)) first = n;
  }
  first = block_reduce(first, shared, smaller<int64_t>);
  if (threadIdx.x == 0) *result = first < N ? first : -1;
}

}  // namespace

cudaError_t launch_joint_cross_entropy(const JointCrossEntropyParams& p, cudaStream_t stream) {
  AEP_CUDA_BY_DTYPE(p.dtype, launch_forward, p, stream);
}
cudaError_t launch_joint_cross_entropy_backward(const JointCrossEntropyBackwardParams& p, cudaStream_t stream) {
  AEP_CUDA_BY_DTYPE(p.dtype, launch_backward, p, stream);
}
cudaError_t launch_joint_cross_entropy_reduce(const JointCrossEntropyReduceParams& p, cudaStream_t stream) {
  return p.dtype == DType::f64 ? launch_reduce<double>(p, stream) : launch_reduce<float>(p, stream);
}
cudaError_t launch_find_bad_label(const int64_t* target, int64_t stride, int64_t N, int64_t K,
                                  const int64_t* ignore_index, int64_t* result, cudaStream_t stream) {
  find_bad_label_kernel<<<1, kMaxThreads, 0, stream>>>(target, stride, N, K, ignore_index != nullptr,
                                                       ignore_index ? *ignore_index : 0, result);
  return cudaGetLastError();
}

}  // namespace aep::kernels::cuda

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

// The lanes of a warp, in every lane: brought to the common maximum first, then added.
template <class A>
__device__ LogSum<A> merge_lanes(LogSum<A> row) {
  const A own = row.top;
  for (int step = 1; step < static_cast<int>(kWarpSize); step *= 2)
    row.top = larger(row.top, __shfl_xor_sync(kAllLanes, row.top, step));
  if (row.sum != A(0) && own != row.top) row.sum *= exponential(own - row.top);
  for (int step = 1; step < static_cast<int>(kWarpSize); step *= 2)
    row.sum += __shfl_xor_sync(kAllLanes, row.sum, step);
  row.nan = __any_sync(kAllLanes, row.nan);
  return row;
}
// The block's, in every thread; `shared` holds one for each warp and may be used again at once.
template <class A>
__device__ LogSum<A> merge_block(LogSum<A> row, LogSum<A>* shared) {
  row = merge_lanes(row);
  const unsigned lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
  if (warps == 1) return row;
  if (lane == 0) shared[threadIdx.x / kWarpSize] = row;
  __syncthreads();
  row = merge_lanes(lane < warps ? shared[lane] : LogSum<A>{-infinity<A>(), A(0), false});
  __syncthreads();
  return row;
}

// Whether rows can be read in packs, or written: a matter of strides and sizes. How they are read decides the order of
// additions; how they are written, nothing.
template <class S>
bool in_packs(int64_t E, int64_t N, int64_t K, int64_t stride_e, int64_t stride_n, int64_t stride_k) {
  constexpr int64_t V = kWide<S>;
  return (K == 1 || stride_k == 1) && K >= V && (E == 1 || stride_e % V == 0) && (N == 1 || stride_n % V == 0);
}

// c[e, n] of LossCoefficients.
template <class A>
__device__ A coefficient_of(const LossCoefficients& c, int64_t e, int64_t n) {
  A sum = 0;
  if (c.exit_weights) {
    sum = static_cast<const A*>(c.exit_weights)[e];
    if (c.grad_loss) sum = sum * static_cast<const A*>(c.grad_loss)[n * c.loss_stride_n];
  }
  if (c.grad_exit_losses) {
    sum = sum + static_cast<const A*>(c.grad_exit_losses)[e * c.exit_stride_e + n * c.exit_stride_n];
  }
  if (c.denominator) sum = sum / *static_cast<const A*>(c.denominator);
  return sum * static_cast<A>(c.factor);
}

// A row's gradient, from what turns its logits into probabilities: e^(x - shift) * whole. Each element is read and
// written by the same thread, so `out` may be `x`.
template <int V, class S>
__device__ void write_gradient(const S* x, int64_t stride_k, S* out, int64_t out_stride_k, int64_t K, int64_t y,
                               const Acc<S>* class_weight, Acc<S> smoothing, Acc<S> total, Acc<S> c, Acc<S> shift,
                               Acc<S> whole, bool aligned, bool out_aligned) {
  using A = Acc<S>;
  const A share = smoothing / static_cast<A>(K);
  const A own = (A(1) - smoothing) * (class_weight ? class_weight[y] : A(1));  // the target's part of the loss
  const A scale = smoothing > 0 ? own + share * total : own;
  for (int64_t k = int64_t(threadIdx.x) * V; k < K; k += int64_t(blockDim.x) * V) {
    const int count = pack_count<V>(k, K);
    Pack<V, S> pack = load_pack<V>(x + k * stride_k, stride_k, count, aligned);
    for (int i = 0; i < V; ++i) {
      A grad = scale * (exponential(value_of(pack.value[i]) - shift) * whole);
      if (smoothing > 0 && i < count) grad -= share * (class_weight ? class_weight[k + i] : A(1));
      if (k + i == y) grad -= own;
      put(&pack.value[i], c * grad);
    }
    store_pack<V>(out + k * out_stride_k, out_stride_k, pack, count, out_aligned);
  }
}

// A row of zeros.
template <int V, class S>
__device__ void write_zeros(S* out, int64_t out_stride_k, int64_t K, bool aligned) {
  const Pack<V, S> zeros{};
  for (int64_t k = int64_t(threadIdx.x) * V; k < K; k += int64_t(blockDim.x) * V)
    store_pack<V>(out + k * out_stride_k, out_stride_k, zeros, pack_count<V>(k, K), aligned);
}

// Losses, and the gradient too if kGrad: the row is read twice, and is in a cache the second time.
template <int V, class S, bool kGrad>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(JointCrossEntropyGradParams q, bool aligned,
                                                                bool out_aligned) {
  using A = Acc<S>;
  AEP_SHARED(LogSum<A>, shared, kMaxThreads / kWarpSize);
  AEP_SHARED(A, shared_sum, kMaxThreads);
  const JointCrossEntropyParams& p = q.loss;
  const A* class_weight = static_cast<const A*>(p.class_weight);
  const A smoothing = static_cast<A>(p.label_smoothing);
  for (int64_t i = blockIdx.x; i < p.E * p.N; i += gridDim.x) {
    const int64_t e = i / p.N, n = i % p.N;
    const S* x = static_cast<const S*>(p.logits) + e * p.stride_e + n * p.stride_n;
    LogSum<A> row = {-infinity<A>(), A(0), false};
    for (int64_t k = int64_t(threadIdx.x) * V; k < p.K; k += int64_t(blockDim.x) * V) {
      const int count = pack_count<V>(k, p.K);
      const Pack<V, S> pack = load_pack<V>(x + k * p.stride_k, p.stride_k, count, aligned);
      A top = row.top;
      for (int i = 0; i < V; ++i) {
        const A v = i < count ? value_of(pack.value[i]) : -infinity<A>();
        row.nan |= v != v;
        if (v > top) top = v;
      }
      if (top > row.top) {  // one rescaling for all of them
        if (row.sum != A(0)) row.sum *= exponential(row.top - top);
        row.top = top;
      }
      for (int i = 0; i < V; ++i) {
        const A v = i < count ? value_of(pack.value[i]) : -infinity<A>();
        if (v > -infinity<A>() && finite(row.top)) row.sum += exponential(v - row.top);
      }
    }
    row = merge_block(row, shared);
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
      if (p.row_max) {
        static_cast<A*>(p.row_max)[i] = row.top;
        static_cast<A*>(p.row_sum)[i] = proper ? row.sum : not_a_number<A>();
      }
    }
    if (kGrad) {
      __syncthreads();  // the first thread has read the target's logit, which may now be overwritten
      S* out = static_cast<S*>(q.grad_logits) + e * q.out_stride_e + n * q.out_stride_n;
      if (ignored || !valid) {
        write_zeros<V>(out, q.out_stride_k, p.K, out_aligned);
      } else {
        const A whole = proper ? A(1) / row.sum : not_a_number<A>();
        write_gradient<V>(x, p.stride_k, out, q.out_stride_k, p.K, y, class_weight, smoothing, weight_sum,
                          coefficient_of<A>(q.coefficients, e, n), row.top, whole, aligned, out_aligned);
      }
    }
  }
}

template <class S>
cudaError_t launch_forward(const JointCrossEntropyParams& p, cudaStream_t stream) {
  if (p.E * p.N == 0) return cudaSuccess;
  JointCrossEntropyGradParams q{};
  q.loss = p;
  constexpr int V = kWide<S>;
  if (in_packs<S>(p.E, p.N, p.K, p.stride_e, p.stride_n, p.stride_k)) {
    return enqueue(forward_kernel<V, S, false>, blocks_for(p.E * p.N), threads_for(p.K), 0, stream, q,
                   aligned_to_16(p.logits), false);
  }
  return enqueue(forward_kernel<1, S, false>, blocks_for(p.E * p.N), threads_for(p.K), 0, stream, q, false, false);
}

template <class S>
cudaError_t launch_grad(const JointCrossEntropyGradParams& q, cudaStream_t stream) {
  const JointCrossEntropyParams& p = q.loss;
  if (p.E * p.N == 0) return cudaSuccess;
  constexpr int V = kWide<S>;
  if (in_packs<S>(p.E, p.N, p.K, p.stride_e, p.stride_n, p.stride_k)) {
    const bool out_packs = in_packs<S>(p.E, p.N, p.K, q.out_stride_e, q.out_stride_n, q.out_stride_k);
    return enqueue(forward_kernel<V, S, true>, blocks_for(p.E * p.N), threads_for(p.K), 0, stream, q,
                   aligned_to_16(p.logits), out_packs && aligned_to_16(q.grad_logits));
  }
  return enqueue(forward_kernel<1, S, true>, blocks_for(p.E * p.N), threads_for(p.K), 0, stream, q, false, false);
}

template <class S>
__global__ void scale_kernel(LossGradScaleParams p) {
  using A = Acc<S>;
  // Read on the device: nobody waits, and where nothing is to be done the launch is all it costs.
  const A factor = *static_cast<const A*>(p.scale) / static_cast<A>(p.divisor);
  if (factor == A(1)) return;
  for (int64_t i = blockIdx.x; i < p.E * p.N; i += gridDim.x) {
    S* row = static_cast<S*>(p.grad) + (i / p.N) * p.stride_e + (i % p.N) * p.stride_n;
    for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x) {
      put(row + k * p.stride_k, factor * value_of(row[k * p.stride_k]));
    }
  }
}

template <class S>
cudaError_t launch_scale(const LossGradScaleParams& p, cudaStream_t stream) {
  if (p.E * p.N == 0) return cudaSuccess;
  return enqueue(scale_kernel<S>, blocks_for(p.E * p.N), threads_for(p.K), 0, stream, p);
}

template <int V, class S>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(JointCrossEntropyBackwardParams p, bool aligned,
                                                                 bool out_aligned) {
  using A = Acc<S>;
  AEP_SHARED(A, shared_sum, kMaxThreads);
  const A* class_weight = static_cast<const A*>(p.class_weight);
  const A smoothing = static_cast<A>(p.label_smoothing);
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
      write_zeros<V>(out, 1, p.K, out_aligned);
      continue;
    }
    write_gradient<V>(x, p.stride_k, out, 1, p.K, y, class_weight, smoothing, total,
                      coefficient_of<A>(p.coefficients, e, n), static_cast<const A*>(p.row_max)[i],
                      A(1) / static_cast<const A*>(p.row_sum)[i], aligned, out_aligned);
  }
}

template <class S>
cudaError_t launch_backward(const JointCrossEntropyBackwardParams& p, cudaStream_t stream) {
  if (p.E * p.N == 0) return cudaSuccess;
  constexpr int V = kWide<S>;
  if (in_packs<S>(p.E, p.N, p.K, p.stride_e, p.stride_n, p.stride_k)) {
    const bool out_packs = in_packs<S>(p.E, p.N, p.K, p.out_stride_e, p.out_stride_n, 1);
    return enqueue(backward_kernel<V, S>, blocks_for(p.E * p.N), threads_for(p.K), 0, stream, p,
                   aligned_to_16(p.logits), out_packs && aligned_to_16(p.grad_logits));
  }
  return enqueue(backward_kernel<1, S>, blocks_for(p.E * p.N), threads_for(p.K), 0, stream, p, false, false);
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

// What the mean divides by, in every thread of the one block.
template <class A>
__device__ A denominator_of(const JointCrossEntropyReduceParams& p, double* shared) {
  if (p.reduction != Reduction::mean) return A(1);
  const A* class_weight = static_cast<const A*>(p.class_weight);
  double total = 0;
  for (int64_t n = threadIdx.x; n < p.N; n += blockDim.x) {
    const int64_t y = p.target[n * p.target_stride];
    if (y == p.ignore_index) continue;
    // A label out of range has no weight to read; its row's NaN decides the loss.
    total += class_weight && y >= 0 && y < p.K ? static_cast<double>(class_weight[y]) : 1.0;
  }
  total = block_sum(total, shared);
  return total == 0 ? not_a_number<A>() : static_cast<A>(total);
}

template <class A>
__global__ void denominator_kernel(JointCrossEntropyReduceParams p) {
  AEP_SHARED(double, shared, kMaxThreads);
  const A denominator = denominator_of<A>(p, shared);
  if (threadIdx.x == 0) *static_cast<A*>(p.denominator) = denominator;
}

// One block: the divisor, then exit after exit.
template <class A>
__global__ void total_loss_kernel(JointCrossEntropyReduceParams p) {
  AEP_SHARED(double, shared, kMaxThreads);
  const A* rows = static_cast<const A*>(p.row_losses);
  const A denominator = denominator_of<A>(p, shared);
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
    return enqueue(losses_per_sample_kernel<A>, blocks, kMaxThreads, 0, stream, p);
  }
  return enqueue(total_loss_kernel<A>, 1, kMaxThreads, 0, stream, p);
}

__global__ void find_bad_label_kernel(const int64_t* target, int64_t stride, int64_t N, int64_t K, bool has_ignore,
                                      int64_t ignore, int64_t* result) {
  AEP_SHARED(int64_t, shared, kMaxThreads);
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
cudaError_t launch_joint_cross_entropy_grad(const JointCrossEntropyGradParams& p, cudaStream_t stream) {
  AEP_CUDA_BY_DTYPE(p.loss.dtype, launch_grad, p, stream);
}
cudaError_t launch_loss_grad_scale(const LossGradScaleParams& p, cudaStream_t stream) {
  AEP_CUDA_BY_DTYPE(p.dtype, launch_scale, p, stream);
}
cudaError_t launch_joint_cross_entropy_denominator(const JointCrossEntropyReduceParams& p, cudaStream_t stream) {
  return p.dtype == DType::f64 ? enqueue(denominator_kernel<double>, 1, kMaxThreads, 0, stream, p)
                               : enqueue(denominator_kernel<float>, 1, kMaxThreads, 0, stream, p);
}
cudaError_t launch_joint_cross_entropy_reduce(const JointCrossEntropyReduceParams& p, cudaStream_t stream) {
  return p.dtype == DType::f64 ? launch_reduce<double>(p, stream) : launch_reduce<float>(p, stream);
}
cudaError_t launch_find_bad_label(const int64_t* target, int64_t stride, int64_t N, int64_t K,
                                  const int64_t* ignore_index, int64_t* result, cudaStream_t stream) {
  return enqueue(find_bad_label_kernel, 1, kMaxThreads, 0, stream, target, stride, N, K, ignore_index != nullptr,
                 ignore_index ? *ignore_index : 0, result);
}

}  // namespace aep::kernels::cuda

// Cross entropy of every (exit, sample) row by an online log-sum-exp, its final sums, and its gradient by
// recomputation.
#include "common.cuh"

namespace aep::kernels::cuda {
namespace {

template <class A>
struct LogSum {
  A top, sum;  // sum of e^(x - top); NaN once a value was
  // For label smoothing, else 0: sums of w and of w (x - top). The terms of the second have one sign, so that moving it
  // to another top loses nothing to cancellation.
  A weight, weighted;
};

template <class A>
__device__ LogSum<A> empty_sum() {
  return {-infinity<A>(), A(0), A(0), A(0)};
}

// What is subtracted from values: 0 stands for -inf, from which nothing can be.
template <class A>
__device__ A shift_of(const LogSum<A>& row) {
  return row.top > -infinity<A>() ? row.top : A(0);
}

// The sums moved to `top` >= row.top.
template <class A>
__device__ void rebase(LogSum<A>& row, A top) {
  if (row.sum != A(0)) row.sum *= exponential(row.top - top);
  if (row.weight != A(0) && row.top > -infinity<A>()) row.weighted += row.weight * (row.top - top);
  row.top = top;
}

// The lanes of a warp, in every lane: brought to the common maximum first, then added.
template <class A>
__device__ LogSum<A> merge_lanes(LogSum<A> row, bool smoothing) {
  A top = row.top;
  for (int step = 1; step < static_cast<int>(kWarpSize); step *= 2)
    top = larger(top, __shfl_xor_sync(kAllLanes, top, step));
  if (top > row.top) rebase(row, top);
  for (int step = 1; step < static_cast<int>(kWarpSize); step *= 2) {
    row.sum += __shfl_xor_sync(kAllLanes, row.sum, step);
    if (!smoothing) continue;  // the same for the whole grid
    row.weight += __shfl_xor_sync(kAllLanes, row.weight, step);
    row.weighted += __shfl_xor_sync(kAllLanes, row.weighted, step);
  }
  return row;
}

// Blocks that a multiprocessor must be able to hold: a limit of registers that the kernels can do with, those that write
// a gradient with more, while enough loads are under way.
template <class S, bool kGradient>
constexpr int kResident = sizeof(S) == 8 ? 2 : kGradient ? 4 : 5;

// Threads that take a row together: a block, or a warp.
template <bool kBlock>
struct Team {
  static __device__ unsigned rank() { return kBlock ? threadIdx.x : threadIdx.x % kWarpSize; }
  static __device__ unsigned size() { return kBlock ? blockDim.x : kWarpSize; }
  static __device__ int64_t per_block() { return kBlock ? 1 : blockDim.x / kWarpSize; }
  static __device__ int64_t first_row() { return blockIdx.x * per_block() + (kBlock ? 0 : threadIdx.x / kWarpSize); }
  static __device__ int64_t row_step() { return gridDim.x * per_block(); }
  static __device__ void sync() {
    if constexpr (kBlock) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
  // In every thread; `shared` holds one for each warp of a block and may be used again at once.
  template <class A>
  static __device__ LogSum<A> merge(LogSum<A> row, bool smoothing, LogSum<A>* shared) {
    row = merge_lanes(row, smoothing);
    if constexpr (kBlock) {
      const unsigned lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
      if (lane == 0) shared[threadIdx.x / kWarpSize] = row;
      __syncthreads();
      row = merge_lanes(lane < warps ? shared[lane] : empty_sum<A>(), smoothing);
      __syncthreads();
    }
    return row;
  }
};

// Whether rows are read in packs: a matter of strides and sizes.
template <class S>
bool in_packs(int64_t K, int64_t stride_k) {
  return (K == 1 || stride_k == 1) && K >= kWide<S>;
}
// Whether the packs of rows of the first strides are packs under the second ones, too: then they can be written whole.
// (How rows are read decides the order of additions; how they are written, nothing.)
template <class S>
bool same_packs(int64_t E, int64_t N, int64_t stride_e, int64_t stride_n, int64_t out_stride_e, int64_t out_stride_n,
                int64_t out_stride_k) {
  constexpr int64_t V = kWide<S>;
  return out_stride_k == 1 && (E == 1 || (out_stride_e - stride_e) % V == 0) &&
         (N == 1 || (out_stride_n - stride_n) % V == 0);
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

// The calling thread's share of a row. `take` gets a pack, or an edge as a pack of one, and where it begins. The next
// pack is asked for before the last one is worked on.
template <class Team, int V, class S, class Take>
__device__ void for_packs(const S* x, int64_t stride_k, const RowParts<V>& parts, bool aligned, Take take) {
  const auto load = [&](int64_t i) {
    return load_pack<V>(x + (V > 1 ? parts.pack(i) : i * stride_k), 1, V, aligned);
  };
  int64_t i = Team::rank();
  if (i < parts.packs) {
    Pack<V, S> next = load(i);
    while (true) {
      const Pack<V, S> pack = next;
      const int64_t at = parts.pack(i);
      i += Team::size();
      const bool more = i < parts.packs;
      if (more) next = load(i);
      take(pack, at);
      if (!more) break;
    }
  }
  if constexpr (V > 1) {
    const int64_t edge = Team::rank();  // fewer than 2 V, so a thread of a team each
    if (edge < parts.edges) take(load_pack<1>(x + parts.edge(edge), 1, 1, false), parts.edge(edge));
  }
}

// A row's gradient, from what turns its logits into probabilities: e^(x - shift) * whole. Each element is read and
// written by the same thread, the next ones before it: `out` may be `x`.
template <class Team, int V, class S>
__device__ void write_gradient(const S* x, int64_t stride_k, S* out, int64_t out_stride_k, const RowParts<V>& parts,
                               int64_t y, const Acc<S>* class_weight, Acc<S> smoothing, Acc<S> total, Acc<S> c,
                               Acc<S> shift, Acc<S> whole, bool aligned, bool out_aligned) {
  using A = Acc<S>;
  const A share = smoothing / static_cast<A>(parts.count());
  const A own = (A(1) - smoothing) * (class_weight ? class_weight[y] : A(1));  // the target's part of the loss
  const A scale = (smoothing > 0 ? own + share * total : own) * whole;
  for_packs<Team, V>(x, stride_k, parts, aligned, [&](auto pack, int64_t k) {
    constexpr int kCount = static_cast<int>(sizeof(pack) / sizeof(S));
    A grad[kCount];
    for (int i = 0; i < kCount; ++i) grad[i] = scale * exponential(value_of(pack.value[i]) - shift);
    if (smoothing > 0) {
      for (int i = 0; i < kCount; ++i) grad[i] -= share * (class_weight ? class_weight[k + i] : A(1));
    }
    const int at = y >= k && y < k + kCount ? static_cast<int>(y - k) : -1;
    for (int i = 0; i < kCount; ++i) put(&pack.value[i], c * (i == at ? grad[i] - own : grad[i]));
    if constexpr (kCount > 1) {
      if (out_aligned) {
        uint4 raw;
        memcpy(&raw, &pack, sizeof(raw));
        __stcg(reinterpret_cast<uint4*>(out + k), raw);  // a plain assignment becomes two stores now and then
        return;
      }
    }
    for (int i = 0; i < kCount; ++i) out[(k + i) * out_stride_k] = pack.value[i];
  });
}

// A row of zeros.
template <class Team, class S>
__device__ void write_zeros(S* out, int64_t out_stride_k, int64_t K) {
  for (int64_t k = Team::rank(); k < K; k += Team::size()) put(out + k * out_stride_k, Acc<S>(0));
}

__device__ inline float top_of(float a, float b) { return fmaxf(a, b); }  // passes over NaN
__device__ inline double top_of(double a, double b) { return fmax(a, b); }

// A thread's share of a row, each logit read once.
template <class Team, int V, class S>
__device__ LogSum<Acc<S>> sum_of_share(const S* x, int64_t stride_k, const RowParts<V>& parts,
                                       const Acc<S>* class_weight, bool smoothing, bool aligned) {
  using A = Acc<S>;
  LogSum<A> row = empty_sum<A>();
  for_packs<Team, V>(x, stride_k, parts, aligned, [&](const auto& pack, int64_t k) {
    constexpr int kCount = static_cast<int>(sizeof(pack) / sizeof(S));
    A values[kCount], top = row.top;
    for (int i = 0; i < kCount; ++i) {
      values[i] = value_of(pack.value[i]);
      top = top_of(top, values[i]);
    }
    if (top > row.top) rebase(row, top);  // one for all of them
    const A shift = shift_of(row);
    for (int i = 0; i < kCount; ++i) row.sum += exponential(values[i] - shift);
    if (!smoothing) return;
    for (int i = 0; i < kCount; ++i) {
      const A w = class_weight ? class_weight[k + i] : A(1);
      row.weight += w;
      row.weighted += w * (values[i] - shift);
    }
  });
  return row;
}

// Losses, and the gradient too if kGrad: then the row is read a second time, out of a cache.
template <bool kBlock, int V, class S, bool kGrad>
__global__ void __launch_bounds__(kMaxThreads, kResident<S, kGrad>)
    forward_kernel(JointCrossEntropyGradParams q, bool aligned, bool out_aligned) {
  using A = Acc<S>;
  using Rows = Team<kBlock>;
  AEP_SHARED(LogSum<A>, shared, kMaxThreads / kWarpSize);
  const JointCrossEntropyParams& p = q.loss;
  const A* class_weight = static_cast<const A*>(p.class_weight);
  const A smoothing = static_cast<A>(p.label_smoothing);
  for (int64_t i = Rows::first_row(); i < p.E * p.N; i += Rows::row_step()) {
    const int64_t e = i / p.N, n = i % p.N, y = p.target[n * p.target_stride];
    const int64_t begin = e * p.stride_e + n * p.stride_n;
    const S* x = static_cast<const S*>(p.logits) + begin;
    const RowParts<V> parts(begin, p.K);
    LogSum<A> row = sum_of_share<Rows, V>(x, p.stride_k, parts, class_weight, smoothing > 0, aligned);
    row = Rows::merge(row, smoothing > 0, shared);
    // As the softmax: NaN for a row with NaN or +inf, or of nothing but -inf.
    const bool proper = row.sum == row.sum && finite(row.top);
    const bool ignored = y == p.ignore_index, valid = y >= 0 && y < p.K;
    if (Rows::rank() == 0) {
      A loss = 0;
      if (!ignored && !valid) {
        loss = not_a_number<A>();
      } else if (!ignored) {
        const A log_sum = proper ? logarithm(row.sum) : not_a_number<A>();
        loss = (class_weight ? class_weight[y] : A(1)) * ((row.top - value_of(x[y * p.stride_k])) + log_sum);
        if (smoothing > 0) {
          loss = (A(1) - smoothing) * loss +
                 smoothing / static_cast<A>(p.K) * (row.weight * log_sum - row.weighted);
        }
      }
      static_cast<A*>(p.row_losses)[i] = loss;
      if (p.row_max) {
        static_cast<A*>(p.row_max)[i] = row.top;
        static_cast<A*>(p.row_sum)[i] = proper ? row.sum : not_a_number<A>();
      }
    }
    if constexpr (kGrad) {
      Rows::sync();  // the first thread has read the target's logit, which may now be overwritten
      S* out = static_cast<S*>(q.grad_logits) + e * q.out_stride_e + n * q.out_stride_n;
      if (ignored || !valid) {
        write_zeros<Rows>(out, q.out_stride_k, p.K);
      } else {
        const A whole = proper ? A(1) / row.sum : not_a_number<A>();
        write_gradient<Rows, V>(x, p.stride_k, out, q.out_stride_k, parts, y, class_weight, smoothing, row.weight,
                                coefficient_of<A>(q.coefficients, e, n), row.top, whole, aligned, out_aligned);
      }
    }
  }
}

// Launches the form for blocks or that for warps, as the rows ask for.
template <int V, class P>
cudaError_t enqueue_rows(void (*of_block)(P, bool, bool), void (*of_warp)(P, bool, bool), int64_t rows, int64_t K,
                         cudaStream_t stream, const P& p, bool aligned, bool out_aligned) {
  const int64_t packs = (K + V - 1) / V;
  if (row_needs_block(rows, packs))
    return enqueue(of_block, blocks_for(rows), threads_for(packs * 4), 0, stream, p, aligned, out_aligned);
  const int64_t blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
  return enqueue(of_warp, blocks_for(blocks), kMaxThreads, 0, stream, p, aligned, out_aligned);
}

template <int V, class S, bool kGrad>
cudaError_t launch_forward_by(const JointCrossEntropyGradParams& q, bool aligned, bool out_aligned,
                              cudaStream_t stream) {
  return enqueue_rows<V>(forward_kernel<true, V, S, kGrad>, forward_kernel<false, V, S, kGrad>, q.loss.E * q.loss.N,
                         q.loss.K, stream, q, aligned, out_aligned);
}

template <class S>
cudaError_t launch_forward(const JointCrossEntropyParams& p, cudaStream_t stream) {
  if (p.E * p.N == 0) return cudaSuccess;
  JointCrossEntropyGradParams q{};
  q.loss = p;
  if (in_packs<S>(p.K, p.stride_k))
    return launch_forward_by<kWide<S>, S, false>(q, aligned_to_16(p.logits), false, stream);
  return launch_forward_by<1, S, false>(q, false, false, stream);
}

template <class S>
cudaError_t launch_grad(const JointCrossEntropyGradParams& q, cudaStream_t stream) {
  const JointCrossEntropyParams& p = q.loss;
  if (p.E * p.N == 0) return cudaSuccess;
  if (in_packs<S>(p.K, p.stride_k)) {
    const bool out_packs =
        same_packs<S>(p.E, p.N, p.stride_e, p.stride_n, q.out_stride_e, q.out_stride_n, q.out_stride_k);
    return launch_forward_by<kWide<S>, S, true>(q, aligned_to_16(p.logits), out_packs && aligned_to_16(q.grad_logits),
                                                stream);
  }
  return launch_forward_by<1, S, true>(q, false, false, stream);
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

template <bool kBlock, int V, class S>
__global__ void __launch_bounds__(kMaxThreads, kResident<S, true>)
    backward_kernel(JointCrossEntropyBackwardParams p, bool aligned, bool out_aligned) {
  using A = Acc<S>;
  using Rows = Team<kBlock>;
  AEP_SHARED(A, shared_sum, kMaxThreads);
  const A* class_weight = static_cast<const A*>(p.class_weight);
  const A smoothing = static_cast<A>(p.label_smoothing);
  A total = static_cast<A>(p.K);
  if (p.label_smoothing > 0 && class_weight) {
    total = 0;
    for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x) total += class_weight[k];
    total = block_sum(total, shared_sum);
  }
  for (int64_t i = Rows::first_row(); i < p.E * p.N; i += Rows::row_step()) {
    const int64_t e = i / p.N, n = i % p.N, y = p.target[n * p.target_stride];
    const int64_t begin = e * p.stride_e + n * p.stride_n;
    const S* x = static_cast<const S*>(p.logits) + begin;
    S* out = static_cast<S*>(p.grad_logits) + e * p.out_stride_e + n * p.out_stride_n;
    if (y == p.ignore_index || y < 0 || y >= p.K) {
      write_zeros<Rows>(out, 1, p.K);
      continue;
    }
    write_gradient<Rows, V>(x, p.stride_k, out, 1, RowParts<V>(begin, p.K), y, class_weight, smoothing, total,
                            coefficient_of<A>(p.coefficients, e, n), static_cast<const A*>(p.row_max)[i],
                            A(1) / static_cast<const A*>(p.row_sum)[i], aligned, out_aligned);
  }
}

template <int V, class S>
cudaError_t launch_backward_by(const JointCrossEntropyBackwardParams& p, bool aligned, bool out_aligned,
                               cudaStream_t stream) {
  return enqueue_rows<V>(backward_kernel<true, V, S>, backward_kernel<false, V, S>, p.E * p.N, p.K, stream, p, aligned,
                         out_aligned);
}

template <class S>
cudaError_t launch_backward(const JointCrossEntropyBackwardParams& p, cudaStream_t stream) {
  if (p.E * p.N == 0) return cudaSuccess;
  if (in_packs<S>(p.K, p.stride_k)) {
    const bool out_packs = same_packs<S>(p.E, p.N, p.stride_e, p.stride_n, p.out_stride_e, p.out_stride_n, 1);
    return launch_backward_by<kWide<S>, S>(p, aligned_to_16(p.logits), out_packs && aligned_to_16(p.grad_logits),
                                           stream);
  }
  return launch_backward_by<1, S>(p, false, false, stream);
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

// Sums over the rows are formed by groups of kMaxThreads threads each, so that their order depends on N only.
constexpr int kGroups = 4, kWarpsOfGroup = kMaxThreads / static_cast<int>(kWarpSize);

// The calling thread's share of an exit's row losses, or of the weights of the rows that count (exit -1).
template <class A>
__device__ double share_of_sum(const JointCrossEntropyReduceParams& p, int64_t exit) {
  const int64_t first = threadIdx.x % kMaxThreads;
  double total = 0;
  if (exit >= 0) {
    const A* rows = static_cast<const A*>(p.row_losses) + exit * p.N;
#pragma unroll 8
    for (int64_t n = first; n < p.N; n += kMaxThreads) total += static_cast<double>(rows[n]);
    return total;
  }
  const A* class_weight = static_cast<const A*>(p.class_weight);
#pragma unroll 4
  for (int64_t n = first; n < p.N; n += kMaxThreads) {
    const int64_t y = p.target[n * p.target_stride];
    // A label out of range has no weight to read; its row's NaN decides the loss.
    const double weight = class_weight && y >= 0 && y < p.K ? static_cast<double>(class_weight[y]) : 1.0;
    if (y != p.ignore_index) total += weight;
  }
  return total;
}

// A group's sum from its threads' shares: sums of warps, to be added by sum_of_group() behind a barrier.
__device__ inline void put_share(double share, double* shared) {
  for (int step = 1; step < static_cast<int>(kWarpSize); step *= 2) share += __shfl_xor_sync(kAllLanes, share, step);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = share;
}
__device__ inline double sum_of_group(int64_t group, const double* shared) {
  double sum = shared[group * kWarpsOfGroup];
  for (int i = 1; i < kWarpsOfGroup; ++i) sum += shared[group * kWarpsOfGroup + i];
  return sum;
}

// What the mean divides by, from the weights' sum.
template <class A>
__device__ A divisor_of(double weights) {
  return weights == 0 ? not_a_number<A>() : static_cast<A>(weights);
}

// One group.
template <class A>
__global__ void __launch_bounds__(kMaxThreads) denominator_kernel(JointCrossEntropyReduceParams p) {
  AEP_SHARED(double, shared, kWarpsOfGroup);
  if (p.reduction == Reduction::mean) put_share(share_of_sum<A>(p, -1), shared);
  __syncthreads();
  if (threadIdx.x == 0)
    *static_cast<A*>(p.denominator) = p.reduction == Reduction::mean ? divisor_of<A>(sum_of_group(0, shared)) : A(1);
}

// One block of several groups: the first takes the divisor, the next ones the exits, in turn. (Not the last block of
// the forward: it would have to be found by a counter that somebody has set to zero, one for each call since streams
// run beside each other, and that is a launch as well.)
template <class A>
__global__ void __launch_bounds__(kGroups * kMaxThreads) total_loss_kernel(JointCrossEntropyReduceParams p) {
  AEP_SHARED(double, shared, kGroups * kWarpsOfGroup);
  const int64_t groups = blockDim.x / kMaxThreads;
  A loss = 0, denominator = 1;
  for (int64_t first = -1; first < p.E; first += groups) {
    const int64_t exit = first + threadIdx.x / kMaxThreads;
    if (exit < p.E && (exit >= 0 || p.reduction == Reduction::mean)) put_share(share_of_sum<A>(p, exit), shared);
    __syncthreads();
    if (threadIdx.x == 0) {
      if (first < 0 && p.reduction == Reduction::mean) denominator = divisor_of<A>(sum_of_group(0, shared));
      for (int64_t e = larger<int64_t>(first, 0); e < smaller(first + groups, p.E); ++e) {
        const A exit_loss = static_cast<A>(sum_of_group(e - first, shared) / static_cast<double>(denominator));
        static_cast<A*>(p.exit_losses)[e] = exit_loss;
        loss = add(loss, product(static_cast<const A*>(p.exit_weights)[e], exit_loss));
      }
    }
    __syncthreads();
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
  const unsigned groups = static_cast<unsigned>(p.E + 1 < kGroups ? p.E + 1 : kGroups);
  return enqueue(total_loss_kernel<A>, 1, groups * kMaxThreads, 0, stream, p);
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

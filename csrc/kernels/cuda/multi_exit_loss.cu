// Cross entropies of exits and prefix ensembles, distillation, their final sums, and their gradient by recomputation. The
// exits' cross entropies alone are formed row by row with an online log-sum-exp; the rest sample by sample.
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
  A sum = c.weights ? static_cast<const A*>(c.weights)[e] : static_cast<A>(c.weight);
  if (c.grad_loss) sum = sum * static_cast<const A*>(c.grad_loss)[n * c.loss_stride_n];
  if (c.grad_losses) sum = sum + static_cast<const A*>(c.grad_losses)[e * c.stride_e + n * c.stride_n];
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
    forward_kernel(MultiExitLossGradParams q, bool aligned, bool out_aligned) {
  using A = Acc<S>;
  using Rows = Team<kBlock>;
  AEP_SHARED(LogSum<A>, shared, kMaxThreads / kWarpSize);
  const MultiExitLossParams& p = q.loss;
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
      static_cast<A*>(p.row_losses[0])[i] = loss;
      if (p.kept) {
        static_cast<A*>(p.kept)[i] = row.top;
        static_cast<A*>(p.kept)[p.E * p.N + i] = proper ? row.sum : not_a_number<A>();
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
                                coefficient_of<A>(q.coefficients[0], e, n), row.top, whole, aligned, out_aligned);
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
cudaError_t launch_forward_by(const MultiExitLossGradParams& q, bool aligned, bool out_aligned, cudaStream_t stream) {
  return enqueue_rows<V>(forward_kernel<true, V, S, kGrad>, forward_kernel<false, V, S, kGrad>, q.loss.E * q.loss.N,
                         q.loss.K, stream, q, aligned, out_aligned);
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
    backward_kernel(MultiExitLossGradParams q, bool aligned, bool out_aligned) {
  using A = Acc<S>;
  using Rows = Team<kBlock>;
  AEP_SHARED(A, shared_sum, kMaxThreads);
  const MultiExitLossParams& p = q.loss;
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
    S* out = static_cast<S*>(q.grad_logits) + e * q.out_stride_e + n * q.out_stride_n;
    if (y == p.ignore_index || y < 0 || y >= p.K) {
      write_zeros<Rows>(out, q.out_stride_k, p.K);
      continue;
    }
    write_gradient<Rows, V>(x, p.stride_k, out, q.out_stride_k, RowParts<V>(begin, p.K), y, class_weight, smoothing,
                            total, coefficient_of<A>(q.coefficients[0], e, n), static_cast<const A*>(p.kept)[i],
                            A(1) / static_cast<const A*>(p.kept)[p.E * p.N + i], aligned, out_aligned);
  }
}

template <int V, class S>
cudaError_t launch_backward_by(const MultiExitLossGradParams& q, bool aligned, bool out_aligned, cudaStream_t stream) {
  return enqueue_rows<V>(backward_kernel<true, V, S>, backward_kernel<false, V, S>, q.loss.E * q.loss.N, q.loss.K,
                         stream, q, aligned, out_aligned);
}

// A sample's softmaxes, in shared memory: as MultiExitLossParams::kept has them, E values each and the teacher's sum.
template <class A>
struct SampleSums {
  A *shift, *sum, *prefix_shift, *prefix_sum, *student_sum, *teacher_sum;
  __device__ SampleSums(A* memory, int64_t E)
      : shift(memory),
        sum(shift + E),
        prefix_shift(sum + E),
        prefix_sum(prefix_shift + E),
        student_sum(prefix_sum + E),
        teacher_sum(student_sum + E) {}
  static __host__ __device__ int64_t values(int64_t E) { return 5 * E + 1; }
};

// The scores of a sample: logits, their running sums and what the classes should have.
template <class S>
struct SampleScores {
  using A = Acc<S>;
  const MultiExitLossParams& p;
  int64_t n, y;
  const S* x;

  __device__ SampleScores(const MultiExitLossParams& params, int64_t sample)
      : p(params),
        n(sample),
        y(p.target ? p.target[n * p.target_stride] : 0),
        x(static_cast<const S*>(p.logits) + n * p.stride_n) {}
  __device__ bool ignored() const { return p.target && y == p.ignore_index; }
  __device__ bool valid() const { return y >= 0 && y < p.K; }
  __device__ A share(int64_t e) const { return p.output_weights ? static_cast<const A*>(p.output_weights)[e] : A(1); }
  __device__ A logit(int64_t e, int64_t k) const { return value_of(x[e * p.stride_e + k * p.stride_k]); }
  // R_e; the logits are read again, out of a cache.
  __device__ A prefix(int64_t e, int64_t k) const {
    if (e == 0) return logit(0, k);
    A total = product(share(0), logit(0, k)), weights = share(0);
    for (int64_t j = 1; j <= e; ++j) {
      total = add(total, product(share(j), logit(j, k)));
      weights = add(weights, share(j));
    }
    return total / weights;
  }
  __device__ A wanted(int64_t k) const {
    const A smoothing = static_cast<A>(p.label_smoothing);
    const A q = p.target ? A(k == y ? 1 : 0) : static_cast<const A*>(p.probabilities)[n * p.target_stride + k];
    const A w = p.class_weight ? static_cast<const A*>(p.class_weight)[k] : A(1);
    return w * ((A(1) - smoothing) * q + smoothing / static_cast<A>(p.K));
  }
};

// One sample a block: losses (kLosses) or what theirs has kept, then the gradient (kGrad). Dynamic shared memory: the
// sums, and five coefficients for each exit.
template <class S, bool kLosses, bool kGrad>
__global__ void __launch_bounds__(kMaxThreads) sample_kernel(MultiExitLossGradParams q) {
  using A = Acc<S>;
  AEP_SHARED(A, shared, kMaxThreads);
  AEP_DYNAMIC_SHARED(A, memory);
  const MultiExitLossParams& p = q.loss;
  const int64_t E = p.E, last = p.E - 1, rows = p.E * p.N;
  const SampleSums<A> of(memory, E);
  const A cooling = static_cast<A>(1 / p.temperature);
  const bool first = threadIdx.x == 0;
  // A sum over the classes, in every thread.
  const auto sum_of = [&](auto&& value) {
    A total = 0;
    for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x) total += value(k);
    return block_sum(total, shared);
  };
  const auto largest_of = [&](auto&& value) {
    A top = -infinity<A>();
    for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x) top = top_of(top, value(k));
    return block_reduce(top, shared, [](A a, A b) { return top_of(a, b); });
  };
  for (int64_t n = blockIdx.x; n < p.N; n += gridDim.x) {
    const SampleScores<S> scores(p, n);
    if (scores.ignored() || !scores.valid()) {
      for (int64_t i = threadIdx.x; kLosses && i < 3 * E; i += blockDim.x) {
        void* const losses = p.row_losses[i / E];
        if (losses) static_cast<A*>(losses)[i % E * p.N + n] = scores.ignored() ? A(0) : not_a_number<A>();
      }
      for (int64_t i = threadIdx.x; kLosses && p.kept && i < SampleSums<A>::values(E); i += blockDim.x) {
        if (i < 2 * E || p.prefixes || p.distillation) static_cast<A*>(p.kept)[i / E * rows + i % E * p.N + n] = A(0);
      }
      for (int64_t e = 0; kGrad && e < E; ++e) {
        write_zeros<Team<true>>(static_cast<S*>(q.grad_logits) + e * q.out_stride_e + n * q.out_stride_n,
                                q.out_stride_k, p.K);
      }
      continue;
    }
    const A mass = sum_of([&](int64_t k) { return scores.wanted(k); });
    if constexpr (kLosses) {
      for (int64_t e = 0; e < E; ++e) {
        const auto logit = [&](int64_t k) { return scores.logit(e, k); };
        const auto prefix = [&](int64_t k) { return scores.prefix(e, k); };
        const auto dot = [&](auto&& score, A shift) {  // of the label alone where nothing is smoothed: others may be -inf
          return sum_of([&](int64_t k) {
            const A t = scores.wanted(k);
            return p.target && p.label_smoothing == 0 && k != scores.y ? A(0) : t * (score(k) - shift);
          });
        };
        const A shift = largest_of(logit), sum = sum_of([&](int64_t k) { return exponential(logit(k) - shift); });
        const A loss = mass * logarithm(sum) - dot(logit, shift);
        A prefix_shift = shift, prefix_sum = sum, prefix_loss = loss, student_sum = 0, teacher_sum = 0;
        if (e > 0 && (p.prefixes || e == last)) {
          prefix_shift = largest_of(prefix);
          prefix_sum = sum_of([&](int64_t k) { return exponential(prefix(k) - prefix_shift); });
          prefix_loss = mass * logarithm(prefix_sum) - dot(prefix, prefix_shift);
        }
        if (p.distillation) {
          student_sum = sum_of([&](int64_t k) { return exponential((logit(k) - shift) * cooling); });
          teacher_sum = sum_of([&](int64_t k) { return exponential((prefix(k) - prefix_shift) * cooling); });
        }
        if (!first) continue;
        of.shift[e] = shift, of.sum[e] = sum, of.prefix_shift[e] = prefix_shift, of.prefix_sum[e] = prefix_sum;
        of.student_sum[e] = student_sum, *of.teacher_sum = teacher_sum;
        static_cast<A*>(p.row_losses[0])[e * p.N + n] = loss;
        if (p.prefixes) static_cast<A*>(p.row_losses[1])[e * p.N + n] = prefix_loss;
      }
      __syncthreads();
      for (int64_t e = 0; p.distillation && e < E; ++e) {
        const A cross = sum_of([&](int64_t k) {
          const A score = scores.prefix(last, k), weight = exponential((score - of.prefix_shift[last]) * cooling);
          return weight > A(0) ? weight * (score - scores.logit(e, k)) : weight;  // else both may be -inf; NaN stays
        });
        if (first) {
          static_cast<A*>(p.row_losses[2])[e * p.N + n] =
              (cross / *of.teacher_sum + (of.shift[e] - of.prefix_shift[last])) * cooling +
              (logarithm(of.student_sum[e]) - logarithm(*of.teacher_sum));
        }
      }
    }
    // Between shared memory and `kept`, which has the exits' two values alone where there are no terms.
    A* const kept = static_cast<A*>(p.kept);
    const int64_t values = p.prefixes || p.distillation ? 5 * E : 2 * E;
    for (int64_t i = threadIdx.x; kept && i < values; i += blockDim.x) {
      A& place = kept[i / E * rows + i % E * p.N + n];
      kLosses ? place = memory[i] : memory[i] = place;
    }
    if (first && kept && values > 2 * E) {
      kLosses ? kept[5 * rows + n] = *of.teacher_sum : *of.teacher_sum = kept[5 * rows + n];
    }
    __syncthreads();
    if constexpr (kGrad) {
      A *const own = memory + SampleSums<A>::values(E), *const prefix = own + E, *const student = prefix + E,
               *const teacher = student + E, *const level = teacher + E;
      if (first) {
        A later = 0, weights = 0;
        for (int64_t e = 0; e < E; ++e) weights = teacher[e] = add(weights, scores.share(e));
        for (int64_t e = last; e >= 0; --e) {
          const A a = coefficient_of<A>(q.coefficients[0], e, n);
          const A share = p.prefixes ? coefficient_of<A>(q.coefficients[1], e, n) / teacher[e] : A(0);
          const A d = p.distillation ? coefficient_of<A>(q.coefficients[2], e, n) * cooling : A(0);
          later = p.detach_prefix ? share : later + share;
          own[e] = a * mass / of.sum[e];
          level[e] = a + later * scores.share(e);
          prefix[e] = p.prefixes ? share * mass / of.prefix_sum[e] : A(0);
          student[e] = p.distillation ? d / of.student_sum[e] : A(0);
          teacher[e] = p.distillation ? d / *of.teacher_sum : A(0);
        }
      }
      __syncthreads();
      S* const out = static_cast<S*>(q.grad_logits) + n * q.out_stride_n;
      for (int64_t k = threadIdx.x; k < p.K; k += blockDim.x) {
        const A wanted = scores.wanted(k);
        const A taught =
            p.distillation ? exponential((scores.prefix(last, k) - of.prefix_shift[last]) * cooling) : A(0);
        A through = 0;
        for (int64_t e = last; e >= 0; --e) {  // later exits first: the gradient may replace the logits
          const A d = scores.logit(e, k) - of.shift[e];
          A grad = own[e] * exponential(d) - level[e] * wanted;
          if (p.distillation) grad += student[e] * exponential(d * cooling) - teacher[e] * taught;
          if (p.prefixes) {
            const A part = prefix[e] * exponential(scores.prefix(e, k) - of.prefix_shift[e]);
            through = p.detach_prefix ? part : through + part;
            grad += scores.share(e) * through;
          }
          put(out + e * q.out_stride_e + k * q.out_stride_k, grad);
        }
      }
    }
    __syncthreads();  // shared memory is used again
  }
}

template <class S, bool kLosses, bool kGrad>
cudaError_t launch_samples(const MultiExitLossGradParams& q, cudaStream_t stream) {
  const int64_t E = q.loss.E;
  const size_t bytes = static_cast<size_t>(SampleSums<Acc<S>>::values(E) + 5 * E) * sizeof(Acc<S>);
  return enqueue(sample_kernel<S, kLosses, kGrad>, blocks_for(q.loss.N), threads_for(q.loss.K), bytes, stream, q);
}

template <class S, bool kLosses, bool kGrad>
cudaError_t launch_loss(const MultiExitLossGradParams& q, cudaStream_t stream) {
  const MultiExitLossParams& p = q.loss;
  if (p.E * p.N == 0) return cudaSuccess;
  if (p.prefixes || p.distillation || !p.target) return launch_samples<S, kLosses, kGrad>(q, stream);
  const bool packs = in_packs<S>(p.K, p.stride_k), aligned = packs && aligned_to_16(p.logits);
  const bool out_aligned =
      kGrad && packs && aligned_to_16(q.grad_logits) &&
      same_packs<S>(p.E, p.N, p.stride_e, p.stride_n, q.out_stride_e, q.out_stride_n, q.out_stride_k);
  if constexpr (kLosses) {
    return packs ? launch_forward_by<kWide<S>, S, kGrad>(q, aligned, out_aligned, stream)
                 : launch_forward_by<1, S, kGrad>(q, false, false, stream);
  } else {
    return packs ? launch_backward_by<kWide<S>, S>(q, aligned, out_aligned, stream)
                 : launch_backward_by<1, S>(q, false, false, stream);
  }
}
template <class S>
cudaError_t launch_losses(const MultiExitLossGradParams& q, cudaStream_t stream) {
  return launch_loss<S, true, false>(q, stream);
}
template <class S>
cudaError_t launch_gradient(const MultiExitLossGradParams& q, cudaStream_t stream) {
  return q.loss.row_losses[0] ? launch_loss<S, true, true>(q, stream) : launch_loss<S, false, true>(q, stream);
}

// The weight of an exit in term i of the loss.
template <class A>
__device__ A weight_of(const MultiExitLossReduceParams& p, int i, int64_t e) {
  return p.weights[i] ? static_cast<const A*>(p.weights[i])[e] : static_cast<A>(p.weight);
}

template <class A>
__global__ void losses_per_sample_kernel(MultiExitLossReduceParams p) {
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t n = first; n < p.N; n += int64_t(gridDim.x) * blockDim.x) {
    A sum = 0;
    for (int i = 0; i < 3; ++i) {
      const A* rows = static_cast<const A*>(p.row_losses[i]);
      for (int64_t e = 0; rows && e < p.E; ++e) sum = add(sum, product(weight_of<A>(p, i, e), rows[e * p.N + n]));
    }
    static_cast<A*>(p.loss)[n] = sum;
  }
  if (first < 2 && p.divisors) static_cast<A*>(p.divisors)[first] = A(1);
}

// Sums over the rows are formed by groups of kMaxThreads threads each, so that their order depends on N only.
constexpr int kGroups = 4, kWarpsOfGroup = kMaxThreads / static_cast<int>(kWarpSize);

// The calling thread's share of a sum over the rows. Item -2: the rows that count; -1: their class weights; i * E + e: the
// row losses of exit e in term i.
template <class A>
__device__ double share_of_sum(const MultiExitLossReduceParams& p, int64_t item) {
  const int64_t first = threadIdx.x % kMaxThreads;
  double total = 0;
  if (item >= 0) {
    const A* rows = static_cast<const A*>(p.row_losses[item / p.E]);
    if (!rows) return 0;
    rows += item % p.E * p.N;
#pragma unroll 8
    for (int64_t n = first; n < p.N; n += kMaxThreads) total += static_cast<double>(rows[n]);
    return total;
  }
  const A* class_weight = item == -1 && p.target ? static_cast<const A*>(p.class_weight) : nullptr;
#pragma unroll 4
  for (int64_t n = first; n < p.N; n += kMaxThreads) {
    const int64_t y = p.target ? p.target[n * p.target_stride] : 0;
    // A label out of range has no weight to read; its row's NaN decides the loss.
    const double weight = class_weight && y >= 0 && y < p.K ? static_cast<double>(class_weight[y]) : 1.0;
    if (!p.target || y != p.ignore_index) total += weight;
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

// Two groups.
template <class A>
__global__ void __launch_bounds__(2 * kMaxThreads) divisors_kernel(MultiExitLossReduceParams p) {
  AEP_SHARED(double, shared, 2 * kWarpsOfGroup);
  const int64_t group = threadIdx.x / kMaxThreads;
  if (p.reduction == Reduction::mean) put_share(share_of_sum<A>(p, group == 0 ? -1 : -2), shared);
  __syncthreads();
  if (threadIdx.x % kMaxThreads == 0)
    static_cast<A*>(p.divisors)[group] =
        p.reduction == Reduction::mean ? divisor_of<A>(sum_of_group(group, shared)) : A(1);
}

// One block of several groups: the first ones take the divisors, the next ones the exits, in turn. (Not the last block of
// the forward: it would have to be found by a counter that somebody has set to zero, one for each call since streams
// run beside each other, and that is a launch as well.)
template <class A>
__global__ void __launch_bounds__(kGroups * kMaxThreads) total_loss_kernel(MultiExitLossReduceParams p, int64_t items) {
  AEP_SHARED(double, shared, kGroups * kWarpsOfGroup);
  const int64_t groups = blockDim.x / kMaxThreads;
  const bool mean = p.reduction == Reduction::mean;
  A loss = 0, sum = 0, weights = 1, count = 1;
  for (int64_t first = -2; first < items; first += groups) {
    const int64_t own = first + threadIdx.x / kMaxThreads;
    if (own < items && (own >= 0 || mean)) put_share(share_of_sum<A>(p, own), shared);
    __syncthreads();
    for (int64_t item = first; threadIdx.x == 0 && item < smaller(first + groups, items); ++item) {
      if (item < 0) {
        if (mean) (item == -2 ? count : weights) = divisor_of<A>(sum_of_group(item - first, shared));
        continue;
      }
      const int i = static_cast<int>(item / p.E);
      const int64_t e = item % p.E;
      if (!p.losses[i]) continue;
      const A divisor = i < 2 ? weights : count;
      const A exit_loss = static_cast<A>(sum_of_group(item - first, shared) / static_cast<double>(divisor));
      static_cast<A*>(p.losses[i])[e] = exit_loss;
      sum = add(e == 0 ? A(0) : sum, product(weight_of<A>(p, i, e), exit_loss));
      if (e + 1 == p.E) loss = add(loss, sum);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    *static_cast<A*>(p.loss) = loss;
    if (p.divisors) static_cast<A*>(p.divisors)[0] = weights, static_cast<A*>(p.divisors)[1] = count;
  }
}

template <class A>
cudaError_t launch_reduce(const MultiExitLossReduceParams& p, cudaStream_t stream) {
  if (p.reduction == Reduction::none) {
    const unsigned blocks = blocks_for_elements(p.N > 0 ? p.N : 1);  // N == 0 still writes the divisors
    return enqueue(losses_per_sample_kernel<A>, blocks, kMaxThreads, 0, stream, p);
  }
  const int64_t items = p.E * (p.losses[2] ? 3 : p.losses[1] ? 2 : 1);
  const unsigned groups = static_cast<unsigned>(items + 2 < kGroups ? items + 2 : kGroups);
  return enqueue(total_loss_kernel<A>, 1, groups * kMaxThreads, 0, stream, p, items);
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

cudaError_t launch_multi_exit_loss(const MultiExitLossParams& p, cudaStream_t stream) {
  MultiExitLossGradParams q{};
  q.loss = p;
  AEP_CUDA_BY_DTYPE(p.dtype, launch_losses, q, stream);
}
cudaError_t launch_multi_exit_loss_grad(const MultiExitLossGradParams& p, cudaStream_t stream) {
  AEP_CUDA_BY_DTYPE(p.loss.dtype, launch_gradient, p, stream);
}
cudaError_t launch_loss_grad_scale(const LossGradScaleParams& p, cudaStream_t stream) {
  AEP_CUDA_BY_DTYPE(p.dtype, launch_scale, p, stream);
}
cudaError_t launch_multi_exit_loss_divisors(const MultiExitLossReduceParams& p, cudaStream_t stream) {
  return p.dtype == DType::f64 ? enqueue(divisors_kernel<double>, 1, 2 * kMaxThreads, 0, stream, p)
                               : enqueue(divisors_kernel<float>, 1, 2 * kMaxThreads, 0, stream, p);
}
cudaError_t launch_multi_exit_loss_reduce(const MultiExitLossReduceParams& p, cudaStream_t stream) {
  return p.dtype == DType::f64 ? launch_reduce<double>(p, stream) : launch_reduce<float>(p, stream);
}
cudaError_t launch_find_bad_label(const int64_t* target, int64_t stride, int64_t N, int64_t K,
                                  const int64_t* ignore_index, int64_t* result, cudaStream_t stream) {
  return enqueue(find_bad_label_kernel, 1, kMaxThreads, 0, stream, target, stride, N, K, ignore_index != nullptr,
                 ignore_index ? *ignore_index : 0, result);
}

}  // namespace aep::kernels::cuda

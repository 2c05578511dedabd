// Weighted sums over the exits, with or without statistics, and their gradients.

namespace aep::kernels::cpu::AEP_ISA_NAMESPACE {
namespace {

// The exits' rows of one sample, with class stride 1.
template <class S>
class ExitRows {
 public:
  ExitRows(const void* logits, int64_t E, int64_t K, int64_t stride_e, int64_t stride_n, int64_t stride_k)
      : logits_(static_cast<const S*>(logits)),
        E_(E),
        K_(K),
        stride_e_(stride_e),
        stride_n_(stride_n),
        stride_k_(stride_k),
        rows_(E),
        copy_(stride_k == 1 ? 0 : E * K) {}

  const S* const* sample(int64_t n) {
    for (int64_t e = 0; e < E_; ++e) {
      rows_[e] = dense_row(logits_ + e * stride_e_ + n * stride_n_, stride_k_, K_,
                           copy_.get() + (stride_k_ == 1 ? 0 : e * K_));
    }
    return rows_.get();
  }

 private:
  const S* logits_;
  int64_t E_, K_, stride_e_, stride_n_, stride_k_;
  Scratch<const S*, 16> rows_;
  Scratch<S> copy_;
};

// The weighted sums of one sample: rounded products, added in ascending exit order. kE exits, known when compiled, so
// that weights and rows stay in registers; 0: E exits.
template <int kE, class S>
class WeightedSum {
 public:
  using A = Acc<S>;
  using V = Vec<A>;

  WeightedSum(const A* weights, int64_t E) : all_weights_(weights), E_(E) {
    for (int e = 0; e < kE; ++e) weights_[e] = V::set(weights[e]);
  }
  // `ahead`: how many elements further on the next sample's rows begin, to fetch them early; 0: not at all.
  void start(const S* const* rows, int64_t ahead) {
    all_rows_ = rows;
    ahead_ = ahead;
    for (int e = 0; e < kE; ++e) rows_[e] = rows[e];
  }

  // kVectors vectors from class k on.
  template <int kVectors, class P>
  inline void at(int64_t k, P part, V* out) const {
    for (int u = 0; u < kVectors; ++u) out[u] = V::mul(weight(0), load(row(0) + k + u * V::n, part, A(0)));
    const int64_t exits = kE ? kE : E_;
    for (int64_t e = 1; e < exits; ++e) {
      const V w = weight(e);
      for (int u = 0; u < kVectors; ++u) out[u] = V::add(out[u], V::mul(w, load(row(e) + k + u * V::n, part, A(0))));
    }
  }
  inline void fetch_ahead(int64_t k, int64_t count) const {
    if (ahead_ == 0) return;
    const int64_t exits = kE ? kE : E_;
    for (int64_t e = 0; e < exits; ++e) {
      for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(S))) __builtin_prefetch(row(e) + ahead_ + k + i);
    }
  }

 private:
  V weight(int64_t e) const { return kE ? weights_[e] : V::set(all_weights_[e]); }
  const S* row(int64_t e) const { return kE ? rows_[e] : all_rows_[e]; }

  const A* all_weights_;
  int64_t E_, ahead_ = 0;
  const S* const* all_rows_ = nullptr;
  V weights_[kE ? kE : 1];
  const S* rows_[kE ? kE : 1];
};

template <int kE, class S>
void ensemble_of(const EnsembleParams& p, int64_t begin, int64_t end) {
  using V = Vec<Acc<S>>;
  ExitRows<S> exits(p.logits, p.E, p.K, p.stride_e, p.stride_n, p.stride_k);
  WeightedSum<kE, S> sums(static_cast<const Acc<S>*>(p.weights), p.E);
  for (int64_t n = begin; n < end; ++n) {
    sums.start(exits.sample(n), p.stride_k == 1 && n + 1 < end ? p.stride_n : 0);
    S* out = static_cast<S*>(p.output) + n * p.out_stride_n;
    int64_t k = 0;
    V sum[4];
    for (; k + 4 * V::n <= p.K; k += 4 * V::n) {
      sums.fetch_ahead(k, 4 * V::n);
      sums.template at<4>(k, Full{}, sum);
      for (int u = 0; u < 4; ++u) store(out + k + u * V::n, sum[u], Full{});
    }
    for_vectors<V::n>(p.K - k, [&](int64_t i, auto part) {
      sums.template at<1>(k + i, part, sum);
      store(out + k + i, sum[0], part);
    });
  }
}

// One sample's sum into `out`, with its largest two values.
template <int kE, class S>
inline void weighted_row(const WeightedSum<kE, S>& sums, int64_t K, S* out, Acc<S>& top, Acc<S>& next) {
  using A = Acc<S>;
  using V = Vec<A>;
  TopTwo<A> tops[2];
  V sum[4];
  int64_t k = 0;
  for (; k + 4 * V::n <= K; k += 4 * V::n) {
    sums.fetch_ahead(k, 4 * V::n);
    sums.template at<4>(k, Full{}, sum);
    for (int u = 0; u < 4; ++u) {
      store(out + k + u * V::n, sum[u], Full{});
      // What is judged is what is returned: the value after rounding to the storage type.
      tops[u & 1].add(sizeof(S) == sizeof(A) ? sum[u] : load(out + k + u * V::n, Full{}, A(0)));
    }
  }
  for_vectors<V::n>(K - k, [&](int64_t i, auto part) {
    sums.template at<1>(k + i, part, sum);
    store(out + k + i, sum[0], part);
    tops[0].add(load(out + k + i, part, -kInfinity<A>));
  });
  tops[0].merge(tops[1]);
  tops[0].reduce(top, next);
}

// Rows are taken a few at a time, as many as stay in the first-level cache: first their sums, then the exp passes, then
// the statistics of all together. One row after the other would wait for each step's result before the next.
constexpr int64_t kStatsBytes = 16384;

template <int kE, class S>
void ensemble_stats_of(const EnsembleStatsParams& q, int64_t begin, int64_t end) {
  using A = Acc<S>;
  using V = Vec<A>;
  const EnsembleParams& p = q.ensemble;
  ExitRows<S> exits(p.logits, p.E, p.K, p.stride_e, p.stride_n, p.stride_k);
  WeightedSum<kE, S> sums(static_cast<const A*>(p.weights), p.E);
  const int64_t most = smaller<int64_t>(V::n, larger<int64_t>(1, kStatsBytes / (p.K * int64_t(sizeof(S)))));
  const Divisor<A> divisor(read<A>(q.normalizer) * read<A>(q.temperature));
  A top[V::n], next[V::n], sum[V::n], weighted[V::n], below[V::n];
  for (int i = 0; i < V::n; ++i) sum[i] = 1, weighted[i] = below[i] = 0;  // lanes without a row hold something harmless
  for (int64_t first = begin; first < end; first += most) {
    const int count = static_cast<int>(smaller(most, end - first));
    const auto row = [&](int i) { return static_cast<S*>(p.output) + (first + i) * p.out_stride_n; };
    for (int i = 0; i < count; ++i) {
      const int64_t n = first + i;
      sums.start(exits.sample(n), p.stride_k == 1 && n + 1 < end ? p.stride_n : 0);
      weighted_row(sums, p.K, row(i), top[i], next[i]);
    }
    unsigned unusual = 0;
    for (int i = 0; i < count; ++i) {
      RowSums<A> found{1, 0, 0};
      if (!row_sums(row(i), p.K, top[i], next[i], divisor, found)) {
        unusual |= 1u << i;
        found = {1, 0, 0};
      }
      sum[i] = found.sum, weighted[i] = found.weighted, below[i] = found.next;
      q.argmax[first + i] = first_equal(row(i), p.K, top[i]);
    }
    make_stats_of_rows(sum, weighted, below, count, q.stats + first * 3);
    for (; unusual; unusual &= unusual - 1) {
      const int i = __builtin_ctz(unusual);
      const RowStats stats = unusual_stats(row(i), p.K, top[i], divisor);
      float* out = q.stats + (first + i) * 3;
      out[0] = stats.confidence, out[1] = stats.entropy, out[2] = stats.margin;
      q.argmax[first + i] = stats.argmax;
    }
  }
}

// Calls F<E, S>(...) with the number of exits known when compiled, up to 8.
#define AEP_BY_EXITS(E, F, S, ...)       \
  switch (E) {                           \
    case 1: return F<1, S>(__VA_ARGS__); \
    case 2: return F<2, S>(__VA_ARGS__); \
    case 3: return F<3, S>(__VA_ARGS__); \
    case 4: return F<4, S>(__VA_ARGS__); \
    case 5: return F<5, S>(__VA_ARGS__); \
    case 6: return F<6, S>(__VA_ARGS__); \
    case 7: return F<7, S>(__VA_ARGS__); \
    case 8: return F<8, S>(__VA_ARGS__); \
    default: return F<0, S>(__VA_ARGS__); \
  }

template <class S>
void ensemble_as(const EnsembleParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  AEP_BY_EXITS(p.E, ensemble_of, S, p, begin, end)
}

template <class S>
void ensemble_stats_as(const EnsembleStatsParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  AEP_BY_EXITS(p.ensemble.E, ensemble_stats_of, S, p, begin, end)
}

template <class S>
void ensemble_backward_logits_as(const EnsembleBackwardParams& p, int64_t begin, int64_t end) {
  using A = Acc<S>;
  using V = Vec<A>;
  if (begin >= end) return;
  ExitRows<S> grads(p.grad, 1, p.K, 0, p.grad_stride_n, p.grad_stride_k);
  const A* weights = static_cast<const A*>(p.weights);
  for (int64_t n = begin; n < end; ++n) {
    const S* grad = grads.sample(n)[0];
    for (int64_t e = 0; e < p.E; ++e) {
      const V w = V::set(weights[e]);
      S* out = static_cast<S*>(p.grad_logits) + e * p.out_stride_e + n * p.out_stride_n;
      for_vectors<V::n>(p.K,
                        [&](int64_t k, auto part) { store(out + k, V::mul(w, load(grad + k, part, A(0))), part); });
    }
  }
}

template <class S>
Acc<S> dot(const S* a, const S* b, int64_t K) {
  using A = Acc<S>;
  using V = Vec<A>;
  V s[2] = {V::set(0), V::set(0)};
  int64_t k = 0;
  for (; k + 2 * V::n <= K; k += 2 * V::n) {
    for (int u = 0; u < 2; ++u)
      s[u] = V::fma(load(a + k + u * V::n, Full{}, A(0)), load(b + k + u * V::n, Full{}, A(0)), s[u]);
  }
  for_vectors<V::n>(K - k, [&](int64_t i, auto part) {
    s[0] = V::fma(load(a + k + i, part, A(0)), load(b + k + i, part, A(0)), s[0]);
  });
  return V::sum(V::add(s[0], s[1]));
}

template <class S>
void ensemble_backward_weights_as(const EnsembleBackwardParams& p, int64_t chunk_begin, int64_t chunk_end) {
  using A = Acc<S>;
  if (chunk_begin >= chunk_end) return;
  ExitRows<S> grads(p.grad, 1, p.K, 0, p.grad_stride_n, p.grad_stride_k);
  ExitRows<S> exits(p.logits, p.E, p.K, p.stride_e, p.stride_n, p.stride_k);
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    A* partial = static_cast<A*>(p.partials) + chunk * p.E;
    for (int64_t e = 0; e < p.E; ++e) partial[e] = 0;
    const int64_t last = smaller(p.N, (chunk + 1) * kEnsembleChunkRows);
    for (int64_t n = chunk * kEnsembleChunkRows; n < last; ++n) {
      const S* grad = grads.sample(n)[0];
      const S* const* rows = exits.sample(n);
      for (int64_t e = 0; e < p.E; ++e) partial[e] += dot(grad, rows[e], p.K);
    }
  }
}

void ensemble(const EnsembleParams& p, int64_t begin, int64_t end) { AEP_BY_DTYPE(p.dtype, ensemble_as, p, begin, end) }
void ensemble_stats(const EnsembleStatsParams& p, int64_t begin, int64_t end) {
  AEP_BY_DTYPE(p.ensemble.dtype, ensemble_stats_as, p, begin, end)
}
void ensemble_backward_logits(const EnsembleBackwardParams& p, int64_t begin, int64_t end) {
  AEP_BY_DTYPE(p.dtype, ensemble_backward_logits_as, p, begin, end)
}
void ensemble_backward_weights(const EnsembleBackwardParams& p, int64_t begin, int64_t end) {
  AEP_BY_DTYPE(p.dtype, ensemble_backward_weights_as, p, begin, end)
}

}  // namespace
}  // namespace aep::kernels::cpu::AEP_ISA_NAMESPACE

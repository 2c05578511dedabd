// Cross entropy of every (exit, sample) row by log-sum-exp, and its gradient: recomputed from the stored maximum and sum
// of its exponentials (nothing else is held), or written while the row is at hand.

namespace aep::kernels::cpu::AEP_ISA_NAMESPACE {
namespace {

// e^x for x that is at most 0, but for rounding: two thirds of the work of exponential(). 2^n * e^r with a polynomial of
// degree 5 on [-ln 2 / 2, ln 2 / 2] (least maximal relative error with value 1 at 0: 9.2e-8). Relative error at most
// 2.5e-7 + 3e-9 * |x|; the second term is from ln 2 in one part. Exactly 1 for 0 and 0 for -inf; NaN stays NaN.
inline Vec<float> exponential_below(Vec<float> x) {
  using V = Vec<float>;
  x = V::max(V::set(-105.0f), x);  // this order of operands keeps NaN
  const V n = V::round(V::mul(x, V::set(1.44269504088896341f)));
  const V r = V::fma(n, V::set(-0.69314718055994531f), x);
  V y = V::set(8.290268222e-03f);
  y = V::fma(y, r, V::set(4.189792275e-02f));
  y = V::fma(y, r, V::set(1.666763683e-01f));
  y = V::fma(y, r, V::set(4.999915024e-01f));
  y = V::fma(y, r, V::set(9.999997448e-01f));
  y = V::fma(y, r, V::set(1.0f));
  return V::scale2(y, n);
}
inline Vec<double> exponential_below(Vec<double> x) { return exponential(x); }

// Sum of the class weights, in ascending order.
template <class A>
A total_weight(const A* class_weight, int64_t K) {
  if (!class_weight) return static_cast<A>(K);
  double sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += static_cast<double>(class_weight[k]);
  return static_cast<A>(sum);
}

// Four chains, since one would wait for each result.
template <class S>
inline Acc<S> largest(const S* row, int64_t K) {
  using A = Acc<S>;
  using V = Vec<A>;
  V m[4] = {V::set(-kInfinity<A>), V::set(-kInfinity<A>), V::set(-kInfinity<A>), V::set(-kInfinity<A>)};
  int64_t k = 0;
  for (; k + 4 * V::n <= K; k += 4 * V::n) {
    for (int u = 0; u < 4; ++u) m[u] = V::max(m[u], load(row + k + u * V::n, Full{}, A(0)));
  }
  for_vectors<V::n>(K - k, [&](int64_t i, auto part) { m[0] = V::max(m[0], load(row + k + i, part, -kInfinity<A>)); });
  // A NaN in the row may be lost here: the sum of exponentials still meets it.
  return V::top(V::max(V::max(m[0], m[1]), V::max(m[2], m[3])));
}

// Sum of e^(x - m); every exponential goes to take(k, value, part) too.
template <class S, class Take>
inline Acc<S> sum_exponentials(const S* row, int64_t K, Acc<S> m, Take&& take) {
  using A = Acc<S>;
  using V = Vec<A>;
  const V peak = V::set(m);
  V sum[2] = {V::set(0), V::set(0)};
  int64_t k = 0;
  for (; k + 2 * V::n <= K; k += 2 * V::n) {
    for (int u = 0; u < 2; ++u) {
      const V value = exponential_below(V::sub(load(row + k + u * V::n, Full{}, A(0)), peak));
      take(k + u * V::n, value, Full{});
      sum[u] = V::add(sum[u], value);
    }
  }
  for_vectors<V::n>(K - k, [&](int64_t i, auto part) {
    const V value = exponential_below(V::sub(load(row + k + i, part, -kInfinity<A>), peak));
    take(k + i, value, part);
    sum[0] = V::add(sum[0], value);
  });
  return V::sum(V::add(sum[0], sum[1]));
}

// Sum over c of w[c] * (x[c] - m), for label smoothing. Relative to the maximum, so that nothing cancels.
template <class S>
Acc<S> smoothing_sum(const S* row, const Acc<S>* class_weight, int64_t K, Acc<S> m) {
  using A = Acc<S>;
  using V = Vec<A>;
  const V peak = V::set(m);
  V sum = V::set(0);
  for_vectors<V::n>(K, [&](int64_t k, auto part) {
    const V d = V::sub(load(row + k, part, m), peak);
    sum = V::add(sum, class_weight ? V::mul(load(class_weight + k, part, A(0)), d) : d);
  });
  return V::sum(sum);
}

// Walks over rows without a division each.
struct RowCursor {
  int64_t e, n, N;
  RowCursor(int64_t row, int64_t rows) : e(row / rows), n(row % rows), N(rows) {}
  void next() {
    if (++n == N) n = 0, ++e;
  }
};

// What the loss needs of a row once the row itself is left behind.
template <class A>
struct RowFacts {
  A top, sum;  // the largest logit; the sum of e^(x - top)
  A own;       // the target's logit
  A rest;      // smoothing_sum
  int64_t target;
};

// Logarithms and losses of `count` rows from `first` on. Apart from the rows' loop, which then holds no call into the C
// library: a call costs all vector registers.
template <class A>
void finish_rows(const JointCrossEntropyParams& p, const RowFacts<A>* rows, int64_t first, int count, A total) {
  const A* class_weight = static_cast<const A*>(p.class_weight);
  const A smoothing = static_cast<A>(p.label_smoothing);
  A* losses = static_cast<A*>(p.row_losses);
  A* row_max = static_cast<A*>(p.row_max);
  A* row_sum = static_cast<A*>(p.row_sum);
  for (int j = 0; j < count; ++j) {
    const RowFacts<A>& row = rows[j];
    const bool ignored = row.target == p.ignore_index;
    if (ignored) losses[first + j] = 0;
    if (row_max) row_max[first + j] = row.top, row_sum[first + j] = row.sum;
    if (ignored) continue;
    const A log_sum = log_of(row.sum);
    const A nll = (row.top - row.own) + log_sum;
    A loss = class_weight ? class_weight[row.target] * nll : nll;
    if (p.label_smoothing > 0) {
      loss = (A(1) - smoothing) * loss + smoothing / static_cast<A>(p.K) * (total * log_sum - row.rest);
    }
    losses[first + j] = loss;
  }
}
constexpr int kRowsAtOnce = 16;

// Rows of one round: as many as stay in the first-level cache between the search for the maxima and the exponentials.
// Each row's maximum is ready when its exponentials start, and nothing waits at a row's end.
inline int rows_of_a_round(int64_t row_bytes, bool copied) {
  if (copied) return 1;  // there is one place for a copy
  return static_cast<int>(larger<int64_t>(1, smaller<int64_t>(kRowsAtOnce, 16384 / row_bytes)));
}

template <class S>
void joint_cross_entropy_as(const JointCrossEntropyParams& p, int64_t begin, int64_t end) {
  using A = Acc<S>;
  using V = Vec<A>;
  if (begin >= end) return;
  const A* class_weight = static_cast<const A*>(p.class_weight);
  const bool smooth = p.label_smoothing > 0;
  const A total = smooth ? total_weight(class_weight, p.K) : A(0);
  Scratch<S> copy(p.stride_k == 1 ? 0 : p.K);
  RowFacts<A> facts[kRowsAtOnce];
  const S* rows[kRowsAtOnce];
  RowCursor at(begin, p.N);
  const int round = rows_of_a_round(p.K * static_cast<int64_t>(sizeof(S)), p.stride_k != 1);
  for (int64_t i = begin; i < end; i += round) {
    const int count = static_cast<int>(smaller<int64_t>(round, end - i));
    for (int j = 0; j < count; ++j, at.next()) {
      rows[j] = dense_row(static_cast<const S*>(p.logits) + at.e * p.stride_e + at.n * p.stride_n, p.stride_k, p.K,
                          copy.get());
      facts[j].target = p.target[at.n * p.target_stride];
      facts[j].top = largest(rows[j], p.K);
    }
    for (int j = 0; j < count; ++j) {
      const S* row = rows[j];
      RowFacts<A>& f = facts[j];
      f.sum = sum_exponentials(row, p.K, f.top, [](int64_t, V, auto) {});
      if (f.target == p.ignore_index) continue;
      f.own = value_of(row[f.target]);
      f.rest = smooth ? smoothing_sum(row, class_weight, p.K, f.top) : A(0);
    }
    finish_rows(p, facts, i, count, total);
  }
}

template <class A>
inline A coefficient_of(const LossCoefficients& c, int64_t e, int64_t n) {
  A sum = 0;
  if (c.exit_weights) {
    sum = static_cast<const A*>(c.exit_weights)[e];
    if (c.grad_loss) sum = sum * static_cast<const A*>(c.grad_loss)[n * c.loss_stride_n];
  }
  if (c.grad_exit_losses) {
    const A given = static_cast<const A*>(c.grad_exit_losses)[e * c.exit_stride_e + n * c.exit_stride_n];
    sum = c.exit_weights ? sum + given : given;
  }
  if (c.denominator) sum = sum / *static_cast<const A*>(c.denominator);
  return sum * static_cast<A>(c.factor);
}

// One row's gradient is scale * (its exponentials) - level * w[k], and at the target less c * own as well.
template <class A>
struct RowGradient {
  A c, own, scale, level;
  // `whole`: what turns an exponential into a probability.
  RowGradient(A coefficient, A own_weight, A share, A total, A whole)
      : c(coefficient), own(own_weight), scale(c * (own + share * total) * whole), level(c * share) {}
};

template <class S>
inline void write_gradient_of_smoothed(S* out, const RowGradient<Acc<S>>& g, const Acc<S>* class_weight, int64_t k,
                                       Vec<Acc<S>> exponential, auto part) {
  using V = Vec<Acc<S>>;
  const V w = class_weight ? load(class_weight + k, part, Acc<S>(0)) : V::set(1);
  store(out + k, V::sub(V::mul(V::set(g.scale), exponential), V::mul(V::set(g.level), w)), part);
}

template <class S>
inline void clear_row(S* out, int64_t K) {
  const auto zero = Vec<Acc<S>>::set(0);
  for_vectors<Vec<Acc<S>>::n>(K, [&](int64_t k, auto part) { store(out + k, zero, part); });
}

template <class S>
void joint_cross_entropy_backward_as(const JointCrossEntropyBackwardParams& p, int64_t begin, int64_t end) {
  using A = Acc<S>;
  using V = Vec<A>;
  if (begin >= end) return;
  const A* class_weight = static_cast<const A*>(p.class_weight);
  const A smoothing = static_cast<A>(p.label_smoothing), share = smoothing / static_cast<A>(p.K);
  const A total = p.label_smoothing > 0 ? total_weight(class_weight, p.K) : A(0);
  Scratch<S> copy(p.stride_k == 1 ? 0 : p.K);
  RowCursor at(begin, p.N);
  for (int64_t i = begin; i < end; ++i, at.next()) {
    const int64_t y = p.target[at.n * p.target_stride];
    S* out = static_cast<S*>(p.grad_logits) + at.e * p.out_stride_e + at.n * p.out_stride_n;
    if (y == p.ignore_index) {
      clear_row(out, p.K);
      continue;
    }
    const S* row = dense_row(static_cast<const S*>(p.logits) + at.e * p.stride_e + at.n * p.stride_n, p.stride_k, p.K,
                             copy.get());
    const A top = static_cast<const A*>(p.row_max)[i], sum = static_cast<const A*>(p.row_sum)[i];
    const RowGradient<A> g(coefficient_of<A>(p.coefficients, at.e, at.n),
                           (A(1) - smoothing) * (class_weight ? class_weight[y] : A(1)), share, total, A(1) / sum);
    const A x_y = value_of(row[y]);  // `out` may be `row`
    const V scale = V::set(g.scale), shift = V::set(top);
    if (p.label_smoothing > 0) {
      for_vectors<V::n>(p.K, [&](int64_t k, auto part) {
        const V exponential = exponential_below(V::sub(load(row + k, part, A(0)), shift));
        write_gradient_of_smoothed(out, g, class_weight, k, exponential, part);
      });
    } else {
      for_vectors<V::n>(p.K, [&](int64_t k, auto part) {
        store(out + k, V::mul(scale, exponential_below(V::sub(load(row + k, part, A(0)), shift))), part);
      });
    }
    if constexpr (sizeof(S) == sizeof(A)) {
      out[y] -= g.c * g.own;
    } else {  // once more, whole, so that it is rounded once only
      const A own = Vec<A>::lane(exponential_below(V::set(x_y - top)), 0);
      put(out + y, (g.scale * own - (p.label_smoothing > 0 ? g.level * (class_weight ? class_weight[y] : A(1)) : A(0))) -
                       g.c * g.own);
    }
  }
}

// The loss's row and its gradient's: the exponentials of the sum are kept for the gradient, in its own place where that
// has the room, so that none is computed twice.
template <class S>
void joint_cross_entropy_grad_as(const JointCrossEntropyGradParams& q, int64_t begin, int64_t end) {
  using A = Acc<S>;
  using V = Vec<A>;
  if (begin >= end) return;
  const JointCrossEntropyParams& p = q.loss;
  const A* class_weight = static_cast<const A*>(p.class_weight);
  const bool smooth = p.label_smoothing > 0;
  const A smoothing = static_cast<A>(p.label_smoothing), share = smoothing / static_cast<A>(p.K);
  const A total = smooth ? total_weight(class_weight, p.K) : A(0);
  const bool scattered = q.out_stride_k != 1 && p.K > 1;
  Scratch<S> copy(p.stride_k == 1 ? 0 : p.K), spread(scattered ? p.K : 0);
  Scratch<A> wide(sizeof(S) == sizeof(A) ? 0 : p.K);
  RowFacts<A> facts[kRowsAtOnce];
  const S* rows[kRowsAtOnce];
  RowCursor ahead(begin, p.N), at(begin, p.N);
  const int round = rows_of_a_round(p.K * static_cast<int64_t>(sizeof(S)), p.stride_k != 1);
  for (int64_t i = begin; i < end; i += round) {
    const int count = static_cast<int>(smaller<int64_t>(round, end - i));
    for (int j = 0; j < count; ++j, ahead.next()) {
      rows[j] = dense_row(static_cast<const S*>(p.logits) + ahead.e * p.stride_e + ahead.n * p.stride_n, p.stride_k,
                          p.K, copy.get());
      facts[j].target = p.target[ahead.n * p.target_stride];
      facts[j].top = largest(rows[j], p.K);
    }
    for (int j = 0; j < count; ++j, at.next()) {
      const S* row = rows[j];
      S* const place = static_cast<S*>(q.grad_logits) + at.e * q.out_stride_e + at.n * q.out_stride_n;
      S* const out = scattered ? spread.get() : place;
      RowFacts<A>& f = facts[j];
      const bool ignored = f.target == p.ignore_index;
      if (ignored) {
        if (p.row_sum) f.sum = sum_exponentials(row, p.K, f.top, [](int64_t, V, auto) {});
        clear_row(out, p.K);
      } else {
        f.own = value_of(row[f.target]);
        f.rest = smooth ? smoothing_sum(row, class_weight, p.K, f.top) : A(0);
        A* values;  // `out` may be `row`: every element is read before it is replaced
        if constexpr (sizeof(S) == sizeof(A)) {
          values = out;
        } else {
          values = wide.get();
        }
        f.sum = sum_exponentials(row, p.K, f.top, [&](int64_t k, V value, auto part) { store(values + k, value, part); });
        const RowGradient<A> g(coefficient_of<A>(q.coefficients, at.e, at.n),
                               (A(1) - smoothing) * (class_weight ? class_weight[f.target] : A(1)), share, total,
                               A(1) / f.sum);
        const A own = values[f.target];
        const V scale = V::set(g.scale);
        if (smooth) {
          for_vectors<V::n>(p.K, [&](int64_t k, auto part) {
            write_gradient_of_smoothed(out, g, class_weight, k, load(values + k, part, A(0)), part);
          });
        } else {
          for_vectors<V::n>(p.K, [&](int64_t k, auto part) {
            store(out + k, V::mul(scale, load(values + k, part, A(0))), part);
          });
        }
        const A w = smooth ? g.level * (class_weight ? class_weight[f.target] : A(1)) : A(0);
        put(out + f.target, (g.scale * own - w) - g.c * g.own);
      }
      for (int64_t k = 0; scattered && k < p.K; ++k) place[k * q.out_stride_k] = out[k];
    }
    finish_rows(p, facts, i, count, total);
  }
}

template <class S>
void loss_grad_scale_as(const LossGradScaleParams& p, int64_t begin, int64_t end) {
  using A = Acc<S>;
  using V = Vec<A>;
  const A factor = *static_cast<const A*>(p.scale) / static_cast<A>(p.divisor);
  if (factor == A(1) || begin >= end) return;
  const V scale = V::set(factor);
  RowCursor at(begin, p.N);
  for (int64_t i = begin; i < end; ++i, at.next()) {
    S* row = static_cast<S*>(p.grad) + at.e * p.stride_e + at.n * p.stride_n;
    if (p.stride_k == 1) {
      for_vectors<V::n>(p.K, [&](int64_t k, auto part) {
        store(row + k, V::mul(scale, load(row + k, part, A(0))), part);
      });
    } else {
      for (int64_t k = 0; k < p.K; ++k) put(row + k * p.stride_k, factor * value_of(row[k * p.stride_k]));
    }
  }
}

void joint_cross_entropy(const JointCrossEntropyParams& p, int64_t begin, int64_t end) {
  AEP_BY_DTYPE(p.dtype, joint_cross_entropy_as, p, begin, end)
}
void joint_cross_entropy_backward(const JointCrossEntropyBackwardParams& p, int64_t begin, int64_t end) {
  AEP_BY_DTYPE(p.dtype, joint_cross_entropy_backward_as, p, begin, end)
}
void joint_cross_entropy_grad(const JointCrossEntropyGradParams& p, int64_t begin, int64_t end) {
  AEP_BY_DTYPE(p.loss.dtype, joint_cross_entropy_grad_as, p, begin, end)
}
void loss_grad_scale(const LossGradScaleParams& p, int64_t begin, int64_t end) {
  AEP_BY_DTYPE(p.dtype, loss_grad_scale_as, p, begin, end)
}

}  // namespace
}  // namespace aep::kernels::cpu::AEP_ISA_NAMESPACE

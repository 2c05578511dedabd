// Cross entropy of every (exit, sample) row by log-sum-exp, and its gradient by recomputation: no softmax is ever held.

namespace aep::kernels::cpu::AEP_ISA_NAMESPACE {
namespace {

// Sum of the class weights, in ascending order.
template <class A>
A total_weight(const A* class_weight, int64_t K) {
  if (!class_weight) return static_cast<A>(K);
  double sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += static_cast<double>(class_weight[k]);
  return static_cast<A>(sum);
}

template <class S>
Acc<S> largest(const S* row, int64_t K) {
  using A = Acc<S>;
  using V = Vec<A>;
  V m[2] = {V::set(-kInfinity<A>), V::set(-kInfinity<A>)};
  int64_t k = 0;
  for (; k + 2 * V::n <= K; k += 2 * V::n) {
    for (int u = 0; u < 2; ++u) m[u] = V::max(m[u], load(row + k + u * V::n, Full{}, A(0)));
  }
  for_vectors<V::n>(K - k, [&](int64_t i, auto part) { m[0] = V::max(m[0], load(row + k + i, part, -kInfinity<A>)); });
  return V::top(V::max(m[0], m[1]));  // a NaN in the row may be lost here: the sum of exponentials still meets it
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

template <class S>
void joint_cross_entropy_as(const JointCrossEntropyParams& p, int64_t begin, int64_t end) {
  using A = Acc<S>;
  using V = Vec<A>;
  if (begin >= end) return;
  const A* class_weight = static_cast<const A*>(p.class_weight);
  const A smoothing = static_cast<A>(p.label_smoothing);
  const A total = p.label_smoothing > 0 ? total_weight(class_weight, p.K) : A(0);
  Scratch<S> copy(p.stride_k == 1 ? 0 : p.K);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t e = i / p.N, n = i % p.N;
    const S* row =
        dense_row(static_cast<const S*>(p.logits) + e * p.stride_e + n * p.stride_n, p.stride_k, p.K, copy.get());
    const A m = largest(row, p.K);
    const V peak = V::set(m);
    V sum0 = V::set(0), sum1 = V::set(0);
    int64_t k = 0;
    for (; k + 2 * V::n <= p.K; k += 2 * V::n) {
      sum0 = V::add(sum0, exponential(V::sub(load(row + k, Full{}, A(0)), peak)));
      sum1 = V::add(sum1, exponential(V::sub(load(row + k + V::n, Full{}, A(0)), peak)));
    }
    for_vectors<V::n>(p.K - k, [&](int64_t j, auto part) {
      sum0 = V::add(sum0, exponential(V::sub(load(row + k + j, part, -kInfinity<A>), peak)));
    });
    const A log_sum = log_of(V::sum(V::add(sum0, sum1)));
    static_cast<A*>(p.log_sum_exp)[i] = m + log_sum;
    A& loss = static_cast<A*>(p.row_losses)[i];
    const int64_t y = p.target[n * p.target_stride];
    if (y == p.ignore_index) {
      loss = 0;
      continue;
    }
    const A nll = (m - value_of(row[y])) + log_sum;
    loss = class_weight ? class_weight[y] * nll : nll;
    if (p.label_smoothing > 0) {
      const A rest = total * log_sum - smoothing_sum(row, class_weight, p.K, m);
      loss = (A(1) - smoothing) * loss + smoothing / static_cast<A>(p.K) * rest;
    }
  }
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
  for (int64_t i = begin; i < end; ++i) {
    const int64_t e = i / p.N, n = i % p.N;
    const int64_t y = p.target[n * p.target_stride];
    S* out = static_cast<S*>(p.grad_logits) + e * p.out_stride_e + n * p.out_stride_n;
    if (y == p.ignore_index) {
      const V zero = V::set(0);
      for_vectors<V::n>(p.K, [&](int64_t k, auto part) { store(out + k, zero, part); });
      continue;
    }
    const S* row =
        dense_row(static_cast<const S*>(p.logits) + e * p.stride_e + n * p.stride_n, p.stride_k, p.K, copy.get());
    const A c = static_cast<const A*>(p.coefficients)[e * p.coef_stride_e + n * p.coef_stride_n];
    const A lse = static_cast<const A*>(p.log_sum_exp)[i];
    const A own = (A(1) - smoothing) * (class_weight ? class_weight[y] : A(1));  // the target's part of the loss
    const A x_y = value_of(row[y]);                                              // `out` may be `row`
    const V scale = V::set(c * (own + share * total)), shift = V::set(lse), level = V::set(c * share);
    if (p.label_smoothing > 0) {
      for_vectors<V::n>(p.K, [&](int64_t k, auto part) {
        const V w = class_weight ? load(class_weight + k, part, A(0)) : V::set(1);
        const V probability = exponential(V::sub(load(row + k, part, A(0)), shift));
        store(out + k, V::sub(V::mul(scale, probability), V::mul(level, w)), part);
      });
    } else {
      for_vectors<V::n>(p.K, [&](int64_t k, auto part) {
        store(out + k, V::mul(scale, exponential(V::sub(load(row + k, part, A(0)), shift))), part);
      });
    }
    // The target's class once more, whole, so that it is rounded once only.
    const A w_y = class_weight ? class_weight[y] : A(1);
    const A p_y = exponential_of(x_y - lse);
    put(out + y, p.label_smoothing > 0 ? c * ((own + share * total) * p_y - share * w_y - own) : c * (own * p_y - own));
  }
}

void joint_cross_entropy(const JointCrossEntropyParams& p, int64_t begin, int64_t end) {
  AEP_BY_DTYPE(p.dtype, joint_cross_entropy_as, p, begin, end)
}
void joint_cross_entropy_backward(const JointCrossEntropyBackwardParams& p, int64_t begin, int64_t end) {
  AEP_BY_DTYPE(p.dtype, joint_cross_entropy_backward_as, p, begin, end)
}

}  // namespace
}  // namespace aep::kernels::cpu::AEP_ISA_NAMESPACE

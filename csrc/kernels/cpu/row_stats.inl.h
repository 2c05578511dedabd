// Softmax statistics of one row: the largest two values come from the pass that made the row, one exp pass gives the
// rest.

namespace aep::kernels::cpu::AEP_ISA_NAMESPACE {
namespace {

struct RowStats {
  float confidence, entropy, margin;
  int64_t argmax;  // of the values before the division; the first NaN if there is one
};

// The largest two values seen, lane by lane. NaN may or may not get through: the exp pass finds it.
template <class A>
struct TopTwo {
  using V = Vec<A>;
  V first = V::set(-kInfinity<A>), second = V::set(-kInfinity<A>);

  void add(V x) {
    second = V::max(second, V::min(first, x));
    first = V::max(first, x);
  }
  void merge(const TopTwo& o) {
    second = V::max(V::max(second, o.second), V::min(first, o.first));
    first = V::max(first, o.first);
  }
  // The second largest is the largest itself where several lanes hold it; else that lane gives way (-inf) to the rest.
  void reduce(A& top, A& next) const {
    top = V::top(first);
    const auto at_top = V::eq(first, V::set(top));
    const unsigned where = V::bits(at_top);
    const A rest = V::top(V::max(V::add_if(at_top, first, V::set(-kInfinity<A>)), second));
    next = where & (where - 1) ? top : rest;
  }
};

// Index of the first value equal to `x`; -1 if there is none.
template <class S>
int64_t first_equal(const S* row, int64_t K, Acc<S> x) {
  using V = Vec<Acc<S>>;
  const V wanted = V::set(x);
  int64_t k = 0;
  for (; k + V::n <= K; k += V::n) {
    const unsigned hit = V::bits(V::eq(load(row + k, Full{}, Acc<S>(0)), wanted));
    if (hit) return k + __builtin_ctz(hit);
  }
  for (; k < K; ++k) {
    if (value_of(row[k]) == x) return k;
  }
  return -1;
}

template <class S>
int64_t first_nan(const S* row, int64_t K) {
  for (int64_t k = 0; k < K; ++k) {
    if (value_of(row[k]) != value_of(row[k])) return k;
  }
  return -1;
}

// Index of the largest value: the first NaN, else the lowest index among equals.
template <class S>
int64_t argmax_of(const S* row, int64_t K) {
  using V = Vec<Acc<S>>;
  V best = V::set(-kInfinity<Acc<S>>);
  bool nan = false;
  for_vectors<V::n>(K, [&](int64_t k, auto part) {
    const V x = load(row + k, part, -kInfinity<Acc<S>>);
    nan |= V::bits(V::unordered(x, x)) != 0;
    best = V::max(best, x);
  });
  if (nan) return first_nan(row, K);
  Acc<S> top = -kInfinity<Acc<S>>;
  for (int i = 0; i < V::n; ++i) top = larger(top, V::lane(best, i));
  return first_equal(row, K, top);
}

// What the exp pass over a row finds. With d = z - max z <= 0: p = e^d / sum, entropy = log sum - (sum of e^d d) / sum.
template <class A>
struct RowSums {
  A sum, weighted;  // of e^d, of e^d d
  A next;           // d of the second largest
};

template <class A>
inline RowStats make_stats(const RowSums<A>& s, int64_t argmax) {
  return {static_cast<float>(A(1) / s.sum), static_cast<float>(log_of(s.sum) - s.weighted / s.sum),
          static_cast<float>((A(1) - exponential_of(s.next)) / s.sum), argmax};
}

template <class S>
RowStats nan_stats(const S* row, int64_t K, Acc<S> top) {
  const int64_t at = first_nan(row, K);
  const float nan = kNaN<float>;
  return {nan, nan, nan, at >= 0 ? at : first_equal(row, K, top)};
}

// The general case (a divisor that is negative, zero, NaN or has no finite reciprocal, or a quotient that overflows):
// plain and slow.
template <class S>
RowStats stats_by_division(const S* row, int64_t K, Acc<S> divisor) {
  using A = Acc<S>;
  A top = -kInfinity<A>, next = -kInfinity<A>;
  bool nan = false;
  for (int64_t k = 0; k < K; ++k) {
    const A z = value_of(row[k]) / divisor;
    nan |= z != z;
    next = larger(next, smaller(top, z));
    top = larger(top, z);
  }
  const int64_t argmax = argmax_of(row, K);
  A sum = 0, weighted = 0;
  for (int64_t k = 0; k < K; ++k) {
    A d = value_of(row[k]) / divisor - top;
    d = larger(d, A(-10000));  // the exponential is 0 there, and 0 * -inf must be 0
    const A e = exponential_of(d);
    sum += e;
    weighted += e * d;
  }
  if (nan || !(top - top == 0)) return {kNaN<float>, kNaN<float>, kNaN<float>, argmax};
  return make_stats(RowSums<A>{sum, weighted, next - top}, argmax);
}

// What divides the logits, with what is the same for every row.
template <class A>
struct Divisor {
  A value, inverse;
  bool plain;  // positive, with a finite reciprocal
  explicit Divisor(A divisor)
      : value(divisor),
        inverse(A(1) / divisor),
        plain(divisor > 0 && inverse > 0 && inverse < kInfinity<A>) {}
};

// The exp pass. `top` and `next` are the row's largest two values (anything if the row holds a NaN). False where the
// row needs unusual_stats() instead.
template <class S>
inline bool row_sums(const S* row, int64_t K, Acc<S> top, Acc<S> next, const Divisor<Acc<S>>& divisor,
                     RowSums<Acc<S>>& sums) {
  using A = Acc<S>;
  using V = Vec<A>;
  const A inverse = divisor.inverse;
  const A judged_top = top / divisor.value;  // must be finite, as z itself: below only differences are formed
  if (!(divisor.plain && judged_top - judged_top == 0)) return false;
  const V peak = V::set(top), scale = V::set(inverse), floor = V::set(A(-10000));
  V sum0 = V::set(0), sum1 = V::set(0), weighted0 = V::set(0), weighted1 = V::set(0);
  const auto step = [&](V x, V& sum, V& weighted) {
    const V d = V::max(floor, V::mul(V::sub(x, peak), scale));  // keeps NaN; the floor avoids 0 * -inf
    const V e = exponential(d);
    sum = V::add(sum, e);
    weighted = V::fma(e, d, weighted);
  };
  int64_t k = 0;
  for (; k + 2 * V::n <= K; k += 2 * V::n) {
    step(load(row + k, Full{}, A(0)), sum0, weighted0);
    step(load(row + k + V::n, Full{}, A(0)), sum1, weighted1);
  }
  for_vectors<V::n>(K - k,
                    [&](int64_t i, auto part) { step(load(row + k + i, part, -kInfinity<A>), sum0, weighted0); });
  sums.sum = V::sum(V::add(sum0, sum1));
  sums.weighted = V::sum(V::add(weighted0, weighted1));
  sums.next = (next - top) * inverse;
  return sums.sum - sums.sum == 0;
}

template <class S>
RowStats unusual_stats(const S* row, int64_t K, Acc<S> top, const Divisor<Acc<S>>& divisor) {
  const Acc<S> judged_top = top / divisor.value;
  if (!(divisor.plain && judged_top - judged_top == 0)) return stats_by_division(row, K, divisor.value);
  return nan_stats(row, K, top);
}

template <class S>
RowStats row_stats(const S* row, int64_t K, Acc<S> top, Acc<S> next, const Divisor<Acc<S>>& divisor) {
  RowSums<Acc<S>> sums;
  if (!row_sums(row, K, top, next, divisor, sums)) return unusual_stats(row, K, top, divisor);
  return make_stats(sums, first_equal(row, K, top));
}

// make_stats() for up to a vector's worth of rows at once, the same to the bit. stats: (count, 3).
template <class A>
void make_stats_of_rows(const A* sum, const A* weighted, const A* next, int count, float* stats) {
  using V = Vec<A>;
  const V all = load(sum, Full{}, A(0)), one = V::set(1);
  A confidence[V::n], share[V::n], margin[V::n];
  store(confidence, V::div(one, all), Full{});
  store(share, V::div(load(weighted, Full{}, A(0)), all), Full{});
  store(margin, V::div(V::sub(one, exponential(load(next, Full{}, A(0)))), all), Full{});
  for (int i = 0; i < count; ++i) {
    stats[i * 3 + 0] = static_cast<float>(confidence[i]);
    stats[i * 3 + 1] = static_cast<float>(log_of(sum[i]) - share[i]);
    stats[i * 3 + 2] = static_cast<float>(margin[i]);
  }
}

}  // namespace
}  // namespace aep::kernels::cpu::AEP_ISA_NAMESPACE

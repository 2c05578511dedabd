// Cross entropies of exits and prefix ensembles, distillation, and their gradient. A sample's E x K logits stay in the
// first-level cache while all its softmaxes are formed. For the backward the softmaxes' shifts and sums are kept (nothing
// else), and the exponentials formed again.

namespace aep::kernels::cpu::AEP_ISA_NAMESPACE {
namespace {

// e^x: half the work of exponential() where powers of two are made of bits. 2^n * e^r with a polynomial of degree 5 on
// [-ln 2 / 2, ln 2 / 2] (least maximal relative error with value 1 at 0: 9.2e-8). Relative error at most 2.5e-7 + 3e-9 *
// |x|; the second term is from ln 2 in one part. Exactly 1 for 0, 0 below -87.7, infinite above 88.8; NaN stays NaN.
inline Vec<float> exponential_of_logit(Vec<float> x) {
  using V = Vec<float>;
  const V bias = V::set(12582912.0f + 127.0f);  // 1.5 * 2^23 rounds to a whole number, whose low bits are the exponent's
  x = V::min(V::set(89.0f), V::max(V::set(-88.0f), x));  // this order of operands keeps NaN
  const V t = V::fma(x, V::set(1.44269504088896341f), bias);
  const V r = V::fma(V::sub(t, bias), V::set(-0.69314718055994531f), x);
  V y = V::set(8.290268222e-03f);
  y = V::fma(y, r, V::set(4.189792275e-02f));
  y = V::fma(y, r, V::set(1.666763683e-01f));
  y = V::fma(y, r, V::set(4.999915024e-01f));
  y = V::fma(y, r, V::set(9.999997448e-01f));
  y = V::fma(y, r, V::set(1.0f));
  return V::times_power(y, t);
}
inline Vec<double> exponential_of_logit(Vec<double> x) { return exponential(x); }

// Sums of exponentials up to here are as good as any: they hold a 1, that of the label. Beyond, the maximum is sought.
template <class A>
constexpr A kMost = sizeof(A) == 8 ? static_cast<A>(1e200) : static_cast<A>(1e24f);
// Stands behind a row's end: its exponential is 0, and its product with 0 too.
template <class A>
constexpr A kNothing = static_cast<A>(-1e30f);

// A NaN in the row may be lost here: the sum of exponentials still meets it.
template <class S>
inline Acc<S> largest(const S* row, int64_t K) {
  using A = Acc<S>;
  using V = Vec<A>;
  V m = V::set(-kInfinity<A>);
  for_vectors<V::n>(K, [&](int64_t k, auto part) { m = V::max(m, load(row + k, part, -kInfinity<A>)); });
  return V::top(m);
}

template <class S>
inline Acc<S> sum_exponentials(const S* row, int64_t K, Acc<S> shift) {
  using A = Acc<S>;
  using V = Vec<A>;
  const V s = V::set(shift);
  V sum[2] = {V::set(0), V::set(0)};
  int64_t k = 0;
  for (; k + 2 * V::n <= K; k += 2 * V::n) {
    for (int u = 0; u < 2; ++u)
      sum[u] = V::add(sum[u], exponential_of_logit(V::sub(load(row + k + u * V::n, Full{}, A(0)), s)));
  }
  for_vectors<V::n>(K - k, [&](int64_t i, auto part) {
    sum[0] = V::add(sum[0], exponential_of_logit(V::sub(load(row + k + i, part, kNothing<A>), s)));
  });
  return V::sum(V::add(sum[0], sum[1]));
}

template <class S>
inline void clear_row(S* out, int64_t K) {
  const auto zero = Vec<Acc<S>>::set(0);
  for_vectors<Vec<Acc<S>>::n>(K, [&](int64_t k, auto part) { store(out + k, zero, part); });
}

template <class A>
inline A coefficient_of(const LossCoefficients& c, int64_t e, int64_t n) {
  A sum = c.weights ? static_cast<const A*>(c.weights)[e] : static_cast<A>(c.weight);
  if (c.grad_loss) sum = sum * static_cast<const A*>(c.grad_loss)[n * c.loss_stride_n];
  if (c.grad_losses) sum = sum + static_cast<const A*>(c.grad_losses)[e * c.stride_e + n * c.stride_n];
  if (c.denominator) sum = sum / *static_cast<const A*>(c.denominator);
  return sum * static_cast<A>(c.factor);
}

// The distribution t that a sample's classes should have, times the class weights.
template <class A>
class Target {
 public:
  // Whether t has more than the label's entry.
  const bool dense;
  int64_t label = 0;  // where t is largest, or nearly
  A mass = 0;         // the sum of t

  explicit Target(const MultiExitLossParams& p)
      : dense(!p.target || p.label_smoothing > 0),
        p_(p),
        weight_(static_cast<const A*>(p.class_weight)),
        share_(static_cast<A>(p.label_smoothing) / static_cast<A>(p.K)),
        values_(p.K) {
    if (!p.target) return;
    double sum = 0;
    for (int64_t k = 0; k < p.K; ++k) sum += static_cast<double>(values_[k] = share_ * weight(k));
    shared_ = static_cast<A>(sum);
  }

  const A* values() const { return values_.get(); }

  // False where the sample does not count.
  bool load_sample(int64_t n) {
    const A own = A(1) - static_cast<A>(p_.label_smoothing);
    if (p_.target) {
      const int64_t y = p_.target[n * p_.target_stride];
      if (y == p_.ignore_index) return false;
      values_[label] = share_ * weight(label);
      label = y;
      values_[y] += own * weight(y);
      mass = shared_ + own * weight(y);
      return true;
    }
    using V = Vec<A>;
    const A* q = static_cast<const A*>(p_.probabilities) + n * p_.target_stride;
    V sum = V::set(0);
    for_vectors<V::n>(p_.K, [&](int64_t k, auto part) {
      V t = V::add(V::mul(V::set(own), load(q + k, part, A(0))), V::set(share_));
      if (weight_) t = V::mul(t, load(weight_ + k, part, A(0)));
      store(values_.get() + k, t, part);
      sum = V::add(sum, load(values_.get() + k, part, A(0)));
    });
    mass = V::sum(sum);
    const A most = largest(q, p_.K);
    for (label = 0; label < p_.K - 1 && !(q[label] == most);) ++label;
    return true;
  }

 private:
  A weight(int64_t k) const { return weight_ ? weight_[k] : A(1); }

  const MultiExitLossParams& p_;
  const A* weight_;
  const A share_;
  A shared_ = 0;
  Scratch<A> values_;
};

// One softmax of a sample: the label's score, what is subtracted from all, the sum of exponentials, and the sum of t times
// (score - shift).
template <class A>
struct Softmax {
  A own, shift, sum, dot;
};

// A sample's rows, and all softmaxes formed of them.
template <class S>
class Sample {
  using A = Acc<S>;
  using V = Vec<A>;

 public:
  explicit Sample(const MultiExitLossParams& p)
      : p_(p),
        E_(p.E),
        K_(p.K),
        terms_(p.prefixes || p.distillation),
        target_(p),
        copy_(p.stride_k == 1 ? 0 : p.E * p.K),
        rows_(p.E),
        exits_(p.E),
        prefixes_(p.E),
        students_(p.E),
        shares_(2 * p.E),
        lanes_(terms_ ? 6 * p.E * V::n : 0) {
    const A* b = static_cast<const A*>(p.output_weights);
    A sum = 0;
    for (int64_t e = 0; e < E_; ++e) {
      shares_[e] = b ? b[e] : A(1);
      sum = sum + shares_[e];
      shares_[E_ + e] = A(1) / sum;
    }
    cooling_ = static_cast<A>(1 / p.temperature);
    for (int whole = 1; whole <= 4; ++whole) power_ = p.temperature == whole ? whole : power_;
  }

  // False where the sample does not count; then nothing else has a meaning.
  bool load_sample(int64_t n) {
    n_ = n;
    if (!target_.load_sample(n)) return false;
    for (int64_t e = 0; e < E_; ++e) {
      rows_[e] = dense_row(static_cast<const S*>(p_.logits) + e * p_.stride_e + n * p_.stride_n, p_.stride_k, K_,
                           copy_.get() + (p_.stride_k == 1 ? 0 : e * K_));
    }
    return true;
  }

  // Forms the softmaxes.
  void forward() {
    const int64_t y = target_.label;
    A running = 0;
    for (int64_t e = 0; e < E_; ++e) {
      const A own = value_of(rows_[e][y]);
      exits_[e].own = exits_[e].shift = own;
      running = e == 0 ? shares_[0] * own : running + shares_[e] * own;
      prefixes_[e].own = prefixes_[e].shift = e == 0 ? own : running * shares_[E_ + e];
    }
    if (terms_) {
      if (!form_terms()) {
        seek_maxima();
        form_terms();
      }
      return;
    }
    for (int64_t e = 0; e < E_; ++e) {
      Softmax<A>& own = exits_[e];
      own.sum = sum_exponentials(rows_[e], K_, own.shift);
      if (!(own.sum < kMost<A>)) {
        own.shift = largest(rows_[e], K_);
        own.sum = sum_exponentials(rows_[e], K_, own.shift);
      }
      if (!target_.dense) {
        own.dot = target_.mass * (own.own - own.shift);
        continue;
      }
      V dot = V::set(0);
      for_vectors<V::n>(K_, [&](int64_t k, auto part) {
        const V d = V::sub(load(rows_[e] + k, part, kNothing<A>), V::set(own.shift));
        dot = V::add(dot, V::mul(load(target_.values() + k, part, A(0)), d));
      });
      own.dot = V::sum(dot);
    }
  }

  // The sample's losses, from the softmaxes.
  void write_losses() const {
    const auto out = [&](int term, int64_t e) -> A& { return static_cast<A*>(p_.row_losses[term])[e * p_.N + n_]; };
    const A teacher = p_.distillation ? log_of(teacher_sum_) : A(0), last = prefixes_[E_ - 1].shift;
    for (int64_t e = 0; e < E_; ++e) {
      out(0, e) = target_.mass * log_of(exits_[e].sum) - exits_[e].dot;
      if (p_.prefixes) out(1, e) = target_.mass * log_of(prefixes_[e].sum) - prefixes_[e].dot;
      if (p_.distillation) {
        const Softmax<A>& own = students_[e];  // its dot: the sum of the teacher's exponentials times (R_last - O_e)
        out(2, e) = (own.dot / teacher_sum_ + (exits_[e].shift - last)) * cooling_ + (log_of(own.sum) - teacher);
      }
    }
  }

  // Losses, and what is kept, of a sample that does not count.
  void clear() {
    for (void* losses : p_.row_losses) {
      for (int64_t e = 0; losses && e < E_; ++e) static_cast<A*>(losses)[e * p_.N + n_] = 0;
    }
    if (p_.kept) exchange([](A& kept, const A&) { kept = 0; });
  }

  // Into kept, and back.
  void keep() { exchange([](A& kept, const A& own) { kept = own; }); }
  void recall() { exchange([](const A& kept, A& own) { own = kept; }); }

  // The gradient into out + e * stride_e, which may be the logits.
  void backward(const LossCoefficients (&c)[3], S* out, int64_t stride_e) {
    const A* t = target_.values();
    if (!terms_) {
      for (int64_t e = 0; e < E_; ++e) {
        const A own = coefficient_of<A>(c[0], e, n_);
        const V scale = V::set(own * target_.mass / exits_[e].sum), level = V::set(-own), shift = V::set(exits_[e].shift);
        const S* row = rows_[e];
        S* const to = out + e * stride_e;
        for_vectors<V::n>(K_, [&](int64_t k, auto part) {
          const V exponential = exponential_of_logit(V::sub(load(row + k, part, A(0)), shift));
          store(to + k, V::fma(level, load(t + k, part, A(0)), V::mul(scale, exponential)), part);
        });
      }
      return;
    }
    // The gradient of exit e: own[e] * e^(O_e - shift) + b_e * (the sum over j >= e, or e alone where the prefix is
    // detached, of prefix[j] * e^(R_j - shift)) + student[e] * e^((O_e - shift) / T) - teacher[e] * e^((R_last - shift) /
    // T) - level[e] * t.
    Scratch<A, 40> numbers(5 * E_);
    A *const own = numbers.get(), *const prefix = own + E_, *const student = prefix + E_, *const teacher = student + E_,
             *const level = teacher + E_, later = 0;
    for (int64_t e = E_ - 1; e >= 0; --e) {
      const A a = coefficient_of<A>(c[0], e, n_);
      own[e] = a * target_.mass / exits_[e].sum, level[e] = a;
      prefix[e] = student[e] = teacher[e] = 0;
      if (p_.prefixes) {
        const A share = coefficient_of<A>(c[1], e, n_) * shares_[E_ + e];
        later = p_.detach_prefix ? share : later + share;
        level[e] += later * shares_[e];
        if (e == 0) {  // R_0 is O_0
          own[0] += share * shares_[0] * target_.mass / exits_[0].sum;
        } else {
          prefix[e] = share * target_.mass / prefixes_[e].sum;
        }
      }
      if (p_.distillation) {
        const A d = coefficient_of<A>(c[2], e, n_) * cooling_;
        student[e] = d / students_[e].sum, teacher[e] = d / teacher_sum_;
      }
    }
    A *const direct = lanes_.get(), *const through = direct + E_ * V::n;
    const V cooling = V::set(cooling_);
    for_vectors<V::n>(K_, [&](int64_t k, auto part) {
      V running = V::set(0), taught = V::set(0);
      for (int64_t e = 0; e < E_; ++e) {
        const V x = load(rows_[e] + k, part, kNothing<A>), d = V::sub(x, V::set(exits_[e].shift));
        V exponential = d, cooled = d;
        softened(d, cooling, exponential, cooled);
        V sum = V::mul(V::set(own[e]), exponential);
        if (p_.distillation) sum = V::fma(V::set(student[e]), cooled, sum);
        store(direct + e * V::n, sum, Full{});
        running = e == 0 ? V::mul(V::set(shares_[0]), x) : V::add(running, V::mul(V::set(shares_[e]), x));
        const V r = e == 0 ? d : V::sub(V::mul(running, V::set(shares_[E_ + e])), V::set(prefixes_[e].shift));
        if (e + 1 == E_ && p_.distillation) {
          if (e > 0) softened(r, cooling, exponential, taught);
          else taught = cooled;
        } else if (e > 0 && p_.prefixes) {
          exponential = exponential_of_logit(r);
        }
        store(through + e * V::n, V::mul(V::set(prefix[e]), exponential), Full{});
      }
      const V wanted = load(t + k, part, A(0));
      V sum = V::set(0);
      for (int64_t e = E_ - 1; e >= 0; --e) {
        const V own_part = load(through + e * V::n, Full{}, A(0));
        sum = p_.detach_prefix ? own_part : V::add(sum, own_part);
        V grad = V::fma(V::set(shares_[e]), sum, load(direct + e * V::n, Full{}, A(0)));
        if (p_.distillation) grad = V::fma(V::set(-teacher[e]), taught, grad);
        store(out + e * stride_e + k, V::fma(V::set(-level[e]), wanted, grad), part);
      }
    });
  }

 private:
  // e^d, and e^(d / T) where there is a distillation: one of them a power of the other for small whole T.
  void softened(V d, V cooling, V& exponential, V& cooled) const {
    if (!p_.distillation) {
      exponential = exponential_of_logit(d);
      return;
    }
    cooled = exponential_of_logit(V::mul(d, cooling));
    if (power_ == 0) {
      exponential = exponential_of_logit(d);
      return;
    }
    exponential = power_ == 1 ? cooled : V::mul(cooled, cooled);
    if (power_ == 3) exponential = V::mul(exponential, cooled);
    if (power_ == 4) exponential = V::mul(exponential, exponential);
  }

  // All softmaxes relative to their shifts, in one pass; false where a sum is not of use.
  bool form_terms() {
    // One vector of partial sums an exit for each: exits, prefixes, students; exits' and prefixes' dots; and the
    // students', which need the teacher.
    const auto lanes = [&](int kind, int64_t e) { return lanes_.get() + (kind * E_ + e) * V::n; };
    const auto add = [](A* to, V value) { store(to, V::add(load(to, Full{}, A(0)), value), Full{}); };
    for (int64_t i = 0; i < 6 * E_; ++i) store(lanes_.get() + i * V::n, V::set(0), Full{});
    const V cooling = V::set(cooling_);
    const bool dense = target_.dense;
    V teacher_sum = V::set(0);
    for_vectors<V::n>(K_, [&](int64_t k, auto part) {
      V running = V::set(0), score = V::set(0), taught = V::set(0), wanted = V::set(0);
      if (dense) wanted = load(target_.values() + k, part, A(0));
      for (int64_t e = 0; e < E_; ++e) {
        const V x = load(rows_[e] + k, part, kNothing<A>), d = V::sub(x, V::set(exits_[e].shift));
        V exponential = d, cooled = d;
        softened(d, cooling, exponential, cooled);
        add(lanes(0, e), exponential);
        if (p_.distillation) add(lanes(2, e), cooled);
        if (dense) add(lanes(3, e), V::mul(wanted, d));
        running = e == 0 ? V::mul(V::set(shares_[0]), x) : V::add(running, V::mul(V::set(shares_[e]), x));
        score = e == 0 ? x : V::mul(running, V::set(shares_[E_ + e]));
        const V r = V::sub(score, V::set(prefixes_[e].shift));
        if (e + 1 == E_ && p_.distillation) {
          if (e > 0) softened(r, cooling, exponential, taught);
          else taught = cooled;
        } else if (e > 0 && p_.prefixes) {
          exponential = exponential_of_logit(r);
        }
        add(lanes(1, e), exponential);
        if (dense) add(lanes(4, e), V::mul(wanted, r));
      }
      if (!p_.distillation) return;
      teacher_sum = V::add(teacher_sum, taught);
      const auto any = V::gt(taught, V::set(0));  // where it is 0, both scores may be -inf
      for (int64_t e = 0; e < E_; ++e) {
        const V behind = V::sub(score, load(rows_[e] + k, part, kNothing<A>));
        A* const to = lanes(5, e);
        store(to, V::add_if(any, load(to, Full{}, A(0)), V::mul(taught, behind)), Full{});
      }
    });
    const auto sum = [&](int kind, int64_t e) { return V::sum(load(lanes(kind, e), Full{}, A(0))); };
    bool good = true;
    teacher_sum_ = V::sum(teacher_sum);
    for (int64_t e = 0; e < E_; ++e) {
      Softmax<A> &exit = exits_[e], &prefix = prefixes_[e], &student = students_[e];
      exit.sum = sum(0, e), prefix.sum = sum(1, e), student.sum = sum(2, e);
      if (dense) {
        exit.dot = sum(3, e), prefix.dot = sum(4, e);
      } else {
        exit.dot = target_.mass * (exit.own - exit.shift), prefix.dot = target_.mass * (prefix.own - prefix.shift);
      }
      student.dot = sum(5, e);
      good = good && exit.sum < kMost<A> && prefix.sum < kMost<A> && student.sum < kMost<A>;
    }
    return good && teacher_sum_ < kMost<A>;
  }

  // Shifts at the largest scores, where the label's are far below.
  void seek_maxima() {
    for (int64_t e = 0; e < E_; ++e) exits_[e].shift = prefixes_[e].shift = -kInfinity<A>;
    for (int64_t k = 0; k < K_; ++k) {
      A running = 0;
      for (int64_t e = 0; e < E_; ++e) {
        const A x = value_of(rows_[e][k]);
        running = e == 0 ? shares_[0] * x : running + shares_[e] * x;
        exits_[e].shift = larger(exits_[e].shift, x);
        prefixes_[e].shift = larger(prefixes_[e].shift, e == 0 ? x : running * shares_[E_ + e]);
      }
    }
  }

  template <class F>
  void exchange(F&& f) {
    A* kept = static_cast<A*>(p_.kept);
    const int64_t size = E_ * p_.N;
    for (int64_t e = 0; e < E_; ++e) {
      const int64_t at = e * p_.N + n_;
      f(kept[at], exits_[e].shift), f(kept[size + at], exits_[e].sum);
      if (!terms_) continue;
      f(kept[2 * size + at], prefixes_[e].shift), f(kept[3 * size + at], prefixes_[e].sum);
      f(kept[4 * size + at], students_[e].sum);
    }
    if (terms_) f(kept[5 * size + n_], teacher_sum_);
  }

  const MultiExitLossParams& p_;
  const int64_t E_, K_;
  const bool terms_;
  Target<A> target_;
  Scratch<S> copy_;
  Scratch<const S*, 8> rows_;
  Scratch<Softmax<A>, 8> exits_, prefixes_, students_;
  Scratch<A, 16> shares_;  // the output weights, then the reciprocals of their sums up to each exit
  Scratch<A> lanes_;
  A teacher_sum_ = 0;
  A cooling_;
  int power_ = 0;
  int64_t n_ = 0;
};

template <class S>
void multi_exit_loss_as(const MultiExitLossParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  Sample<S> sample(p);
  for (int64_t n = begin; n < end; ++n) {
    if (sample.load_sample(n)) {
      sample.forward();
      sample.write_losses();
      if (p.kept) sample.keep();
    } else {
      sample.clear();
    }
  }
}

// With the losses, or from what their pass has kept.
template <class S>
void multi_exit_loss_grad_as(const MultiExitLossGradParams& q, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const MultiExitLossParams& p = q.loss;
  const bool scattered = q.out_stride_k != 1 && p.K > 1;
  Sample<S> sample(p);
  Scratch<S> spread(scattered ? p.E * p.K : 0);
  for (int64_t n = begin; n < end; ++n) {
    S* const place = static_cast<S*>(q.grad_logits) + n * q.out_stride_n;
    S* const out = scattered ? spread.get() : place;
    const int64_t stride_e = scattered ? p.K : q.out_stride_e;
    if (!sample.load_sample(n)) {
      if (p.row_losses[0]) sample.clear();
      for (int64_t e = 0; e < p.E; ++e) clear_row(out + e * stride_e, p.K);
    } else {
      if (p.row_losses[0]) {
        sample.forward();
        sample.write_losses();
      } else {
        sample.recall();
      }
      sample.backward(q.coefficients, out, stride_e);
    }
    for (int64_t e = 0; scattered && e < p.E; ++e) {
      for (int64_t k = 0; k < p.K; ++k) place[e * q.out_stride_e + k * q.out_stride_k] = out[e * p.K + k];
    }
  }
}

template <class S>
void loss_grad_scale_as(const LossGradScaleParams& p, int64_t begin, int64_t end) {
  using A = Acc<S>;
  using V = Vec<A>;
  const A factor = *static_cast<const A*>(p.scale) / static_cast<A>(p.divisor);
  if (factor == A(1) || begin >= end) return;
  const V scale = V::set(factor);
  for (int64_t i = begin; i < end; ++i) {
    S* row = static_cast<S*>(p.grad) + i / p.N * p.stride_e + i % p.N * p.stride_n;
    if (p.stride_k == 1) {
      for_vectors<V::n>(p.K, [&](int64_t k, auto part) {
        store(row + k, V::mul(scale, load(row + k, part, A(0))), part);
      });
    } else {
      for (int64_t k = 0; k < p.K; ++k) put(row + k * p.stride_k, factor * value_of(row[k * p.stride_k]));
    }
  }
}

void multi_exit_loss(const MultiExitLossParams& p, int64_t begin, int64_t end) {
  AEP_BY_DTYPE(p.dtype, multi_exit_loss_as, p, begin, end)
}
void multi_exit_loss_grad(const MultiExitLossGradParams& p, int64_t begin, int64_t end) {
  AEP_BY_DTYPE(p.loss.dtype, multi_exit_loss_grad_as, p, begin, end)
}
void loss_grad_scale(const LossGradScaleParams& p, int64_t begin, int64_t end) {
  AEP_BY_DTYPE(p.dtype, loss_grad_scale_as, p, begin, end)
}

}  // namespace
}  // namespace aep::kernels::cpu::AEP_ISA_NAMESPACE

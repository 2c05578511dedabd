// Top-1 and top-5 counts of every subset of the exits.
//
// A subset's scores are prefix + product, one exit after the other in ascending order, so that they equal the plain
// weighted sum bit for bit. The subsets are walked depth first; the last two exits are taken together: four subsets
// from three loads, nothing stored.
// Two forms, chosen sample by sample:
//   Rows:  one sample, classes in the lanes. Any values (NaN, infinities), any number of classes.
//   Lanes: one sample per lane, over those classes only that could reach the target's rank in SOME subset. A class that
//          lies below the target at every exit, by more than rounding could make up for, is behind it in every subset.
//          Trained networks leave a handful of candidates, near-chance logits leave nearly all of them: these take the
//          first form.

namespace aep::kernels::cpu::AEP_ISA_NAMESPACE {
namespace {

template <class A>
constexpr A kUnitRoundoff = sizeof(A) == 4 ? static_cast<A>(0x1p-24) : static_cast<A>(0x1p-53);
// Products up to this size cannot overflow a sum over 16 exits; kPad lies below any such sum, and its own sums are
// finite too.
template <class A>
constexpr A kSafe = sizeof(A) == 4 ? static_cast<A>(0x1p+118) : static_cast<A>(0x1p+1000);
template <class A>
constexpr A kPad = -4 * kSafe<A>;

inline void count_ranks(int64_t* counts, int64_t mask, int64_t rank) {
  counts[(mask - 1) * 2 + 0] += rank < 1;
  counts[(mask - 1) * 2 + 1] += rank < 5;
}

// ---- one sample at a time, classes in the lanes ----
template <class A>
class SubsetRows {
 public:
  using V = Vec<A>;

  SubsetRows(int64_t E, int64_t K)
      : E_(E), K_(K), width_((K + V::n - 1) / V::n * V::n), products_(E * width_), sums_((E > 2 ? E - 2 : 0) * width_) {
    // The lanes behind the last class stay zero and are masked when counted.
    for (int64_t i = 0; i < E * width_; ++i) products_[i] = 0;
  }

  A* products(int64_t e) const { return products_.get() + e * width_; }

  // `safe`: no sum can be NaN.
  void count(int64_t target, bool safe, int64_t* counts) {
    target_ = target;
    counts_ = counts;
    if (safe) {
      walk<false>(0, 0, nullptr, A(0));
    } else {
      walk<true>(0, 0, nullptr, A(0));
    }
  }

 private:
  template <bool kCheck>
  void walk(int64_t e, int64_t mask, const A* prefix, A at) {
    if (e == E_ - 1) return last_one<kCheck>();  // E == 1 only
    if (e == E_ - 2)
      return prefix ? last_two<kCheck, true>(mask, prefix, at) : last_two<kCheck, false>(mask, prefix, at);
    walk<kCheck>(e + 1, mask, prefix, at);
    const A* own = products(e);
    const A* sum = own;
    A sum_at = own[target_];
    if (prefix) {
      A* level = sums_.get() + e * width_;
      for (int64_t k = 0; k < width_; k += V::n) {
        store(level + k, V::add(load(prefix + k, Full{}, A(0)), load(own + k, Full{}, A(0))), Full{});
      }
      sum = level;
      sum_at = at + sum_at;
    }
    walk<kCheck>(e + 1, mask | (int64_t(1) << e), sum, sum_at);
  }

  // How many classes of the vector at k stand before the target: larger, or equal with a lower index.
  struct Position {
    unsigned valid, below;  // lanes that are classes; lanes whose class index is below the target's
  };
  template <bool kCheck>
  static void judge(V s, V t, Position p, int64_t& rank, unsigned& nan) {
    const unsigned greater = V::bits(V::gt(s, t)), equal = V::bits(V::eq(s, t));
    rank += __builtin_popcount((greater | (equal & p.below)) & p.valid);
    if (kCheck) nan |= V::bits(V::unordered(s, s)) & p.valid;
  }

  // Calls f(k, position, special) for every vector; `special` is false where the position need not be looked at.
  template <class F>
  void each_vector(F&& f) const {
    const unsigned all = V::n == 32 ? ~0u : (1u << V::n) - 1u;
    for (int64_t k = 0; k < width_; k += V::n) {
      const int64_t rest = K_ - k, under = target_ - k;
      Position p;
      p.valid = rest >= V::n ? all : (1u << rest) - 1u;
      p.below = under <= 0 ? 0u : under >= V::n ? all : (1u << under) - 1u;
      f(k, p);
    }
  }

  template <bool kCheck>
  void last_one() {
    int64_t rank = 0;
    unsigned nan = 0;
    const A* own = products(0);
    const V t = V::set(own[target_]);
    each_vector([&](int64_t k, Position p) { judge<kCheck>(load(own + k, Full{}, A(0)), t, p, rank, nan); });
    count_ranks(counts_, 1, nan ? K_ + 5 : rank);
  }

  template <bool kCheck, bool kPrefix>
  void last_two(int64_t mask, const A* prefix, A at) {
    const A* a = products(E_ - 2);
    const A* b = products(E_ - 1);
    const A at_a = kPrefix ? at + a[target_] : a[target_], at_b = kPrefix ? at + b[target_] : b[target_],
            at_ab = at_a + b[target_];
    const V t = V::set(at), t_a = V::set(at_a), t_b = V::set(at_b), t_ab = V::set(at_ab);
    int64_t rank = 0, rank_a = 0, rank_b = 0, rank_ab = 0;
    unsigned nan = 0, nan_a = 0, nan_b = 0, nan_ab = 0;
    each_vector([&](int64_t k, Position p) {
      const V own_a = load(a + k, Full{}, A(0)), own_b = load(b + k, Full{}, A(0));
      V s_a = own_a, s_b = own_b;
      if (kPrefix) {
        const V s = load(prefix + k, Full{}, A(0));
        s_a = V::add(s, own_a);
        s_b = V::add(s, own_b);
        judge<kCheck>(s, t, p, rank, nan);
      }
      judge<kCheck>(s_a, t_a, p, rank_a, nan_a);
      judge<kCheck>(s_b, t_b, p, rank_b, nan_b);
      judge<kCheck>(V::add(s_a, own_b), t_ab, p, rank_ab, nan_ab);
    });
    const int64_t bit_a = int64_t(1) << (E_ - 2), bit_b = int64_t(1) << (E_ - 1), wrong = K_ + 5;
    if (kPrefix) count_ranks(counts_, mask, nan ? wrong : rank);
    count_ranks(counts_, mask | bit_a, nan_a ? wrong : rank_a);
    count_ranks(counts_, mask | bit_b, nan_b ? wrong : rank_b);
    count_ranks(counts_, mask | bit_a | bit_b, nan_ab ? wrong : rank_ab);
  }

  int64_t E_, K_, width_;  // width: K rounded up to whole vectors
  Scratch<A> products_, sums_;
  int64_t target_ = 0;
  int64_t* counts_ = nullptr;
};

// ---- one sample per lane, candidates only ----
template <class A>
class SubsetLanes {
 public:
  using V = Vec<A>;

  SubsetLanes(int64_t E, int64_t capacity, int64_t* counts)
      : E_(E),
        capacity_(capacity),
        counts_(counts),
        products_(2 * E * capacity * V::n),
        sums_(2 * (E > 2 ? E - 2 : 0) * capacity * V::n),
        targets_(E * V::n) {}

  int64_t capacity() const { return capacity_; }

  // Takes a sample in; `classes` are its candidates in ascending order, the first `below` of them with an index below
  // the target's.
  void add(const SubsetRows<A>& rows, int64_t target, const int32_t* classes, int count, int below) {
    for (int64_t e = 0; e < E_; ++e) {
      const A* own = rows.products(e);
      targets_[e * V::n + used_] = own[target];
      A* list = block(products_.get(), 0, e) + used_;
      for (int j = 0; j < below; ++j) list[j * V::n] = own[classes[j]];
      list = block(products_.get(), 1, e) + used_;
      for (int j = below; j < count; ++j) list[(j - below) * V::n] = own[classes[j]];
    }
    sizes_[0][used_] = below;
    sizes_[1][used_] = count - below;
    if (++used_ == V::n) flush();
  }

  void flush() {
    if (used_ == 0) return;
    for (int side = 0; side < 2; ++side) {
      int most = 0;
      for (int i = 0; i < used_; ++i) most = larger(most, sizes_[side][i]);
      filled_[side] = most;
      for (int i = 0; i < V::n; ++i) {
        for (int j = i < used_ ? sizes_[side][i] : 0; j < most; ++j) {
          for (int64_t e = 0; e < E_; ++e) block(products_.get(), side, e)[j * V::n + i] = kPad<A>;
        }
      }
    }
    for (int i = used_; i < V::n; ++i) {
      for (int64_t e = 0; e < E_; ++e) targets_[e * V::n + i] = 0;  // idle lanes: defined values, masked when counted
    }
    lanes_ = (1u << used_) - 1u;
    walk(0, 0, false, V::set(0), 0);
    used_ = 0;
  }

 private:
  // side 0: candidates with a lower index than the target (they win ties), side 1: with a higher one.
  A* block(A* base, int side, int64_t level) const { return base + ((level * 2 + side) * capacity_) * V::n; }
  V target(int64_t e) const { return load(targets_.get() + e * V::n, Full{}, A(0)); }

  // `has`: the prefix is not empty; `prefix` then points to its sums, or to the products of its only exit, and `at`
  // holds the targets' sums.
  void walk(int64_t e, int64_t mask, bool has, V at, const A* prefix) {
    if (e == E_ - 1) return last_one();
    if (e == E_ - 2) return has ? last_two<true>(mask, at, prefix) : last_two<false>(mask, at, prefix);
    walk(e + 1, mask, has, at, prefix);
    const A* own = block(products_.get(), 0, e);
    const A* sum = own;
    V sum_at = target(e);
    if (has) {
      A* level = block(sums_.get(), 0, e);
      for (int side = 0; side < 2; ++side) {
        const int64_t offset = side * capacity_ * V::n;
        for (int64_t j = offset; j < offset + int64_t(filled_[side]) * V::n; j += V::n) {
          store(level + j, V::add(load(prefix + j, Full{}, A(0)), load(own + j, Full{}, A(0))), Full{});
        }
      }
      sum = level;
      sum_at = V::add(at, sum_at);
    }
    walk(e + 1, mask | (int64_t(1) << e), true, sum_at, sum);
  }

  void tally(int64_t mask, V rank) {
    counts_[(mask - 1) * 2 + 0] += __builtin_popcount(V::bits(V::lt(rank, V::set(1))) & lanes_);
    counts_[(mask - 1) * 2 + 1] += __builtin_popcount(V::bits(V::lt(rank, V::set(5))) & lanes_);
  }

  void last_one() {
    const V t = target(0), one = V::set(1);
    V rank = V::set(0);
    const A* own = block(products_.get(), 0, 0);
    for (int64_t j = 0; j < filled_[0]; ++j) rank = V::add_if(V::ge(load(own + j * V::n, Full{}, A(0)), t), rank, one);
    own = block(products_.get(), 1, 0);
    for (int64_t j = 0; j < filled_[1]; ++j) rank = V::add_if(V::gt(load(own + j * V::n, Full{}, A(0)), t), rank, one);
    tally(1, rank);
  }

  template <bool kPrefix>
  void last_two(int64_t mask, V t, const A* prefix) {
    const V target_a = target(E_ - 2), target_b = target(E_ - 1), one = V::set(1);
    const V t_a = kPrefix ? V::add(t, target_a) : target_a, t_b = kPrefix ? V::add(t, target_b) : target_b;
    const V t_ab = V::add(t_a, target_b);
    V rank = V::set(0), rank_a = rank, rank_b = rank, rank_ab = rank;
    const A* a = block(products_.get(), 0, E_ - 2);
    const A* b = block(products_.get(), 0, E_ - 1);
    const auto pass = [&](int64_t from, int64_t count, auto ahead) {
      for (int64_t j = from; j < from + count * V::n; j += V::n) {
        const V own_a = load(a + j, Full{}, A(0)), own_b = load(b + j, Full{}, A(0));
        V s_a = own_a, s_b = own_b;
        if (kPrefix) {
          const V s = load(prefix + j, Full{}, A(0));
          s_a = V::add(s, own_a);
          s_b = V::add(s, own_b);
          rank = V::add_if(ahead(s, t), rank, one);
        }
        rank_a = V::add_if(ahead(s_a, t_a), rank_a, one);
        rank_b = V::add_if(ahead(s_b, t_b), rank_b, one);
        rank_ab = V::add_if(ahead(V::add(s_a, own_b), t_ab), rank_ab, one);
      }
    };
    pass(0, filled_[0], [](V s, V target) { return V::ge(s, target); });
    pass(capacity_ * V::n, filled_[1], [](V s, V target) { return V::gt(s, target); });
    const int64_t bit_a = int64_t(1) << (E_ - 2), bit_b = int64_t(1) << (E_ - 1);
    if (kPrefix) tally(mask, rank);
    tally(mask | bit_a, rank_a);
    tally(mask | bit_b, rank_b);
    tally(mask | bit_a | bit_b, rank_ab);
  }

  int64_t E_, capacity_;
  int64_t* counts_;
  Scratch<A> products_, sums_, targets_;
  int sizes_[2][V::n];
  int filled_[2] = {0, 0};
  int used_ = 0;
  unsigned lanes_ = 0;
};

constexpr int kFewCandidates = 8, kManyCandidates = 64;

template <class S>
void subset_correct_as(const SubsetCorrectParams& p, int64_t begin, int64_t end, int64_t* counts) {
  using A = Acc<S>;
  using V = Vec<A>;
  if (begin >= end) return;
  SubsetRows<A> rows(p.E, p.K);
  // Samples with few and with more candidates are collected apart, for lanes of about equal length.
  SubsetLanes<A> few(p.E, kFewCandidates, counts), many(p.E, kManyCandidates, counts);
  Scratch<S> copy(p.stride_k == 1 ? 0 : p.K);
  const A* weights = static_cast<const A*>(p.weights);
  int32_t candidates[kManyCandidates];
  for (int64_t n = begin; n < end; ++n) {
    const int64_t target = p.target[n * p.target_stride];
    A largest_product = 0;
    bool safe = p.K <= INT32_MAX;
    for (int64_t e = 0; e < p.E; ++e) {
      const S* row =
          dense_row(static_cast<const S*>(p.logits) + e * p.stride_e + n * p.stride_n, p.stride_k, p.K, copy.get());
      A* own = rows.products(e);
      const V w = V::set(weights[e]);
      V most = V::set(0);
      unsigned out_of_bounds = 0;
      for_vectors<V::n>(p.K, [&](int64_t k, auto part) {
        const V product = V::mul(w, load(row + k, part, A(0)));
        store(own + k, product, part);
        most = V::max(most, V::abs(product));
      });
      // NaN may get lost in a maximum, but not in this comparison.
      for_vectors<V::n>(p.K, [&](int64_t k, auto part) {
        const V product = load(own + k, part, A(0));
        out_of_bounds |= ~V::bits(V::le(V::abs(product), V::set(kSafe<A>))) & ((2u << (V::n - 1)) - 1u);
      });
      safe = safe && out_of_bounds == 0;
      largest_product = larger(largest_product, V::top(most));
    }
    if (!safe) {
      rows.count(target, false, counts);
      continue;
    }
    // |rounding of a sum| <= (E - 1) u * E * largest; two such sums, per exit: 2 (E - 1) u * largest. Twice that, to be
    // safe.
    const A margin = 4 * static_cast<A>(p.E) * kUnitRoundoff<A> * largest_product;
    int count = 0, below = 0;
    for (int64_t k = 0; k < p.K && count <= kManyCandidates; k += V::n) {
      unsigned bits = 0;
      for (int64_t e = 0; e < p.E; ++e) {
        const A* own = rows.products(e);
        bits |= V::bits(V::ge(load(own + k, Full{}, A(0)), V::set(own[target] - margin)));
      }
      if (p.K - k < V::n) bits &= (1u << (p.K - k)) - 1u;
      for (; bits; bits &= bits - 1) {
        const int64_t c = k + __builtin_ctz(bits);
        if (c == target) continue;
        if (count < kManyCandidates) candidates[count] = static_cast<int32_t>(c);
        ++count;
        below += c < target;
      }
    }
    if (count > kManyCandidates) {
      rows.count(target, true, counts);
    } else {
      (count <= kFewCandidates ? few : many).add(rows, target, candidates, count, below);
    }
  }
  few.flush();
  many.flush();
}

void subset_correct(const SubsetCorrectParams& p, int64_t begin, int64_t end, int64_t* counts) {
  AEP_BY_DTYPE(p.dtype, subset_correct_as, p, begin, end, counts)
}

}  // namespace
}  // namespace aep::kernels::cpu::AEP_ISA_NAMESPACE

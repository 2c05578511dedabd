// The gate: judge every row, then copy every row to the place that the partition gave it.
//
// Outputs are a partition, so a row's place is known only when all are judged. The running sum is computed twice
// instead of being kept in between: reading two rows again costs no more than writing one and reading it back.
// One row alone needs no partition: gate_one updates its sum in place.

namespace aep::kernels::cpu::AEP_ISA_NAMESPACE {
namespace {

// running' of one row into `out`, rounded to its storage type; its largest two values into `top`.
template <class R, class S>
void update_running(const R* running, const S* logits, Acc<S> weight, int64_t K, R* out, TopTwo<Acc<S>>& top) {
  using A = Acc<S>;
  using V = Vec<A>;
  const V w = V::set(weight);
  for_vectors<V::n>(K, [&](int64_t k, auto part) {
    store(out + k, V::add(load(running + k, part, A(0)), V::mul(w, load(logits + k, part, A(0)))), part);
    top.add(load(out + k, part, -kInfinity<A>));
  });
}

// The answer of a row that leaves: its sum, as stored, over the sum of the weights.
template <class R, class A>
void divide(R* running, A weight_sum, int64_t K) {
  using V = Vec<A>;
  const V divisor = V::set(weight_sum);
  for_vectors<V::n>(K, [&](int64_t k, auto part) {
    store(running + k, V::div(load(running + k, part, A(0)), divisor), part);
  });
}

template <class S>
TopTwo<Acc<S>> top_two(const S* row, int64_t K) {
  using A = Acc<S>;
  TopTwo<A> top;
  for_vectors<Vec<A>::n>(K, [&](int64_t k, auto part) { top.add(load(row + k, part, -kInfinity<A>)); });
  return top;
}

// Statistics of the row whose running' is in `running`, with its largest two values in `top`: of running' or of the
// exit's logits.
template <class R, class S>
RowStats judge(CriterionOn criterion_on, const R* running, const TopTwo<Acc<S>>& top, const S* logits, int64_t K,
               const Divisor<Acc<S>>& divisor) {
  Acc<S> first, second;
  if (criterion_on == CriterionOn::ensemble) {
    top.reduce(first, second);
    return row_stats(running, K, first, second, divisor);
  }
  top_two(logits, K).reduce(first, second);
  return row_stats(logits, K, first, second, divisor);
}

// For the criteria that compare a statistic; false for NaN.
inline bool reaches(GateCriterion criterion, const RowStats& stats, float threshold) {
  switch (criterion) {
    case GateCriterion::confidence:
      return stats.confidence >= threshold;
    case GateCriterion::entropy:
      return stats.entropy <= threshold;
    case GateCriterion::margin:
      return stats.margin >= threshold;
    default:
      return false;
  }
}

template <class A>
bool leaves(const GateParams& p, int64_t row, const RowStats& stats, bool judged, float threshold,
            double count_threshold) {
  if (!judged) return false;
  switch (p.criterion) {
    case GateCriterion::confidence:
    case GateCriterion::entropy:
    case GateCriterion::margin:
      return reaches(p.criterion, stats, threshold);
    case GateCriterion::patience: {
      const int64_t* state = p.state + row * 2;
      return static_cast<double>(state[0] == stats.argmax ? state[1] + 1 : 1) >= count_threshold;
    }
    case GateCriterion::vote: {
      const int64_t* votes = p.state + row * p.S;
      int64_t most = 0;
      for (int64_t k = 0; k < p.S; ++k) most = larger(most, votes[k] + (k == stats.argmax));
      return static_cast<double>(most) >= count_threshold;
    }
  }
  return false;
}

template <class R, class S>
void gate_judge_as(const GateParams& p, int64_t begin, int64_t end) {
  using A = Acc<S>;
  if (begin >= end) return;
  const A weight = read<A>(p.weight), temperature = read<A>(p.temperature), threshold = read<A>(p.threshold);
  const Divisor<A> divisor(p.criterion_on == CriterionOn::ensemble
                               ? (read<A>(p.weight_sum) + weight) * temperature : temperature);
  GateRow* places = static_cast<GateRow*>(p.scratch);
  Scratch<R, 1024> running(p.K);
  for (int64_t n = begin; n < end; ++n) {
    const S* logits = static_cast<const S*>(p.exit_logits) + n * p.logits_stride_n;
    TopTwo<A> top;
    update_running(static_cast<const R*>(p.running) + n * p.running_stride_n, logits, weight, p.K, running.get(), top);
    const RowStats stats = judge(p.criterion_on, running.get(), top, logits, p.K, divisor);
    GateRow& row = places[n];
    row.answer = p.criterion_on == CriterionOn::ensemble ? stats.argmax : argmax_of(running.get(), p.K);
    const bool judged = stats.confidence == stats.confidence;
    row.judged = judged ? stats.argmax : -1;
    row.stats[0] = stats.confidence;
    row.stats[1] = stats.entropy;
    row.stats[2] = stats.margin;
    row.leaves = p.last || (p.enabled && leaves<A>(p, n, stats, judged, static_cast<float>(threshold),
                                                   static_cast<double>(threshold)));
  }
}

template <class R, class S>
void gate_scatter_as(const GateParams& p, int64_t begin, int64_t end) {
  using A = Acc<S>;
  const A weight = read<A>(p.weight), weight_sum = read<A>(p.weight_sum) + weight;
  const GateRow* places = static_cast<const GateRow*>(p.scratch);
  const size_t bytes = static_cast<size_t>(p.feature_row_bytes);
  for (int64_t n = begin; n < end; ++n) {
    const GateRow& row = places[n];
    const int64_t to = row.place;
    R* running = static_cast<R*>(p.running_out) + to * p.K;
    TopTwo<A> unused;
    update_running(static_cast<const R*>(p.running) + n * p.running_stride_n,
                   static_cast<const S*>(p.exit_logits) + n * p.logits_stride_n, weight, p.K, running, unused);
    if (row.leaves) divide(running, weight_sum, p.K);
    p.indices_out[to] = p.indices[n];
    p.argmax_out[to] = row.answer;
    for (int i = 0; i < 3; ++i) p.stats_out[to * 3 + i] = row.stats[i];
    if (p.S > 0) {
      int64_t* state = p.state_out + to * p.S;
      const int64_t* old = p.state + n * p.S;
      if (p.criterion == GateCriterion::patience) {
        state[0] = row.judged;
        state[1] = row.judged < 0 ? 0 : row.judged == old[0] ? old[1] + 1 : 1;
      } else {
        for (int64_t k = 0; k < p.S; ++k) state[k] = old[k];
        if (p.criterion == GateCriterion::vote && row.judged >= 0) state[row.judged] += 1;
      }
    }
    if (bytes == 0) continue;
    char* out = static_cast<char*>(p.features_out) + to * p.feature_out_stride_bytes;
    if (!row.leaves) {
      memcpy(out, static_cast<const char*>(p.features) + n * p.feature_stride_bytes, bytes);
    } else {
      memset(out, 0, bytes);  // leavers are placed behind the stayers: these are the rows that must be zero
    }
  }
}

template <class R, class S>
void gate_one_as(const GateOneParams& p) {
  using A = Acc<S>;
  const A weight = static_cast<A>(p.weight), temperature = static_cast<A>(p.temperature);
  const A weight_sum = static_cast<A>(p.weight_sum) + weight;
  const Divisor<A> divisor(p.criterion_on == CriterionOn::ensemble ? weight_sum * temperature : temperature);
  R* running = static_cast<R*>(p.running);
  const S* logits = static_cast<const S*>(p.exit_logits);
  TopTwo<A> top;
  update_running(running, logits, weight, p.K, running, top);
  const RowStats stats = judge(p.criterion_on, running, top, logits, p.K, divisor);
  p.stats_out[0] = stats.confidence;
  p.stats_out[1] = stats.entropy;
  p.stats_out[2] = stats.margin;
  const bool judged = stats.confidence == stats.confidence;
  const float threshold = static_cast<float>(static_cast<A>(p.threshold));
  *p.leaves_out = p.last || (p.enabled && judged && reaches(p.criterion, stats, threshold));
  if (*p.leaves_out) divide(running, weight_sum, p.K);
}

#define AEP_GATE_BY_DTYPE(F, ...)                                                                      \
  switch (p.dtype) {                                                                                   \
    case DType::f32:                                                                                   \
      return F<float, float>(__VA_ARGS__);                                                             \
    case DType::f64:                                                                                   \
      return F<double, double>(__VA_ARGS__);                                                           \
    case DType::bf16:                                                                                  \
      return p.running_dtype == DType::f32 ? F<float, BF16>(__VA_ARGS__) : F<BF16, BF16>(__VA_ARGS__); \
    case DType::f16:                                                                                   \
      return p.running_dtype == DType::f32 ? F<float, F16>(__VA_ARGS__) : F<F16, F16>(__VA_ARGS__);    \
  }

void gate_judge(const GateParams& p, int64_t begin, int64_t end) { AEP_GATE_BY_DTYPE(gate_judge_as, p, begin, end) }
void gate_scatter(const GateParams& p, int64_t begin, int64_t end) { AEP_GATE_BY_DTYPE(gate_scatter_as, p, begin, end) }
void gate_one(const GateOneParams& p) { AEP_GATE_BY_DTYPE(gate_one_as, p) }

}  // namespace
}  // namespace aep::kernels::cpu::AEP_ISA_NAMESPACE

// An exit of the gated CUDA graph, emulated, against the CPU's gate: the same decisions, with the rows left where they
// are. What composes the graph (graph.cu) needs a device.
#include <memory>

#include "kernels/cuda/gated_exit.h"
#include "testing.h"

using namespace testing;

namespace {

int64_t exits = 3;

struct Case {
  GateCriterion criterion;
  CriterionOn criterion_on;
  double threshold;
  bool may_leave = true;
};

// What the CPU's gate makes of row n alone, in place.
struct Row {
  std::vector<double> running, answer;
  std::vector<int64_t> state;
  int64_t exit = -1;
  double confidence = 0;
  bool by_a_hair = false;  // so near the threshold that rounding decides
};

void step(Row& row, DType d, const Case& c, Values& logits, int64_t at, int64_t K, int64_t e, double weight,
          double weight_sum, double temperature, bool enabled) {
  const DType acc = acc_of(d);
  const int64_t S = static_cast<int64_t>(row.state.size());
  Values running(acc, K), own(d, K), running_out(acc, K), sum_out(acc, 1);
  for (int64_t k = 0; k < K; ++k) running.set(k, row.running[static_cast<size_t>(k)]), own.set(k, logits.get(at + k));
  Guarded features(1), features_out(1), state(static_cast<size_t>(S) * 8), state_out(static_cast<size_t>(S) * 8);
  Guarded scratch(cpu::gate_scratch_bytes(1));
  for (int64_t i = 0; i < S; ++i) state.as<int64_t>()[i] = row.state[static_cast<size_t>(i)];
  int64_t index = 0, index_out, answer, count;
  float stats[3];
  GateParams p{};
  p.features = features.data(), p.running = running.data(), p.exit_logits = own.data(), p.indices = &index;
  p.state = S ? state.as<int64_t>() : nullptr, p.features_out = features_out.data(), p.running_out = running_out.data();
  p.indices_out = &index_out, p.state_out = state_out.as<int64_t>(), p.stats_out = stats, p.argmax_out = &answer;
  p.weight_sum_out = sum_out.data(), p.count_out = &count, p.scratch = scratch.data(), p.dtype = d;
  p.running_dtype = acc, p.n = 1, p.K = K, p.S = S, p.running_stride_n = K, p.logits_stride_n = K;
  p.weight = {nullptr, weight}, p.weight_sum = {nullptr, weight_sum}, p.temperature = {nullptr, temperature};
  p.threshold = {nullptr, c.threshold}, p.criterion = c.criterion, p.criterion_on = c.criterion_on,
  p.enabled = enabled, p.last = e == exits - 1;
  cpu::kScalarTable.gate_judge(p, 0, 1);
  cpu::gate_partition(p);
  cpu::kScalarTable.gate_scatter(p, 0, 1);
  row.answer.clear();
  for (int64_t k = 0; k < K; ++k) {
    double& sum = row.running[static_cast<size_t>(k)];
    sum = multiply_add(d, sum, weight, own.get(k));
    row.answer.push_back(round_acc(d, sum / sum_out.get(0)));
    CHECK(same(running_out.get(k), count == 0 ? row.answer.back() : sum));
  }
  for (int64_t i = 0; i < S; ++i) row.state[static_cast<size_t>(i)] = state_out.as<int64_t>()[i];
  row.confidence = static_cast<double>(stats[0]);
  if (c.criterion <= GateCriterion::margin) {
    row.by_a_hair |= fabs(static_cast<double>(stats[static_cast<int>(c.criterion)]) - c.threshold) < 1e-5;
  }
  if (count == 0) row.exit = e;
}

void run(DType d, DType weights_dtype, const Case& c, int64_t N, int64_t K) {
  const DType acc = acc_of(d);
  const int64_t S = c.criterion == GateCriterion::patience ? 2 : c.criterion == GateCriterion::vote ? K : 0;
  Random random(static_cast<uint64_t>(N * 1000 + K) + static_cast<uint64_t>(c.criterion));
  const auto E = static_cast<size_t>(exits);
  Guarded thresholds((E - 1) * 8), temperatures(E * 8), enabled(E - 1), state(size_t(N * S) * 8);
  Guarded exit(size_t(N) * 8), confidence(size_t(N) * 4), tally(E * 8), remaining(E * 8), condition(4);
  Values weights(weights_dtype, exits), running(acc, N * K), answers(d, N * K);
  memset(tally.data(), 0, tally.size());
  for (int64_t e = 0; e < exits; ++e) {
    weights.set(e, 0.25 + 0.3 * static_cast<double>(e));
    temperatures.as<double>()[e] = 1.0 + 0.5 * static_cast<double>(e);
    if (e < exits - 1) thresholds.as<double>()[e] = c.threshold, enabled.as<bool>()[e] = e == 0 || N != 3;
  }
  std::vector<Row> rows(static_cast<size_t>(N));
  for (Row& row : rows) {
    row.running.assign(static_cast<size_t>(K), 0.0);
    row.state.assign(static_cast<size_t>(S), 0);
    if (c.criterion == GateCriterion::patience) row.state[0] = -1;
  }
  // Twice: the second replay finds what the first one left behind.
  for (int replay = 0; replay < 2; ++replay) {
    std::vector<Row> now = rows;
    double weight_sum = 0;
    for (int64_t e = 0; e < exits; ++e) {
      Values logits(d, N * (K + 3));
      logits.fill_normal(random, 3);
      if (N > 2 && K > 1) logits.set(2 * (K + 3) + 1, NAN);
      cuda::GatedExitParams p{};
      p.exit_logits = logits.data(), p.thresholds = thresholds.as<double>(), p.temperatures = temperatures.as<double>();
      p.enabled = enabled.as<bool>(), p.weights = weights.data(), p.running = running.data();
      p.state = S ? state.as<int64_t>() : nullptr, p.exit = exit.as<int64_t>(), p.logits = answers.data();
      p.confidence = confidence.as<float>(), p.tally = tally.as<uint32_t>(), p.remaining = remaining.as<int64_t>();
      p.dtype = d, p.weights_dtype = weights_dtype, p.N = N, p.K = K, p.S = S, p.logits_stride_n = K + 3;
      p.e = e, p.E = exits, p.criterion = c.criterion, p.criterion_on = c.criterion_on, p.may_leave = c.may_leave, p.sets = true;
      p.condition = reinterpret_cast<unsigned long long>(condition.data());  // the emulation writes it there
      backend::check(cuda::launch_gated_exit(p, nullptr), "gated_exit");
      const double weight = rounded(acc, weights.get(e));
      int64_t left = 0;
      for (int64_t n = 0; n < N; ++n) {
        Row& row = now[static_cast<size_t>(n)];
        if (row.exit < 0) {
          const bool live = e < exits - 1 && c.may_leave && enabled.as<bool>()[e];
          step(row, d, c, logits, n * (K + 3), K, e, weight, weight_sum, temperatures.as<double>()[e], live);
          if (row.by_a_hair) row.exit = exit.as<int64_t>()[n];
        }
        left += row.exit < 0;
        CHECK(exit.as<int64_t>()[n] == row.exit, "%s criterion %d N %ld K %ld exit %ld row %ld: %ld, want %ld", name_of(d),
              int(c.criterion), long(N), long(K), long(e), long(n), long(exit.as<int64_t>()[n]), long(row.exit));
        for (int64_t i = 0; i < S && row.exit < 0; ++i)
          CHECK(state.as<int64_t>()[n * S + i] == row.state[static_cast<size_t>(i)]);
        for (int64_t k = 0; k < K; ++k) CHECK(same(running.get(n * K + k), row.running[static_cast<size_t>(k)]));
      }
      CHECK(remaining.as<int64_t>()[e] == left && *condition.as<unsigned>() == (left > 0 ? 1u : 0u));
      CHECK(tally.as<uint32_t>()[2 * e] == 0 && tally.as<uint32_t>()[2 * e + 1] == 0);
      weight_sum = rounded(acc, weight_sum + weight);
    }
    for (int64_t n = 0; n < N; ++n) {
      const Row& row = now[static_cast<size_t>(n)];
      CHECK(near(static_cast<double>(confidence.as<float>()[n]), row.confidence, 3e-6), "row %ld: %g, want %g", long(n),
            static_cast<double>(confidence.as<float>()[n]), row.confidence);
      for (int64_t k = 0; k < K; ++k)
        CHECK(same(answers.get(n * K + k), rounded(d, row.answer[static_cast<size_t>(k)])));
    }
  }
}

}  // namespace

int main() {
  const Case cases[] = {
      {GateCriterion::confidence, CriterionOn::ensemble, 0.6}, {GateCriterion::confidence, CriterionOn::exit, 0.6},
      {GateCriterion::entropy, CriterionOn::ensemble, 0.9},    {GateCriterion::margin, CriterionOn::exit, 0.3},
      {GateCriterion::patience, CriterionOn::ensemble, 2},     {GateCriterion::vote, CriterionOn::exit, 2},
      {GateCriterion::confidence, CriterionOn::ensemble, 0.0}, {GateCriterion::confidence, CriterionOn::ensemble, 2.0},
      {GateCriterion::vote, CriterionOn::ensemble, 1, false},  {GateCriterion::margin, CriterionOn::ensemble, 0.1, false},
  };
  for (DType d : kAllTypes) {
    for (const Case& c : cases) {
      run(d, DType::f64, c, 1, 1);
      run(d, DType::f32, c, 1, 300);
      run(d, DType::bf16, c, 3, 10);
      run(d, DType::f16, c, 20, 7);
    }
    run(d, DType::f32, cases[0], 2, 2100);  // a thread's second turn
    exits = 11;                             // more weights than are loaded at once
    run(d, DType::f32, {GateCriterion::confidence, CriterionOn::ensemble, 0.95}, 6, 5);
    exits = 3;
  }
  return finish("gated_exit");
}

// The gate against a direct account of its rules: the partition, and that features, sums, indices and states travel
// together.
#include "testing.h"

using namespace testing;

namespace {

struct Case {
  GateCriterion criterion;
  CriterionOn criterion_on;
  double threshold;
  bool enabled;
  bool last = false;
};

void run(const KernelTable& t, DType d, DType rd, const Case& c, int64_t n, int64_t K, int64_t feature_bytes) {
  if (!take(d)) return;
  Random random(static_cast<uint64_t>(n * 10 + K) + static_cast<uint64_t>(c.criterion));
  const DType acc = acc_of(d);
  const int64_t S = c.criterion == GateCriterion::patience ? 2 : c.criterion == GateCriterion::vote ? K : 0;
  Values running(rd, n * (K + 2)), logits(d, n * (K + 1)), running_out(rd, n * K), sum_out(acc, 1);
  running.fill_normal(random, 2);
  logits.fill_normal(random, 3);
  if (n > 4 && K > 1) {
    logits.set(2 * (K + 1) + 1, NAN);
    logits.set(3 * (K + 1), INFINITY);
    for (int64_t k = 0; k < K; ++k) running.set(4 * (K + 2) + k, 1), logits.set(4 * (K + 1) + k, 1);  // all tied
  }
  const auto bytes = [](int64_t count) { return static_cast<size_t>(count); };
  Guarded features(bytes(n ? (n - 1) * (feature_bytes + 5) + feature_bytes : 0)),
      features_out(bytes(n * feature_bytes));
  for (size_t i = 0; i < features.size(); ++i)
    features.as<unsigned char>()[i] = static_cast<unsigned char>(random.below(255) + 1);
  if (features_out.size() > 0) memset(features_out.data(), 0xa5, features_out.size());
  Guarded indices(bytes(n * 8)), indices_out(bytes(n * 8)), state(bytes(n * S * 8)), state_out(bytes(n * S * 8));
  Guarded stats_out(bytes(n * 12)), argmax_out(bytes(n * 8)), count_out(8), scratch(backend::gate_scratch_bytes(n));
  for (int64_t i = 0; i < n; ++i) indices.as<int64_t>()[i] = 1000 + 3 * i;
  for (int64_t i = 0; i < n * S; ++i)
    state.as<int64_t>()[i] = random.below(c.criterion == GateCriterion::patience && i % 2 == 0 ? K + 1 : 3) -
                             (c.criterion == GateCriterion::patience && i % 2 == 0 ? 1 : 0);

  const double weight = rounded(acc, 0.3), weight_sum = rounded(acc, 0.45), temperature = rounded(acc, 1.7),
               threshold = rounded(acc, c.threshold);
  double weight_buffer;
  store_value(acc, &weight_buffer, 0, weight);
  GateParams p{};
  p.features = features.data(), p.running = running.data(), p.exit_logits = logits.data(),
  p.indices = indices.as<int64_t>();
  p.state = S ? state.as<int64_t>() : nullptr, p.features_out = features_out.data(), p.running_out = running_out.data();
  p.indices_out = indices_out.as<int64_t>(), p.state_out = state_out.as<int64_t>(), p.stats_out = stats_out.as<float>();
  p.argmax_out = argmax_out.as<int64_t>(), p.weight_sum_out = sum_out.data(), p.count_out = count_out.as<int64_t>();
  p.scratch = scratch.data(), p.dtype = d, p.running_dtype = rd, p.n = n, p.K = K, p.S = S;
  p.running_stride_n = K + 2, p.logits_stride_n = K + 1;
  p.feature_row_bytes = feature_bytes, p.feature_stride_bytes = feature_bytes + 5,
  p.feature_out_stride_bytes = feature_bytes;
  p.weight = {&weight_buffer, 0}, p.weight_sum = {nullptr, weight_sum}, p.temperature = {nullptr, temperature},
  p.threshold = {nullptr, threshold};
  p.criterion = c.criterion, p.criterion_on = c.criterion_on, p.enabled = c.enabled, p.last = c.last;
  t.gate_judge(p, n / 2, n);
  t.gate_judge(p, 0, n / 2);
  const int64_t count = backend::gate_partition(p);
  t.gate_scatter(p, 0, n / 3);
  t.gate_scatter(p, n / 3, n);

  CHECK(count == count_out.as<int64_t>()[0]);
  CHECK(sum_out.get(0) == round_acc(d, weight_sum + weight));
  const double divisor =
      c.criterion_on == CriterionOn::ensemble ? round_acc(d, round_acc(d, weight_sum + weight) * temperature) : temperature;
  std::vector<int64_t> stay, leave;
  const auto first_best = [](const std::vector<double>& v) {
    for (size_t k = 0; k < v.size(); ++k) {
      if (isnan(v[k])) return static_cast<int64_t>(k);
    }
    size_t best = 0;
    for (size_t k = 1; k < v.size(); ++k) best = v[k] > v[best] ? k : best;
    return static_cast<int64_t>(best);
  };
  std::vector<std::vector<double>> sums(static_cast<size_t>(n)), stats(static_cast<size_t>(n));
  std::vector<std::vector<int64_t>> states(static_cast<size_t>(n));
  std::vector<int64_t> answers(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> sum, own;
    for (int64_t k = 0; k < K; ++k) {
      own.push_back(logits.get(i * (K + 1) + k));
      sum.push_back(rounded(rd, multiply_add(d, running.get(i * (K + 2) + k), weight, own.back())));
    }
    const std::vector<double>& judged = c.criterion_on == CriterionOn::ensemble ? sum : own;
    double top = -INFINITY, total = 0, first = 0, second = 0, entropy = 0;
    for (double v : judged) top = isnan(v) || isnan(top) ? NAN : fmax(top, v / divisor);
    for (double v : judged) total += exp(v / divisor - top);
    for (double v : judged) {
      const double q = exp(v / divisor - top) / total;
      if (isnan(q)) first = second = entropy = NAN;
      if (q > 0) entropy -= q * log(q);
      if (q > first)
        second = first, first = q;
      else if (q > second)
        second = q;
    }
    const bool valid = !isnan(first);
    const int64_t cls = first_best(judged);
    std::vector<int64_t> s(state.as<int64_t>() + i * S, state.as<int64_t>() + (i + 1) * S);
    bool leaves = false;
    // The kernel's own statistics decide near the threshold: they are checked for accuracy below.
    double kernel_stats[3] = {NAN, NAN, NAN};
    for (int64_t j = 0; j < n; ++j) {
      if (indices_out.as<int64_t>()[j] == 1000 + 3 * i) {
        for (int q = 0; q < 3; ++q) kernel_stats[q] = static_cast<double>(stats_out.as<float>()[j * 3 + q]);
      }
    }
    const double limit = static_cast<double>(static_cast<float>(threshold));
    if (c.criterion == GateCriterion::confidence) leaves = kernel_stats[0] >= limit;
    if (c.criterion == GateCriterion::entropy) leaves = kernel_stats[1] <= limit;
    if (c.criterion == GateCriterion::margin) leaves = kernel_stats[2] >= limit;
    if (c.criterion == GateCriterion::patience) {
      s[1] = valid ? (s[0] == cls ? s[1] + 1 : 1) : 0;
      s[0] = valid ? cls : -1;
      leaves = valid && static_cast<double>(s[1]) >= threshold;
    }
    if (c.criterion == GateCriterion::vote) {
      int64_t most = 0;
      if (valid) s[static_cast<size_t>(cls)] += 1;
      for (int64_t v : s) most = v > most ? v : most;
      leaves = valid && static_cast<double>(most) >= threshold;
    }
    leaves = c.last || (leaves && c.enabled);
    (leaves ? leave : stay).push_back(i);
    const size_t at = static_cast<size_t>(i);
    answers[at] = first_best(sum);
    for (double& v : sum) v = leaves ? rounded(rd, round_acc(d, v / sum_out.get(0))) : v;
    sums[at] = sum, stats[at] = {first, entropy, first - second}, states[at] = s;
  }
  CHECK(count == static_cast<int64_t>(stay.size()), "%s %s criterion %d: %ld stay, want %zu", t.name, name_of(d),
        int(c.criterion), long(count), stay.size());
  std::vector<int64_t> order = stay;
  order.insert(order.end(), leave.begin(), leave.end());
  for (int64_t to = 0; to < n; ++to) {
    const int64_t from = order[static_cast<size_t>(to)];
    const size_t at = static_cast<size_t>(from);
    CHECK(indices_out.as<int64_t>()[to] == 1000 + 3 * from, "%s %s criterion %d", t.name, name_of(d), int(c.criterion));
    CHECK(argmax_out.as<int64_t>()[to] == answers[at]);
    for (int64_t k = 0; k < K; ++k) CHECK(same(running_out.get(to * K + k), sums[at][static_cast<size_t>(k)]));
    for (int64_t s = 0; s < S; ++s) CHECK(state_out.as<int64_t>()[to * S + s] == states[at][static_cast<size_t>(s)]);
    for (int q = 0; q < 3; ++q) {
      const double got = static_cast<double>(stats_out.as<float>()[to * 3 + q]);
      CHECK(near(got, stats[at][static_cast<size_t>(q)], 3e-6), "%s %s row %ld stat %d: %g, want %g", t.name,
            name_of(d), long(from), q, got, stats[at][static_cast<size_t>(q)]);
    }
    for (int64_t i = 0; i < feature_bytes; ++i) {
      const unsigned char want = to < count ? features.as<unsigned char>()[from * (feature_bytes + 5) + i] : 0;
      CHECK(features_out.as<unsigned char>()[to * feature_bytes + i] == want);
    }
  }
}

}  // namespace

int main() {
  const Case cases[] = {
      {GateCriterion::confidence, CriterionOn::ensemble, 0.6, true},  {GateCriterion::confidence, CriterionOn::exit, 0.6, true},
      {GateCriterion::entropy, CriterionOn::ensemble, 0.9, true},     {GateCriterion::margin, CriterionOn::exit, 0.3, true},
      {GateCriterion::patience, CriterionOn::ensemble, 2, true},      {GateCriterion::patience, CriterionOn::exit, 1.5, true},
      {GateCriterion::vote, CriterionOn::ensemble, 3, true},          {GateCriterion::vote, CriterionOn::exit, 2, true},
      {GateCriterion::confidence, CriterionOn::ensemble, 0.0, false}, {GateCriterion::vote, CriterionOn::ensemble, 1, false},
      {GateCriterion::confidence, CriterionOn::ensemble, 0.0, true},  {GateCriterion::entropy, CriterionOn::exit, INFINITY, true},
      {GateCriterion::vote, CriterionOn::ensemble, 9, false, true}};
  for (const KernelTable* t : tables()) {
    for (DType d : kAllTypes) {
      for (const Case& c : cases) {
        for (DType rd : {d, acc_of(d)}) {
          // Emulated, each of the larger sizes with some of the cases: there every block judges all rows.
          const auto some = [&, at = &c - cases](int64_t of) { return !backend::kCuda || at % 4 == of; };
          run(*t, d, rd, c, 0, 5, 12);
          run(*t, d, rd, c, 1, 3, 7);
          run(*t, d, rd, c, 9, 10, 33);
          if (some(0)) run(*t, d, rd, c, 17, 1, 64);
          if (some(1)) run(*t, d, rd, c, 3, 1000, 0);
          if (some(2)) run(*t, d, rd, c, 1, 257, 4096);
          if (!backend::kCuda || &c == cases + 3) run(*t, d, rd, c, 34, 32, 16);
          if (rd == DType::f32 && some(0)) {
            run(*t, d, rd, c, 2, 8, 20000);  // rows in several pieces
            run(*t, d, rd, c, 3, 6000, 8);   // from here on, more than one launch of the CUDA kernels takes
            run(*t, d, rd, c, 260, 3, 8);
          }
          if (rd == DType::f32 && &c == cases) run(*t, d, rd, c, 1030, 2, 2);
          if (d == acc_of(d)) break;
        }
      }
    }
  }
  return finish("test_gate");
}

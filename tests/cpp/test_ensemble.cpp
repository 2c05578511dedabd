// Weighted sums (exact), their statistics, and the gradients.
#include "testing.h"

using namespace testing;

namespace {

struct Shape {
  int64_t E, N, K;
};
constexpr Shape kShapes[] = {{1, 0, 5},  {1, 1, 1},    {3, 2, 1},   {4, 3, 3},  {2, 5, 17},
                             {7, 3, 64}, {4, 2, 1000}, {17, 1, 33}, {2, 1, 129},
                             {1, 2, 2},  {2, 7, 31},   {3, 64, 10}, {2, 2, 256}, {1, 1, 5003}};

// Statistics by their definition, in double.
void statistics(const std::vector<double>& z, double divisor, double out[3], int64_t& argmax) {
  argmax = -1;
  for (size_t k = 0; k < z.size() && argmax < 0; ++k) {
    if (isnan(z[k])) argmax = static_cast<int64_t>(k);
  }
  if (argmax < 0) {
    argmax = 0;
    for (size_t k = 1; k < z.size(); ++k) {
      if (z[k] > z[static_cast<size_t>(argmax)]) argmax = static_cast<int64_t>(k);
    }
  }
  double top = -INFINITY;
  for (double x : z) top = isnan(x / divisor) ? NAN : fmax(top, x / divisor);
  for (double x : z) top = isnan(x) ? NAN : top;
  double sum = 0, largest = 0, second = 0, entropy = 0;
  std::vector<double> p;
  for (double x : z) p.push_back(exp(x / divisor - top));
  for (double e : p) sum += e;
  for (double e : p) {
    const double q = e / sum;
    if (isnan(q)) largest = second = entropy = NAN;
    if (q > 0) entropy -= q * log(q);
    if (q > largest) {
      second = largest;
      largest = q;
    } else if (q > second) {
      second = q;
    }
  }
  out[0] = largest;
  out[1] = entropy;
  out[2] = largest - second;
}

void forward(const KernelTable& t, DType d, Shape s, int layout, double normalizer, double temperature, bool special) {
  if (!take(d)) return;
  Random random(static_cast<uint64_t>(s.E * 1000 + s.N * 100 + s.K + layout));
  Logits x(d, s.E, s.N, s.K, layout);
  x.values.fill_normal(random, 3);
  if (special && s.N >= 2 && s.K >= 3) {
    x.set(0, 0, s.K - 1, NAN);
    x.set(s.E - 1, 0, s.K - 2, NAN);
    for (int64_t e = 0; e < s.E; ++e) {
      x.set(e, 1, 1, -INFINITY);
      x.set(e, 1, 0, 5);  // ties at the top
      x.set(e, 1, s.K - 1, 5);
      if (s.N >= 3) x.set(e, 2, 2, INFINITY);
      for (int64_t k = 0; s.N >= 5 && k < s.K; ++k) x.set(e, 3, k, -INFINITY), x.set(e, 4, k, 1);
    }
  }
  Values w(acc_of(d), s.E), out(d, s.N * s.K), again(d, s.N * s.K);
  for (int64_t e = 0; e < s.E; ++e) w.set(e, 0.1 + random.uniform());
  Guarded stats(static_cast<size_t>(s.N) * 12), argmax(static_cast<size_t>(s.N) * 8);
  EnsembleStatsParams q{};
  EnsembleParams& p = q.ensemble;
  p.logits = x.data(), p.weights = w.data(), p.output = out.data(), p.dtype = d;
  p.E = s.E, p.N = s.N, p.K = s.K;
  p.stride_e = x.stride_e, p.stride_n = x.stride_n, p.stride_k = x.stride_k, p.out_stride_n = s.K;
  double acc_buffer;
  store_value(acc_of(d), &acc_buffer, 0, temperature);
  q.normalizer = {nullptr, normalizer};
  q.temperature = {&acc_buffer, -1};
  q.stats = stats.as<float>(), q.argmax = argmax.as<int64_t>();
  t.ensemble(p, 0, s.N);
  for (int64_t n = 0; n < s.N; ++n) {
    for (int64_t k = 0; k < s.K; ++k) {
      double sum = round_acc(d, w.get(0) * x.get(0, n, k));
      for (int64_t e = 1; e < s.E; ++e) sum = multiply_add(d, sum, w.get(e), x.get(e, n, k));
      CHECK(same(out.get(n * s.K + k), rounded(d, sum)), "%s %s layout %d", t.name, name_of(d), layout);
    }
  }
  p.output = again.data();
  t.ensemble_stats(q, 0, s.N);
  CHECK(s.N == 0 || memcmp(out.data(), again.data(), out.memory.size()) == 0);
  for (int64_t n = 0; n < s.N; ++n) {
    std::vector<double> z;
    for (int64_t k = 0; k < s.K; ++k) z.push_back(out.get(n * s.K + k));
    double want[3];
    int64_t best;
    statistics(z, round_acc(d, round_acc(d, normalizer) * round_acc(d, temperature)), want, best);
    CHECK(argmax.as<int64_t>()[n] == best, "%s %s row %ld: %ld, want %ld", t.name, name_of(d), long(n),
          long(argmax.as<int64_t>()[n]), long(best));
    for (int i = 0; i < 3; ++i) {
      const double got = static_cast<double>(stats.as<float>()[n * 3 + i]);
      CHECK(near(got, want[i], 3e-6), "%s %s K %ld row %ld stat %d: %g, want %g", t.name, name_of(d), long(s.K),
            long(n), i, got, want[i]);
    }
    if (s.K == 1 && !special)
      CHECK(stats.as<float>()[n * 3] == 1 && stats.as<float>()[n * 3 + 1] == 0 && stats.as<float>()[n * 3 + 2] == 1);
  }
}

void backward(const KernelTable& t, DType d, Shape s, int layout, bool expanded) {
  if (!take(d)) return;
  Random random(static_cast<uint64_t>(s.E + s.N + s.K));
  Logits x(d, s.E, s.N, s.K, layout);
  x.values.fill_normal(random);
  Values g(d, expanded ? 1 : s.N * s.K), w(acc_of(d), s.E), out(d, s.E * s.N * s.K), gw(acc_of(d), s.E);
  g.fill_normal(random);
  w.fill_normal(random);
  const int64_t chunks = cpu::ensemble_backward_chunks(s.N);
  Values partials(acc_of(d), ensemble_backward_partials(s.E, s.N, s.K));
  EnsembleBackwardParams p{};
  p.grad = g.data(), p.logits = x.data(), p.weights = w.data(), p.grad_logits = out.data(),
  p.partials = partials.data();
  p.grad_weights = gw.data(), p.dtype = d, p.E = s.E, p.N = s.N, p.K = s.K;
  p.grad_stride_n = expanded ? 0 : s.K, p.grad_stride_k = expanded ? 0 : 1;
  p.stride_e = x.stride_e, p.stride_n = x.stride_n, p.stride_k = x.stride_k, p.out_stride_e = s.N * s.K,
  p.out_stride_n = s.K;
  t.ensemble_backward_logits(p, 0, s.N);
  t.ensemble_backward_weights(p, 0, chunks);
  backend::ensemble_backward_weights_finish(p);
  for (int64_t e = 0; e < s.E; ++e) {
    double sum = 0, size = 0;
    for (int64_t n = 0; n < s.N; ++n) {
      for (int64_t k = 0; k < s.K; ++k) {
        const double grad = g.get(expanded ? 0 : n * s.K + k);
        CHECK(same(out.get((e * s.N + n) * s.K + k), rounded(d, round_acc(d, w.get(e) * grad))));
        sum += grad * x.get(e, n, k);
        size += fabs(grad * x.get(e, n, k));
      }
    }
    CHECK(fabs(gw.get(e) - sum) <= (d == DType::f64 ? 1e-15 : 1e-6) * (size + 1), "%s %s: %g, want %g", t.name,
          name_of(d), gw.get(e), sum);
  }
}

}  // namespace

int main() {
  for (const KernelTable* t : tables()) {
    for (DType d : kAllTypes) {
      for (const Shape& s : kShapes) {
        for (int layout = 0; layout < Logits::kLayouts; ++layout) {
          forward(*t, d, s, layout, 1, 1, false);
          forward(*t, d, s, layout, 0.7, 1.3, true);
          backward(*t, d, s, layout, false);
          backward(*t, d, s, layout, true);
        }
      }
      forward(*t, d, {2, 3, 20}, 0, -1.0, 0.5, false);  // a negative normalizer turns the order round
      backward(*t, d, {2, 200, 19}, 0, false);          // several chunks
    }
  }
  return finish("test_ensemble");
}

// Row losses and gradients against their definition in double, and the final sums.
#include <vector>

#include "testing.h"

using namespace testing;

namespace {

struct Case {
  int64_t E, N, K;
  bool weighted;
  double smoothing;
};
constexpr Case kCases[] = {{1, 0, 5, false, 0},    {1, 1, 1, false, 0},    {2, 3, 1, true, 0.1},
                           {3, 4, 3, true, 0},     {2, 5, 17, false, 0.2}, {4, 3, 100, true, 0.1},
                           {2, 3, 1000, false, 0}, {1, 2, 129, true, 1.0},
                           {2, 7, 2, false, 0.1},  {1, 3, 32, true, 0},    {3, 64, 10, true, 0.1},
                           {2, 2, 256, true, 0.1}, {1, 1, 5003, false, 0}};
constexpr int64_t kIgnore = -100;

// What else a loss has beside the exits' cross entropies.
struct Terms {
  bool prefixes, distillation, detach, probabilities;
  double temperature;
};
constexpr Terms kTerms[] = {{false, false, false, false, 1}, {true, true, false, false, 3},  {true, false, true, false, 1},
                            {false, true, false, true, 2.5}, {true, true, true, true, 4}};

double log_sum_exp(const std::vector<double>& x) {
  double top = -INFINITY, sum = 0;
  for (double v : x) top = isnan(v) || isnan(top) ? NAN : fmax(top, v);
  for (double v : x) sum += exp(v - top);
  return top + log(sum);
}

// One sample by the definition: its losses (3, E), and the gradient (E, K) of them times their coefficients.
struct Sample {
  std::vector<std::vector<double>> x, r;
  std::vector<double> t, b, losses, grad;

  void run(const Terms& terms, const std::vector<double>& c) {
    const size_t E = x.size(), K = t.size();
    double mass = 0, weights = 0;
    for (double v : t) mass += v;
    losses.assign(3 * E, 0), grad.assign(E * K, 0), r = x;
    std::vector<double> sums;
    for (size_t e = 0; e < E; ++e) {
      sums.push_back(weights += b[e]);
      for (size_t k = 0; k < K; ++k) {
        double total = 0;
        for (size_t j = 0; j <= e; ++j) total += b[j] * x[j][k];
        r[e][k] = total / weights;
      }
    }
    const auto cross_entropy = [&](const std::vector<double>& scores) {
      double loss = 0;
      const double sum = log_sum_exp(scores);
      for (size_t k = 0; k < K; ++k) loss += t[k] == 0 ? (isnan(sum) ? sum : 0) : t[k] * (sum - scores[k]);
      return loss;
    };
    const auto cooled = [&](std::vector<double> scores) {
      for (double& v : scores) v /= terms.temperature;
      return scores;
    };
    const std::vector<double> teacher = cooled(r[E - 1]);
    const double teacher_sum = log_sum_exp(teacher);
    for (size_t e = 0; e < E; ++e) {
      const std::vector<double> student = cooled(x[e]);
      const double exit_sum = log_sum_exp(x[e]), prefix_sum = log_sum_exp(r[e]), student_sum = log_sum_exp(student);
      losses[e] = cross_entropy(x[e]);
      if (terms.prefixes) losses[E + e] = cross_entropy(r[e]);
      for (size_t k = 0; k < K; ++k) {
        const double p = exp(teacher[k] - teacher_sum);
        grad[e * K + k] += c[e] * (mass * exp(x[e][k] - exit_sum) - t[k]);
        if (terms.distillation) {
          losses[2 * E + e] += p == 0 ? 0 : p * ((teacher[k] - teacher_sum) - (student[k] - student_sum));
          grad[e * K + k] += c[2 * E + e] / terms.temperature * (exp(student[k] - student_sum) - p);
        }
        for (size_t j = terms.detach ? e : 0; terms.prefixes && j <= e; ++j)
          grad[j * K + k] += c[E + e] * b[j] / sums[e] * (mass * exp(r[e][k] - prefix_sum) - t[k]);
      }
    }
  }
};

void run(const KernelTable& t, DType d, const Case& c, const Terms& terms, int layout, bool special) {
  if (!take(d)) return;
  Random random(static_cast<uint64_t>(c.E * 7 + c.N * 3 + c.K + layout));
  const DType acc = acc_of(d);
  const int64_t E = c.E, N = c.N, K = c.K, rows = E * N;
  const bool more = terms.prefixes || terms.distillation;
  Logits x(d, E, N, K, layout);
  x.values.fill_normal(random, 4);
  if (N >= 3 && K >= 3) x.set(E - 1, 2, 2, 150);  // the label's logit is far below
  if (special && N >= 3 && K >= 3) {
    x.set(0, 0, 2, NAN);
    x.set(E - 1, 1, 0, -INFINITY);
    for (int64_t k = 0; k < K; ++k) x.set(0, 2, k, k == 1 ? INFINITY : -1);
  }
  Guarded target(static_cast<size_t>(N) * 16);
  for (int64_t n = 0; n < N; ++n)
    target.as<int64_t>()[2 * n] = n == 3            ? kIgnore
                                  : n == 1 && K > 1 ? 1
                                                    : random.below(K),
                             target.as<int64_t>()[2 * n + 1] = 1 << 30;
  Values w(acc, K), q(acc, N * K), b(acc, E), losses(acc, 3 * rows), kept(acc, multi_exit_loss_kept(E, N, more)),
      incoming(acc, N), exits(acc, E), prefixes(acc, E), grad(d, rows * K), own_grad(acc, rows), one(acc, 1);
  one.set(0, 2);
  for (int64_t e = 0; e < E; ++e) {
    const double step = static_cast<double>(e);
    exits.set(e, 1 + 0.5 * step), prefixes.set(e, 0.7 - 0.2 * step), b.set(e, 0.3 + 0.4 * step);
  }
  for (int64_t k = 0; k < K; ++k) w.set(k, 0.2 + random.uniform());
  if (K > 3) w.set(3, 0);
  for (int64_t i = 0; i < N * K; ++i) q.set(i, 2 * random.uniform() / static_cast<double>(K));
  incoming.fill_normal(random), own_grad.fill_normal(random);
  MultiExitLossParams p{};
  p.logits = x.data(), p.class_weight = c.weighted ? w.data() : nullptr;
  p.target = terms.probabilities ? nullptr : target.as<int64_t>(), p.target_stride = terms.probabilities ? K : 2;
  p.probabilities = q.data(), p.output_weights = more ? b.data() : nullptr;
  p.row_losses[0] = losses.data(), p.row_losses[1] = terms.prefixes ? losses.at(rows) : nullptr;
  p.row_losses[2] = terms.distillation ? losses.at(2 * rows) : nullptr;
  p.kept = kept.data(), p.dtype = d, p.E = E, p.N = N, p.K = K;
  p.stride_e = x.stride_e, p.stride_n = x.stride_n, p.stride_k = x.stride_k;
  p.ignore_index = kIgnore, p.label_smoothing = c.smoothing, p.temperature = terms.temperature;
  p.prefixes = terms.prefixes, p.distillation = terms.distillation, p.detach_prefix = terms.detach;
  const int64_t half = N / 2;
  t.multi_exit_loss(p, half, N);
  t.multi_exit_loss(p, 0, half);

  MultiExitLossGradParams g{};
  g.loss = p, g.grad_logits = grad.data();
  for (void*& row_losses : g.loss.row_losses) row_losses = nullptr;
  for (int i = 0; i < 3; ++i) {
    auto& k = g.coefficients[i];
    k.weights = i == 0 ? exits.data() : i == 1 ? prefixes.data() : nullptr;
    k.weight = 1.5, k.grad_loss = incoming.data(), k.loss_stride_n = 1, k.denominator = one.data(), k.factor = 4;
  }
  g.coefficients[0].grad_losses = own_grad.data(), g.coefficients[0].stride_e = N, g.coefficients[0].stride_n = 1;
  g.out_stride_e = N * K, g.out_stride_n = K, g.out_stride_k = 1;
  t.multi_exit_loss_grad(g, half, N);
  t.multi_exit_loss_grad(g, 0, half);

  const double tolerance = d == DType::f64 ? 4e-14 : 6e-6, s = c.smoothing;
  for (int64_t n = 0; n < N; ++n) {
    const int64_t y = target.as<int64_t>()[2 * n];
    if (!terms.probabilities && y == kIgnore) {
      for (int64_t i = 0; i < E; ++i) {
        CHECK(losses.get(i * N + n) == 0);
        for (int64_t k = 0; k < K; ++k) CHECK(grad.get((i * N + n) * K + k) == 0);
      }
      continue;
    }
    Sample sample;
    std::vector<double> coefficients;
    for (int64_t e = 0; e < E; ++e) {
      sample.x.emplace_back();
      for (int64_t k = 0; k < K; ++k) sample.x.back().push_back(x.get(e, n, k));
      sample.b.push_back(more ? b.get(e) : 1);
    }
    for (int64_t k = 0; k < K; ++k) {
      const double share = terms.probabilities ? q.get(n * K + k) : k == y;
      sample.t.push_back((c.weighted ? w.get(k) : 1) * ((1 - s) * share + s / static_cast<double>(K)));
    }
    for (int64_t i = 0; i < 3 * E; ++i) {
      const double weight = i < E ? exits.get(i) : i < 2 * E ? prefixes.get(i - E) : 1.5;
      coefficients.push_back(2 * (weight * incoming.get(n) + (i < E ? own_grad.get(i * N + n) : 0)));
    }
    sample.run(terms, coefficients);
    for (int64_t i = 0; i < 3 * E; ++i) {
      if (i >= E && !p.row_losses[i / E]) continue;
      const double want = sample.losses[static_cast<size_t>(i)], found = losses.get(i * N + n);
      CHECK(near(found, want, tolerance * 4), "%s %s K %ld loss %ld of sample %ld: %g, want %g", t.name, name_of(d),
            long(K), long(i), long(n), found, want);
    }
    for (int64_t i = 0; i < E; ++i) {
      for (int64_t k = 0; k < K; ++k) {
        const double want = sample.grad[static_cast<size_t>(i * K + k)], found = grad.get((i * N + n) * K + k);
        CHECK(near(found, want, 3 * tolerance + 2 * epsilon(d)), "%s %s K %ld sample %ld exit %ld class %ld: %g, want %g",
              t.name, name_of(d), long(K), long(n), long(i), long(k), found, want);
      }
    }
  }
  // Loss and gradient in one pass, the coefficient being the exit's weight alone, then scaled afterwards; in a place of
  // its own with other strides, and in place of the logits.
  Logits own(d, E, N, K, layout == Logits::dense ? 1 : 0);
  Values again(acc, 3 * rows);
  for (auto& k : g.coefficients) k.grad_loss = k.grad_losses = nullptr;
  t.multi_exit_loss_grad(g, 0, N);
  MultiExitLossGradParams both = g;
  both.loss.kept = nullptr;
  for (int i = 0; i < 3; ++i) both.loss.row_losses[i] = p.row_losses[i] ? again.at(i * rows) : nullptr;
  both.grad_logits = const_cast<void*>(own.data());
  both.out_stride_e = own.stride_e, both.out_stride_n = own.stride_n, both.out_stride_k = own.stride_k;
  t.multi_exit_loss_grad(both, half, N);
  t.multi_exit_loss_grad(both, 0, half);
  both.grad_logits = const_cast<void*>(p.logits);
  both.out_stride_e = p.stride_e, both.out_stride_n = p.stride_n, both.out_stride_k = p.stride_k;
  t.multi_exit_loss_grad(both, 0, N);
  for (int64_t i = 0; i < 3 * rows; ++i) {
    if (!p.row_losses[i / rows]) continue;
    CHECK(same(again.get(i), losses.get(i)), "%s %s row %ld: %g, want %g", t.name, name_of(d), long(i), again.get(i),
          losses.get(i));
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < K; ++k) {
      const double want = grad.get(i * K + k);
      CHECK(near(own.row_get(i, k), want, 2 * tolerance + 4 * epsilon(d)), "%s %s K %ld row %ld class %ld: %g, want %g",
            t.name, name_of(d), long(K), long(i), long(k), own.row_get(i, k), want);
      CHECK(same(own.row_get(i, k), x.row_get(i, k)), "in place, %s %s K %ld", t.name, name_of(d), long(K));
    }
  }
  Values factor(acc, 1);
  LossGradScaleParams l{};
  l.grad = const_cast<void*>(own.data()), l.scale = factor.data(), l.dtype = d, l.E = E, l.N = N, l.K = K;
  l.stride_e = own.stride_e, l.stride_n = own.stride_n, l.stride_k = own.stride_k;
  factor.set(0, 3), l.divisor = 3;  // nothing to do
  t.loss_grad_scale(l, 0, rows);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < K; ++k) CHECK(same(own.row_get(i, k), x.row_get(i, k)));
  }
  l.divisor = 6;
  t.loss_grad_scale(l, rows / 2, rows);
  t.loss_grad_scale(l, 0, rows / 2);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < K; ++k) CHECK(near(own.row_get(i, k), x.row_get(i, k) / 2, epsilon(d)));
  }
}

void reduce(DType d) {
  const DType acc = acc_of(d);
  Values rows(acc, 6), a(acc, 2), w(acc, 4), loss(acc, 3), exits(acc, 2), other(acc, 2), divisors(acc, 2);
  for (int i = 0; i < 6; ++i) rows.set(i, i == 1 || i == 4 ? 0 : i + 0.5);
  a.set(0, 0.25), a.set(1, 2);
  for (int i = 0; i < 4; ++i) w.set(i, i + 1);
  int64_t target[3] = {2, kIgnore, 0};
  MultiExitLossReduceParams p{};
  p.row_losses[0] = rows.data(), p.weights[0] = a.data(), p.target = target, p.class_weight = w.data();
  p.loss = loss.data(), p.losses[0] = exits.data(), p.divisors = divisors.data(), p.dtype = d, p.E = 2, p.N = 3;
  p.K = 4, p.target_stride = 1, p.ignore_index = kIgnore;
  p.reduction = Reduction::mean;  // rows: .5 0 2.5 | 3.5 0 5.5, divisors 3 + 1 and 2
  backend::multi_exit_loss_reduce(p);
  CHECK(exits.get(0) == 0.75 && exits.get(1) == 2.25 && divisors.get(0) == 4 && divisors.get(1) == 2 &&
        loss.get(0) == 0.25 * 0.75 + 2 * 2.25);
  p.row_losses[2] = rows.data(), p.losses[2] = other.data(), p.weight = 0.5;
  backend::multi_exit_loss_reduce(p);
  CHECK(other.get(0) == 1.5 && other.get(1) == 4.5 && loss.get(0) == 0.25 * 0.75 + 2 * 2.25 + 0.5 * 1.5 + 0.5 * 4.5);
  p.row_losses[2] = p.losses[2] = nullptr;
  p.class_weight = nullptr;
  backend::multi_exit_loss_reduce(p);
  CHECK(divisors.get(0) == 2 && exits.get(1) == 4.5);
  p.reduction = Reduction::sum;
  backend::multi_exit_loss_reduce(p);
  CHECK(exits.get(0) == 3 && exits.get(1) == 9 && loss.get(0) == 0.75 + 18 && divisors.get(0) == 1);
  p.reduction = Reduction::none;
  p.losses[0] = nullptr;
  backend::multi_exit_loss_reduce(p);
  CHECK(loss.get(0) == 0.125 + 7 && loss.get(1) == 0 && loss.get(2) == 0.625 + 11);
  p.target = nullptr;
  p.reduction = Reduction::mean;
  p.losses[0] = exits.data();
  backend::multi_exit_loss_reduce(p);
  CHECK(divisors.get(0) == 3 && divisors.get(1) == 3);
  p.target = target;
  target[0] = target[2] = kIgnore;
  for (int i = 0; i < 6; ++i) rows.set(i, 0);
  backend::multi_exit_loss_reduce(p);
  CHECK(isnan(loss.get(0)) && isnan(exits.get(0)) && isnan(divisors.get(0)) && isnan(divisors.get(1)));
}

void labels() {
  const int64_t target[] = {0, 9, 4, 9, -100, 9, 5, 9, -1, 9};
  const int64_t ignore = -100;
  CHECK(backend::find_bad_label(target, 2, 5, 6, &ignore) == 4);
  CHECK(backend::find_bad_label(target, 2, 4, 6, &ignore) == -1);
  CHECK(backend::find_bad_label(target, 2, 4, 6, nullptr) == 2);
  CHECK(backend::find_bad_label(target, 2, 4, 5, &ignore) == 3);
  CHECK(backend::find_bad_label(target, 2, 0, 6, &ignore) == -1);
}

}  // namespace

int main() {
  labels();
  for (DType d : kAllTypes) reduce(d);
  for (const KernelTable* t : tables()) {
    for (DType d : kAllTypes) {
      for (const Case& c : kCases) {
        for (const Terms& terms : kTerms) {
          for (int layout = 0; layout < Logits::kLayouts; ++layout) {
            run(*t, d, c, terms, layout, false);
            run(*t, d, c, terms, layout, true);
          }
        }
      }
      // Several packs a lane of a warp.
      if (backend::kCuda) run(*t, d, {2, 1024, 135, true, 0.1}, kTerms[0], Logits::dense, true);
    }
  }
  return finish("test_multi_exit_loss");
}

// Row losses and gradients against their definition in double, and the final sums.
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

void run(const KernelTable& t, DType d, const Case& c, int layout, bool special) {
  if (!take(d)) return;
  Random random(static_cast<uint64_t>(c.E * 7 + c.N * 3 + c.K + layout));
  const DType acc = acc_of(d);
  const int64_t E = c.E, N = c.N, K = c.K;
  Logits x(d, E, N, K, layout);
  x.values.fill_normal(random, 4);
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
  Values w(acc, K), loss(acc, E * N), tops(acc, E * N), sums(acc, E * N), coefficients(acc, N), exits(acc, E), grad(d, E * N * K);
  Values one(acc, 1);
  one.set(0, 2);
  for (int64_t e = 0; e < E; ++e) exits.set(e, 1 + 0.5 * static_cast<double>(e));
  for (int64_t k = 0; k < K; ++k) w.set(k, 0.2 + random.uniform());
  if (K > 3) w.set(3, 0);
  coefficients.fill_normal(random);
  JointCrossEntropyParams p{};
  p.logits = x.data(), p.target = target.as<int64_t>(), p.class_weight = c.weighted ? w.data() : nullptr;
  p.row_losses = loss.data(), p.row_max = tops.data(), p.row_sum = sums.data(), p.dtype = d, p.E = E, p.N = N, p.K = K;
  p.stride_e = x.stride_e, p.stride_n = x.stride_n, p.stride_k = x.stride_k, p.target_stride = 2;
  p.ignore_index = kIgnore, p.label_smoothing = c.smoothing;
  const int64_t half = E * N / 2;
  t.joint_cross_entropy(p, half, E * N);
  t.joint_cross_entropy(p, 0, half);

  JointCrossEntropyBackwardParams b{};
  b.logits = p.logits, b.target = p.target, b.class_weight = p.class_weight, b.row_max = tops.data(), b.row_sum = sums.data();
  b.coefficients.exit_weights = exits.data(), b.coefficients.grad_loss = coefficients.data();
  b.coefficients.loss_stride_n = 1, b.coefficients.denominator = one.data(), b.coefficients.factor = 4;
  b.grad_logits = grad.data(), b.dtype = d, b.E = E, b.N = N, b.K = K;
  b.stride_e = p.stride_e, b.stride_n = p.stride_n, b.stride_k = p.stride_k, b.target_stride = 2;
  b.out_stride_e = N * K, b.out_stride_n = K;
  b.ignore_index = kIgnore, b.label_smoothing = c.smoothing;
  t.joint_cross_entropy_backward(b, half, E * N);
  t.joint_cross_entropy_backward(b, 0, half);

  const double tolerance = d == DType::f64 ? 2e-14 : 4e-6, s = c.smoothing;
  double total = 0;
  for (int64_t k = 0; k < K; ++k) total += c.weighted ? w.get(k) : 1;
  for (int64_t i = 0; i < E * N; ++i) {
    const int64_t n = i % N, y = target.as<int64_t>()[2 * n];
    double top = -INFINITY, sum = 0, rest = 0;
    for (int64_t k = 0; k < K; ++k) top = isnan(x.row_get(i, k)) || isnan(top) ? NAN : fmax(top, x.row_get(i, k));
    for (int64_t k = 0; k < K; ++k) sum += exp(x.row_get(i, k) - top);
    const double log_sum_exp = top + log(sum);
    const double found = tops.get(i) + log(sums.get(i));
    CHECK(near(found, log_sum_exp, tolerance), "%s %s log-sum-exp %g, want %g", t.name, name_of(d), found, log_sum_exp);
    if (y == kIgnore) {
      CHECK(loss.get(i) == 0);
      for (int64_t k = 0; k < K; ++k) CHECK(grad.get(i * K + k) == 0);
      continue;
    }
    const double w_y = c.weighted ? w.get(y) : 1;
    for (int64_t k = 0; k < K && s > 0; ++k) rest += (c.weighted ? w.get(k) : 1) * (log_sum_exp - x.row_get(i, k));
    double want = w_y * (log_sum_exp - x.row_get(i, y));
    if (s > 0) want = (1 - s) * want + s / static_cast<double>(K) * rest;
    CHECK(near(loss.get(i), want, tolerance * (s > 0 ? 4 : 2)), "%s %s K %ld row %ld: %g, want %g", t.name, name_of(d),
          long(K), long(i), loss.get(i), want);
    for (int64_t k = 0; k < K; ++k) {
      const double probability = exp(x.row_get(i, k) - log_sum_exp), share = s / static_cast<double>(K);
      const double g = 2 * exits.get(i / N) * coefficients.get(n) * ((1 - s) * w_y * (probability - (k == y)) +
                                              share * (total * probability - (c.weighted ? w.get(k) : 1)));
      CHECK(near(grad.get(i * K + k), g, 2 * tolerance + 2 * epsilon(d)), "%s %s K %ld row %ld class %ld: %g, want %g",
            t.name, name_of(d), long(K), long(i), long(k), grad.get(i * K + k), g);
    }
  }
  // Loss and gradient in one pass, the coefficient being the exit's weight alone, then scaled afterwards; in a place of
  // its own with other strides, and in place of the logits.
  Logits own(d, E, N, K, layout == Logits::dense ? 1 : 0);
  Values again(acc, E * N);
  b.coefficients.grad_loss = nullptr;
  t.joint_cross_entropy_backward(b, 0, E * N);
  JointCrossEntropyGradParams q{};
  q.loss = p, q.loss.row_losses = again.data(), q.coefficients = b.coefficients;
  q.grad_logits = const_cast<void*>(own.data());
  q.out_stride_e = own.stride_e, q.out_stride_n = own.stride_n, q.out_stride_k = own.stride_k;
  t.joint_cross_entropy_grad(q, half, E * N);
  t.joint_cross_entropy_grad(q, 0, half);
  q.grad_logits = const_cast<void*>(p.logits), q.loss.row_max = q.loss.row_sum = nullptr;
  q.out_stride_e = p.stride_e, q.out_stride_n = p.stride_n, q.out_stride_k = p.stride_k;
  t.joint_cross_entropy_grad(q, 0, E * N);
  for (int64_t i = 0; i < E * N; ++i) {
    CHECK(same(again.get(i), loss.get(i)), "%s %s row %ld: %g, want %g", t.name, name_of(d), long(i), again.get(i),
          loss.get(i));
    for (int64_t k = 0; k < K; ++k) {
      const double want = grad.get(i * K + k);
      CHECK(near(own.row_get(i, k), want, 2 * tolerance + 4 * epsilon(d)), "%s %s K %ld row %ld class %ld: %g, want %g",
            t.name, name_of(d), long(K), long(i), long(k), own.row_get(i, k), want);
      CHECK(same(own.row_get(i, k), x.row_get(i, k)), "in place, %s %s K %ld", t.name, name_of(d), long(K));
    }
  }
  Values factor(acc, 1);
  LossGradScaleParams g{};
  g.grad = const_cast<void*>(own.data()), g.scale = factor.data(), g.dtype = d, g.E = E, g.N = N, g.K = K;
  g.stride_e = own.stride_e, g.stride_n = own.stride_n, g.stride_k = own.stride_k;
  factor.set(0, 3), g.divisor = 3;  // nothing to do
  t.loss_grad_scale(g, 0, E * N);
  for (int64_t i = 0; i < E * N; ++i) {
    for (int64_t k = 0; k < K; ++k) CHECK(same(own.row_get(i, k), x.row_get(i, k)));
  }
  g.divisor = 6;
  t.loss_grad_scale(g, half, E * N);
  t.loss_grad_scale(g, 0, half);
  for (int64_t i = 0; i < E * N; ++i) {
    for (int64_t k = 0; k < K; ++k) CHECK(near(own.row_get(i, k), x.row_get(i, k) / 2, epsilon(d)));
  }
}

void reduce(DType d) {
  const DType acc = acc_of(d);
  Values rows(acc, 6), a(acc, 2), w(acc, 4), loss(acc, 3), exits(acc, 2), denominator(acc, 1);
  for (int i = 0; i < 6; ++i) rows.set(i, i == 1 || i == 4 ? 0 : i + 0.5);
  a.set(0, 0.25), a.set(1, 2);
  for (int i = 0; i < 4; ++i) w.set(i, i + 1);
  int64_t target[3] = {2, kIgnore, 0};
  JointCrossEntropyReduceParams p{};
  p.row_losses = rows.data(), p.exit_weights = a.data(), p.target = target, p.class_weight = w.data(),
  p.loss = loss.data();
  p.exit_losses = exits.data(), p.denominator = denominator.data(), p.dtype = d, p.E = 2, p.N = 3, p.K = 4;
  p.target_stride = 1, p.ignore_index = kIgnore;
  p.reduction = Reduction::mean;  // rows: .5 0 2.5 | 3.5 0 5.5, denominator 3 + 1
  backend::joint_cross_entropy_reduce(p);
  CHECK(exits.get(0) == 0.75 && exits.get(1) == 2.25 && denominator.get(0) == 4 &&
        loss.get(0) == 0.25 * 0.75 + 2 * 2.25);
  p.class_weight = nullptr;
  backend::joint_cross_entropy_reduce(p);
  CHECK(denominator.get(0) == 2 && exits.get(1) == 4.5);
  p.reduction = Reduction::sum;
  backend::joint_cross_entropy_reduce(p);
  CHECK(exits.get(0) == 3 && exits.get(1) == 9 && loss.get(0) == 0.75 + 18 && denominator.get(0) == 1);
  p.reduction = Reduction::none;
  p.exit_losses = nullptr;
  backend::joint_cross_entropy_reduce(p);
  CHECK(loss.get(0) == 0.125 + 7 && loss.get(1) == 0 && loss.get(2) == 0.625 + 11);
  target[0] = target[2] = kIgnore;
  p.reduction = Reduction::mean;
  p.exit_losses = exits.data();
  for (int i = 0; i < 6; ++i) rows.set(i, 0);
  backend::joint_cross_entropy_reduce(p);
  CHECK(isnan(loss.get(0)) && isnan(exits.get(0)) && isnan(denominator.get(0)));
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
        for (int layout = 0; layout < Logits::kLayouts; ++layout) {
          run(*t, d, c, layout, false);
          run(*t, d, c, layout, true);
        }
      }
      if (backend::kCuda) run(*t, d, {2, 1024, 135, true, 0.1}, Logits::dense, true);  // several packs a lane of a warp
    }
  }
  return finish("test_joint_cross_entropy");
}

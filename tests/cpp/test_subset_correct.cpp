// Every subset's counts against the plain sum and the rank by its definition: exact, in every form of the kernel.
#include "testing.h"

using namespace testing;

namespace {

enum Data { chance, trained, ties, extremes, huge, kData };

void run(const KernelTable& t, DType d, int64_t E, int64_t N, int64_t K, int layout, int data) {
  if (!take(d)) return;
  Random random(static_cast<uint64_t>(E * 1000 + N * 10 + K + data));
  Logits x(d, E, N, K, layout);
  x.values.fill_normal(random, data == huge ? 1e37 : 1);
  Guarded target(static_cast<size_t>(N) * 8);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t y = target.as<int64_t>()[n] = random.below(K);
    for (int64_t e = 0; e < E; ++e) {
      if (data == trained) x.set(e, n, y, 2.5);
      for (int64_t k = 0; data == ties && k < K; ++k) x.set(e, n, k, static_cast<double>(random.below(3)));
      if (data == extremes) {
        const double odd[] = {NAN, INFINITY, -INFINITY, -0.0, 1e300, 1e-300};
        if (random.below(3) == 0) x.set(e, n, random.below(K), odd[random.below(6)]);
        if (random.below(9) == 0) x.set(e, n, y, odd[random.below(6)]);
      }
    }
  }
  Values w(acc_of(d), E);
  for (int64_t e = 0; e < E; ++e) w.set(e, data == ties ? 0.5 : 0.05 + random.uniform());
  if (E > 2 && data == chance) w.set(1, -0.3), w.set(2, 0);
  const int64_t subsets = (int64_t(1) << E) - 1;
  Guarded counts(static_cast<size_t>(subsets) * 16);
  memset(counts.data(), 0, counts.size());
  std::vector<int64_t> want(static_cast<size_t>(subsets) * 2);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t y = target.as<int64_t>()[n];
    for (int64_t m = 1; m <= subsets; ++m) {
      std::vector<double> sum(static_cast<size_t>(K));
      bool first = true, nan = false;
      for (int64_t e = 0; e < E; ++e) {
        if (!(m >> e & 1)) continue;
        for (int64_t k = 0; k < K; ++k) {
          double& s = sum[static_cast<size_t>(k)];
          s = first ? round_acc(d, w.get(e) * x.get(e, n, k)) : multiply_add(d, s, w.get(e), x.get(e, n, k));
        }
        first = false;
      }
      int64_t rank = 0;
      for (int64_t k = 0; k < K; ++k) {
        const double s = sum[static_cast<size_t>(k)], own = sum[static_cast<size_t>(y)];
        nan |= isnan(s);
        rank += s > own || (s == own && k < y);
      }
      want[static_cast<size_t>(m - 1) * 2] += !nan && rank < 1;
      want[static_cast<size_t>(m - 1) * 2 + 1] += !nan && rank < 5;
    }
  }
  SubsetCorrectParams p{};
  p.logits = x.data(), p.weights = w.data(), p.target = target.as<int64_t>(), p.counts = nullptr, p.dtype = d;
  p.E = E, p.N = N, p.K = K, p.stride_e = x.stride_e, p.stride_n = x.stride_n, p.stride_k = x.stride_k,
  p.target_stride = 1;
  const int64_t cut = N / 3;
  t.subset_correct(p, 0, cut, counts.as<int64_t>());
  t.subset_correct(p, cut, N, counts.as<int64_t>());
  int wrong = 0;
  for (size_t i = 0; i < want.size(); ++i) wrong += counts.as<int64_t>()[i] != want[i];
  CHECK(wrong == 0, "%s %s E %ld N %ld K %ld layout %d data %d: %d of %zu counts", t.name, name_of(d), long(E), long(N),
        long(K), layout, data, wrong, want.size());
}

}  // namespace

int main() {
  for (const KernelTable* t : tables()) {
    for (DType d : kAllTypes) {
      for (int data = 0; data < kData; ++data) {
        for (int layout = 0; layout < Logits::kLayouts; ++layout) {
          run(*t, d, 1, 5, 7, layout, data);
          run(*t, d, 2, 40, 3, layout, data);
          run(*t, d, 4, 37, 17, layout, data);
        }
        run(*t, d, 1, 0, 4, 0, data);
        run(*t, d, 3, 20, 1, 0, data);
        run(*t, d, 3, 20, 130, 0, data);  // more than 64 candidates: the row form
        run(*t, d, 5, 9, 70, 0, data);
      }
      run(*t, d, 2, 3, 1000, 1, chance);
      run(*t, d, 2, 40, 1000, 0, trained);
      run(*t, d, 9, 20, 10, 0, trained);
    }
    run(*t, DType::f32, 16, 2, 6, 0, chance);
    run(*t, DType::f32, 3, 3, 6000, 0, trained);
    run(*t, DType::f32, 8, 2, 1300, 0, ties);  // longer than a tile of shared memory, with many prefixes
    run(*t, DType::f32, 12, 1, 900, 0, extremes);
  }
  return finish("test_subset_correct");
}

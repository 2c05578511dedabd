#include "testing.h"

using namespace testing;

namespace {

void run(const KernelTable& t, DType d, int64_t N, int64_t C, int64_t K, bool with_bias) {
  Random random(static_cast<uint64_t>(N * 131 + C * 17 + K));
  Values x(d, N ? (N - 1) * (C + 3) + C : 0), weight(d, (K - 1) * (C + 1) + C), bias(d, 2 * K - 1), y(d, N * K),
      z(d, N * K);
  x.fill_normal(random), weight.fill_normal(random), bias.fill_normal(random);
  SmallLinearParams p{};
  p.input = x.data(), p.weight = weight.data(), p.bias = with_bias ? bias.data() : nullptr, p.output = y.data();
  p.dtype = d, p.N = N, p.C = C, p.K = K;
  p.stride_n = C + 3, p.weight_stride_k = C + 1, p.bias_stride = 2, p.out_stride_n = K;
  t.small_linear(p, 0, N);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      double want = with_bias ? bias.get(2 * k) : 0, size = fabs(want);
      for (int64_t c = 0; c < C; ++c) {
        const double product = x.get(n * (C + 3) + c) * weight.get(k * (C + 1) + c);
        want += product, size += fabs(product);
      }
      const double got = y.get(n * K + k), tolerance = epsilon(d) * fabs(want) + (d == DType::f64 ? 1e-14 : 2e-6) * size;
      CHECK(fabs(got - want) <= tolerance, "%s %s (%ld,%ld,%ld): %g, want %g", t.name, name_of(d), long(N), long(C),
            long(K), got, want);
    }
  }
  // The split into ranges changes nothing.
  p.output = z.data();
  for (int64_t n = 0; n < N; ++n) t.small_linear(p, n, n + 1);
  CHECK(N == 0 || memcmp(y.data(), z.data(), y.memory.size()) == 0, "%s %s split", t.name, name_of(d));
}

}  // namespace

int main() {
  for (const KernelTable* t : tables()) {
    for (DType d : kAllTypes) {
      for (bool with_bias : {false, true}) {
        run(*t, d, 0, 3, 2, with_bias);
        run(*t, d, 1, 1, 1, with_bias);
        run(*t, d, 3, 67, 10, with_bias);
        run(*t, d, 2, 512, 5, with_bias);
        run(*t, d, 1, 33, 4, with_bias);
      }
    }
  }
  return finish("test_small_linear");
}

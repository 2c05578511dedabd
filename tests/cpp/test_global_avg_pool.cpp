#include "testing.h"

using namespace testing;

namespace {

enum Layout { contiguous, channels_last, any, kLayouts };

void run(const KernelTable& t, DType d, int layout, int64_t N, int64_t C, int64_t H, int64_t W) {
  if (!take(d)) return;
  Random random(static_cast<uint64_t>(N * 131 + C * 17 + H * 5 + W));
  GlobalAvgPoolParams p{};
  p.dtype = d;
  p.N = N, p.C = C, p.H = H, p.W = W;
  if (layout == contiguous) {
    p.stride_w = 1, p.stride_h = W, p.stride_c = H * W, p.stride_n = C * H * W;
  } else if (layout == channels_last) {
    p.stride_c = 1, p.stride_w = C, p.stride_h = W * C, p.stride_n = C * H * W;
  } else {  // transposed image with gaps
    p.stride_h = 2, p.stride_w = 2 * H, p.stride_c = 2 * H * W, p.stride_n = 2 * C * H * W;
  }
  const int64_t extent =
      N == 0 || C == 0 ? 0
                       : (N - 1) * p.stride_n + (C - 1) * p.stride_c + (H - 1) * p.stride_h + (W - 1) * p.stride_w + 1;
  Values x(d, extent), y(d, N * C), z(d, N * C);
  x.fill_normal(random);
  if (extent > 3) x.set(extent / 2, NAN);
  p.input = x.data();
  p.output = y.data();
  p.out_stride_n = C, p.out_stride_c = 1;
  t.global_avg_pool(p, 0, N * C);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t c = 0; c < C; ++c) {
      double sum = 0;
      for (int64_t h = 0; h < H; ++h) {
        for (int64_t w = 0; w < W; ++w) sum += x.get(n * p.stride_n + c * p.stride_c + h * p.stride_h + w * p.stride_w);
      }
      const double got = y.get(n * C + c), want = sum / static_cast<double>(H * W);
      CHECK(near(got, want, 2 * epsilon(d) + (d == DType::f64 ? 1e-14 : 2e-6)),
            "%s %s layout %d (%ld,%ld,%ld,%ld): %g, want %g", t.name, name_of(d), layout, long(N), long(C), long(H),
            long(W), got, want);
    }
  }
  // The split into ranges changes nothing.
  p.output = z.data();
  for (int64_t begin = 0; begin < N * C; begin += 7) t.global_avg_pool(p, begin, begin + 7 < N * C ? begin + 7 : N * C);
  CHECK(N * C == 0 || memcmp(y.data(), z.data(), y.memory.size()) == 0, "%s %s layout %d split", t.name, name_of(d),
        layout);
}

}  // namespace

int main() {
  for (const KernelTable* t : tables()) {
    for (DType d : kAllTypes) {
      for (int layout = 0; layout < kLayouts; ++layout) {
        run(*t, d, layout, 0, 3, 2, 2);
        run(*t, d, layout, 2, 0, 2, 2);
        run(*t, d, layout, 1, 1, 1, 1);
        run(*t, d, layout, 2, 3, 1, 1);
        run(*t, d, layout, 3, 17, 7, 7);
        run(*t, d, layout, 2, 100, 1, 5);
        run(*t, d, layout, 2, 65, 5, 1);
        run(*t, d, layout, 1, 131, 9, 31);
        run(*t, d, layout, 2, 8, 4, 4);
        run(*t, d, layout, 130, 8, 2, 2);
        run(*t, d, layout, 1, 16, 16, 24);
      }
    }
  }
  return finish("test_global_avg_pool");
}

// Conversions to and from half precision, and the vector exponential, for every instruction set.
#include "testing.h"

using namespace testing;

namespace {

// The exponential of a double to more digits than needed.
double ulps(double got, long double want, int digits) {
  if (want == 0) return got == 0 ? 0 : 1e9;
  int exponent;
  frexpl(want, &exponent);
  const int lowest = digits == 24 ? -149 : -1074;
  const int unit = exponent - digits < lowest ? lowest : exponent - digits;
  return static_cast<double>(fabsl(static_cast<long double>(got) - want) / ldexpl(1, unit));
}

void exponential(const KernelTable& t) {
  const float f_inf = INFINITY;
  {
    const float in[] = {0,     -0.0f, -f_inf, f_inf, NAN,    -104,   -103.5f, -1000,
                        88.5f, 89.5f, -3e38f, 3e38f, -87.5f, 1e-30f, -87.0f,  -100};
    const int count = 16;
    Guarded x(sizeof(in)), y(sizeof(in));
    memcpy(x.data(), in, sizeof(in));
    t.exp_f32(x.as<float>(), y.as<float>(), count);
    for (int i = 0; i < count; ++i) {
      const long double want = expl(static_cast<long double>(in[i]));
      const float got = y.as<float>()[i];
      if (isnan(in[i]))
        CHECK(isnan(got), "%s", t.name);
      else if (want > 3.5e38L)
        CHECK(isinf(got) && got > 0, "%s exp(%g)", t.name, in[i]);
      else
        CHECK(ulps(got, want, 24) <= 2, "%s exp(%g) = %g", t.name, in[i], got);
    }
    CHECK(y.as<float>()[2] == 0 && y.as<float>()[7] == 0 && y.as<float>()[0] == 1);
  }
  Random random(1);
  double worst = 0;
  for (int64_t count : {1, 3, 17, 20000}) {
    Guarded x(static_cast<size_t>(count) * 4), y(static_cast<size_t>(count) * 4);
    for (int64_t i = 0; i < count; ++i) x.as<float>()[i] = static_cast<float>(random.uniform() * 190 - 103);
    t.exp_f32(x.as<float>(), y.as<float>(), count);
    for (int64_t i = 0; i < count; ++i) worst = fmax(worst, ulps(y.as<float>()[i], expl(x.as<float>()[i]), 24));
  }
  CHECK(worst <= 2, "%s float exponential off by %g ulp", t.name, worst);
  printf("%s: float exponential within %.2f ulp\n", t.name, worst);
  worst = 0;
  for (int64_t count : {1, 3, 17, 20000}) {
    Guarded x(static_cast<size_t>(count) * 8), y(static_cast<size_t>(count) * 8);
    for (int64_t i = 0; i < count; ++i) x.as<double>()[i] = random.uniform() * (i % 2 ? 1450 : 2) - (i % 2 ? 744 : 1);
    x.as<double>()[0] = count == 3 ? -INFINITY : count == 17 ? NAN : -800;
    t.exp_f64(x.as<double>(), y.as<double>(), count);
    if (count == 17)
      CHECK(isnan(y.as<double>()[0]));
    else
      CHECK(y.as<double>()[0] == 0);
    for (int64_t i = 1; i < count; ++i) {
      if (x.as<double>()[i] < 709.7) worst = fmax(worst, ulps(y.as<double>()[i], expl(x.as<double>()[i]), 53));
    }
  }
  CHECK(worst <= 2, "%s double exponential off by %g ulp", t.name, worst);
  printf("%s: double exponential within %.2f ulp\n", t.name, worst);
}

// The value of a half by its definition.
double meaning(DType d, uint16_t bits) {
  const int mantissa_bits = d == DType::bf16 ? 7 : 10, bias = d == DType::bf16 ? 127 : 15;
  const int top = d == DType::bf16 ? 255 : 31;
  const int exponent = (bits & 0x7fff) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  double value;
  if (exponent == top)
    value = mantissa ? NAN : INFINITY;
  else if (exponent == 0)
    value = ldexp(mantissa, 1 - bias - mantissa_bits);
  else
    value = ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
  return bits & 0x8000 ? -value : value;
}

void halves(const KernelTable& t, DType d) {
  std::vector<uint16_t> all(65536), back(65536);
  std::vector<float> wide(65536);
  for (int i = 0; i < 65536; ++i) all[i] = static_cast<uint16_t>(i);
  t.convert(all.data(), d, wide.data(), DType::f32, 65536);
  t.convert(wide.data(), DType::f32, back.data(), d, 65536);
  int wrong = 0;
  for (int i = 0; i < 65536; ++i) {
    const double want = meaning(d, all[i]);
    if (!same(static_cast<double>(wide[i]), want) || (!isnan(want) && back[i] != all[i])) ++wrong;
    if (isnan(want) && !isnan(meaning(d, back[i]))) ++wrong;
    if (want == 0 && signbit(wide[i]) != signbit(want)) ++wrong;
  }
  CHECK(wrong == 0, "%s %s: %d", t.name, name_of(d), wrong);

  // Between two neighbours a < b: below the middle to a, above it to b, in the middle to the even one.
  const int last = d == DType::bf16 ? 0x7f7f : 0x7bff;
  std::vector<float> in;
  std::vector<uint16_t> want;
  for (int i = 0; i < last; ++i) {
    const float a = static_cast<float>(meaning(d, static_cast<uint16_t>(i))),
                b = static_cast<float>(meaning(d, static_cast<uint16_t>(i + 1)));
    const float middle = static_cast<float>((static_cast<double>(a) + static_cast<double>(b)) / 2);
    if (static_cast<double>(middle) * 2 != static_cast<double>(a) + static_cast<double>(b)) continue;
    for (float sign : {1.0f, -1.0f}) {
      const uint16_t s = sign < 0 ? 0x8000 : 0;
      in.push_back(sign * middle);
      want.push_back(static_cast<uint16_t>((i % 2 == 0 ? i : i + 1) | s));
      in.push_back(sign * nextafterf(middle, 0));
      want.push_back(static_cast<uint16_t>(i | s));
      in.push_back(sign * nextafterf(middle, INFINITY));
      want.push_back(static_cast<uint16_t>((i + 1) | s));
    }
  }
  const float largest = static_cast<float>(meaning(d, static_cast<uint16_t>(last)));
  const float step = largest - static_cast<float>(meaning(d, static_cast<uint16_t>(last - 1)));
  for (float x : {largest + step / 2, INFINITY}) {
    in.push_back(x);
    want.push_back(static_cast<uint16_t>(last + 1));
  }
  in.push_back(nextafterf(largest + step / 2, 0));
  want.push_back(static_cast<uint16_t>(last));
  std::vector<uint16_t> got(in.size());
  t.convert(in.data(), DType::f32, got.data(), d, static_cast<int64_t>(in.size()));
  wrong = 0;
  for (size_t i = 0; i < in.size(); ++i) wrong += got[i] != want[i];
  CHECK(wrong == 0, "%s to %s: %d of %zu", t.name, name_of(d), wrong, in.size());

  for (int64_t count = 0; count < 40; ++count) {  // every length of the tail, at the edge of readable memory
    Guarded x(static_cast<size_t>(count) * 4), y(static_cast<size_t>(count) * 2), z(static_cast<size_t>(count) * 4);
    for (int64_t i = 0; i < count; ++i) x.as<float>()[i] = static_cast<float>(i) - 7;
    t.convert(x.data(), DType::f32, y.data(), d, count);
    t.convert(y.data(), d, z.data(), DType::f32, count);
    for (int64_t i = 0; i < count; ++i) CHECK(z.as<float>()[i] == static_cast<float>(i) - 7);
  }
  // NaN with a payload that rounding could turn into infinity
  const uint32_t nan_bits[] = {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu};
  for (uint32_t bits : nan_bits) {
    std::vector<float> x(17);
    std::vector<uint16_t> y(17);
    for (float& v : x) memcpy(&v, &bits, 4);
    t.convert(x.data(), DType::f32, y.data(), d, 17);
    for (uint16_t v : y) CHECK(isnan(meaning(d, v)), "%s %s", t.name, name_of(d));
  }
}

}  // namespace

int main() {
  for (const KernelTable* t : tables()) {
    exponential(*t);
    halves(*t, DType::bf16);
    halves(*t, DType::f16);
  }
  return finish("test_vectors");
}

// The contract of Vec<T> (vec_scalar.h) for one instruction set: every operation, lane by lane, against the one-lane
// type. Compiled once for each set with its flags; AEP_UNIT names the set, AEP_UNIT_HEADER its header.
//
// Nothing with vague linkage may be used in here (csrc/kernels/cpu/kernel_table.h says why): hence no testing.h and no
// standard containers.
#include <stdio.h>

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own intrinsics: "__Y is used uninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define AEP_JOIN_(a, b) a##b
#define AEP_JOIN(a, b) AEP_JOIN_(a, b)

#define AEP_ISA_NAMESPACE AEP_JOIN(contract_one_lane_for_, AEP_UNIT)
#include "kernels/cpu/vec_scalar.h"
#undef AEP_ISA_NAMESPACE
#define AEP_ISA_NAMESPACE AEP_JOIN(contract_, AEP_UNIT)
#include AEP_UNIT_HEADER

namespace {

namespace one = aep::kernels::cpu::AEP_JOIN(contract_one_lane_for_, AEP_UNIT);
namespace many = aep::kernels::cpu::AEP_JOIN(contract_, AEP_UNIT);

int failures = 0;

template <class T>
bool same(T a, T b) {  // the same bits, where every NaN counts as the same
  return (a != a && b != b) || memcmp(&a, &b, sizeof(T)) == 0;
}

template <class T>
void expect(const char* what, T got, T want, T a, T b) {
  if (same(got, want)) return;
  if (++failures <= 20)
    fprintf(stderr, "%s(%g, %g) = %g, want %g\n", what, double(a), double(b), double(got), double(want));
}

template <class T>
constexpr T kSpecial[] = {0,
                          static_cast<T>(-0.0),
                          1,
                          -1,
                          static_cast<T>(0.5),
                          static_cast<T>(-2.5),
                          static_cast<T>(1.5),
                          static_cast<T>(3.7),
                          static_cast<T>(-1e-30),
                          static_cast<T>(1e30),
                          static_cast<T>(-123),
                          static_cast<T>(127),
                          sizeof(T) == 4 ? static_cast<T>(0x1p-149) : static_cast<T>(0x1p-1074),
                          sizeof(T) == 4 ? static_cast<T>(-0x1.8p-130) : static_cast<T>(-0x1.8p-1030),
                          sizeof(T) == 4 ? static_cast<T>(0x1.fffffep127) : static_cast<T>(0x1.fffffffffffffp1023),
                          static_cast<T>(__builtin_inf()),
                          static_cast<T>(-__builtin_inf()),
                          static_cast<T>(__builtin_nan(""))};
template <class T>
constexpr int kCount = static_cast<int>(sizeof(kSpecial<T>) / sizeof(T));

// Every pair of special values, in every lane.
template <class T>
void operations() {
  using V = many::Vec<T>;
  using O = one::Vec<T>;
  T a[V::n], b[V::n];
  for (int pair = 0; pair < kCount<T> * kCount<T>; ++pair) {
    for (int i = 0; i < V::n; ++i) {
      a[i] = kSpecial<T>[(pair + i) / kCount<T> % kCount<T>];
      b[i] = kSpecial<T>[(pair + i) % kCount<T>];
    }
    const V x = load(a, many::Full{}, T(0)), y = load(b, many::Full{}, T(0));
    const V results[] = {V::add(x, y), V::sub(x, y), V::mul(x, y), V::div(x, y), V::max(x, y), V::min(x, y), V::abs(x)};
    const char* const names[] = {"add", "sub", "mul", "div", "max", "min", "abs"};
    const unsigned masks[] = {V::bits(V::gt(x, y)), V::bits(V::ge(x, y)), V::bits(V::lt(x, y)),
                              V::bits(V::le(x, y)), V::bits(V::eq(x, y)), V::bits(V::unordered(x, y))};
    const char* const relations[] = {"gt", "ge", "lt", "le", "eq", "unordered"};
    const V counted = V::add_if(V::gt(x, y), V::set(7), V::set(1));
    for (int i = 0; i < V::n; ++i) {
      const O s = O::set(a[i]), t = O::set(b[i]);
      const O wants[] = {O::add(s, t), O::sub(s, t), O::mul(s, t), O::div(s, t), O::max(s, t), O::min(s, t), O::abs(s)};
      for (int f = 0; f < 7; ++f) expect(names[f], V::lane(results[f], i), wants[f].v, a[i], b[i]);
      const bool held[] = {O::gt(s, t), O::ge(s, t), O::lt(s, t), O::le(s, t), O::eq(s, t), O::unordered(s, t)};
      for (int f = 0; f < 6; ++f) expect(relations[f], T(masks[f] >> i & 1u), T(held[f]), a[i], b[i]);
      expect("add_if", V::lane(counted, i), T(held[0] ? 8 : 7), a[i], b[i]);
    }
    for (unsigned mask : masks) expect("bits behind the last lane", T(mask >> (V::n - 1) >> 1), T(0), a[0], b[0]);
  }
}

// Whole results over the lanes, one rounding where one is promised, and powers of two down to the subnormal.
template <class T>
void whole() {
  using V = many::Vec<T>;
  T a[V::n], sum = 0;
  for (int i = 0; i < V::n; ++i) sum += a[i] = T(1 + (i * 5) % V::n);
  const V x = load(a, many::Full{}, T(0));
  expect("sum", V::sum(x), sum, T(0), T(0));
  expect("top", V::top(x), T(V::n), T(0), T(0));
  V rows[V::n];
  for (int i = 0; i < V::n; ++i) rows[i] = V::mul(x, V::set(T(i + 1)));
  for (int i = 0; i < V::n; ++i) expect("sums", V::lane(V::sums(rows), i), T(i + 1) * sum, T(i), T(0));
  const int digits = sizeof(T) == 4 ? 13 : 27;  // (1 + u)(1 - u) - 1 = -u^2 shows with one rounding only
  const T u = one::Vec<T>::power2(-digits);
  expect("fma", V::lane(V::fma(V::set(1 + u), V::set(1 - u), V::set(-1)), 0), -u * u, u, u);
  const T halves[] = {T(-2.5), T(-1.5), T(-0.5), T(0.5), T(1.5), T(2.5)}, even[] = {-2, -2, T(-0.0), 0, 2, 2};
  for (int i = 0; i < 6; ++i) expect("round", V::lane(V::round(V::set(halves[i])), 0), even[i], halves[i], T(0));
  const int most = sizeof(T) == 4 ? 160 : 1100;
  for (int k = -most; k <= most; ++k) {
    const T scale = T(k), want = sizeof(T) == 4 ? T(ldexpf(1.25f, k)) : T(ldexp(1.25, k));
    expect("scale2", V::lane(V::scale2(V::set(T(1.25)), V::set(scale)), V::n - 1), want, T(1.25), scale);
  }
}

// A part: the lanes behind it become `fill`, and what stands behind it in memory is left alone.
template <class S, class A, class Put, class Get>
void parts(Put put, Get get) {
  using V = many::Vec<A>;
  S in[V::n], out[V::n];
  const A fills[] = {0, 3, static_cast<A>(-__builtin_inf())};
  for (int i = 0; i < V::n; ++i) in[i] = put(A(i + 1));
  for (int count = 1; count < V::n; ++count) {
    for (A fill : fills) {
      const V x = load(in, many::Part{count}, fill);
      for (int i = 0; i < V::n; ++i) expect("load", V::lane(x, i), i < count ? A(i + 1) : fill, A(count), fill);
    }
    for (int i = 0; i < V::n; ++i) out[i] = put(A(-9));
    store(out, load(in, many::Full{}, A(0)), many::Part{count});
    for (int i = 0; i < V::n; ++i) expect("store", get(out[i]), i < count ? A(i + 1) : A(-9), A(count), A(i));
  }
}

}  // namespace

extern "C" int AEP_JOIN(aep_contract_, AEP_UNIT)() {
  failures = 0;
  operations<float>();
  operations<double>();
  whole<float>();
  whole<double>();
  parts<float, float>([](float x) { return x; }, [](float x) { return x; });
  parts<double, double>([](double x) { return x; }, [](double x) { return x; });
  parts<aep::kernels::cpu::BF16, float>([](float x) { return many::to_bf16(x); },
                                        [](aep::kernels::cpu::BF16 x) { return many::to_float(x); });
  parts<aep::kernels::cpu::F16, float>([](float x) { return many::to_f16(x); },
                                       [](aep::kernels::cpu::F16 x) { return many::to_float(x); });
  return failures;
}

// The small vector type with one lane: the meaning of every operation, and the fallback for any CPU.
//
// Contract of Vec<T> (T = float, double), the same in vec_avx2.h, vec_avx512.h and vec_neon.h:
//   max(a, b), min(a, b) give b when either is NaN (as x86 does); comparisons with NaN are false, but unordered().
//   sums(a) has the sum of a[i]'s lanes in lane i, added in the same order for every i.
//   bits(mask) has bit i set for lane i. load/store with a Part touch `count` lanes only, the others become `fill`.
//   times_power(x, t) = x * 2^n (float), where t = 1.5 * 2^23 + 127 + n: 0 for n = -127, infinite for n = 128.
//   scale2(x, n) = x * 2^n with gradual underflow, for whole n within +-1100 (double) or +-160 (float).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "half_types.h"

namespace aep::kernels::cpu::AEP_ISA_NAMESPACE {
namespace {

struct Full {};  // all lanes
struct Part {    // the first `count` lanes, 0 < count < Vec::n
  int count;
};

#include "half_scalar.inl.h"

template <class T>
struct Vec;

template <class T, class Bits, int kMantissa, int kBias>
struct ScalarVec {
  static constexpr int n = 1;
  using Mask = bool;
  using Self = Vec<T>;
  T v;

  static Self set(T x) { return Self{{x}}; }
  static Self add(Self a, Self b) { return set(a.v + b.v); }
  static Self sub(Self a, Self b) { return set(a.v - b.v); }
  static Self mul(Self a, Self b) { return set(a.v * b.v); }
  static Self div(Self a, Self b) { return set(a.v / b.v); }
  static Self fma(Self a, Self b, Self c) { return set(a.v * b.v + c.v); }  // two roundings here, one with FMA hardware
  static Self max(Self a, Self b) { return set(a.v > b.v ? a.v : b.v); }
  static Self min(Self a, Self b) { return set(a.v < b.v ? a.v : b.v); }
  static Self abs(Self a) { return set(a.v > 0 ? a.v : T(0) - a.v); }  // -0 becomes 0
  static Mask gt(Self a, Self b) { return a.v > b.v; }
  static Mask ge(Self a, Self b) { return a.v >= b.v; }
  static Mask lt(Self a, Self b) { return a.v < b.v; }
  static Mask le(Self a, Self b) { return a.v <= b.v; }
  static Mask eq(Self a, Self b) { return a.v == b.v; }
  static Mask unordered(Self a, Self b) { return a.v != a.v || b.v != b.v; }
  static unsigned bits(Mask m) { return m ? 1u : 0u; }
  static Self add_if(Mask m, Self a, Self b) { return m ? set(a.v + b.v) : a; }
  static T sum(Self a) { return a.v; }
  static T top(Self a) { return a.v; }
  static Self sums(const Self (&a)[n]) { return a[0]; }
  static T lane(Self a, int) { return a.v; }
  static Self round(Self a) {
    return set(a.v - a.v == 0 ? static_cast<T>(static_cast<int>(a.v + (a.v < 0 ? T(-0.5) : T(0.5)))) : a.v);
  }
  static T power2(int e) {
    const Bits b = static_cast<Bits>(e + kBias) << kMantissa;
    T x;
    memcpy(&x, &b, sizeof(x));
    return x;
  }
  static Self times_power(Self a, Self t) {
    Bits b;
    memcpy(&b, &t.v, sizeof(b));
    b <<= kMantissa;
    T power;
    memcpy(&power, &b, sizeof(power));
    return set(a.v * power);
  }
  static Self scale2(Self a, Self k) {
    if (!(k.v - k.v == 0)) return set(a.v + k.v);  // NaN stays NaN
    const int e = static_cast<int>(k.v), half = e / 2;
    return set(a.v * power2(half) * power2(e - half));
  }
};

template <>
struct Vec<float> : ScalarVec<float, uint32_t, 23, 127> {};
template <>
struct Vec<double> : ScalarVec<double, uint64_t, 52, 1023> {};

inline Vec<float> load(const float* p, Full, float) { return Vec<float>::set(*p); }
inline Vec<double> load(const double* p, Full, double) { return Vec<double>::set(*p); }
inline Vec<float> load(const BF16* p, Full, float) { return Vec<float>::set(to_float(*p)); }
inline Vec<float> load(const F16* p, Full, float) { return Vec<float>::set(to_float(*p)); }
inline void store(float* p, Vec<float> a, Full) { *p = a.v; }
inline void store(double* p, Vec<double> a, Full) { *p = a.v; }
inline void store(BF16* p, Vec<float> a, Full) { *p = to_bf16(a.v); }
inline void store(F16* p, Vec<float> a, Full) { *p = to_f16(a.v); }
// One lane has no part of its own: never reached, needed to compile the shared loops.
template <class S, class A>
inline auto load(const S* p, Part, A fill) {
  return load(p, Full{}, fill);
}
template <class S, class V>
inline void store(S* p, V a, Part) {
  store(p, a, Full{});
}

}  // namespace
}  // namespace aep::kernels::cpu::AEP_ISA_NAMESPACE

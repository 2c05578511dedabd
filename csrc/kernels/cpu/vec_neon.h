// The small vector type for NEON (Advanced SIMD of Armv8.0, AArch64): 4 floats or 2 doubles. Contract: vec_scalar.h.
//
// Only what every AArch64 processor has: no flags beyond the baseline. Half precision is converted by FCVTL and FCVTN,
// bfloat16 by integer arithmetic (its own instructions come with Armv8.6).
#pragma once

#include <arm_neon.h>
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

// FMAX and FMIN return NaN where either operand is one; the contract wants the second operand, hence the selections.
template <>
struct Vec<float> {
  static constexpr int n = 4;
  using Mask = uint32x4_t;
  float32x4_t v;

  static Vec set(float x) { return {vdupq_n_f32(x)}; }
  static Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  static Vec div(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  static Vec max(Vec a, Vec b) { return {vbslq_f32(gt(a, b), a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {vbslq_f32(lt(a, b), a.v, b.v)}; }
  static Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
  static Mask gt(Vec a, Vec b) { return vcgtq_f32(a.v, b.v); }
  static Mask ge(Vec a, Vec b) { return vcgeq_f32(a.v, b.v); }
  static Mask lt(Vec a, Vec b) { return vcltq_f32(a.v, b.v); }
  static Mask le(Vec a, Vec b) { return vcleq_f32(a.v, b.v); }
  static Mask eq(Vec a, Vec b) { return vceqq_f32(a.v, b.v); }
  static Mask unordered(Vec a, Vec b) { return vmvnq_u32(vandq_u32(eq(a, a), eq(b, b))); }
  static unsigned bits(Mask m) {
    const uint32x4_t weight = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(m, weight));
  }
  static Vec add_if(Mask m, Vec a, Vec b) { return {vbslq_f32(m, vaddq_f32(a.v, b.v), a.v)}; }
  static float sum(Vec a) { return vaddvq_f32(a.v); }
  static float top(Vec a) { return vmaxvq_f32(a.v); }
  static Vec sums(const Vec (&a)[n]) {
    return {vpaddq_f32(vpaddq_f32(a[0].v, a[1].v), vpaddq_f32(a[2].v, a[3].v))};
  }
  static float lane(Vec a, int i) {
    float t[n];
    vst1q_f32(t, a.v);
    return t[i];
  }
  static Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
  static Vec times_power(Vec a, Vec t) {
    return {vmulq_f32(a.v, vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(t.v), 23)))};
  }
  static float32x4_t power2(int32x4_t e) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(e, vdupq_n_s32(127)), 23));
  }
  // In two steps, since 2^k itself may be subnormal. A NaN in k comes with a NaN in a.
  static Vec scale2(Vec a, Vec k) {
    const int32x4_t e = vcvtnq_s32_f32(k.v), half = vshrq_n_s32(e, 1);
    return {vmulq_f32(vmulq_f32(a.v, power2(half)), power2(vsubq_s32(e, half)))};
  }
};

template <>
struct Vec<double> {
  static constexpr int n = 2;
  using Mask = uint64x2_t;
  float64x2_t v;

  static Vec set(double x) { return {vdupq_n_f64(x)}; }
  static Vec add(Vec a, Vec b) { return {vaddq_f64(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {vsubq_f64(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {vmulq_f64(a.v, b.v)}; }
  static Vec div(Vec a, Vec b) { return {vdivq_f64(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
  static Vec max(Vec a, Vec b) { return {vbslq_f64(gt(a, b), a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {vbslq_f64(lt(a, b), a.v, b.v)}; }
  static Vec abs(Vec a) { return {vabsq_f64(a.v)}; }
  static Mask gt(Vec a, Vec b) { return vcgtq_f64(a.v, b.v); }
  static Mask ge(Vec a, Vec b) { return vcgeq_f64(a.v, b.v); }
  static Mask lt(Vec a, Vec b) { return vcltq_f64(a.v, b.v); }
  static Mask le(Vec a, Vec b) { return vcleq_f64(a.v, b.v); }
  static Mask eq(Vec a, Vec b) { return vceqq_f64(a.v, b.v); }
  static Mask unordered(Vec a, Vec b) { return veorq_u64(vandq_u64(eq(a, a), eq(b, b)), vdupq_n_u64(~uint64_t(0))); }
  static unsigned bits(Mask m) {
    const uint64x2_t weight = {1, 2};
    return static_cast<unsigned>(vaddvq_u64(vandq_u64(m, weight)));
  }
  static Vec add_if(Mask m, Vec a, Vec b) { return {vbslq_f64(m, vaddq_f64(a.v, b.v), a.v)}; }
  static double sum(Vec a) { return vaddvq_f64(a.v); }
  static double top(Vec a) { return vmaxvq_f64(a.v); }
  static Vec sums(const Vec (&a)[n]) { return {vpaddq_f64(a[0].v, a[1].v)}; }
  static double lane(Vec a, int i) {
    double t[n];
    vst1q_f64(t, a.v);
    return t[i];
  }
  static Vec round(Vec a) { return {vrndnq_f64(a.v)}; }
  static float64x2_t power2(int64x2_t e) {
    return vreinterpretq_f64_s64(vshlq_n_s64(vaddq_s64(e, vdupq_n_s64(1023)), 52));
  }
  static Vec scale2(Vec a, Vec k) {
    const int64x2_t e = vcvtnq_s64_f64(k.v), half = vshrq_n_s64(e, 1);
    return {vmulq_f64(vmulq_f64(a.v, power2(half)), power2(vsubq_s64(e, half)))};
  }
};

inline float32x4_t widen_bf16(uint16x4_t h) { return vreinterpretq_f32_u32(vshll_n_u16(h, 16)); }
inline uint16x4_t narrow_bf16(float32x4_t f) {
  const uint32x4_t b = vreinterpretq_u32_f32(f), odd = vandq_u32(vshrq_n_u32(b, 16), vdupq_n_u32(1));
  const uint16x4_t rounded = vaddhn_u32(b, vaddq_u32(odd, vdupq_n_u32(0x7fff)));  // the upper halves of the sums
  const uint16x4_t nan = vorr_u16(vand_u16(vshrn_n_u32(b, 16), vdup_n_u16(0x8000)), vdup_n_u16(0x7fc0));
  return vbsl_u16(vmovn_u32(vceqq_f32(f, f)), rounded, nan);
}
inline float32x4_t widen_f16(uint16x4_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
inline uint16x4_t narrow_f16(float32x4_t f) { return vreinterpret_u16_f16(vcvt_f16_f32(f)); }

// The first 1, 2 or 3 lanes, one by one: nothing behind them is touched.
inline uint16x4_t load_shorts(const uint16_t* p, int count) {
  uint16x4_t h = vld1_lane_u16(p, vdup_n_u16(0), 0);
  if (count > 1) h = vld1_lane_u16(p + 1, h, 1);
  if (count > 2) h = vld1_lane_u16(p + 2, h, 2);
  return h;
}
inline void store_shorts(uint16_t* p, uint16x4_t h, int count) {
  vst1_lane_u16(p, h, 0);
  if (count > 1) vst1_lane_u16(p + 1, h, 1);
  if (count > 2) vst1_lane_u16(p + 2, h, 2);
}
inline float32x4_t keep_first(float32x4_t v, int count, float fill) {
  const uint32x4_t index = {0, 1, 2, 3};
  return vbslq_f32(vcltq_u32(index, vdupq_n_u32(static_cast<uint32_t>(count))), v, vdupq_n_f32(fill));
}

inline Vec<float> load(const float* p, Full, float) { return {vld1q_f32(p)}; }
inline Vec<double> load(const double* p, Full, double) { return {vld1q_f64(p)}; }
inline Vec<float> load(const BF16* p, Full, float) { return {widen_bf16(vld1_u16(&p->bits))}; }
inline Vec<float> load(const F16* p, Full, float) { return {widen_f16(vld1_u16(&p->bits))}; }
inline Vec<float> load(const float* p, Part t, float fill) {
  float32x4_t v = vld1q_lane_f32(p, vdupq_n_f32(fill), 0);
  if (t.count > 1) v = vld1q_lane_f32(p + 1, v, 1);
  if (t.count > 2) v = vld1q_lane_f32(p + 2, v, 2);
  return {v};
}
inline Vec<double> load(const double* p, Part, double fill) { return {vld1q_lane_f64(p, vdupq_n_f64(fill), 0)}; }
inline Vec<float> load(const BF16* p, Part t, float fill) {
  return {keep_first(widen_bf16(load_shorts(&p->bits, t.count)), t.count, fill)};
}
inline Vec<float> load(const F16* p, Part t, float fill) {
  return {keep_first(widen_f16(load_shorts(&p->bits, t.count)), t.count, fill)};
}

inline void store(float* p, Vec<float> a, Full) { vst1q_f32(p, a.v); }
inline void store(double* p, Vec<double> a, Full) { vst1q_f64(p, a.v); }
inline void store(BF16* p, Vec<float> a, Full) { vst1_u16(&p->bits, narrow_bf16(a.v)); }
inline void store(F16* p, Vec<float> a, Full) { vst1_u16(&p->bits, narrow_f16(a.v)); }
inline void store(float* p, Vec<float> a, Part t) {
  vst1q_lane_f32(p, a.v, 0);
  if (t.count > 1) vst1q_lane_f32(p + 1, a.v, 1);
  if (t.count > 2) vst1q_lane_f32(p + 2, a.v, 2);
}
inline void store(double* p, Vec<double> a, Part) { vst1q_lane_f64(p, a.v, 0); }
inline void store(BF16* p, Vec<float> a, Part t) { store_shorts(&p->bits, narrow_bf16(a.v), t.count); }
inline void store(F16* p, Vec<float> a, Part t) { store_shorts(&p->bits, narrow_f16(a.v), t.count); }

}  // namespace
}  // namespace aep::kernels::cpu::AEP_ISA_NAMESPACE

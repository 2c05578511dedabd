// The small vector type for AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles. Contract: vec_scalar.h.
#pragma once

#include <immintrin.h>
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

template <>
struct Vec<float> {
  static constexpr int n = 16;
  using Mask = __mmask16;
  __m512 v;

  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  static Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
  static Mask gt(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
  static Mask ge(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
  static Mask lt(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
  static Mask le(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
  static Mask eq(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
  static Mask unordered(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q); }
  static unsigned bits(Mask m) { return m; }
  static Vec add_if(Mask m, Vec a, Vec b) { return {_mm512_mask_add_ps(a.v, m, a.v, b.v)}; }
  static float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
  static float top(Vec a) { return _mm512_reduce_max_ps(a.v); }
  // Each step halves the number of vectors: pairs within 128 bits first, then the 128-bit quarters.
  static __m512 pairs(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
  static __m512 fours(Vec a, Vec b, Vec c, Vec d) {
    const __m512d ab = _mm512_castps_pd(pairs(a.v, b.v)), cd = _mm512_castps_pd(pairs(c.v, d.v));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  static __m512 quarters(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  static Vec sums(const Vec (&a)[n]) {
    return {quarters(quarters(fours(a[0], a[1], a[2], a[3]), fours(a[4], a[5], a[6], a[7])),
                     quarters(fours(a[8], a[9], a[10], a[11]), fours(a[12], a[13], a[14], a[15])))};
  }
  static float lane(Vec a, int i) {
    float t[n];
    _mm512_storeu_ps(t, a.v);
    return t[i];
  }
  static Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Vec times_power(Vec a, Vec t) {
    return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t.v), 23)))};
  }
  static Vec scale2(Vec a, Vec k) { return {_mm512_scalef_ps(a.v, k.v)}; }
};

template <>
struct Vec<double> {
  static constexpr int n = 8;
  using Mask = __mmask8;
  __m512d v;

  static Vec set(double x) { return {_mm512_set1_pd(x)}; }
  static Vec add(Vec a, Vec b) { return {_mm512_add_pd(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {_mm512_sub_pd(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm512_mul_pd(a.v, b.v)}; }
  static Vec div(Vec a, Vec b) { return {_mm512_div_pd(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_pd(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm512_min_pd(a.v, b.v)}; }
  static Vec abs(Vec a) { return {_mm512_abs_pd(a.v)}; }
  static Mask gt(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ); }
  static Mask ge(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GE_OQ); }
  static Mask lt(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ); }
  static Mask le(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ); }
  static Mask eq(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ); }
  static Mask unordered(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_UNORD_Q); }
  static unsigned bits(Mask m) { return m; }
  static Vec add_if(Mask m, Vec a, Vec b) { return {_mm512_mask_add_pd(a.v, m, a.v, b.v)}; }
  static double sum(Vec a) { return _mm512_reduce_add_pd(a.v); }
  static double top(Vec a) { return _mm512_reduce_max_pd(a.v); }
  static __m512d pairs(Vec a, Vec b) {
    return _mm512_add_pd(_mm512_unpacklo_pd(a.v, b.v), _mm512_unpackhi_pd(a.v, b.v));
  }
  static __m512d quarters(__m512d a, __m512d b) {
    return _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
  }
  static Vec sums(const Vec (&a)[n]) {
    return {quarters(quarters(pairs(a[0], a[1]), pairs(a[2], a[3])), quarters(pairs(a[4], a[5]), pairs(a[6], a[7])))};
  }
  static double lane(Vec a, int i) {
    double t[n];
    _mm512_storeu_pd(t, a.v);
    return t[i];
  }
  static Vec round(Vec a) { return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Vec scale2(Vec a, Vec k) { return {_mm512_scalef_pd(a.v, k.v)}; }
};

inline __mmask16 first16(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
inline __mmask8 first8(int count) { return static_cast<__mmask8>((1u << count) - 1u); }

inline __m512 widen_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
inline __m256i narrow_bf16(__m512 f) {
  const __m512i b = _mm512_castps_si512(f);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __m512i nan = _mm512_or_si512(_mm512_slli_epi32(_mm512_srli_epi32(b, 31), 15), _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), nan));
}
inline __m256i narrow_f16(__m512 f) { return _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline __m256i load_shorts(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m256i load_shorts(const void* p, int count) { return _mm256_maskz_loadu_epi16(first16(count), p); }
inline __m512 keep_first(__m512 v, int count, float fill) {
  return _mm512_mask_mov_ps(_mm512_set1_ps(fill), first16(count), v);
}

inline Vec<float> load(const float* p, Full, float) { return {_mm512_loadu_ps(p)}; }
inline Vec<double> load(const double* p, Full, double) { return {_mm512_loadu_pd(p)}; }
inline Vec<float> load(const BF16* p, Full, float) { return {widen_bf16(load_shorts(p))}; }
inline Vec<float> load(const F16* p, Full, float) { return {_mm512_cvtph_ps(load_shorts(p))}; }
inline Vec<float> load(const float* p, Part t, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first16(t.count), p)};
}
inline Vec<double> load(const double* p, Part t, double fill) {
  return {_mm512_mask_loadu_pd(_mm512_set1_pd(fill), first8(t.count), p)};
}
inline Vec<float> load(const BF16* p, Part t, float fill) {
  return {keep_first(widen_bf16(load_shorts(p, t.count)), t.count, fill)};
}
inline Vec<float> load(const F16* p, Part t, float fill) {
  return {keep_first(_mm512_cvtph_ps(load_shorts(p, t.count)), t.count, fill)};
}

inline void store(float* p, Vec<float> a, Full) { _mm512_storeu_ps(p, a.v); }
inline void store(double* p, Vec<double> a, Full) { _mm512_storeu_pd(p, a.v); }
inline void store(BF16* p, Vec<float> a, Full) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a.v)); }
inline void store(F16* p, Vec<float> a, Full) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a.v)); }
inline void store(float* p, Vec<float> a, Part t) { _mm512_mask_storeu_ps(p, first16(t.count), a.v); }
inline void store(double* p, Vec<double> a, Part t) { _mm512_mask_storeu_pd(p, first8(t.count), a.v); }
inline void store(BF16* p, Vec<float> a, Part t) { _mm256_mask_storeu_epi16(p, first16(t.count), narrow_bf16(a.v)); }
inline void store(F16* p, Vec<float> a, Part t) { _mm256_mask_storeu_epi16(p, first16(t.count), narrow_f16(a.v)); }

}  // namespace
}  // namespace aep::kernels::cpu::AEP_ISA_NAMESPACE

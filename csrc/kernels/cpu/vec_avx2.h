// The small vector type for AVX2 + FMA + F16C: 8 floats or 4 doubles. Contract: vec_scalar.h.
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
  static constexpr int n = 8;
  using Mask = __m256;
  __m256 v;

  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  static Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  static Mask gt(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
  static Mask ge(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ); }
  static Mask lt(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
  static Mask le(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ); }
  static Mask eq(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
  static Mask unordered(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q); }
  static unsigned bits(Mask m) { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
  static Vec add_if(Mask m, Vec a, Vec b) { return {_mm256_add_ps(a.v, _mm256_and_ps(m, b.v))}; }
  static float sum(Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static float top(Vec a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static Vec sums(const Vec (&a)[n]) {
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(a[4].v, a[5].v), _mm256_hadd_ps(a[6].v, a[7].v));
    return {_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31))};
  }
  static float lane(Vec a, int i) {
    float t[n];
    _mm256_storeu_ps(t, a.v);
    return t[i];
  }
  static Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Vec times_power(Vec a, Vec t) {
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t.v), 23)))};
  }
  static __m256 power2(__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  }
  static Vec scale2(Vec a,
                    Vec k) {  // in two steps, since 2^k itself may be subnormal; a NaN in k comes with a NaN in a
    const __m256i e = _mm256_cvtps_epi32(k.v), half = _mm256_srai_epi32(e, 1);
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, power2(half)), power2(_mm256_sub_epi32(e, half)))};
  }
};

template <>
struct Vec<double> {
  static constexpr int n = 4;
  using Mask = __m256d;
  __m256d v;

  static Vec set(double x) { return {_mm256_set1_pd(x)}; }
  static Vec add(Vec a, Vec b) { return {_mm256_add_pd(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {_mm256_sub_pd(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm256_mul_pd(a.v, b.v)}; }
  static Vec div(Vec a, Vec b) { return {_mm256_div_pd(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_pd(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm256_min_pd(a.v, b.v)}; }
  static Vec abs(Vec a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
  static Mask gt(Vec a, Vec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ); }
  static Mask ge(Vec a, Vec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_GE_OQ); }
  static Mask lt(Vec a, Vec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ); }
  static Mask le(Vec a, Vec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_LE_OQ); }
  static Mask eq(Vec a, Vec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ); }
  static Mask unordered(Vec a, Vec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_UNORD_Q); }
  static unsigned bits(Mask m) { return static_cast<unsigned>(_mm256_movemask_pd(m)); }
  static Vec add_if(Mask m, Vec a, Vec b) { return {_mm256_add_pd(a.v, _mm256_and_pd(m, b.v))}; }
  static double sum(Vec a) {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
  static double top(Vec a) {
    const __m128d s = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(s, _mm_unpackhi_pd(s, s)));
  }
  static Vec sums(const Vec (&a)[n]) {
    const __m256d low = _mm256_hadd_pd(a[0].v, a[1].v), high = _mm256_hadd_pd(a[2].v, a[3].v);
    return {_mm256_add_pd(_mm256_permute2f128_pd(low, high, 0x20), _mm256_permute2f128_pd(low, high, 0x31))};
  }
  static double lane(Vec a, int i) {
    double t[n];
    _mm256_storeu_pd(t, a.v);
    return t[i];
  }
  static Vec round(Vec a) { return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static __m256d power2(__m128i e) {
    const __m256i wide = _mm256_cvtepi32_epi64(_mm_add_epi32(e, _mm_set1_epi32(1023)));
    return _mm256_castsi256_pd(_mm256_slli_epi64(wide, 52));
  }
  static Vec scale2(Vec a, Vec k) {
    const __m128i e = _mm256_cvtpd_epi32(k.v), half = _mm_srai_epi32(e, 1);
    return {_mm256_mul_pd(_mm256_mul_pd(a.v, power2(half)), power2(_mm_sub_epi32(e, half)))};
  }
};

// Lane masks for the first `count` lanes: windows into these rows of ones and zeros.
constexpr int32_t kWindow32[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
constexpr int64_t kWindow64[8] = {-1, -1, -1, -1, 0, 0, 0, 0};
inline __m256i first32(int count) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kWindow32 + 8 - count));
}
inline __m256i first64(int count) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kWindow64 + 4 - count));
}

inline __m256 widen_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
inline __m128i narrow_bf16(__m256 f) {
  const __m256i b = _mm256_castps_si256(f);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_or_si256(_mm256_slli_epi32(_mm256_srli_epi32(b, 31), 15), _mm256_set1_epi32(0x7fc0));
  r = _mm256_blendv_epi8(r, nan, _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q)));
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
inline __m128i load_shorts(const void* p, int count) {
  uint16_t t[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  memcpy(t, p, static_cast<size_t>(count) * 2);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(t));
}
inline void store_shorts(void* p, __m128i h, int count) {
  uint16_t t[8];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(t), h);
  memcpy(p, t, static_cast<size_t>(count) * 2);
}
inline __m256 keep_first(__m256 v, int count, float fill) {
  return _mm256_blendv_ps(_mm256_set1_ps(fill), v, _mm256_castsi256_ps(first32(count)));
}

inline Vec<float> load(const float* p, Full, float) { return {_mm256_loadu_ps(p)}; }
inline Vec<double> load(const double* p, Full, double) { return {_mm256_loadu_pd(p)}; }
inline Vec<float> load(const BF16* p, Full, float) {
  return {widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vec<float> load(const F16* p, Full, float) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vec<float> load(const float* p, Part t, float fill) {
  return {keep_first(_mm256_maskload_ps(p, first32(t.count)), t.count, fill)};
}
inline Vec<double> load(const double* p, Part t, double fill) {
  const __m256i m = first64(t.count);
  return {_mm256_blendv_pd(_mm256_set1_pd(fill), _mm256_maskload_pd(p, m), _mm256_castsi256_pd(m))};
}
inline Vec<float> load(const BF16* p, Part t, float fill) {
  return {keep_first(widen_bf16(load_shorts(p, t.count)), t.count, fill)};
}
inline Vec<float> load(const F16* p, Part t, float fill) {
  return {keep_first(_mm256_cvtph_ps(load_shorts(p, t.count)), t.count, fill)};
}

inline __m128i narrow_f16(__m256 f) { return _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store(float* p, Vec<float> a, Full) { _mm256_storeu_ps(p, a.v); }
inline void store(double* p, Vec<double> a, Full) { _mm256_storeu_pd(p, a.v); }
inline void store(BF16* p, Vec<float> a, Full) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a.v)); }
inline void store(F16* p, Vec<float> a, Full) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(a.v)); }
inline void store(float* p, Vec<float> a, Part t) { _mm256_maskstore_ps(p, first32(t.count), a.v); }
inline void store(double* p, Vec<double> a, Part t) { _mm256_maskstore_pd(p, first64(t.count), a.v); }
inline void store(BF16* p, Vec<float> a, Part t) { store_shorts(p, narrow_bf16(a.v), t.count); }
inline void store(F16* p, Vec<float> a, Part t) { store_shorts(p, narrow_f16(a.v), t.count); }

}  // namespace
}  // namespace aep::kernels::cpu::AEP_ISA_NAMESPACE

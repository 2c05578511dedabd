// In place of the toolkit's header of this name: storage and conversions, rounding to nearest even.
#pragma once

#include <stdint.h>
#include <string.h>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16, rest = h.bits & 0x7fffu;
  float x;
  if (rest >= 0x7c00u) {  // infinite or NaN
    const uint32_t bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
    memcpy(&x, &bits, sizeof(x));
  } else if (rest < 0x400u) {  // subnormal: a multiple of 2^-24
    x = static_cast<float>(rest) * 0x1p-24f;
    x = sign ? -x : x;
  } else {
    const uint32_t bits = sign | (rest + (112u << 10)) << 13;
    memcpy(&x, &bits, sizeof(x));
  }
  return x;
}

inline __half __float2half_rn(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return {0x7fff};                          // NaN
  if (size >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more
  if (size < 0x38800000u) {                                         // below 2^-14
    float scaled;
    memcpy(&scaled, &size, sizeof(scaled));
    scaled = scaled * 0x1p24f + 8388608.0f - 8388608.0f;  // rounded to a whole number, ties to even
    return {static_cast<uint16_t>(sign | static_cast<uint32_t>(scaled))};
  }
  const uint32_t rounded = size + 0xfffu + (size >> 13 & 1u);
  return {static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)))};
}

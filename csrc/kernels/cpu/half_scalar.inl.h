// Conversions of single values, included inside each instruction set's anonymous namespace. Round to nearest, ties to
// even.

inline float float_from_bits(uint32_t b) {
  float f;
  memcpy(&f, &b, sizeof(f));
  return f;
}
inline uint32_t bits_of_float(float f) {
  uint32_t b;
  memcpy(&b, &f, sizeof(b));
  return b;
}

inline float to_float(BF16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

inline BF16 to_bf16(float f) {
  const uint32_t b = bits_of_float(f);
  if ((b & 0x7fffffffu) > 0x7f800000u)
    return BF16{static_cast<uint16_t>(0x7fc0u | (b >> 31 << 15))};  // NaN stays a NaN
  return BF16{static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16)};
}

inline float to_float(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31u, mantissa = x.bits & 0x3ffu;
  if (exponent == 31u) return float_from_bits(sign | 0x7f800000u | (mantissa << 13));  // infinity, NaN
  if (exponent != 0u) return float_from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal: exact
  return float_from_bits(sign | bits_of_float(magnitude));
}

inline F16 to_f16(float f) {
  const uint32_t b = bits_of_float(f), sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
  if (a > 0x7f800000u) return F16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (a >= 0x477ff000u) return F16{static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more rounds to infinity
  if (a < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded by the addition.
    const uint32_t m = bits_of_float(float_from_bits(a) + 0.5f) - 0x3f000000u;
    return F16{static_cast<uint16_t>(sign | m)};
  }
  return F16{static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13))};
}

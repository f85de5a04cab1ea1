// __half on the host.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa ? NAN : INFINITY;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  }
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

// To nearest, ties to even: nearbyint in units of the last place.
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = magnitude > 0 ? std::ilogb(magnitude) : -14;
  exponent = exponent < -14 ? -14 : exponent;
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // A carry into the next power of two is what adding the mantissa to the exponent's bits does.
  return {static_cast<uint16_t>(sign | (units < 1024 ? units : ((exponent + 14) << 10) + units))};
}

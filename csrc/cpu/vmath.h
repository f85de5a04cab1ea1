// exp, tanh, sigmoid and relu on packs: at most 4 ULP from the exact value in float and in double,
// with true division. They saturate exactly, and NaN and infinities go through as in torch.
//
// exp is x = n ln2 + r with |r| <= ln2/2, a Taylor polynomial in r (degree 7 in float, 13 in
// double: the first term left out is below half an ULP), and a scaling by 2^n in two halves, so
// that results reach infinity, zero and the denormals without a special case. The two-part ln2 is
// Cody & Waite's (1980).
#pragma once

#include "cpu/simd.h"

namespace rnnkern {
namespace {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float lowest = -104.0f, highest = 89.0f;  // exp is exactly 0 and inf beyond
  static constexpr float log2e = 1.44269504088896341f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float round = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float taylor[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24,
                                     1.0f / 6,    0.5f,       1.0f,       1.0f};
};

template <>
struct ExpConstants<double> {
  static constexpr double lowest = -746.0, highest = 710.0;
  static constexpr double log2e = 1.44269504088896340736;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double round = 6755399441055744.0;  // 1.5 · 2^52
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double taylor[] = {1.0 / 6227020800,
                                      1.0 / 479001600,
                                      1.0 / 39916800,
                                      1.0 / 3628800,
                                      1.0 / 362880,
                                      1.0 / 40320,
                                      1.0 / 5040,
                                      1.0 / 720,
                                      1.0 / 120,
                                      1.0 / 24,
                                      1.0 / 6,
                                      0.5,
                                      1.0,
                                      1.0};
};

template <class T>
RNNKERN_INLINE Pack<T> exp(Pack<T> x) {
  using P = Pack<T>;
  using C = ExpConstants<T>;
  using RawInt = typename P::RawInt;
  // Comparisons with NaN are false, so NaN passes the clamps and reaches the polynomial.
  typename P::Raw v = x.v;
  v = v < P(C::lowest).v ? P(C::lowest).v : v;
  v = v > P(C::highest).v ? P(C::highest).v : v;
  const P shifted = fma(P(v), P(C::log2e), P(C::round));
  const P n = shifted - P(C::round);
  P r = fma(n, P(-C::ln2_high), P(v));
  r = fma(n, P(-C::ln2_low), r);
  P p(C::taylor[0]);
#pragma GCC unroll 16
  for (unsigned k = 1; k < sizeof(C::taylor) / sizeof(T); ++k) p = fma(p, r, P(C::taylor[k]));
  const RawInt i = reinterpret_cast<RawInt>(shifted.v) - reinterpret_cast<RawInt>(P(C::round).v);
  const RawInt half = i >> 1;
  const RawInt low = (half + C::bias) << C::mantissa;
  const RawInt high = (i - half + C::bias) << C::mantissa;
  using Raw = typename P::Raw;
  return P(p.v * reinterpret_cast<Raw>(low) * reinterpret_cast<Raw>(high));
}

template <class T>
RNNKERN_INLINE Pack<T> sigmoid(Pack<T> x) {
  return Pack<T>(T(1)) / (Pack<T>(T(1)) + exp(Pack<T>(-x.v)));
}

// tanh near zero as x + x³ P(x²)/Q(x²), where 1 - 2/(e^2x + 1) would cancel. The coefficients are
// those of the Cephes library (Moshier 1989): float a polynomial, double a rational function, both
// good for |x| < 0.625.
RNNKERN_INLINE Pack<float> tanh_small(Pack<float> x) {
  using P = Pack<float>;
  const P z = x * x;
  P p(-5.70498872745e-3f);
  p = fma(p, z, P(2.06390887954e-2f));
  p = fma(p, z, P(-5.37397155531e-2f));
  p = fma(p, z, P(1.33314422036e-1f));
  p = fma(p, z, P(-3.33332819422e-1f));
  return fma(p * z, x, x);
}

RNNKERN_INLINE Pack<double> tanh_small(Pack<double> x) {
  using P = Pack<double>;
  const P z = x * x;
  P p(-9.64399179425052238628e-1);
  p = fma(p, z, P(-9.92877231001918586564e1));
  p = fma(p, z, P(-1.61468768441708447952e3));
  P q = z + P(1.12811678491632931402e2);
  q = fma(q, z, P(2.23548839060100448583e3));
  q = fma(q, z, P(4.84406305325125486048e3));
  return fma(p / q * z, x, x);
}

template <class T>
RNNKERN_INLINE Pack<T> tanh(Pack<T> x) {
  using P = Pack<T>;
  const typename P::Raw magnitude = x.v < P(T(0)).v ? -x.v : x.v;
  const P e = exp(P(magnitude + magnitude));
  const P big = P(T(1)) - P(T(2)) / (e + P(T(1)));
  const typename P::Raw signed_big = x.v < P(T(0)).v ? -big.v : big.v;
  // NaN fails the comparison and is taken from the exponential, which passes it on.
  return P(magnitude < P(T(0.625)).v ? tanh_small(x).v : signed_big);
}

template <class T>
RNNKERN_INLINE Pack<T> relu(Pack<T> x) {
  return Pack<T>(x.v <= Pack<T>(T(0)).v ? Pack<T>(T(0)).v : x.v);  // NaN stays NaN
}

// d where a > 0 (or a is NaN, as torch's threshold_backward has it), else 0.
template <class T>
RNNKERN_INLINE Pack<T> where_positive(Pack<T> a, Pack<T> d) {
  return Pack<T>(a.v <= Pack<T>(T(0)).v ? Pack<T>(T(0)).v : d.v);
}

}  // namespace
}  // namespace rnnkern

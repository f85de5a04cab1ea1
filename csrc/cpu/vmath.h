// tanh, sigmoid and relu on packs: at most 4 ULP from the exact value in float and in double, with
// true division. They saturate exactly, and NaN and infinities go through as in torch.
//
// Both rest on e^x = 2 s (1 + q) with s = 2^(n-1), x = n ln2 + r, |r| <= ln2/2 and
// q = e^r - 1 = r + r² p(r). In float p has degree 4 and the least largest relative error of q
// (1.4e-8; Remez); in double it is Taylor's up to r^13, where the first term left out is below half
// an ULP. s is half the scale because it is then finite wherever e^x is. The two-part ln2 is Cody &
// Waite's (1980).
//   sigmoid x = 1 / (1 + e^-x)
//   tanh |x|  = E / (E + 2) with E = e^2|x| - 1 = 2 s q + (2 s - 1), exact near zero, where 2 s = 1
#pragma once

#include "cpu/simd.h"

namespace rnnkern {
namespace {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float log2e = 1.44269504088896341f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float round = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float lowest = -86.0f, highest = 89.0f;  // s is normal, e^x infinite
  static constexpr float tanh_is_one = 10.0f;
  static constexpr float p[] = {1.38824975e-3f, 8.36664679e-3f, 4.16672039e-2f, 1.66665427e-1f,
                                4.99999981e-1f};
};

template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.44269504088896340736;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double round = 6755399441055744.0;  // 1.5 · 2^52
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double lowest = -707.0, highest = 710.0;
  static constexpr double tanh_is_one = 20.0;
  static constexpr double p[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                 1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                 1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
};

// e^x = 2 s (1 + q), for x between `lowest` and `highest`, or NaN.
template <class T>
struct Exp {
  Pack<T> s, q;

  RNNKERN_INLINE explicit Exp(Pack<T> x) {
    using P = Pack<T>;
    using C = ExpConstants<T>;
    using RawInt = typename P::RawInt;
    const P shifted = fma(x, P(C::log2e), P(C::round));
    const P n = shifted - P(C::round);
    P r = fma(n, P(-C::ln2_high), x);
    r = fma(n, P(-C::ln2_low), r);
    P p(C::p[0]);
#pragma GCC unroll 16
    for (unsigned k = 1; k < sizeof(C::p) / sizeof(T); ++k) p = fma(p, r, P(C::p[k]));
    q = fma(r * r, p, r);
    const RawInt i = reinterpret_cast<RawInt>(shifted.v) - reinterpret_cast<RawInt>(P(C::round).v);
    s.v = reinterpret_cast<typename P::Raw>((i + (C::bias - 1)) << C::mantissa);
  }
};

template <class T>
RNNKERN_INLINE Pack<T> sigmoid(Pack<T> x) {
  using C = ExpConstants<T>;
  const Exp<T> e(at_most(at_least(Pack<T>(-x.v), C::lowest), C::highest));
  const Pack<T> one(T(1));
  const Pack<T> half = fma(e.q, e.s, e.s);
  return one / (one + half + half);
}

template <class T>
RNNKERN_INLINE Pack<T> tanh(Pack<T> x) {
  using P = Pack<T>;
  using RawInt = typename P::RawInt;
  const RawInt sign_bit = reinterpret_cast<RawInt>(P(T(-0.0)).v);
  const RawInt bits = reinterpret_cast<RawInt>(x.v);
  const P magnitude(reinterpret_cast<typename P::Raw>(bits & ~sign_bit));
  const Exp<T> e(at_most(magnitude + magnitude, 2 * ExpConstants<T>::tanh_is_one));
  const P scale = e.s + e.s;
  const P E = fma(e.q, scale, scale - P(T(1)));
  const P result = E / (E + P(T(2)));
  const RawInt with_sign = reinterpret_cast<RawInt>(result.v) | (bits & sign_bit);
  return P(reinterpret_cast<typename P::Raw>(with_sign));
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

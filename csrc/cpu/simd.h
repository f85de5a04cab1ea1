// Pack<T>: one SIMD register of T, from GCC/Clang vector extensions, for the ISA this file is
// compiled for.
//
// Everything here has internal linkage: each per-ISA file gets its own copy, so no code of one ISA
// can be picked by the linker for another. Only fma, the limits and the partial load and store are
// written per ISA.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/bfloat16.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define RNNKERN_INLINE inline __attribute__((always_inline))
#define RNNKERN_LAMBDA __attribute__((always_inline))

namespace rnnkern {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

// GCC ignores vector_size on a type that depends on a template parameter, hence one set of names a
// type.
template <class T>
struct Vector;
template <>
struct Vector<float> {
  typedef float Raw __attribute__((vector_size(kVectorBytes)));
  typedef int32_t RawInt __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Vector<double> {
  typedef double Raw __attribute__((vector_size(kVectorBytes)));
  typedef int64_t RawInt __attribute__((vector_size(kVectorBytes)));
};

template <class T>
struct Pack {
  static constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(T));
  using Scalar = T;
  using Raw = typename Vector<T>::Raw;
  using RawInt = typename Vector<T>::RawInt;

  Raw v;

  Pack() = default;
  RNNKERN_INLINE Pack(Raw raw) : v(raw) {}
  RNNKERN_INLINE explicit Pack(T scalar) : v(scalar - Raw{}) {}  // - 0, not + 0: it keeps -0

  RNNKERN_INLINE static Pack load(const T* p) {
    Pack a;
    std::memcpy(&a.v, p, sizeof(Raw));
    return a;
  }
  RNNKERN_INLINE void store(T* p) const { std::memcpy(p, &v, sizeof(Raw)); }

  RNNKERN_INLINE friend Pack operator+(Pack a, Pack b) { return a.v + b.v; }
  RNNKERN_INLINE friend Pack operator-(Pack a, Pack b) { return a.v - b.v; }
  RNNKERN_INLINE friend Pack operator*(Pack a, Pack b) { return a.v * b.v; }
  RNNKERN_INLINE friend Pack operator/(Pack a, Pack b) { return a.v / b.v; }
};

// a·b + c, with one rounding where the ISA has it. The build turns implicit contraction off, so a
// result depends on the ISA alone and never on the tile or the thread that computed it.
#if defined(__AVX512F__)
RNNKERN_INLINE Pack<float> fma(Pack<float> a, Pack<float> b, Pack<float> c) {
  return Pack<float>(_mm512_fmadd_ps(a.v, b.v, c.v));
}
RNNKERN_INLINE Pack<double> fma(Pack<double> a, Pack<double> b, Pack<double> c) {
  return Pack<double>(_mm512_fmadd_pd(a.v, b.v, c.v));
}
#elif defined(__AVX2__)
RNNKERN_INLINE Pack<float> fma(Pack<float> a, Pack<float> b, Pack<float> c) {
  return Pack<float>(_mm256_fmadd_ps(a.v, b.v, c.v));
}
RNNKERN_INLINE Pack<double> fma(Pack<double> a, Pack<double> b, Pack<double> c) {
  return Pack<double>(_mm256_fmadd_pd(a.v, b.v, c.v));
}
#else
template <class T>
RNNKERN_INLINE Pack<T> fma(Pack<T> a, Pack<T> b, Pack<T> c) {
  return a * b + c;
}
#endif

// x limited from above or below; NaN stays. (GCC compiles the conditional with a constant to a
// comparison and a blend.)
#if defined(__AVX512F__)
RNNKERN_INLINE Pack<float> at_most(Pack<float> x, float limit) {
  return Pack<float>(_mm512_min_ps(Pack<float>(limit).v, x.v));
}
RNNKERN_INLINE Pack<float> at_least(Pack<float> x, float limit) {
  return Pack<float>(_mm512_max_ps(Pack<float>(limit).v, x.v));
}
RNNKERN_INLINE Pack<double> at_most(Pack<double> x, double limit) {
  return Pack<double>(_mm512_min_pd(Pack<double>(limit).v, x.v));
}
RNNKERN_INLINE Pack<double> at_least(Pack<double> x, double limit) {
  return Pack<double>(_mm512_max_pd(Pack<double>(limit).v, x.v));
}
#else
template <class T>
RNNKERN_INLINE Pack<T> at_most(Pack<T> x, T limit) {
  return Pack<T>(x.v > Pack<T>(limit).v ? Pack<T>(limit).v : x.v);
}
template <class T>
RNNKERN_INLINE Pack<T> at_least(Pack<T> x, T limit) {
  return Pack<T>(x.v < Pack<T>(limit).v ? Pack<T>(limit).v : x.v);
}
#endif

// The first n lanes; the others are zero.
template <class T>
RNNKERN_INLINE Pack<T> load_partial(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return Pack<T>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
  } else {
    return Pack<T>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p));
  }
#else
  T lanes[Pack<T>::lanes] = {};
  for (int l = 0; l < n; ++l) lanes[l] = p[l];
  return Pack<T>::load(lanes);
#endif
}

template <class T>
RNNKERN_INLINE void store_partial(T* p, Pack<T> a, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), a.v);
  }
#else
  T lanes[Pack<T>::lanes];
  a.store(lanes);
  for (int l = 0; l < n; ++l) p[l] = lanes[l];
#endif
}

template <class T>
RNNKERN_INLINE Pack<T> load(const T* p, int n) {
  return n == Pack<T>::lanes ? Pack<T>::load(p) : load_partial(p, n);
}

template <class T>
RNNKERN_INLINE void store(T* p, Pack<T> a, int n) {
  if (n == Pack<T>::lanes) {
    a.store(p);
  } else {
    store_partial(p, a, n);
  }
}

// The factors of a product, a register of them at a time, held as a Pack of the type that products
// are summed in. Of float and double a lane holds one; of bfloat16 it holds two neighbours in k,
// and takes both products at once.
template <class T>
struct Factors {
  using P = Pack<T>;
  static constexpr int depth = 1;  // factors a lane

  // n <= lanes · depth of them, side by side; the others are zero.
  RNNKERN_INLINE static P load(const T* p, int n) { return rnnkern::load(p, n); }
  // The same in every lane: p[0 .. depth), or only p[0].
  RNNKERN_INLINE static P spread(const T* p) { return P(*p); }
  RNNKERN_INLINE static P spread_one(const T* p) { return P(*p); }
  // n <= lanes of them from each of `depth` rows; `second` may be null: zero.
  RNNKERN_INLINE static P join(const T* first, const T*, int n) { return rnnkern::load(first, n); }
  RNNKERN_INLINE static P ones() { return P(T(1)); }
  RNNKERN_INLINE static P dot(P a, P b, P c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
// n <= 16 values in the lower halves of lanes; the others are zero.
RNNKERN_INLINE Pack<float>::RawInt load_bits(const Bfloat16* p, int n) {
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  const __m256i bits = n == 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                               : _mm256_maskz_loadu_epi16(mask, p);
  return reinterpret_cast<Pack<float>::RawInt>(_mm512_maskz_cvtepu16_epi32(0xffff, bits));
}

// n <= 16 values as float; the others are zero.
RNNKERN_INLINE Pack<float> load(const Bfloat16* p, int n) {
  return Pack<float>(reinterpret_cast<Pack<float>::Raw>(load_bits(p, n) << 16));
}

// Rounded to the nearest, ties to even; subnormal values become zero.
RNNKERN_INLINE void store(Bfloat16* p, Pack<float> a, int n) {
  const __m256bh rounded = _mm512_cvtneps_pbh(a.v);
  __m256i bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  if (n == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
  } else {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), bits);
  }
}

template <>
struct Factors<Bfloat16> {
  using P = Pack<float>;
  static constexpr int depth = 2;

  RNNKERN_INLINE static P load(const Bfloat16* p, int n) {
    const auto mask = n == 32 ? ~__mmask32{0} : static_cast<__mmask32>((1u << n) - 1);
    return as_pack(n == 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(mask, p));
  }
  RNNKERN_INLINE static P spread(const Bfloat16* p) {
    int32_t both;
    std::memcpy(&both, p, sizeof(both));
    return as_pack(_mm512_set1_epi32(both));
  }
  RNNKERN_INLINE static P spread_one(const Bfloat16* p) {
    return as_pack(_mm512_set1_epi32(p->bits));
  }
  RNNKERN_INLINE static P join(const Bfloat16* first, const Bfloat16* second, int n) {
    const P::RawInt lower = load_bits(first, n);
    const P::RawInt both = second ? lower | load_bits(second, n) << 16 : lower;
    return P(reinterpret_cast<P::Raw>(both));
  }
  RNNKERN_INLINE static P ones() { return as_pack(_mm512_set1_epi32(0x3f803f80)); }
  RNNKERN_INLINE static P dot(P a, P b, P c) {
    __m512bh x, y;
    std::memcpy(&x, &a.v, sizeof(x));
    std::memcpy(&y, &b.v, sizeof(y));
    return P(_mm512_dpbf16_ps(c.v, x, y));
  }

 private:
  RNNKERN_INLINE static P as_pack(__m512i bits) { return P(_mm512_castsi512_ps(bits)); }
};
#endif

// Interleave<L>::run takes lanes of a and b in turn, of their lower or of their upper halves:
// a0 b0 a1 b1 ..
template <int n, int... lane>
struct Interleave : Interleave<n - 1, n - 1, lane...> {};
template <int... lane>
struct Interleave<0, lane...> {
  template <bool upper, class Raw>
  RNNKERN_INLINE static Raw run(Raw a, Raw b) {
    constexpr int L = sizeof...(lane);
    return __builtin_shufflevector(a, b, (lane / 2 + upper * L / 2 + lane % 2 * L)...);
  }
};
template <bool upper, class T>
RNNKERN_INLINE Pack<T> interleave(Pack<T> a, Pack<T> b) {
  return Interleave<Pack<T>::lanes>::template run<upper>(a.v, b.v);
}

// Turns L registers of L lanes, the rows of a square, into its columns.
template <class T>
RNNKERN_INLINE void transpose(Pack<T> (&r)[Pack<T>::lanes]) {
  constexpr int L = Pack<T>::lanes;
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    Pack<T> next[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave<false>(r[i], r[i + L / 2]);
      next[2 * i + 1] = interleave<true>(r[i], r[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) r[i] = next[i];
  }
}

// Lane l of the result is the sum of the lanes of r[l].
template <class T>
RNNKERN_INLINE Pack<T> sums(Pack<T> (&r)[Pack<T>::lanes]) {
#pragma GCC unroll 4
  for (int n = Pack<T>::lanes / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
      r[i] = interleave<false>(r[i], r[i + n]) + interleave<true>(r[i], r[i + n]);
  }
  return r[0];
}

// Asks for n elements ahead of their use.
template <class T>
RNNKERN_INLINE void prefetch(const T* p, int64_t n) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < n; i += line) __builtin_prefetch(p + i);
}

// Asks for a cache line in L2.
RNNKERN_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

// The standard library's templates are not used in per-ISA files: their symbols are shared between
// ISAs.
RNNKERN_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
RNNKERN_INLINE int64_t maximum(int64_t a, int64_t b) { return a < b ? b : a; }
RNNKERN_INLINE int64_t clamp(int64_t a, int64_t low, int64_t high) {
  return maximum(low, minimum(a, high));
}

struct Range {
  int64_t begin, end;
};

// Part `index` of `parts` nearly equal parts of [0, n).
RNNKERN_INLINE Range part(int64_t n, int64_t index, int64_t parts) {
  if (parts == 1) return {0, n};  // two divisions less
  return {n * index / parts, n * (index + 1) / parts};
}

}  // namespace
}  // namespace rnnkern

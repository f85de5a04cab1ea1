// Products of bfloat16 by AMX, Intel's matrix unit (Intel 64 and IA-32 Architectures Software
// Developer's Manual, volume 1, chapter 18): eight registers of 16 rows × 64 bytes, and one
// instruction that adds the product of 16 rows × 32 factors and 32 × 16 factors to 16 × 16 sums.
//
// The factors from the right lie as Factors<Bfloat16> packs them: two neighbours in k in each lane,
// so that 16 rows of lanes are 32 factors. An output's sum takes k in ascending order, 32 at a
// time, whatever the height of its tile, and so does not depend on the tile it was computed in.
#pragma once

#include "cpu/simd.h"

namespace rnnkern {
namespace {

constexpr int kTileRows = 16;     // of a register
constexpr int kTileFactors = 32;  // in k, of one instruction

// While one exists, its thread may use the registers for products of T.
template <class T>
class TileRegisters {
 public:
  static constexpr bool exist = false;
  TileRegisters() {}
};

#if defined(__AMX_BF16__)
// GCC's intrinsics do not tell the compiler what memory they read: this lets no store pass it.
RNNKERN_INLINE void finish_stores() { asm volatile("" ::: "memory"); }

template <>
class TileRegisters<Bfloat16> {
 public:
  static constexpr bool exist = true;

  // Others, such as oneDNN, may have set the registers up before; and released, they make no switch
  // to another thread slower.
  TileRegisters() { height = 0; }
  ~TileRegisters() {
    if (height != 0) _tile_release();
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  // Sets them up for m <= 32 rows of left factors. Registers 0 to 3 are sums and 4 is left factors,
  // of 16 rows at most; where there are more rows, 2 and 3 have those beyond 16, and so has 5; else
  // 5 is right factors, as 6 and 7 always are.
  RNNKERN_INLINE static void set_height(int m) {
    if (m == height) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    const bool two = m > kTileRows;
    const int upper = two ? kTileRows : m, lower = two ? m - kTileRows : m;
    const int last = two ? lower : kTileRows;
    const int rows[8] = {upper, upper, lower, lower, upper, last, kTileRows, kTileRows};
    for (int i = 0; i < 8; ++i) {
      shape.row_bytes[i] = 64;
      shape.rows[i] = static_cast<uint8_t>(rows[i]);
    }
    finish_stores();
    _tile_loadconfig(&shape);
    height = m;
  }

 private:
  static thread_local int height;  // what they are set up for; 0: not set up
};
thread_local int TileRegisters<Bfloat16>::height = 0;
#endif

// The sums in registers, of up to 32 rows × 2 columns of registers or of up to 16 rows × 4; in
// memory every column stands on its own, and rows are as far apart as is said.
template <class T, int rows, int columns>
struct TileSums {
#if defined(__AMX_BF16__)
  static_assert(rows * columns <= 4 && rows <= 2, "as many as there are registers for sums");

  RNNKERN_INLINE static void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  // From the sums at `from`, whose rows are from_row floats apart; 0: the same in all rows.
  RNNKERN_INLINE static void load(const float* const (&from)[columns], int64_t from_row) {
    finish_stores();
    const int64_t bytes = from_row * 4, lower = kTileRows * from_row;
    _tile_loadd(0, from[0], bytes);
    if constexpr (columns > 1) _tile_loadd(1, from[1], bytes);
    if constexpr (columns > 2) _tile_loadd(2, from[2], bytes);
    if constexpr (columns > 3) _tile_loadd(3, from[3], bytes);
    if constexpr (rows > 1) _tile_loadd(2, from[0] + lower, bytes);
    if constexpr (rows > 1 && columns > 1) _tile_loadd(3, from[1] + lower, bytes);
  }

  // Adds the products of `steps` times 32 factors. Left factors: a step and the next left_step
  // apart, its rows left_row; right: 16 rows a step, right_row floats apart. Unless `ahead` is
  // null, asks for the lines from there on, as many as a step's rows of lanes in two columns.
  RNNKERN_INLINE static void add(const T* left, int64_t left_row, int64_t left_step,
                                 const float* const (&right)[columns], int64_t right_row,
                                 int64_t steps, const float* ahead = nullptr) {
    finish_stores();
    const int64_t left_bytes = left_row * 2, right_bytes = right_row * 4;
    const T* lower = left + kTileRows * left_row;
    int64_t at = 0;
    constexpr int kAhead = columns > 2 ? 2 * kTileRows : kTileRows;
    for (int64_t s = 0; s < steps; ++s) {
      if (ahead) {
#pragma GCC unroll 32
        for (int i = 0; i < kAhead; ++i) prefetch_far(ahead + i * Pack<float>::lanes);
        ahead += kAhead * Pack<float>::lanes;
      }
      _tile_loadd(6, right[0] + at, right_bytes);
      _tile_loadd(4, left, left_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (columns > 1) {
        _tile_loadd(7, right[1] + at, right_bytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (rows > 1) {
        _tile_loadd(5, lower, left_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (columns > 1) _tile_dpbf16ps(3, 5, 7);
      }
      if constexpr (columns > 2) {
        _tile_loadd(5, right[2] + at, right_bytes);
        _tile_dpbf16ps(2, 4, 5);
      }
      if constexpr (columns > 3) {
        _tile_loadd(6, right[3] + at, right_bytes);
        _tile_dpbf16ps(3, 4, 6);
      }
      left += left_step;
      lower += left_step;
      at += kTileRows * right_row;
    }
  }

  RNNKERN_INLINE static void store(float* const (&to)[columns], int64_t to_row) {
    const int64_t bytes = to_row * 4, lower = kTileRows * to_row;
    _tile_stored(0, to[0], bytes);
    if constexpr (columns > 1) _tile_stored(1, to[1], bytes);
    if constexpr (columns > 2) _tile_stored(2, to[2], bytes);
    if constexpr (columns > 3) _tile_stored(3, to[3], bytes);
    if constexpr (rows > 1) _tile_stored(2, to[0] + lower, bytes);
    if constexpr (rows > 1 && columns > 1) _tile_stored(3, to[1] + lower, bytes);
  }
#endif
};

// The product of m <= 32 rows and NU blocks of packed weights, `stride` apart: out[m][NU][NG][L].
template <class T, int NU, int NG>
class TileProduct {
  static constexpr int L = Pack<float>::lanes, NV = NU * NG;
  static constexpr int kFirst = NV > 2 ? 2 : NV;  // columns of registers that go with two of rows

 public:
  TileProduct(const T* a, int64_t lda, int64_t m, const float* w, int64_t stride, int64_t K,
              float* out, const float* ahead)
      : a_(a), lda_(lda), w_(w), stride_(stride), K_(K), out_(out), ahead_(ahead) {
    TileRegisters<T>::set_height(static_cast<int>(m));
    if (const int rest = static_cast<int>(K % kTileFactors)) {
      for (int64_t r = 0; r < m; ++r) {
        const Pack<float> factors = Factors<T>::load(a + r * lda + K - rest, rest);
        factors.store(reinterpret_cast<float*>(rest_ + r * kTileFactors));
      }
    }
    if (m <= kTileRows) {
      columns<1, 0, NV>();
    } else {
      columns<2, 0, kFirst>();
      if constexpr (NV > 2) columns<2, 2, NV - 2>();
    }
  }

 private:
  // `count` columns of registers from `first` on.
  template <int rows, int first, int count>
  RNNKERN_INLINE void columns() {
    using Sums = TileSums<T, rows, count>;
    const float* w[count];
    float* out[count];
    for (int n = 0; n < count; ++n) {
      const int v = first + n;
      w[n] = w_ + v / NG * stride_ + v % NG * L;
      out[n] = out_ + v * L;
    }
    Sums::load(w, 0);  // the biases
    for (const float*& column : w) column += NG * L;
    const int64_t steps = K_ / kTileFactors;
    Sums::add(a_, lda_, kTileFactors, w, NG * L, steps, ahead_);
    if (ahead_) ahead_ += steps * kTileRows * L;
    if (K_ % kTileFactors != 0) {
      for (const float*& column : w) column += steps * kTileRows * NG * L;
      Sums::add(rest_, kTileFactors, 0, w, NG * L, 1);
    }
    Sums::store(out, NV * L);
  }

  const T* const a_;
  const int64_t lda_;
  const float* const w_;
  const int64_t stride_, K_;
  float* const out_;
  const float* ahead_;
  alignas(64) T rest_[2 * kTileRows * kTileFactors];  // K % 32 of each row, zeros after them
};

}  // namespace
}  // namespace rnnkern

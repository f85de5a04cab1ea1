// The recurrent product of one phase: packed weights, and the register tile that multiplies by
// them.
//
// Packing. Units are cut into blocks of L lanes, and NU neighbouring blocks with all their NG gates
// form a panel of NV = NU·NG registers; NU is chosen so that a tile has 3 or 4 registers a row
// whatever the cell. One panel is contiguous, bias row first, then one row per element k of the
// operand:
//
//            block 0                          block 1 ..
//            gate 0     gate 1  ..            gate 0  ..
//   bias  [ L lanes | L lanes | .. | L lanes | .. ]
//   k = 0 [ L lanes | L lanes | .. ]
//   k = 1 [ ..
//
// so the tile loads NV registers a step of k, in order, and every gate of a unit ends in the same
// lane. Units beyond the last are zero.
//
// Tile. MR operand rows × NV registers of accumulators; MR is what the register file holds. Every
// output is summed in chains of kChain fma, k ascending, the first of them from the bias, and the
// chains are added in order. So a value does not depend on the tile it was computed in, results are
// the same for every split over threads, and the rounding error grows with kChain and not with K.
#pragma once

#include "core/problem.h"
#include "cpu/simd.h"

namespace rnnkern {
namespace {

constexpr int64_t kChain = 128;

template <class T, int MR, int NV>
void multiply_tile(const T* a, int64_t lda, const T* w, int64_t K, T* out) {
  constexpr int L = Pack<T>::lanes;
  const T* bias = w;
  w += NV * L;
  int64_t k = 0;
  do {
    Pack<T> acc[MR][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) acc[m][n] = k == 0 ? Pack<T>::load(bias + n * L) : Pack<T>(T(0));
    }
    const int64_t first = k, end = minimum(K, k + kChain);
    for (; k < end; ++k, w += NV * L) {
      Pack<T> row[NV];
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) row[n] = Pack<T>::load(w + n * L);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const Pack<T> b(a[m * lda + k]);
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) acc[m][n] = fma(b, row[n], acc[m][n]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) {
        T* sum = out + (m * NV + n) * L;
        (first == 0 ? acc[m][n] : Pack<T>::load(sum) + acc[m][n]).store(sum);
      }
    }
  } while (k < K);
}

template <class T, int NG>
struct Weights {
  static constexpr int L = Pack<T>::lanes;
  static constexpr int NU = NG >= 3 ? 1 : 4 / NG;
  static constexpr int NV = NU * NG;
  static constexpr int MR = kRegisters == 32 ? (NV == 3 ? 8 : 6) : (NV == 3 ? 4 : 3);
  static constexpr int units = NU * L;  // units a panel covers

  int64_t K = 0, N = 0;     // operand elements, units
  T* data = nullptr;        // [panels][1 + K][NU][NG][L]; null: not packed
  const T* rows = nullptr;  // [NG,N,K], rows ld apart, where the weights are not packed
  int64_t ld = 0;
  const T* bias = nullptr;  // [NG,N], or null

  static int64_t panels(int64_t N) { return (N + units - 1) / units; }
  static int64_t size(int64_t K, int64_t N) { return panels(N) * (1 + K) * NV * L; }
  T* panel(int64_t index) const { return data + index * (1 + K) * NV * L; }

  // Unit n of gate g is row g·N + n of R, operand element k its column: packs the panels in `mine`,
  // or where there is no room for that, lets every product read R itself.
  void set_rows(const T* R, int64_t ldr, const T* b, Range mine) {
    if (data) return pack_rows(R, ldr, b, mine.begin, mine.end);
    rows = R;
    ld = ldr;
    bias = b;
  }

  void pack_rows(const T* R, int64_t ldr, const T* b, int64_t begin, int64_t end) const {
    for (int64_t p = begin; p < end; ++p) {
      for (int v = 0; v < NV; ++v) {
        const int64_t n0 = p * units + v / NG * L;
        const int64_t r0 = v % NG * N + n0;
        T* out = panel(p) + v * L;
        const int64_t lanes = clamp(N - n0, 0, L);
        for (int l = 0; l < L; ++l) out[l] = b && l < lanes ? b[r0 + l] : T(0);
      }
      for (int v = 0; v < NV; ++v) {
        const int64_t n0 = p * units + v / NG * L;
        const int64_t lanes = clamp(N - n0, 0, L);
        for (int64_t k = 0; k < K; k += L) {
          Pack<T> square[L];
          load_square(R + (v % NG * N + n0) * ldr + k, ldr, lanes, minimum(L, K - k), square);
          transpose(square);
          T* out = panel(p) + ((1 + k) * NV + v) * L;
          for (int64_t l = 0; l < minimum(L, K - k); ++l) square[l].store(out + l * NV * L);
        }
      }
    }
  }

  // rows × columns of a matrix as registers; zero beyond.
  static void load_square(const T* in, int64_t ld, int64_t rows, int64_t columns,
                          Pack<T> (&square)[L]) {
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      if (l < rows) {
        square[l] = load(in + l * ld, static_cast<int>(columns));
        __builtin_prefetch(in + l * ld + 128);
      } else {
        square[l] = Pack<T>(T(0));
      }
    }
  }

  // The same product without packing: L rows of the weights at a time, each times the operand.
  void multiply_unpacked(const T* a, int64_t lda, int64_t m, int64_t index, T* out) const {
    for (int v = 0; v < NV; ++v) {
      const int64_t n0 = index * units + v / NG * L, r0 = v % NG * N + n0;
      const int lanes = static_cast<int>(clamp(N - n0, 0, L));
      const Pack<T> b = bias && lanes > 0 ? load(bias + r0, lanes) : Pack<T>(T(0));
      for (int64_t j = 0; j < m; ++j) {
        Pack<T> acc[L];
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) acc[l] = Pack<T>(T(0));
        const T* w = rows + r0 * ld;
        int64_t k = 0;
        for (; lanes == L && k + L <= K; k += L) {
          const Pack<T> operand = Pack<T>::load(a + j * lda + k);
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) acc[l] = fma(Pack<T>::load(w + l * ld + k), operand, acc[l]);
        }
        for (; k < K; k += L) {
          const int columns = static_cast<int>(minimum(L, K - k));
          const Pack<T> operand = load(a + j * lda + k, columns);
          Pack<T> square[L];
          load_square(w + k, ld, lanes, columns, square);
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) acc[l] = fma(square[l], operand, acc[l]);
        }
        (sums(acc) + b).store(out + (j * NV + v) * L);
      }
    }
  }

  // Panels [begin, end) of the transposed product: unit n is column n of R, operand element k its
  // row.
  void pack_columns(const T* R, int64_t ldr, int64_t begin, int64_t end) const {
    static_assert(NG == 1, "a transposed product has one output a unit");
    for (int64_t p = begin; p < end; ++p) {
      T* out = panel(p);
      for (int i = 0; i < NV * L; ++i) out[i] = T(0);
      for (int64_t k = 0; k < K; ++k) {
        for (int v = 0; v < NV; ++v) {
          const int64_t n0 = p * units + v * L;
          const int lanes = static_cast<int>(clamp(N - n0, 0, L));
          const Pack<T> row = lanes > 0 ? load(R + k * ldr + n0, lanes) : Pack<T>(T(0));
          row.store(out + ((1 + k) * NV + v) * L);
        }
      }
    }
  }

  // m rows × panel: out[m][NV][L], m <= MR.
  void multiply(const T* a, int64_t lda, int64_t m, int64_t index, T* out) const {
    if (!data) return multiply_unpacked(a, lda, m, index, out);
    const T* w = panel(index);
    switch (m) {
      case 1: return multiply_tile<T, 1, NV>(a, lda, w, K, out);
      case 2: return multiply_tile<T, 2, NV>(a, lda, w, K, out);
      case 3: return multiply_tile<T, 3, NV>(a, lda, w, K, out);
      default: break;
    }
    if constexpr (MR >= 4) {
      if (m == 4) return multiply_tile<T, 4, NV>(a, lda, w, K, out);
    }
    if constexpr (MR >= 6) {
      if (m == 5) return multiply_tile<T, 5, NV>(a, lda, w, K, out);
      if (m == 6) return multiply_tile<T, 6, NV>(a, lda, w, K, out);
    }
    if constexpr (MR >= 8) {
      if (m == 7) return multiply_tile<T, 7, NV>(a, lda, w, K, out);
      if (m == 8) return multiply_tile<T, 8, NV>(a, lda, w, K, out);
    }
  }
};

// Products of this few rows in the whole call do not pay for packing the weights.
inline bool few_rows(const Sequence& seq) { return seq.T * seq.B <= 4; }

struct FetchNothing {
  RNNKERN_INLINE void operator()(int64_t, int64_t, int64_t) const {}
};

// Runs one product for the panels in `mine` and the rows [0, rows) of `a`, and hands every finished
// block of units to emit(row, unit, lanes, r): r[NG][L] holds the products of the `lanes` units
// from `unit` on. Rows from product_rows on have no operand and are handed over as zero. Before a
// product, fetch(row, unit, count) is called for the units that follow from it.
template <class T, int NG, class Emit, class Fetch>
RNNKERN_INLINE void run_product(const Weights<T, NG>& w, const T* a, int64_t lda,
                                int64_t product_rows, int64_t rows, Range mine, Emit&& emit,
                                Fetch&& fetch) {
  using W = Weights<T, NG>;
  alignas(64) T out[W::MR * W::NV * W::L];
  const int64_t tiles = (rows + W::MR - 1) / W::MR;
  for (int64_t p = mine.begin; p < mine.end; ++p) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = part(rows, tile, tiles).begin, end = part(rows, tile, tiles).end;
      const int64_t product_end = clamp(product_rows, begin, end);
      const int64_t unit = p * W::units, count = minimum(W::units, w.N - unit);
      for (int64_t m = begin; m < end; ++m) fetch(m, unit, count);
      if (product_end > begin) w.multiply(a + begin * lda, lda, product_end - begin, p, out);
      if (product_end < end) {
        std::memset(out + (product_end - begin) * W::NV * W::L, 0,
                    static_cast<size_t>((end - product_end) * W::NV * W::L) * sizeof(T));
      }
      for (int64_t m = begin; m < end; ++m) {
        for (int block = 0; block < W::NU; ++block) {
          const int64_t u = unit + block * W::L;
          if (u >= w.N) break;
          const int lanes = static_cast<int>(minimum(W::L, w.N - u));
          emit(m, u, lanes, out + ((m - begin) * W::NV + block * NG) * W::L);
        }
      }
    }
  }
}

}  // namespace
}  // namespace rnnkern

// The recurrent product of one phase: packed weights, and the register tile that multiplies by
// them.
//
// Packing. Units are cut into blocks of L lanes. A block holds all NG gates of its units, bias row
// first, then one row per element k of the operand:
//
//            gate 0     gate 1  ..
//   bias  [ L lanes | L lanes | .. ]
//   k = 0 [ L lanes | L lanes | .. ]
//   k = 1 [ ..
//
// (of bfloat16, a row for two neighbouring k, side by side in each lane) so every gate of a unit
// ends in the same lane. Units beyond the last are zero, as are rows up to what a product takes at
// once.
//
// Tile. MR operand rows × NU neighbouring blocks with all their gates; NU is chosen so that a tile
// has 3 or 4 registers a row whatever the cell, MR is what the register file holds. Every output
// is summed in chains of kChain fma, k ascending, the first of them from the bias, and the chains
// are added in order. So a value does not depend on the tile it was computed in, results are the
// same for every split over threads, and the rounding error grows with kChain and not with K. Where
// all steps of a call have one row and the recurrent weights are small, a product would wait for
// its few chains, so each is two that take turns at k. Where there is a matrix unit for the type,
// the tile is its own (cpu/amx.h).
#pragma once

#include "core/problem.h"
#include "cpu/amx.h"

namespace rnnkern {
namespace {

constexpr int64_t kChain = 128;

// The product of MR rows and NU blocks, `stride` apart: out[MR][NU][NG][L], each chain in `parts`.
// Meanwhile it asks in L2 for one row of a block from `ahead` on for each that it reads, unless
// that is null.
template <class T, int MR, int NU, int NG, int parts = 1>
void multiply_tile(const T* a, int64_t lda, const Accumulator<T>* w, int64_t stride, int64_t K,
                   Accumulator<T>* out, const Accumulator<T>* ahead) {
  using A = Accumulator<T>;
  using F = Factors<T>;
  constexpr int L = Pack<A>::lanes, NV = NU * NG;
  const A* bias = w;
  w += NG * L;
  int64_t k = 0;
  do {
    Pack<A> acc[parts][MR][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) {
        const A* b = bias + n / NG * stride + n % NG * L;
        acc[0][m][n] = k == 0 ? Pack<A>::load(b) : Pack<A>(A(0));
        for (int i = 1; i < parts; ++i) acc[i][m][n] = Pack<A>(A(0));
      }
    }
    const auto step = [&](int i, auto&& spread) RNNKERN_LAMBDA {
      Pack<A> row[NV];
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) row[n] = Pack<A>::load(w + n / NG * stride + n % NG * L);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const Pack<A> b = spread(a + m * lda + k);
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) acc[i][m][n] = F::dot(b, row[n], acc[i][m][n]);
      }
      w += NG * L;
      k += F::depth;
    };
    const auto spread = [](const T* p) RNNKERN_LAMBDA { return F::spread(p); };
    const int64_t first = k, end = minimum(K, k + kChain), whole = end - end % F::depth;
    if constexpr (parts > 1) {
      while (k + parts * F::depth <= whole) {
#pragma GCC unroll 4
        for (int i = 0; i < parts; ++i) step(i, spread);
      }
    } else if (ahead) {
      for (; k < whole; ahead += L) {
        prefetch_far(ahead);
        step(0, spread);
      }
    }
    while (k < whole) step(0, spread);
    if (k < end) step(0, [](const T* p) RNNKERN_LAMBDA { return F::spread_one(p); });
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) {
        A* sum = out + (m * NV + n) * L;
        Pack<A> chain = acc[0][m][n];
        for (int i = 1; i < parts; ++i) chain = chain + acc[i][m][n];
        (first == 0 ? chain : Pack<A>::load(sum) + chain).store(sum);
      }
    }
  } while (k < K);
}

// Products of this few rows in the whole call do not pay for packing the weights.
constexpr int kFewRows = 4;
inline bool few_rows(const Sequence& seq) { return seq.T * seq.B <= kFewRows; }

template <int n>
struct Count {
  static constexpr int value = n;
};

template <class T, int NG>
struct Weights {
  using A = Accumulator<T>;
  using F = Factors<T>;
  static constexpr int L = Pack<A>::lanes;
  static constexpr int NU = NG >= 3 ? 1 : 4 / NG;
  static constexpr int MR = TileRegisters<T>::exist ? 2 * kTileRows
                            : kRegisters == 32      ? (NG == 3 ? 8 : 6)
                                                    : (NG == 3 ? 4 : 3);

  // Of a core, at most: two fma a cycle, or the matrix unit's product in 16.
  static constexpr int kCycleFlops =
      TileRegisters<T>::exist ? 2 * kTileRows * kTileFactors : 4 * L * F::depth;

  int64_t K = 0, N = 0;     // operand elements, units
  A* data = nullptr;        // [blocks][1 + rows of K][NG][L]; null: not packed
  int64_t first_block = 0;  // which data begins with
  bool one_row = false;     // recurrent weights of a call whose steps have one row
  // Where the weights are not packed: [NG,N,K], or [K,N] for a transposed product; rows ld apart.
  const T* rows = nullptr;
  int64_t ld = 0;
  bool transposed = false;
  const T* bias = nullptr;  // [NG,N], or null
  int64_t first_row = 0;    // transposed: operand element k belongs to row (k + first_row) mod K

  static int64_t blocks(int64_t N) { return (N + L - 1) / L; }
  static int64_t packed_rows(int64_t K) {
    if (TileRegisters<T>::exist) return (K + kTileFactors - 1) / kTileFactors * kTileRows;
    return (K + F::depth - 1) / F::depth;
  }
  static int64_t block_size(int64_t K) { return (1 + packed_rows(K)) * NG * L; }
  static int64_t size(int64_t K, int64_t N) { return blocks(N) * block_size(K); }
  A* block(int64_t index) const { return data + (index - first_block) * block_size(K); }

  // The rows of blocks ahead that a tile asks for.
  static int64_t rows_ahead(int64_t K) {
    if (TileRegisters<T>::exist) return K / kTileFactors * kTileRows * (NU * NG > 2 ? 2 : 1);
    return K / F::depth;
  }

  // What a thread needs to pack as many blocks as a tile takes.
  static int64_t piece_size(int64_t K, int64_t N) { return size(K, minimum(N, NU * L)); }
  // The same weights with a thread's piece of the data, for blocks from this one on.
  Weights piece(A* at, int64_t block) const {
    Weights w = *this;
    w.data = at;
    w.first_block = block;
    return w;
  }

  // Whether these blocks are so many that it pays to ask for them ahead.
  bool are_far(Range mine) const {
    return kVectorBytes == 64 && data &&
           (mine.end - mine.begin) * block_size(K) * static_cast<int64_t>(sizeof(A)) > kNearBytes;
  }

  // Unit n of gate g is row g·N + n of R, operand element k its column: packs the blocks in `mine`,
  // or where there is no room for that, lets every product read R itself.
  void set_rows(const T* R, int64_t ldr, const T* b, Range mine) {
    if (data) return pack_rows(R, ldr, b, mine.begin, mine.end);
    rows = R;
    ld = ldr;
    bias = b;
  }

  void pack_rows(const T* R, int64_t ldr, const T* b, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t lanes = minimum(N - i * L, L);
      for (int g = 0; g < NG; ++g) {
        const int64_t r0 = g * N + i * L;
        A* out = block(i) + g * L;
        bias_of(b, r0, static_cast<int>(lanes)).store(out);
        for (int64_t k = 0; k < K; k += kSquare) {
          const int64_t columns = minimum(kSquare, K - k);
          Pack<A> square[L];
          load_square(R + r0 * ldr + k, ldr, lanes, columns, square);
          transpose(square);
          for (int64_t l = 0; l < packed_rows(columns); ++l)
            square[l].store(out + (1 + k / F::depth + l) * NG * L);
        }
      }
    }
  }

  // The same product without packing: one row of the weights after the other, as the hardware's
  // prefetching follows it, times all M rows of the operand.
  template <int M>
  void multiply_unpacked(const T* a, int64_t lda, int64_t first, int64_t count, A* out) const {
    for (int64_t v = 0; v < count * NG; ++v) {
      const int64_t n0 = (first + v / NG) * L, r0 = v % NG * N + n0;
      const int lanes = static_cast<int>(minimum(N - n0, L));
      Pack<A> total[M][L];
      for (int l = 0; l < lanes; ++l) dot(rows + (r0 + l) * ld, a, lda, total, l);
      const Pack<A> b = bias_of(bias, r0, lanes);
      for (int m = 0; m < M; ++m) {
        for (int l = lanes; l < L; ++l) total[m][l] = Pack<A>(A(0));
        (sums(total[m]) + b).store(out + (m * count * NG + v) * L);
      }
    }
  }

  // total[m][l]: the products of a row of the weights and row m of the operand, in four chains, to
  // be summed over the lanes.
  template <int M>
  RNNKERN_INLINE void dot(const T* w, const T* a, int64_t lda, Pack<A> (&total)[M][L],
                          int l) const {
    constexpr int kChains = 4;
    Pack<A> acc[M][kChains];
    for (auto& row : acc) {
      for (Pack<A>& chain : row) chain = Pack<A>(A(0));
    }
    const auto add = [&](int c, int64_t k, int n) RNNKERN_LAMBDA {
      const Pack<A> factor = F::load(w + k, n);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        acc[m][c] = F::dot(factor, F::load(a + m * lda + k, n), acc[m][c]);
      }
    };
    int64_t k = 0;
    for (; k + kChains * kSquare <= K; k += kChains * kSquare) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) add(c, k + c * kSquare, kSquare);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c, k += kSquare) {
      if (k >= K) break;
      if (k + kSquare > K) {
        add(c, k, static_cast<int>(K - k));
      } else {
        add(c, k, kSquare);
      }
    }
    for (int m = 0; m < M; ++m) {
      total[m][l] = (acc[m][0] + acc[m][1]) + (acc[m][2] + acc[m][3]);
    }
  }

  // The transposed product without packing: one row of the matrix after the other, its columns of
  // all units at once.
  void multiply_columns(const T* a, int64_t lda, int64_t m, int64_t first, int64_t count,
                        A* out) const {
    const int64_t units = minimum(N - first * L, count * L);
    const T* columns = rows + first * L;
    for (int64_t j = 0; j < m; ++j) {
      Pack<A> sum[NU];
      for (Pack<A>& s : sum) s = Pack<A>(A(0));
      for (int64_t k = 0; k < K;) {
        Pack<A> acc[NU];
        for (Pack<A>& s : acc) s = Pack<A>(A(0));
        for (const int64_t end = minimum(K, k + kChain); k < end; k += F::depth) {
          const bool last = k + F::depth > K;
          const T* row = columns + row_of(k) * ld;
          const T* next = last ? nullptr : columns + row_of(k + F::depth - 1) * ld;
          const T* operand = a + j * lda + k;
          const Pack<A> b = last ? F::spread_one(operand) : F::spread(operand);
#pragma GCC unroll 4
          for (int v = 0; v < NU; ++v) {
            const int lanes = static_cast<int>(minimum(units - v * L, L));
            if (lanes <= 0) break;
            acc[v] = F::dot(b, F::join(row + v * L, next ? next + v * L : nullptr, lanes), acc[v]);
          }
        }
        for (int v = 0; v < NU; ++v) sum[v] = sum[v] + acc[v];
      }
      for (int v = 0; v < count; ++v) sum[v].store(out + (j * count + v) * L);
    }
  }

  // Blocks [begin, end) of the transposed product, neighbours together: their columns are.
  void pack_columns(const T* R, int64_t ldr, int64_t begin, int64_t end) const {
    static_assert(NG == 1, "a transposed product has one output a unit");
    for (int64_t i = begin; i < end; i += NU) {
      const int64_t count = minimum(NU, end - i), stride = block_size(K), last = packed_rows(K) * L;
      const auto put = [&](int64_t v, int64_t at, Pack<A> row) RNNKERN_LAMBDA {
        row.store(block(i) + v * stride + at);
      };
      for (int64_t v = 0; v < count; ++v) put(v, 0, Pack<A>(A(0)));
      int64_t at = L;
      for (int64_t k = 0; k < K; k += F::depth, at += L) {
        const T* row = R + row_of(k) * ldr + i * L;
        const T* next = k + 1 < K ? R + row_of(k + 1) * ldr + i * L : nullptr;
        for (int64_t v = 0; v < count; ++v) {
          const int lanes = static_cast<int>(minimum(N - (i + v) * L, L));
          put(v, at, F::join(row + v * L, next ? next + v * L : nullptr, lanes));
        }
      }
      for (; at <= last; at += L) {
        for (int64_t v = 0; v < count; ++v) put(v, at, Pack<A>(A(0)));
      }
    }
  }

  // Unit n is column n of R, operand element k row row_of(k), packed or not as above.
  void set_columns(const T* R, int64_t ldr, Range mine) {
    if (data) return pack_columns(R, ldr, mine.begin, mine.end);
    rows = R;
    ld = ldr;
    transposed = true;
  }

  // m rows × `count` blocks from `first` on: out[m][count][NG][L], m <= MR, count <= NU; `ahead` is
  // where packed weights lie that will be needed soon, or null.
  void multiply(const T* a, int64_t lda, int64_t m, int64_t first, int64_t count, A* out,
                const A* ahead) const {
    if constexpr (NG == 1) {
      if (!data && transposed) return multiply_columns(a, lda, m, first, count, out);
    }
    if (!data) {
      switch (m) {
        case 1: return multiply_unpacked<1>(a, lda, first, count, out);
        case 2: return multiply_unpacked<2>(a, lda, first, count, out);
        case 3: return multiply_unpacked<3>(a, lda, first, count, out);
        default: return multiply_unpacked<kFewRows>(a, lda, first, count, out);
      }
    }
    if constexpr (NU == 4) {
      if (count == 3) return multiply_packed<3>(a, lda, m, first, out, ahead);
      if (count == 2) return multiply_packed<2>(a, lda, m, first, out, ahead);
    }
    if constexpr (NU > 1) {
      if (count == 1) return multiply_packed<1>(a, lda, m, first, out, ahead);
    }
    multiply_packed<NU>(a, lda, m, first, out, ahead);
  }

 private:
  static constexpr int64_t kNearBytes = 768 << 10;
  static constexpr int64_t kSmallBytes = 64 << 10;
  static constexpr int kSquare = L * F::depth;  // columns of the matrix in a register

  int64_t row_of(int64_t k) const { return k + first_row - (k + first_row < K ? 0 : K); }

  static Pack<A> bias_of(const T* b, int64_t r0, int lanes) {
    return b ? load(b + r0, lanes) : Pack<A>(A(0));
  }

  // rows × columns of a matrix as registers; zero beyond.
  static void load_square(const T* in, int64_t ld, int64_t rows, int64_t columns,
                          Pack<A> (&square)[L]) {
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      square[l] = l < rows ? F::load(in + l * ld, static_cast<int>(columns)) : Pack<A>(A(0));
    }
  }

  template <int count>
  void multiply_packed(const T* a, int64_t lda, int64_t m, int64_t first, A* out,
                       const A* ahead) const {
    if constexpr (TileRegisters<T>::exist) {
      TileProduct<T, count, NG>(a, lda, m, block(first), block_size(K), K, out, ahead);
    } else {
      multiply_by_registers<count>(a, lda, m, first, out, ahead);
    }
  }

  template <int count>
  void multiply_by_registers(const T* a, int64_t lda, int64_t m, int64_t first, A* out,
                             const A* ahead) const {
    const auto tile = [&](auto rows_of_tile) {
      multiply_tile<T, decltype(rows_of_tile)::value, count, NG>(a, lda, block(first),
                                                                 block_size(K), K, out, ahead);
    };
    if (one_row && NG * K * N * static_cast<int64_t>(sizeof(T)) <= kSmallBytes) {
      return multiply_tile<T, 1, count, NG, 2>(a, lda, block(first), block_size(K), K, out,
                                               nullptr);
    }
    switch (m) {
      case 1: return tile(Count<1>{});
      case 2: return tile(Count<2>{});
      case 3: return tile(Count<3>{});
      default: break;
    }
    if constexpr (MR >= 4) {
      if (m == 4) return tile(Count<4>{});
    }
    if constexpr (MR >= 6) {
      if (m == 5) return tile(Count<5>{});
      if (m == 6) return tile(Count<6>{});
    }
    if constexpr (MR >= 8) {
      if (m == 7) return tile(Count<7>{});
      if (m == 8) return tile(Count<8>{});
    }
  }
};

struct FetchNothing {
  RNNKERN_INLINE void operator()(int64_t, int64_t, int64_t) const {}
};

// Runs one product for the blocks of units in `mine` and the rows [0, rows) of `a`, and hands every
// finished block to emit(row, unit, lanes, r): r[NG][L] holds the products of the `lanes` units
// from `unit` on. Rows from product_rows on have no operand and are handed over as zero. Before a
// product, fetch(row, unit, count) is called for the units that follow from it.
template <class T, int NG, class Emit, class Fetch>
RNNKERN_INLINE void run_product(const Weights<T, NG>& w, const T* a, int64_t lda,
                                int64_t product_rows, int64_t rows, Range mine, Emit&& emit,
                                Fetch&& fetch, bool downwards = false) {
  using W = Weights<T, NG>;
  using A = Accumulator<T>;
  alignas(64) A out[W::MR * W::NU * NG * W::L];
  const int64_t tiles = (rows + W::MR - 1) / W::MR;
  const bool are_far = tiles > 1 && w.are_far(mine);
  const int64_t groups = (mine.end - mine.begin + W::NU - 1) / W::NU;
  for (int64_t g = 0; g < groups; ++g) {
    const auto at = [&](int64_t g) {
      return mine.begin + (downwards ? groups - 1 - g : g) * W::NU;
    };
    const int64_t first = at(g), next = at(minimum(g + 1, groups - 1));
    const int64_t next_size = minimum(W::NU, mine.end - next) * W::block_size(w.K);
    const int64_t count = minimum(W::NU, mine.end - first), row_size = count * NG * W::L;
    const int64_t unit = first * W::L, units = minimum(count * W::L, w.N - unit);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = part(rows, tile, tiles).begin, end = part(rows, tile, tiles).end;
      const int64_t product_end = clamp(product_rows, begin, end);
      for (int64_t m = begin; m < end; ++m) fetch(m, unit, units);
      const int64_t ahead = tile * W::rows_ahead(w.K) * W::L;
      if (product_end > begin) {
        w.multiply(a + begin * lda, lda, product_end - begin, first, count, out,
                   are_far && next != first && ahead < next_size ? w.block(next) + ahead : nullptr);
      }
      if (product_end < end) {
        std::memset(out + (product_end - begin) * row_size, 0,
                    static_cast<size_t>((end - product_end) * row_size) * sizeof(A));
      }
      for (int64_t m = begin; m < end; ++m) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t u = unit + i * W::L, lanes = minimum(W::L, w.N - u);
          const A* r = out + (m - begin) * row_size + i * NG * W::L;
          if (lanes == W::L) {  // apart, so that the compiler leaves out what tails need
            emit(m, u, W::L, r);
          } else {
            emit(m, u, static_cast<int>(lanes), r);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace rnnkern

// Sums of outer products over all rows of data, out = aᵀ·b: the weight gradients, where a is the
// gradient of the gates and each b what one of the weights was multiplied by; and the sum of a's
// rows, the gradient of the biases.
//
// The factors already have the outputs side by side in their rows, so nothing is transposed: b is
// packed into panels of NV registers, a into tiles of MR columns, and every MR × NV tile of an
// output adds its sum over the rows to memory. A few tiles of a follow each other for each panel of
// b, which comes from L2 once for all of them where they and it fit L1. Sums run over the rows in
// order, so that the result does not depend on how threads split the outputs. Rows are taken kRows
// at a time, so that rounding errors do not grow with all of them (a matrix unit adds 32 rows at a
// time to the sum in memory). All products of a call share their packed panels.
#pragma once

#include "core/problem.h"
#include "cpu/amx.h"

namespace rnnkern {
namespace {

template <class T>
class Outer {
  using A = Accumulator<T>;
  using F = Factors<T>;
  using Problem = OuterProblem<T, A>;
  using Factor = OuterFactor<T>;
  using Part = OuterPart<T, A>;
  static constexpr int L = Pack<A>::lanes;
  static constexpr int NV = 2;
  static constexpr int MR = TileRegisters<T>::exist ? 2 * kTileRows : kRegisters * 3 / 4 / NV;
  static constexpr int64_t kRows = 256;
  static constexpr int64_t kTiles = TileRegisters<T>::exist ? 1 : 4;  // of a, for a panel of b
  // What is written for a row of a tile; of it the next row overwrites what is beyond MR.
  static constexpr int kWritten = (MR + L - 1) / L * L;

 public:
  static int64_t panels(int64_t I) { return (I + NV * L - 1) / (NV * L); }

  // A thread's scratch for that many rows, of factors with that many panels: all of them, a few
  // tiles of a, and whether each panel has been packed.
  static int64_t scratch_elements(int64_t rows, int64_t panels) {
    const int64_t packed = packed_rows(minimum(kRows, rows));
    return kTiles * tile_size(packed) + panels * (packed * NV * L + 1);
  }

  // The part of thread `rank` of `size`, with scratch of its own: of all tiles of all outputs, in
  // the order in which they are visited, every thread takes as many.
  static void run(const Problem& p, A* scratch, int rank, int size) {
    int64_t all = 0;
    for (const Part& part : p.part) all += tiles(part) * panels(p, part);
    const Range mine = rnnkern::part(all, rank, size);
    const int64_t packed = packed_rows(minimum(kRows, p.N)), panel_size = packed * NV * L;
    A* packed_a = scratch;
    A* packed_b = packed_a + kTiles * tile_size(packed);
    int64_t panels_of_all = 0;
    for (const Factor& factor : p.b) panels_of_all += panels(factor.I);
    A* is_packed = packed_b + panels_of_all * panel_size;
    for (int64_t n = 0; n < p.N; n += kRows) {
      const Block block{n, minimum(kRows, p.N - n), p.adds || n > 0};
      std::memset(is_packed, 0, static_cast<size_t>(panels_of_all) * sizeof(A));
      int64_t begin = 0;  // of the part's tiles
      for (const Part& part : p.part) {
        add_sums(part, block, rank, size);
        // Tiles are taken kTiles at a time: for each panel, each of them.
        const int64_t width = panels(p, part), end = begin + tiles(part) * width;
        const int64_t last = minimum(end, mine.end);
        for (int64_t i = maximum(begin, mine.begin); i < last;) {
          const int64_t first = (i - begin) / (kTiles * width) * kTiles;
          const int64_t count = minimum(kTiles, tiles(part) - first), start = begin + first * width;
          pack_tiles(part, block, first, count, packed_a);
          for (const int64_t stop = minimum(last, start + count * width); i < stop; ++i) {
            const Panel panel = find_panel(p, part, (i - start) / count);
            A* b = packed_b + panel.slot * panel_size;
            if (is_packed[panel.slot] == A(0)) pack_panel(panel, block, b);
            is_packed[panel.slot] = A(1);
            const int64_t tile = (i - start) % count;
            const A* a = packed_a + tile * tile_size(packed_rows(block.rows));
            add_tile(part, block, panel, a, b, first + tile);
          }
        }
        begin = end;
      }
    }
  }

 private:
  struct Panel {
    const Factor& factor;
    A* out;                // of the part, for this factor
    int64_t begin, count;  // columns
    int64_t slot;          // among the panels of all factors
  };

  struct Block {
    int64_t first, rows;
    bool adds;  // to what the blocks before gave
  };

  // What rows become when packed; there are zeros up to what a product takes at once.
  static int64_t packed_rows(int64_t rows) {
    if (TileRegisters<T>::exist) return (rows + kTileFactors - 1) / kTileFactors * kTileRows;
    return (rows + F::depth - 1) / F::depth;
  }

  static int64_t tile_size(int64_t packed_rows) { return packed_rows * MR + kWritten - MR; }

  static int64_t tiles(const Part& part) { return (part.O + MR - 1) / MR; }

  // Panels of the factors that the part is multiplied with.
  static int64_t panels(const Problem& p, const Part& part) {
    int64_t n = 0;
    for (int f = 0; f < kOuterFactors; ++f) n += part.out[f] ? panels(p.b[f].I) : 0;
    return n;
  }

  static Panel find_panel(const Problem& p, const Part& part, int64_t index) {
    int64_t slot = 0;
    for (int f = 0;; ++f) {
      const int64_t count = panels(p.b[f].I);
      if (part.out[f] && index < count) {
        const int64_t begin = index * NV * L;
        return {p.b[f], part.out[f], begin, minimum(NV * L, p.b[f].I - begin), slot + index};
      }
      if (part.out[f]) index -= count;
      slot += count;
    }
  }

  static void pack_panel(const Panel& panel, const Block& block, A* out) {
    const Factor& f = panel.factor;
    const RowMap& rows = f.rows;
    // Row block.first of the map, and how many more its group has.
    const T* row = f.data + rows.at(block.first) * f.ld + panel.begin;
    int64_t left = rows.group - block.first % rows.group;
    const auto next = [&] {
      const T* const here = row;
      row += rows.inner * f.ld;
      if (--left == 0) {
        row += (rows.outer - rows.group * rows.inner) * f.ld;
        left = rows.group;
      }
      return here;
    };
    const A* const end = out + packed_rows(block.rows) * NV * L;
    for (int64_t n = 0; n < block.rows; n += F::depth, out += NV * L) {
      const T* first = next();
      const T* second = F::depth > 1 && n + 1 < block.rows ? next() : nullptr;
      for (int v = 0; v < NV; ++v) {
        const int lanes = static_cast<int>(clamp(panel.count - v * L, 0, L));
        Pack<A> both(A(0));
        if (lanes > 0) both = F::join(first + v * L, second ? second + v * L : nullptr, lanes);
        both.store(out + v * L);
      }
    }
    for (; out < end; out += L) Pack<A>(A(0)).store(out);
  }

  static void pack_tiles(const Part& part, const Block& block, int64_t first, int64_t count,
                         A* out) {
    const T* in = part.a + block.first * part.lda + first * MR;
    const int64_t columns = minimum(count * MR, part.O - first * MR);
    if constexpr (TileRegisters<T>::exist) {
      pack_turned(in, part.lda, block.rows, static_cast<int>(columns), out);
    } else {
      pack_rows(in, part.lda, block.rows, columns, out, tile_size(packed_rows(block.rows)));
    }
  }

  static void pack_rows(const T* in, int64_t ld, int64_t rows, int64_t columns, A* out,
                        int64_t tile) {
    const auto pack = [&](int64_t columns) RNNKERN_LAMBDA {
      for (int64_t n = 0; n < rows; n += F::depth, in += F::depth * ld, out += MR) {
        const T* next = F::depth > 1 && n + 1 < rows ? in + ld : nullptr;
#pragma GCC unroll 4
        for (int64_t c = 0; c < columns; c += MR) {
          for (int l = 0; l < kWritten; l += L) {
            const int lanes = static_cast<int>(clamp(columns - c - l, 0, L));
            const T* second = next ? next + c + l : nullptr;
            F::join(in + c + l, second, lanes).store(out + c / MR * tile + l);
          }
        }
      }
    };
    if (columns == kTiles * MR) return pack(kTiles * MR);  // apart, without the checks
    pack(columns);
  }

  // For the matrix unit, 32 rows of a after the other: for each column their factors side by side.
  static void pack_turned(const T* in, int64_t ld, int64_t rows, int columns, A* out) {
    for (int64_t n = 0; n < rows; n += L * F::depth) {
      for (int o = 0; o < MR; o += L, out += L * L) {
        const int lanes = static_cast<int>(clamp(columns - o, 0, L));
        Pack<A> square[L];
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) {
          const int64_t row = n + l * F::depth;
          const T* first = in + row * ld + o;
          const bool both = row + 1 < rows;
          square[l] =
              row < rows ? F::join(first, both ? first + ld : nullptr, lanes) : Pack<A>(A(0));
        }
        transpose(square);
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) square[l].store(out + l * L);
      }
    }
  }

  // Sums of a's rows, a few registers of columns at a time.
  static void add_sums(const Part& part, const Block& block, int rank, int size) {
    constexpr int kColumns = 4 * L;
    if (!part.sum[0] && !part.sum[1]) return;
    const Range mine = rnnkern::part((part.O + kColumns - 1) / kColumns, rank, size);
    for (int64_t o = mine.begin * kColumns; o < minimum(part.O, mine.end * kColumns);
         o += kColumns) {
      if (part.O - o >= kColumns) {  // apart, without the checks
        add_sums_of(part, block, o, kColumns);
      } else {
        add_sums_of(part, block, o, part.O - o);
      }
    }
  }

  RNNKERN_INLINE static void add_sums_of(const Part& part, const Block& block, int64_t o,
                                         int64_t columns) {
    const auto each = [&](auto&& visit) RNNKERN_LAMBDA {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        if (v * L < columns) visit(v, static_cast<int>(minimum(columns - v * L, L)));
      }
    };
    const T* a = part.a + block.first * part.lda + o;
    Pack<A> total[4];
    for (Pack<A>& t : total) t = Pack<A>(A(0));
    for (int64_t n = 0; n < block.rows; n += F::depth, a += F::depth * part.lda) {
      const T* next = F::depth > 1 && n + 1 < block.rows ? a + part.lda : nullptr;
      each([&](int v, int lanes) RNNKERN_LAMBDA {
        const Pack<A> both = F::join(a + v * L, next ? next + v * L : nullptr, lanes);
        total[v] = F::dot(both, F::ones(), total[v]);
      });
    }
    for (A* sum : part.sum) {
      if (!sum) continue;
      each([&](int v, int lanes) RNNKERN_LAMBDA {
        A* at = sum + o + v * L;
        store(at, block.adds ? load(at, lanes) + total[v] : total[v], lanes);
      });
    }
  }

  static void add_tile(const Part& part, const Block& block, const Panel& panel, const A* a,
                       const A* b, int64_t tile) {
    const int64_t I = panel.factor.I;
    A* out = panel.out + tile * MR * I + panel.begin;
    const bool whole = panel.count == NV * L && part.O - tile * MR >= MR;
    if (whole && block.adds) {  // the sums come from far, and the product takes longer than they do
      for (int m = 0; m < MR; ++m) prefetch(out + m * I, NV * L);
    }
    if (whole) return multiply(block, a, b, out, I, block.adds);
    A sums[MR][NV * L];
    multiply(block, a, b, sums[0], NV * L, false);
    for (int64_t m = 0; m < minimum(MR, part.O - tile * MR); ++m) {
      for (int64_t u = 0; u < panel.count; u += L) {
        const int lanes = static_cast<int>(minimum(panel.count - u, L));
        const Pack<A> sum = Pack<A>::load(sums[m] + u);
        A* at = out + m * I + u;
        store(at, block.adds ? load(at, lanes) + sum : sum, lanes);
      }
    }
  }

  // A whole tile, at `out` with rows `ld` apart; `adds`: to what is there.
  static void multiply(const Block& block, const A* a, const A* b, A* out, int64_t ld, bool adds) {
    if constexpr (TileRegisters<T>::exist) {
      using Sums = TileSums<T, 2, NV>;
      TileRegisters<T>::set_height(MR);
      if (adds) {
        Sums::load({out, out + L}, ld);
      } else {
        Sums::clear();
      }
      Sums::add(reinterpret_cast<const T*>(a), kTileFactors, MR * kTileFactors, {b, b + L}, NV * L,
                packed_rows(block.rows) / kTileRows);
      Sums::store({out, out + L}, ld);
    } else {
      multiply_by_registers(block, a, b, out, ld, adds);
    }
  }

  static void multiply_by_registers(const Block& block, const A* a, const A* b, A* out, int64_t ld,
                                    bool adds) {
    Pack<A> acc[MR][NV];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[m][v] = Pack<A>(A(0));
    }
    for (int64_t n = 0; n < block.rows; n += F::depth, a += MR, b += NV * L) {
      Pack<A> row[NV];
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) row[v] = Pack<A>::load(b + v * L);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const Pack<A> factor = F::spread(reinterpret_cast<const T*>(a + m));
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[m][v] = F::dot(factor, row[v], acc[m][v]);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) {
        A* at = out + m * ld + v * L;
        (adds ? Pack<A>::load(at) + acc[m][v] : acc[m][v]).store(at);
      }
    }
  }
};

}  // namespace
}  // namespace rnnkern

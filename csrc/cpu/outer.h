// Sums of outer products over all rows of data, out = aᵀ·b: the weight gradients, where a is the
// gradient of the gates and each b what one of the weights was multiplied by; and the sum of a's
// rows, the gradient of the biases.
//
// The factors already have the outputs side by side in their rows, so nothing is transposed: b is
// packed into panels of NV registers, a into tiles of MR columns, and every MR × NV tile of an
// output adds its sum over the rows to memory. The packed tile of a stays in L1, the panels of b in
// L2. Sums run over the rows in order, so that the result does not depend on how threads split the
// outputs. Rows are taken kRows at a time, so that rounding errors do not grow with all of them.
#pragma once

#include "core/problem.h"
#include "cpu/simd.h"

namespace rnnkern {
namespace {

template <class T>
class Outer {
  using A = Accumulator<T>;
  using F = Factors<T>;
  using Problem = OuterProblem<T, A>;
  using Factor = OuterFactor<T, A>;
  static constexpr int L = Pack<A>::lanes;
  static constexpr int NV = 2;
  static constexpr int MR = kRegisters * 3 / 4 / NV;
  static constexpr int64_t kRows = 256, kPackedRows = kRows / F::depth;

 public:
  // Columns of a factor, in whole panels.
  static int64_t columns(int64_t I) { return (I + NV * L - 1) / (NV * L) * NV * L; }

  // A thread's scratch for factors with that many columns: all panels and one tile of a block.
  static int64_t scratch_elements(int64_t columns) { return kPackedRows * (columns + MR); }

  // The part of thread `rank` of `size`, with scratch of its own.
  static void run(const Problem& p, A* scratch, int rank, int size) {
    const int64_t grid_rows = divide(p, size), grid_columns = size / grid_rows;
    const Range mine = part(tiles(p), rank / grid_columns, grid_rows);
    const Range columns = part(panels(p), rank % grid_columns, grid_columns);
    const bool sums = (p.sum[0] || p.sum[1]) && rank % grid_columns == 0;
    if (rank >= grid_rows * grid_columns) return;
    if (columns.begin == columns.end && !sums) return;
    A* packed_a = scratch + kPackedRows * panels(p) * NV * L;
    for (int64_t n = 0; n < p.N; n += kRows) {
      const Block block{n, minimum(kRows, p.N - n), p.adds || n > 0};
      for (int64_t c = columns.begin; c < columns.end; ++c)
        pack_panel(panel(p, c), block, scratch + c * kPackedRows * NV * L);
      for (int64_t t = mine.begin; t < mine.end; ++t) {
        pack_tile(p, block, t, packed_a);
        if (sums) add_sum(p, block, packed_a, t);
        for (int64_t c = columns.begin; c < columns.end; ++c)
          add_tile(p, block, panel(p, c), packed_a, scratch + c * kPackedRows * NV * L, t);
      }
    }
  }

 private:
  struct Panel {
    const Factor& factor;
    int64_t begin, count;  // columns
  };

  struct Block {
    int64_t first, rows;
    bool adds;  // to what the blocks before gave
  };

  static int64_t tiles(const Problem& p) { return (p.O + MR - 1) / MR; }
  static int64_t panels(const Factor& f) { return (f.I + NV * L - 1) / (NV * L); }
  static int64_t panels(const Problem& p) { return panels(p.b[0]) + panels(p.b[1]); }

  static Panel panel(const Problem& p, int64_t index) {
    const int64_t others = panels(p.b[0]);
    const Factor& factor = p.b[index < others ? 0 : 1];
    const int64_t begin = (index < others ? index : index - others) * NV * L;
    return {factor, begin, minimum(NV * L, factor.I - begin)};
  }

  // The rows of the grid of threads over tiles and panels that leaves each the least to do.
  static int64_t divide(const Problem& p, int64_t size) {
    int64_t best = 1, least = INT64_MAX;
    for (int64_t rows = 1; rows <= size; ++rows) {
      if (size % rows != 0) continue;
      const int64_t columns = size / rows;
      const int64_t share = ((tiles(p) + rows - 1) / rows) * ((panels(p) + columns - 1) / columns);
      if (share <= least) {
        least = share;
        best = rows;
      }
    }
    return best;
  }

  static void pack_panel(const Panel& panel, const Block& block, A* out) {
    const Factor& f = panel.factor;
    const auto row = [&](int64_t n) {
      return f.data + f.rows.at(block.first + n) * f.ld + panel.begin;
    };
    for (int64_t n = 0; n < block.rows; n += F::depth, out += NV * L) {
      const T* first = row(n);
      const T* second = F::depth > 1 && n + 1 < block.rows ? row(n + 1) : nullptr;
      for (int v = 0; v < NV; ++v) {
        const int lanes = static_cast<int>(clamp(panel.count - v * L, 0, L));
        Pack<A> both(A(0));
        if (lanes > 0) both = F::join(first + v * L, second ? second + v * L : nullptr, lanes);
        both.store(out + v * L);
      }
    }
  }

  static void pack_tile(const Problem& p, const Block& block, int64_t tile, A* out) {
    const T* in = p.a + block.first * p.lda + tile * MR;
    const int columns = static_cast<int>(minimum(MR, p.O - tile * MR));
    for (int64_t n = 0; n < block.rows; n += F::depth, in += F::depth * p.lda, out += MR) {
      if constexpr (F::depth > 1) {
        store(out, F::join(in, n + 1 < block.rows ? in + p.lda : nullptr, columns), MR);
      } else if (columns == MR) {
        std::memcpy(out, in, MR * sizeof(T));
      } else {
        for (int m = 0; m < MR; ++m) out[m] = m < columns ? in[m] : T(0);
      }
    }
  }

  static void add_sum(const Problem& p, const Block& block, const A* a, int64_t tile) {
    A sum[MR] = {};
    if constexpr (F::depth > 1) {
      const Bfloat16 one[] = {{0x3f80}, {0x3f80}};
      const Pack<A> ones = F::spread(one);
      Pack<A> total(A(0));
      for (int64_t n = 0; n < block.rows; n += F::depth, a += MR)
        total = F::dot(load(a, MR), ones, total);
      store(sum, total, MR);
    } else {
      for (int64_t n = 0; n < block.rows; ++n, a += MR) {
        for (int m = 0; m < MR; ++m) sum[m] += a[m];
      }
    }
    for (A* total : p.sum) {
      if (!total) continue;
      A* out = total + tile * MR;
      for (int m = 0; m < minimum(MR, p.O - tile * MR); ++m)
        out[m] = block.adds ? out[m] + sum[m] : sum[m];
    }
  }

  static void add_tile(const Problem& p, const Block& block, const Panel& panel, const A* a,
                       const A* b, int64_t tile) {
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
    const int64_t rows = minimum(MR, p.O - tile * MR);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      if (m == rows) break;
      A* out = panel.factor.out + (tile * MR + m) * panel.factor.I + panel.begin;
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) {
        const int lanes = static_cast<int>(clamp(panel.count - v * L, 0, L));
        if (lanes == 0) break;
        A* at = out + v * L;
        store(at, block.adds ? load(at, lanes) + acc[m][v] : acc[m][v], lanes);
      }
    }
  }
};

}  // namespace
}  // namespace rnnkern

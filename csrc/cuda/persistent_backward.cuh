// The backward pass in one launch, for cells of one phase without a projection; persistent.cuh says
// how. A block has the rows of the transposed R that belong to its units, whose product needs all
// gates of all units: the blocks exchange dr. A visit reads one slot and writes the other; the last
// visit makes none, and hands out the gradients of the initial states.
#pragma once

#include "cuda/backward.cuh"
#include "cuda/persistent.cuh"

namespace rnnkern {

// What a thread knows of the gradients of its unit of RN rows. dprev is, until the gate math, what
// the visit before has left.
template <class Cell, class T, int RN>
struct OwnedGradients {
  using V = Value<Accumulator<T>>;
  BackwardUnit<Cell, V> unit[RN];
  V dy[RN];
  Runs in[RN];

  __device__ __forceinline__ void fetch_kept(const BackwardProblem<T, Accumulator<T>>& p,
                                             const Tile& tile, const Visit& visit) {
    const int64_t u = tile.unit();
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      const int64_t j = tile.row(n);
      in[n] = u < p.H ? Runs::of(p.seq, visit, j) : Runs{false, false};
      if (!in[n].now) continue;
      fetch_unit<Cell>(p, tile.d, data_row(p.seq, p.x_rows, visit.now, j), u, unit[n]);
      dy[n] = fetch_dy(p, tile.d, visit.now, j, u);
    }
  }

  // The gate math; dr goes to the others, dprev stays here unless `shares` the registers with more
  // rows.
  __device__ __forceinline__ void visit_step(const BackwardCall<T>& s, const Tile& tile,
                                             const Visit& visit, int slot, bool shares,
                                             const Accumulator<T> (&product)[1][RN]) {
    const int64_t u = tile.unit();
    const BackwardScratch<T>& scratch = s.scratch[tile.d];
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      if (!(in[n].now || in[n].before)) continue;
      const int64_t j = tile.row(n), at = j * s.p.H + u;
      if (shares && in[n].before) fetch_direct<Cell, false>(scratch, at, unit[n]);
      enter_step(s.p, tile.d, visit, in[n], j, u, V(product[0][n]), unit[n]);
      if (!in[n].now) continue;
      unit[n].dnext[0] = unit[n].dnext[0] + dy[n];
      Cell::template backward<0>(unit[n]);
      put_dr<Cell, 0>(scratch.dr[slot ^ 1], s.p.H, j, u, unit[n]);
      if (shares) put_direct<Cell, false>(scratch, at, unit[n]);
    }
  }

  // What nobody waits for.
  __device__ __forceinline__ void put_results(const BackwardProblem<T, Accumulator<T>>& p,
                                              const Tile& tile, const Step& now) {
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      if (!in[n].now) continue;
      const int64_t row = data_row(p.seq, p.x_rows, now, tile.row(n));
      put_dx<Cell, 0>(p, tile.d, row, tile.unit(), unit[n]);
    }
  }
};

template <class Cell, class Product, int RN>
__global__ void __launch_bounds__(kThreads, kSequenceBlocks)
    backward_sequence(const BackwardCall<typename Product::Data> s) {
  using T = typename Product::Data;
  const auto& p = s.p;
  const Part part = Part::of_block<RN>(p.seq, s.exchange);
  const int d = part.first.d;
  const BackwardScratch<T>& scratch = s.scratch[d];
  const int64_t K = Cell::gates * p.H;
  const Kept R{block_memory() + Product::template work<1, RN>(), K};
  Product::template keep<1>(Weights<T>{scratch.first, p.H, K}, part.first.u0, R.data);

  OwnedGradients<Cell, T, RN> own{};
  const int64_t way = p.dir[d].reverse ? 1 : -1;
  Visit visit{step_at(p.seq, p.dir[d].reverse ? 0 : p.seq.T - 1), {-1, 0, 0}};
  for (int64_t i = 0; i <= p.seq.T; ++i) {
    const int slot = static_cast<int>(i % 2);
    const auto compute = [&](const Tile& tile) {
      Accumulator<T> product[1][RN] = {};
      if (tile.j0 < visit.before.rows)
        Product::run(R, Operand<T>{scratch.dr[slot], visit.before.rows}, tile.u0, tile.j0, product);
      own.visit_step(s, tile, visit, slot, part.shares, product);
    };
    part.exchange(
        i, visit.rows(), [&](const Tile& tile) { own.fetch_kept(p, tile, visit); }, compute,
        [&](const Tile& tile) { own.put_results(p, tile, visit.now); });
    visit = {step_at(p.seq, visit.now.t + way), visit.now};
  }
}

}  // namespace rnnkern

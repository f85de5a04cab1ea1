// The backward pass in one launch, for cells without a projection; persistent.cuh says how.
//
// A block has the rows of the transposed R that belong to its units, whose products need all gates
// of all units: the blocks exchange dr. A visit has an exchange for each phase, last phase first.
// The dr of phase 0, which the next visit reads, has two slots, of which a visit reads the one and
// writes the other; the dr of a second phase, which the same visit reads, has one. The last visit
// makes none, and hands out the gradients of the initial states.
#pragma once

#include "cuda/backward.cuh"
#include "cuda/persistent.cuh"

namespace rnnkern {

template <class Cell>
struct BackwardShape {
  static constexpr int phases = Cell::phases;
  template <int phase>
  static constexpr int gates = 1;
  template <int phase>
  RNNKERN_HD static constexpr int64_t operand(int64_t H) {
    return phase_gates<Cell, phase> * H;
  }
};

// What a thread knows of the gradients of its unit of RN rows. dprev is, until the gate math of the
// last phase, what the visit before has left.
template <class Cell, class T, int RN>
struct OwnedGradients {
  using V = Value<Accumulator<T>>;
  static constexpr int last = Cell::phases - 1;
  BackwardUnit<Cell, V> unit[RN];
  V dy[RN];
  Runs in[RN];

  template <int phase>
  __device__ __forceinline__ void fetch_kept(const BackwardProblem<T, Accumulator<T>>& p,
                                             const Tile& tile, const Visit& visit) {
    const int64_t u = tile.unit();
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      const int64_t j = tile.row(n);
      in[n] = u < p.H ? Runs::of(p.seq, visit, j) : Runs{false, false};
      if (!in[n].now) continue;
      fetch_unit<Cell>(p, tile.d, data_row(p.seq, p.x_rows, visit.now, j), u, unit[n]);
      if (phase == last) dy[n] = fetch_dy(p, tile.d, visit.now, j, u);
    }
  }

  // The gradient that enters the step, and the gate math of its last phase; dr goes to the others,
  // the rest stays here unless `shares` the registers with more rows.
  __device__ __forceinline__ void enter(const BackwardCall<T>& s, const Tile& tile,
                                        const Visit& visit, bool shares, T* dr,
                                        const Accumulator<T> (&dh)[RN]) {
    const int64_t u = tile.unit();
    const BackwardScratch<T>& scratch = s.scratch[tile.d];
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      if (!(in[n].now || in[n].before)) continue;
      const int64_t j = tile.row(n), at = j * s.p.H + u;
      if (shares && in[n].before) fetch_direct<Cell, false>(scratch, at, unit[n]);
      enter_step(s.p, tile.d, visit, in[n], j, u, V(dh[n]), unit[n]);
      if (!in[n].now) continue;
      unit[n].dnext[0] = unit[n].dnext[0] + dy[n];
      Cell::template backward<last>(unit[n]);
      put_dr<Cell, last>(dr, s.p.H, j, u, unit[n]);
      if (!shares) continue;
      put_direct<Cell, false>(scratch, at, unit[n]);
      if (Cell::phases == 2) scratch.dh[at] = unit[n].dnext[0].v;
    }
  }

  // Phase 0 of a two-phase cell, likewise.
  __device__ __forceinline__ void first_phase(const BackwardCall<T>& s, const Tile& tile,
                                              bool shares, T* dr, const Accumulator<T> (&dq)[RN]) {
    const int64_t u = tile.unit();
    const BackwardScratch<T>& scratch = s.scratch[tile.d];
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      if (!in[n].now) continue;
      const int64_t j = tile.row(n), at = j * s.p.H + u;
      if (shares) fetch_direct<Cell, false>(scratch, at, unit[n]);
      if (shares) unit[n].dnext[0] = V(scratch.dh[at]);
      unit[n].dq = V(dq[n]);
      Cell::template backward<0>(unit[n]);
      put_dr<Cell, 0>(dr, s.p.H, j, u, unit[n]);
      if (shares) put_direct<Cell, false>(scratch, at, unit[n]);
    }
  }

  // What nobody waits for.
  template <int phase>
  __device__ __forceinline__ void put_results(const BackwardProblem<T, Accumulator<T>>& p,
                                              const Tile& tile, const Step& now) {
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      if (!in[n].now) continue;
      const int64_t row = data_row(p.seq, p.x_rows, now, tile.row(n));
      put_dx<Cell, phase>(p, tile.d, row, tile.unit(), unit[n]);
    }
  }
};

// The product with the dr that visit i - 1 left, and the last phase of visit i.
template <class Cell, class Product, int RN>
__device__ __forceinline__ void exchange_states(
    const BackwardCall<typename Product::Data>& s, const Part& part,
    const Kept<typename Product::Data>& R, int64_t i, const Visit& visit,
    OwnedGradients<Cell, typename Product::Data, RN>& own) {
  using T = typename Product::Data;
  constexpr int last = Cell::phases - 1;
  const BackwardScratch<T>& scratch = s.scratch[part.first.d];
  const int slot = static_cast<int>(i % 2);
  const Operand<T> dr{scratch.dr[slot], visit.before.rows};
  const auto compute = [&](const Tile& tile) {
    Accumulator<T> dh[1][1][RN] = {};
    if (tile.j0 < dr.rows) Product::run(R, dr, tile.u0, tile.j0, dh);
    own.enter(s, tile, visit, part.shares, last == 0 ? scratch.dr[slot ^ 1] : scratch.dr_second,
              dh[0][0]);
  };
  part.exchange(
      Cell::phases * i, visit.rows(),
      [&](const Tile& tile) { own.template fetch_kept<last>(s.p, tile, visit); }, compute,
      [&](const Tile& tile) { own.template put_results<last>(s.p, tile, visit.now); });
}

// The product with the dr of the second phase, and phase 0 of visit i.
template <class Cell, class Product, int RN>
__device__ __forceinline__ void exchange_operand(
    const BackwardCall<typename Product::Data>& s, const Part& part,
    const Kept<typename Product::Data>& R, int64_t i, const Visit& visit,
    OwnedGradients<Cell, typename Product::Data, RN>& own) {
  using T = typename Product::Data;
  const BackwardScratch<T>& scratch = s.scratch[part.first.d];
  const int slot = static_cast<int>(i % 2);
  const auto ahead = [&](const Tile& tile) {
    if (part.shares) own.template fetch_kept<0>(s.p, tile, visit);
  };
  const auto compute = [&](const Tile& tile) {
    Accumulator<T> dq[1][1][RN];
    Product::run(R, Operand<T>{scratch.dr_second, visit.now.rows}, tile.u0, tile.j0, dq);
    own.first_phase(s, tile, part.shares, scratch.dr[slot ^ 1], dq[0][0]);
  };
  part.exchange(Cell::phases * i + 1, visit.now.rows, ahead, compute,
                [&](const Tile& tile) { own.template put_results<0>(s.p, tile, visit.now); });
}

template <class Cell, class Product, int RN>
__global__ void __launch_bounds__(kThreads, kSequenceBlocks)
    backward_sequence(const BackwardCall<typename Product::Data> s) {
  using T = typename Product::Data;
  using Memory = BlockMemory<BackwardShape<Cell>, Product, RN>;
  const Sequence& seq = s.p.seq;
  const Part part = Part::of_block<RN>(seq, s.exchange);
  const BackwardScratch<T>& scratch = s.scratch[part.first.d];
  const bool reverse = s.p.dir[part.first.d].reverse;
  const int64_t u0 = part.first.u0;
  const Kept<T> R = Memory::template keep<0>(scratch.first, s.p.H, s.resident, u0);
  Kept<T> second{};
  if constexpr (Cell::phases == 2)
    second = Memory::template keep<1>(scratch.second, s.p.H, s.resident, u0);
  OwnedGradients<Cell, T, RN> own{};
  Visit visit{step_at(seq, reverse ? 0 : seq.T - 1), {-1, 0, 0}};
  for (int64_t i = 0; i <= seq.T; ++i) {
    exchange_states<Cell, Product, RN>(s, part, R, i, visit, own);
    if constexpr (Cell::phases == 2)
      exchange_operand<Cell, Product, RN>(s, part, second, i, visit, own);
    visit = {step_at(seq, visit.now.t + (reverse ? 1 : -1)), visit.now};
  }
}

}  // namespace rnnkern

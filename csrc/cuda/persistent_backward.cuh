// The backward pass in one launch; persistent.cuh says how.
//
// A block has the rows of the transposed R that belong to its units, whose products need all gates
// of all units: the blocks exchange dr. A visit has an exchange for each phase, last phase first,
// and before it one for the gradient of a projected h. The dr of phase 0, which the next visit
// reads, has two slots, of which a visit reads the one and writes the other; the dr of a second
// phase and the gradient of a projected h, which the same visit reads, have one. The last visit
// makes none, and hands out the gradients of the initial states.
#pragma once

#include "cuda/backward.cuh"
#include "cuda/persistent.cuh"

namespace rnnkern {

template <class Cell, bool projected>
struct BackwardShape {
  static constexpr int stages = kStages<Cell, projected>;
  template <int stage>
  static constexpr int gates = 1;
  template <int stage>
  RNNKERN_HD static constexpr int64_t operand(const Widths& widths) {
    constexpr int phase = stage < Cell::phases ? stage : 0;
    return projected && stage == 1 ? widths.P : phase_gates<Cell, phase> * widths.H;
  }
};

// What a thread knows of the gradients of its unit of RN rows. dprev is, until the gate math of the
// last phase, what the visit before has left.
template <class Cell, class T, int RN, bool projected>
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
      if (phase == last && !projected) dy[n] = fetch_dy(p, tile.d, visit.now, j, u);
    }
  }

  // The gradient that enters the step, from dh', or dm with a projection, and the gate math of its
  // last phase; dr goes to the others, the rest stays here unless `shares` the registers with more
  // rows.
  __device__ __forceinline__ void enter(const BackwardCall<T>& s, const Tile& tile,
                                        const Visit& visit, bool shares, T* dr,
                                        const Accumulator<T> (&dh)[RN]) {
    const int64_t u = tile.unit();
    const BackwardScratch<T>& scratch = s.scratch[tile.d];
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      if (!(in[n].now || in[n].before)) continue;
      const int64_t j = tile.row(n), at = j * s.p.H + u;
      if (shares && in[n].before) fetch_direct<Cell>(scratch, at, unit[n]);
      if constexpr (projected) {
        constexpr int c = Cell::states - 1;
        unit[n].dnext[0] = V(dh[n]);
        if (c == 1) unit[n].dnext[c] = flow(s.p, tile.d, c, visit, in[n], j, u, unit[n].dprev[c]);
        if (!in[n].now) continue;
      } else {
        enter_step(s.p, tile.d, visit, in[n], j, u, V(dh[n]), unit[n]);
        if (!in[n].now) continue;
        unit[n].dnext[0] = unit[n].dnext[0] + dy[n];
      }
      Cell::template backward<last>(unit[n]);
      put_dr<Cell, last>(dr, s.p.H, j, u, unit[n]);
      if (!shares) continue;
      put_direct<Cell>(scratch, at, unit[n]);
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
      if (shares) fetch_direct<Cell>(scratch, at, unit[n]);
      if (shares) unit[n].dnext[0] = V(scratch.dh[at]);
      unit[n].dq = V(dq[n]);
      Cell::template backward<0>(unit[n]);
      put_dr<Cell, 0>(dr, s.p.H, j, u, unit[n]);
      if (shares) put_direct<Cell>(scratch, at, unit[n]);
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

// The product with the dr that visit i - 1 left, for this block's units of P: the gradient of the
// projected h that enters visit i.
template <class Cell, class Product, int RN>
__device__ __forceinline__ void exchange_projected(const BackwardCall<typename Product::Data>& s,
                                                   const Part& part,
                                                   const Kept<typename Product::Data>& R, int64_t i,
                                                   const Visit& visit) {
  using T = typename Product::Data;
  using V = Value<Accumulator<T>>;
  const auto& p = s.p;
  const int d = part.first.d;
  const BackwardScratch<T>& scratch = s.scratch[d];
  const Operand<T> dr{scratch.dr[i % 2], visit.before.rows};
  V dh[RN];
  const auto each_row = [&](const Tile& tile, auto use) {
    const int64_t u = tile.unit();
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      const int64_t j = tile.row(n);
      if (u < p.P) use(n, j, u, Runs::of(p.seq, visit, j));
    }
  };
  const auto ahead = [&](const Tile& tile) {
    each_row(tile, [&](int n, int64_t j, int64_t u, Runs in) {
      if (in.now) dh[n] = fetch_dy(p, d, visit.now, j, u);
    });
  };
  const auto compute = [&](const Tile& tile) {
    Accumulator<T> r[1][1][RN] = {};
    if (tile.j0 < dr.rows && tile.u0 < p.P) Product::run(R, dr, tile.u0, tile.j0, r);
    each_row(tile, [&](int n, int64_t j, int64_t u, Runs in) {
      if (!(in.now || in.before)) return;
      const V flows = flow(p, d, 0, visit, in, j, u, V(r[0][0][n]));
      if (!in.now) return;
      dh[n] = flows + dh[n];
      put(scratch.dh_projected + j * p.P + u, dh[n]);
    });
  };
  const auto after = [&](const Tile& tile) {
    each_row(tile, [&](int n, int64_t j, int64_t u, Runs in) {
      if (in.now) put(p.dir[d].dh + data_row(p.seq, p.x_rows, visit.now, j) * p.P + u, dh[n]);
    });
  };
  part.exchange(kStages<Cell, true> * i, visit.rows(), ahead, compute, after);
}

// The product with the dr that visit i - 1 left, or with W_hrᵀ of what exchange_projected has made,
// and the last phase of visit i.
template <class Cell, class Product, int RN, bool projected>
__device__ __forceinline__ void exchange_states(
    const BackwardCall<typename Product::Data>& s, const Part& part,
    const Kept<typename Product::Data>& weights, int64_t i, const Visit& visit,
    OwnedGradients<Cell, typename Product::Data, RN, projected>& own) {
  using T = typename Product::Data;
  constexpr int last = Cell::phases - 1;
  const BackwardScratch<T>& scratch = s.scratch[part.first.d];
  const int slot = static_cast<int>(i % 2);
  const Operand<T> operand = projected ? Operand<T>{scratch.dh_projected, visit.now.rows}
                                       : Operand<T>{scratch.dr[slot], visit.before.rows};
  const auto compute = [&](const Tile& tile) {
    Accumulator<T> dh[1][1][RN] = {};
    if (tile.j0 < operand.rows) Product::run(weights, operand, tile.u0, tile.j0, dh);
    own.enter(s, tile, visit, part.shares, last == 0 ? scratch.dr[slot ^ 1] : scratch.dr_second,
              dh[0][0]);
  };
  part.exchange(
      kStages<Cell, projected> * i + (projected ? 1 : 0), visit.rows(),
      [&](const Tile& tile) { own.template fetch_kept<last>(s.p, tile, visit); }, compute,
      [&](const Tile& tile) { own.template put_results<last>(s.p, tile, visit.now); });
}

// The product with the dr of the second phase, and phase 0 of visit i.
template <class Cell, class Product, int RN>
__device__ __forceinline__ void exchange_operand(
    const BackwardCall<typename Product::Data>& s, const Part& part,
    const Kept<typename Product::Data>& R, int64_t i, const Visit& visit,
    OwnedGradients<Cell, typename Product::Data, RN, false>& own) {
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

template <class Cell, class Product, int RN, bool projected>
__global__ void __launch_bounds__(kThreads, kSequenceBlocks)
    backward_sequence(const BackwardCall<typename Product::Data> s) {
  using T = typename Product::Data;
  using Memory = BlockMemory<BackwardShape<Cell, projected>, Product, RN>;
  const Sequence& seq = s.p.seq;
  const Part part = Part::of_block<RN>(seq, s.exchange);
  const BackwardScratch<T>& scratch = s.scratch[part.first.d];
  const bool reverse = s.p.dir[part.first.d].reverse;
  const int64_t u0 = part.first.u0;
  const Widths widths{s.p.H, s.p.P};
  const Kept<T> R = Memory::template keep<0>(scratch.first, s.p.P, widths, s.resident, u0);
  Kept<T> second{};
  if constexpr (kStages<Cell, projected> == 2) {
    const T* weights = projected ? scratch.projection : scratch.second;
    second = Memory::template keep<1>(weights, s.p.H, widths, s.resident, u0);
  }
  OwnedGradients<Cell, T, RN, projected> own{};
  Visit visit{step_at(seq, reverse ? 0 : seq.T - 1), {-1, 0, 0}};
  for (int64_t i = 0; i <= seq.T; ++i) {
    if constexpr (projected) {
      exchange_projected<Cell, Product, RN>(s, part, R, i, visit);
      exchange_states<Cell, Product, RN>(s, part, second, i, visit, own);
    } else {
      exchange_states<Cell, Product, RN>(s, part, R, i, visit, own);
    }
    if constexpr (Cell::phases == 2)
      exchange_operand<Cell, Product, RN>(s, part, second, i, visit, own);
    visit = {step_at(seq, visit.now.t + (reverse ? 1 : -1)), visit.now};
  }
}

}  // namespace rnnkern

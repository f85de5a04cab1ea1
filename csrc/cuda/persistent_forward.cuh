// The forward pass in one launch; persistent.cuh says how.
//
// A step has an exchange for each stage, of the operand of its product: h, in two slots, of which a
// step reads the one and writes the other, and then q in a cell of two phases, or m before a
// projection, for which one will do: who writes the next q has waited for all that read this one.
#pragma once

#include "cuda/forward.cuh"
#include "cuda/persistent.cuh"

namespace rnnkern {

template <class Cell, bool projected>
struct ForwardShape {
  static constexpr int stages = kStages<Cell, projected>;
  template <int stage>
  static constexpr int gates =
      stage < Cell::phases ? phase_gates<Cell, (stage < Cell::phases ? stage : 0)> : 1;
  template <int stage>
  RNNKERN_HD static constexpr int64_t operand(const Widths& widths) {
    return stage == 0 ? widths.P : widths.H;
  }
};

// What a thread knows of its unit of RN rows. With a projection, h is exchange_projected's.
template <class Cell, class T, int RN, bool projected>
struct Owned {
  using V = Value<Accumulator<T>>;
  static constexpr int first_state = projected ? 1 : 0;
  ForwardUnit<Cell, V> unit[RN];
  V state[RN][Cell::states];  // before this step; h as the exchange has rounded it
  Bias<Cell, V> bias[Cell::phases];
  bool runs_now[RN], goes_on[RN];  // whether the row has this step, and the next one

  // From where forward_prepare, or the step before, left them.
  __device__ __forceinline__ void fetch_states(const ForwardCall<T>& s, const Tile& tile,
                                               int slot) {
    const int64_t u = tile.unit();
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      const int64_t at = tile.row(n) * s.p.H + u;
      if (u >= s.p.H || tile.row(n) >= s.p.seq.B) continue;
      if (!projected) state[n][0] = fetch(s.scratch[tile.d].h[slot] + at);
      if (Cell::states == 2) state[n][Cell::states - 1] = V(s.scratch[tile.d].c[at]);
    }
  }

  // x, and the gates of the phases before, as the data's type has rounded them.
  template <int phase>
  __device__ __forceinline__ void fetch_x(const ForwardProblem<T>& p, const Tile& tile,
                                          const Step& now, const Step& next) {
    const int64_t u = tile.unit();
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      const int64_t j = tile.row(n);
      runs_now[n] = u < p.H && runs(p.seq, now, j);
      goes_on[n] = runs(p.seq, next, j);
      if (runs_now[n])
        fetch_gates<Cell, phase>(p, tile.d, data_row(p.seq, p.x_rows, now, j), u, unit[n]);
    }
  }

  // The gate math; q, m or h goes to the others, c stays here unless `shares` the registers with
  // more rows.
  template <int phase>
  __device__ __forceinline__ void compute(const ForwardCall<T>& s, const Tile& tile,
                                          const Step& now, const Step& next, int slot, bool shares,
                                          const Accumulator<T> (&r)[phase_gates<Cell, phase>][RN]) {
    const int64_t u = tile.unit();
    const ForwardScratch<T>& scratch = s.scratch[tile.d];
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      if (!runs_now[n]) continue;
      const int64_t j = tile.row(n), at = j * s.p.H + u;
#pragma unroll
      for (int k = first_state; k < Cell::states; ++k) unit[n].prev[k] = state[n][k];
      activate<Cell, phase>(bias[phase], r, n, unit[n]);
      if (phase < Cell::phases - 1) put(scratch.operand + at, unit[n].q);
      if (projected) put(scratch.operand + at, unit[n].next[0]);
      if (phase < Cell::phases - 1 || !goes_on[n]) continue;
#pragma unroll
      for (int k = first_state; k < Cell::states; ++k)
        state[n][k] = state_before(s.p, tile.d, k, now, next, j, u, unit[n].next[k]);
      if (!projected) {
        put(scratch.h[slot ^ 1] + at, state[n][0]);
        state[n][0] = V(widen(narrow<T>(state[n][0].v)));
      }
      if (Cell::states == 2 && shares) scratch.c[at] = state[n][Cell::states - 1].v;
    }
  }

  // What nobody waits for.
  template <int phase>
  __device__ __forceinline__ void put_results(const ForwardProblem<T>& p, const Tile& tile,
                                              const Step& now) {
    const int64_t u = tile.unit();
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      if (!runs_now[n]) continue;
      const int64_t j = tile.row(n), row = data_row(p.seq, p.x_rows, now, j);
      keep_gates<Cell, phase>(p, tile.d, row, u, unit[n]);
      if (phase < Cell::phases - 1) continue;
      if (!projected && p.dir[tile.d].h_prev)
        put(p.dir[tile.d].h_prev + row * p.H + u, unit[n].prev[0]);
#pragma unroll
      for (int k = first_state; k < Cell::states; ++k)
        put_result(p, tile.d, k, now, goes_on[n], j, u, unit[n].next[k]);
    }
  }
};

// Phase `phase` of step i of a sequence.
template <class Cell, class Product, int RN, bool projected, int phase>
__device__ __forceinline__ void forward_exchange(
    const ForwardCall<typename Product::Data>& s, const Part& part,
    const Kept<typename Product::Data>& R, int64_t i, const Step& now, const Step& next,
    Owned<Cell, typename Product::Data, RN, projected>& own) {
  using T = typename Product::Data;
  const ForwardProblem<T>& p = s.p;
  const ForwardScratch<T>& scratch = s.scratch[part.first.d];
  const int slot = static_cast<int>(i % 2);
  const Operand<T> operand{phase == 0 ? scratch.h[slot] : scratch.operand, now.rows};
  const auto compute = [&](const Tile& tile) {
    if (part.shares) own.fetch_states(s, tile, slot);
    Accumulator<T> r[1][phase_gates<Cell, phase>][RN];
    Product::run(R, operand, tile.u0, tile.j0, r);
    own.template compute<phase>(s, tile, now, next, slot, part.shares, r[0]);
  };
  part.exchange(
      kStages<Cell, projected> * i + phase, now.rows,
      [&](const Tile& tile) { own.template fetch_x<phase>(p, tile, now, next); }, compute,
      [&](const Tile& tile) { own.template put_results<phase>(p, tile, now); });
}

// h = W_hr · m (Sak et al. 2014) of step i, for this block's units of P.
template <class Cell, class Product, int RN>
__device__ __forceinline__ void exchange_projected(const ForwardCall<typename Product::Data>& s,
                                                   const Part& part,
                                                   const Kept<typename Product::Data>& W_hr,
                                                   int64_t i, const Step& now, const Step& next) {
  using T = typename Product::Data;
  using V = Value<Accumulator<T>>;
  const ForwardProblem<T>& p = s.p;
  const int d = part.first.d, slot = static_cast<int>(i % 2);
  const ForwardScratch<T>& scratch = s.scratch[d];
  V h[RN];
  const auto each_row = [&](const Tile& tile, auto use) {
    const int64_t u = tile.unit();
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      const int64_t j = tile.row(n);
      if (u < p.P && runs(p.seq, now, j)) use(n, j, u, runs(p.seq, next, j));
    }
  };
  const auto compute = [&](const Tile& tile) {
    if (tile.u0 >= p.P) return;
    Accumulator<T> r[1][1][RN];
    Product::run(W_hr, Operand<T>{scratch.operand, now.rows}, tile.u0, tile.j0, r);
    each_row(tile, [&](int n, int64_t j, int64_t u, bool goes_on) {
      h[n] = V(r[0][0][n]);
      if (!goes_on) return;
      put(scratch.h[slot ^ 1] + j * p.P + u, state_before(p, d, 0, now, next, j, u, h[n]));
    });
  };
  const auto after = [&](const Tile& tile) {
    each_row(tile, [&](int n, int64_t j, int64_t u, bool goes_on) {
      keep_previous(s, d, slot, now, j, u);
      put_result(p, d, 0, now, goes_on, j, u, h[n]);
    });
  };
  part.exchange(kStages<Cell, true> * i + 1, now.rows, [](const Tile&) {}, compute, after);
}

template <class Cell, class Product, int RN, bool projected>
__global__ void __launch_bounds__(kThreads, kSequenceBlocks)
    forward_sequence(const ForwardCall<typename Product::Data> s) {
  using T = typename Product::Data;
  using Memory = BlockMemory<ForwardShape<Cell, projected>, Product, RN>;
  constexpr int last = Cell::phases - 1, g0 = Cell::first[last];
  const ForwardProblem<T>& p = s.p;
  const Part part = Part::of_block<RN>(p.seq, s.exchange);
  const Tile& first = part.first;
  const ForwardDirection<T>& io = p.dir[first.d];
  const Widths widths{p.H, p.P};
  Owned<Cell, T, RN, projected> own;
  const Kept<T> R = Memory::template keep<0>(io.R, p.H, widths, s.resident, first.u0);
  own.bias[0] = fetch_bias<Cell, 0>(p, first.d, first.unit());
  Kept<T> second{};
  if constexpr (projected)
    second = Memory::template keep<1>(io.W_hr, p.P, widths, s.resident, first.u0);
  if constexpr (last == 1) {
    second = Memory::template keep<1>(io.R + g0 * p.H * p.H, p.H, widths, s.resident, first.u0);
    own.bias[last] = fetch_bias<Cell, last>(p, first.d, first.unit());
  }
  if (!part.shares) own.fetch_states(s, first, 0);
  const int64_t way = io.reverse ? -1 : 1;
  Step next = step_at(p.seq, io.reverse ? p.seq.T - 1 : 0);
  for (int64_t i = 0; i < p.seq.T; ++i) {
    const Step now = next;
    next = step_at(p.seq, now.t + way);
    forward_exchange<Cell, Product, RN, projected, 0>(s, part, R, i, now, next, own);
    if constexpr (last == 1)
      forward_exchange<Cell, Product, RN, projected, last>(s, part, second, i, now, next, own);
    if constexpr (projected) exchange_projected<Cell, Product, RN>(s, part, second, i, now, next);
  }
}

}  // namespace rnnkern

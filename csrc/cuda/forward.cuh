// The forward pass: what every kernel of it does for one unit of one row, and the kernel of one
// step a launch: the recurrent product of a phase and the cell's gate math. c stays in the
// accumulation type; h is kept in the data's type, in two slots, of which a step reads the one and
// writes the other.
//
// Stages of a step: the phases of the cell, then the projection if there is one.
#pragma once

#include "cuda/steps.cuh"

namespace rnnkern {

template <class T>
struct ForwardScratch {
  T* h[2];            // [B,P] h' and the next h
  Accumulator<T>* c;  // [B,H]
  T* operand;         // [B,H] q of a two-phase cell, or m before the projection
};

// A whole call.
template <class T>
struct ForwardCall {
  ForwardProblem<T> p;
  ForwardScratch<T> scratch[kMaxDirections];
  Exchange exchange;
  PackedSteps packed;
  int64_t resident;  // bytes of R that a block of a persistent kernel keeps
};

// One step of it: the argument of the step-wise kernels.
template <class T>
struct ForwardStep : ForwardCall<T> {
  Step now[kMaxDirections], next[kMaxDirections];
  int64_t rows;  // the most that a direction runs
  int slot;      // where h' is
};

// The states before the first step, into the scratch; a row without steps goes to its final state.
// Final states of a row that an order leaves out, of which the host knows nothing, stay NaN.
// One thread an element of [D, B, max(P, H)].
template <class Cell, class T>
__global__ void forward_prepare(const ForwardCall<T> s) {
  const ForwardProblem<T>& p = s.p;
  const int64_t width = p.P > p.H ? p.P : p.H;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  nobody_arrived(s.exchange);
  if (index >= p.D * p.seq.B * width) return;
  const int64_t u = index % width, j = index / width % p.seq.B;
  const int d = static_cast<int>(index / width / p.seq.B);
  const ForwardDirection<T>& io = p.dir[d];
  const int64_t b = p.seq.batch_row(j);
  const bool has_steps = runs(p.seq, Step{0, p.seq.B, 0}, j);
  const bool reset = has_steps && !io.reverse && p.seq.reset_at(0, j);
  const T nan = narrow<T>(Accumulator<T>(NAN));
  for (int k = 0; k < Cell::states; ++k) {
    const int64_t state_width = k == 0 ? p.P : p.H;
    if (u >= state_width) continue;
    const T* from = reset ? io.reset[k] : io.initial[k];
    T value = from ? from[b * state_width + u] : narrow<T>(0);
    if (!valid_length(p.seq, j)) value = nan;
    if (p.seq.order) io.final[k][j * state_width + u] = nan;  // all its rows have steps
    if (!has_steps) {
      io.final[k][b * state_width + u] = value;
    } else if (k == 0) {
      s.scratch[d].h[0][j * p.P + u] = s.scratch[d].h[1][j * p.P + u] = value;
    } else {
      s.scratch[d].c[j * p.H + u] = widen(value);
    }
  }
}

// Hands out state k of row j after this step; `goes_on` if the row runs the next one.
template <class T>
__device__ __forceinline__ void put_result(const ForwardProblem<T>& p, int d, int k,
                                           const Step& now, bool goes_on, int64_t j, int64_t u,
                                           Value<Accumulator<T>> value) {
  const int64_t width = k == 0 ? p.P : p.H;
  if (k == 0) put(p.dir[d].y + data_row(p.seq, p.y_rows, now, j) * p.D * p.P + u, value);
  if (!goes_on) put(p.dir[d].final[k] + p.seq.batch_row(j) * width + u, value);
}

// What state k of row j, which is `value` after step `now`, is before step `next`, which it runs.
template <class T>
__device__ __forceinline__ Value<Accumulator<T>> state_before(const ForwardProblem<T>& p, int d,
                                                              int k, const Step& now,
                                                              const Step& next, int64_t j,
                                                              int64_t u,
                                                              Value<Accumulator<T>> value) {
  using V = Value<Accumulator<T>>;
  const int64_t boundary = now.t > next.t ? now.t : next.t;
  if (!p.seq.reset_at(boundary, j)) return value;
  if (!valid_length(p.seq, j)) return V(Accumulator<T>(NAN));
  const T* reset = p.dir[d].reset[k];
  return reset ? fetch(reset + p.seq.batch_row(j) * (k == 0 ? p.P : p.H) + u)
               : V(Accumulator<T>(0));
}

// Writes state k of row j after this step to wherever it is needed next.
template <class T>
__device__ void put_state(const ForwardStep<T>& s, int d, int k, int64_t j, int64_t u,
                          Value<Accumulator<T>> value) {
  const ForwardProblem<T>& p = s.p;
  const bool goes_on = runs(p.seq, s.next[d], j);
  put_result(p, d, k, s.now[d], goes_on, j, u, value);
  if (!goes_on) return;
  value = state_before(p, d, k, s.now[d], s.next[d], j, u, value);
  if (k == 0) {
    put(s.scratch[d].h[s.slot ^ 1] + j * p.P + u, value);
  } else {
    s.scratch[d].c[j * p.H + u] = value.v;
  }
}

// h' of this step, which training keeps; by the stage that makes h, so that the widths agree.
template <class T>
__device__ void keep_previous(const ForwardCall<T>& s, int d, int slot, const Step& now, int64_t j,
                              int64_t u) {
  const ForwardProblem<T>& p = s.p;
  if (p.dir[d].h_prev) {
    p.dir[d].h_prev[data_row(p.seq, p.x_rows, now, j) * p.P + u] =
        s.scratch[d].h[slot][j * p.P + u];
  }
}

// ---- one unit of one row, whose data row is `row` -----------------------------------------------
// x, and in place of it the activated gates of the phases before.
template <class Cell, int phase, class T>
__device__ __forceinline__ void fetch_gates(const ForwardProblem<T>& p, int d, int64_t row,
                                            int64_t u,
                                            ForwardUnit<Cell, Value<Accumulator<T>>>& unit) {
  constexpr int g1 = Cell::first[phase + 1];
  const T* x = p.dir[d].x + row * p.D * Cell::gates * p.H + u;
#pragma unroll
  for (int g = 0; g < g1; ++g) unit.gate[g] = fetch(x + g * p.H);
}

// The recurrent bias of one unit.
template <class Cell, class V>
struct Bias {
  bool there;
  V b[Cell::gates];
};
template <class Cell, int phase, class T>
__device__ __forceinline__ Bias<Cell, Value<Accumulator<T>>> fetch_bias(const ForwardProblem<T>& p,
                                                                        int d, int64_t u) {
  constexpr int g0 = Cell::first[phase], g1 = Cell::first[phase + 1];
  Bias<Cell, Value<Accumulator<T>>> bias{p.dir[d].b != nullptr, {}};
#pragma unroll
  for (int g = g0; g < g1; ++g) {
    if (bias.there && u < p.H) bias.b[g] = fetch(p.dir[d].b + g * p.H + u);
  }
  return bias;
}

// The gate math, from `unit`'s gates and states and the product's r of row n.
template <class Cell, int phase, class A, int NG, int RN>
__device__ __forceinline__ void activate(const Bias<Cell, Value<A>>& bias, const A (&r)[NG][RN],
                                         int n, ForwardUnit<Cell, Value<A>>& unit) {
  constexpr int g0 = Cell::first[phase], g1 = Cell::first[phase + 1];
#pragma unroll
  for (int g = g0; g < g1; ++g) {
    unit.r[g] = Value<A>(r[g - g0][n]);
    if (bias.there) unit.r[g] = unit.r[g] + bias.b[g];
  }
  Cell::template forward<phase>(unit);
}

// What a later phase, or backward, reads.
template <class Cell, int phase, class T>
__device__ __forceinline__ void keep_gates(const ForwardProblem<T>& p, int d, int64_t row,
                                           int64_t u,
                                           ForwardUnit<Cell, Value<Accumulator<T>>>& unit) {
  constexpr bool is_last = phase == Cell::phases - 1;
  constexpr int G = Cell::gates, K = Cell::saved;
  constexpr int g0 = Cell::first[phase], g1 = Cell::first[phase + 1];
  if (is_last && !p.training) return;
  T* x = p.dir[d].x + row * p.D * G * p.H + u;
#pragma unroll
  for (int g = g0; g < g1; ++g) put(x + g * p.H, unit.gate[g]);
  for (int k = 0; is_last && k < K; ++k)
    put(p.dir[d].saved + (row * K + k) * p.H + u, unit.saved[k]);
}

// ---- one step a launch --------------------------------------------------------------------------
// One row of one unit of a phase; r are the products of the unit's gates, for all RN rows.
template <class Cell, class T, bool projected, int phase, int NG, int RN>
__device__ __forceinline__ void forward_unit(const ForwardStep<T>& s, const Tile& tile, int64_t u,
                                             const Bias<Cell, Value<Accumulator<T>>>& bias,
                                             const Accumulator<T> (&r)[NG][RN], int n) {
  using V = Value<Accumulator<T>>;
  constexpr int S = Cell::states;
  const ForwardProblem<T>& p = s.p;
  const int d = tile.d;
  const ForwardScratch<T>& scratch = s.scratch[d];
  const int64_t j = tile.row(n);
  if (u >= p.H || !runs(p.seq, s.now[d], j)) return;
  const int64_t row = data_row(p.seq, p.x_rows, s.now[d], j);
  ForwardUnit<Cell, V> unit;
  fetch_gates<Cell, phase>(p, d, row, u, unit);
  if (!Cell::projects) unit.prev[0] = fetch(scratch.h[s.slot] + j * p.P + u);
  if (S == 2) unit.prev[S - 1] = V(scratch.c[j * p.H + u]);
  activate<Cell, phase>(bias, r, n, unit);
  keep_gates<Cell, phase>(p, d, row, u, unit);
  if constexpr (phase < Cell::phases - 1) {
    put(scratch.operand + j * p.H + u, unit.q);
  } else {
    if (S == 2) put_state(s, d, S - 1, j, u, unit.next[S - 1]);
    if constexpr (projected) {
      put(scratch.operand + j * p.H + u, unit.next[0]);
    } else {
      keep_previous(s, d, s.slot, s.now[d], j, u);
      put_state(s, d, 0, j, u, unit.next[0]);
    }
  }
}

template <class Cell, class Product, int NU, int RN, bool projected, int phase>
__device__ __forceinline__ void forward_phase(const ForwardStep<typename Product::Data>& s,
                                              const Tile& tile) {
  using T = typename Product::Data;
  const ForwardProblem<T>& p = s.p;
  const Step& now = s.now[tile.d];
  if (now.t < 0 || tile.j0 >= now.rows) return;
  const ForwardScratch<T>& scratch = s.scratch[tile.d];
  const int64_t width = phase == 0 ? p.P : p.H;
  Accumulator<T> r[NU][phase_gates<Cell, phase>][RN];
  Product::run(Weights<T>{p.dir[tile.d].R + Cell::first[phase] * p.H * p.P, p.H, width},
               Operand<T>{phase == 0 ? scratch.h[s.slot] : scratch.operand, now.rows}, tile.u0,
               tile.j0, r);
#pragma unroll
  for (int m = 0; m < NU; ++m) {
    const int64_t u = tile.unit(m);
    const auto bias = fetch_bias<Cell, phase>(p, tile.d, u);
#pragma unroll
    for (int n = 0; n < RN; ++n) forward_unit<Cell, T, projected, phase>(s, tile, u, bias, r[m], n);
  }
}

// h = W_hr · m (Sak et al. 2014).
template <class Product, int NU, int RN>
__device__ __forceinline__ void forward_project(const ForwardStep<typename Product::Data>& s,
                                                const Tile& tile) {
  using T = typename Product::Data;
  using A = Accumulator<T>;
  const ForwardProblem<T>& p = s.p;
  const int d = tile.d;
  if (s.now[d].t < 0 || tile.j0 >= s.now[d].rows) return;
  A h[NU][1][RN];
  Product::run(Weights<T>{p.dir[d].W_hr, p.P, p.H}, Operand<T>{s.scratch[d].operand, s.now[d].rows},
               tile.u0, tile.j0, h);
#pragma unroll
  for (int i = 0; i < NU * RN; ++i) {
    const int64_t u = tile.unit(i / RN), j = tile.row(i % RN);
    if (u >= p.P || !runs(p.seq, s.now[d], j)) continue;
    keep_previous(s, d, s.slot, s.now[d], j, u);
    put_state(s, d, 0, j, u, Value<A>(h[i / RN][0][i % RN]));
  }
}

// Whether a wide kernel has a stage of several tiles of units.
template <class Cell, bool projected>
constexpr bool kForwardWidens = projected || kUnitTiles<phase_gates<Cell, 0>, true> > 1 ||
                                kUnitTiles<phase_gates<Cell, Cell::phases - 1>, true> > 1;

template <class Cell, class Product, int RN, bool wide, bool projected>
__global__ void __launch_bounds__(kThreads, kStepBlocks<Product, kStages<Cell, projected>, wide>)
    forward_step(const ForwardStep<typename Product::Data> s) {
  constexpr int last = Cell::phases - 1;
  constexpr int first_tiles = kUnitTiles<phase_gates<Cell, 0>, wide>;
  constexpr int last_tiles = kUnitTiles<phase_gates<Cell, last>, wide>;
  const auto phase_0 = [&](const Tile& tile) {
    forward_phase<Cell, Product, first_tiles, RN, projected, 0>(s, tile);
  };
  if constexpr (kStages<Cell, projected> == 1) {
    only_stage<first_tiles, RN>(s.p.H, phase_0);
  } else {
    stage<first_tiles, RN>(s.p.H, s.rows, s.p.D, phase_0);
    if constexpr (last == 1) {
      next_stage();
      stage<last_tiles, RN>(s.p.H, s.rows, s.p.D, [&](const Tile& tile) {
        forward_phase<Cell, Product, last_tiles, RN, projected, last>(s, tile);
      });
    }
    if constexpr (projected) {
      constexpr int tiles = kUnitTiles<1, wide>;
      next_stage();
      stage<tiles, RN>(s.p.P, s.rows, s.p.D,
                       [&](const Tile& tile) { forward_project<Product, tiles, RN>(s, tile); });
    }
  }
}

}  // namespace rnnkern

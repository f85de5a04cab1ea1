// The forward pass, one step a launch: the recurrent product of a phase and the cell's gate math in
// one kernel. c stays in the accumulation type; h is kept in the data's type, in two slots, of
// which a step reads the one and writes the other.
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

// The argument of every kernel of this file.
template <class T>
struct ForwardStep {
  ForwardProblem<T> p;
  ForwardScratch<T> scratch[kMaxDirections];
  Step now[kMaxDirections], next[kMaxDirections];
  int64_t rows;  // the most that a direction runs
  int slot;      // where h' is
};

// The states before the first step, into the scratch; a row without steps goes to its final state.
// One thread an element of [D, B, max(P, H)].
template <class Cell, class T>
__global__ void forward_prepare(const ForwardStep<T> s) {
  const ForwardProblem<T>& p = s.p;
  const int64_t width = p.P > p.H ? p.P : p.H;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.D * p.seq.B * width) return;
  const int64_t u = index % width, j = index / width % p.seq.B;
  const int d = static_cast<int>(index / width / p.seq.B);
  const ForwardDirection<T>& io = p.dir[d];
  const int64_t b = p.seq.batch_row(j);
  const bool has_steps = runs(p.seq, Step{0, p.seq.B, 0}, j);
  const bool reset = has_steps && !io.reverse && p.seq.reset_at(0, j);
  for (int k = 0; k < Cell::states; ++k) {
    const int64_t state_width = k == 0 ? p.P : p.H;
    if (u >= state_width) continue;
    const T* from = reset ? io.reset[k] : io.initial[k];
    T value = from ? from[b * state_width + u] : narrow<T>(0);
    if (!valid_length(p.seq, j)) value = narrow<T>(Accumulator<T>(NAN));
    if (!has_steps) {
      io.final[k][b * state_width + u] = value;
    } else if (k == 0) {
      s.scratch[d].h[0][j * p.P + u] = s.scratch[d].h[1][j * p.P + u] = value;
    } else {
      s.scratch[d].c[j * p.H + u] = widen(value);
    }
  }
}

// Writes state k of row j after this step to wherever it is needed next.
template <class T>
__device__ void put_state(const ForwardStep<T>& s, int d, int k, int64_t j, int64_t u,
                          Value<Accumulator<T>> value) {
  const ForwardProblem<T>& p = s.p;
  using V = Value<Accumulator<T>>;
  const ForwardDirection<T>& io = p.dir[d];
  const int64_t width = k == 0 ? p.P : p.H, at = p.seq.batch_row(j) * width + u;
  if (k == 0) put(io.y + data_row(p.seq, p.y_rows, s.now[d], j) * p.D * p.P + u, value);
  if (!runs(p.seq, s.next[d], j)) return put(io.final[k] + at, value);
  const int64_t boundary = s.now[d].t > s.next[d].t ? s.now[d].t : s.next[d].t;
  if (p.seq.reset_at(boundary, j)) {
    value = io.reset[k] ? fetch(io.reset[k] + at) : V(Accumulator<T>(0));
    if (!valid_length(p.seq, j)) value = V(Accumulator<T>(NAN));
  }
  if (k == 0) {
    put(s.scratch[d].h[s.slot ^ 1] + j * width + u, value);
  } else {
    s.scratch[d].c[j * width + u] = value.v;
  }
}

// h' of this step, which training keeps; by the stage that makes h, so that the widths agree.
template <class T>
__device__ void keep_previous(const ForwardStep<T>& s, int d, int64_t j, int64_t u) {
  const ForwardProblem<T>& p = s.p;
  if (p.dir[d].h_prev) {
    p.dir[d].h_prev[data_row(p.seq, p.x_rows, s.now[d], j) * p.P + u] =
        s.scratch[d].h[s.slot][j * p.P + u];
  }
}

template <class Cell, class Product, int RN, bool projected, int phase>
__device__ __forceinline__ void forward_phase(const ForwardStep<typename Product::Data>& s,
                                              const Tile& tile) {
  using T = typename Product::Data;
  using A = Accumulator<T>;
  using V = Value<A>;
  constexpr int G = Cell::gates, S = Cell::states, K = Cell::saved;
  constexpr int g0 = Cell::first[phase], g1 = Cell::first[phase + 1];
  constexpr bool is_last = phase == Cell::phases - 1;
  const ForwardProblem<T>& p = s.p;
  const int d = tile.d;
  if (s.now[d].t < 0 || tile.j0 >= s.now[d].rows) return;
  const ForwardDirection<T>& io = p.dir[d];
  const ForwardScratch<T>& scratch = s.scratch[d];

  const int64_t width = phase == 0 ? p.P : p.H;
  A r[g1 - g0][RN];
  Product::run(Weights<T>{io.R + g0 * p.H * p.P, p.H, width},
               Operand<T>{phase == 0 ? scratch.h[s.slot] : scratch.operand, s.now[d].rows}, tile.u0,
               tile.j0, r);

  const int64_t u = tile.unit();
#pragma unroll
  for (int n = 0; n < RN; ++n) {
    const int64_t j = tile.row(n);
    if (u >= p.H || !runs(p.seq, s.now[d], j)) continue;
    const int64_t row = data_row(p.seq, p.x_rows, s.now[d], j);
    T* x = io.x + row * p.D * G * p.H + u;
    ForwardUnit<Cell, V> unit;
    for (int g = 0; g < g1; ++g) unit.gate[g] = fetch(x + g * p.H);
    for (int g = g0; g < g1; ++g) {
      unit.r[g] = V(r[g - g0][n]);
      if (io.b) unit.r[g] = unit.r[g] + fetch(io.b + g * p.H + u);
    }
    if (!Cell::projects) unit.prev[0] = fetch(scratch.h[s.slot] + j * p.P + u);
    if (S == 2) unit.prev[S - 1] = V(scratch.c[j * p.H + u]);
    Cell::template forward<phase>(unit);
    if (p.training || !is_last) {
      for (int g = g0; g < g1; ++g) put(x + g * p.H, unit.gate[g]);
    }
    if constexpr (!is_last) {
      put(scratch.operand + j * p.H + u, unit.q);
    } else {
      if (p.training) {
        for (int k = 0; k < K; ++k) put(io.saved + (row * K + k) * p.H + u, unit.saved[k]);
      }
      if (S == 2) put_state(s, d, S - 1, j, u, unit.next[S - 1]);
      if constexpr (projected) {
        put(scratch.operand + j * p.H + u, unit.next[0]);
      } else {
        keep_previous(s, d, j, u);
        put_state(s, d, 0, j, u, unit.next[0]);
      }
    }
  }
}

// h = W_hr · m (Sak et al. 2014).
template <class Product, int RN>
__device__ __forceinline__ void forward_project(const ForwardStep<typename Product::Data>& s,
                                                const Tile& tile) {
  using T = typename Product::Data;
  using A = Accumulator<T>;
  const ForwardProblem<T>& p = s.p;
  const int d = tile.d;
  if (s.now[d].t < 0 || tile.j0 >= s.now[d].rows) return;
  A h[1][RN];
  Product::run(Weights<T>{p.dir[d].W_hr, p.P, p.H}, Operand<T>{s.scratch[d].operand, s.now[d].rows},
               tile.u0, tile.j0, h);
  const int64_t u = tile.unit();
  for (int n = 0; n < RN; ++n) {
    const int64_t j = tile.row(n);
    if (u >= p.P || !runs(p.seq, s.now[d], j)) continue;
    keep_previous(s, d, j, u);
    put_state(s, d, 0, j, u, Value<A>(h[0][n]));
  }
}

template <class Cell, class Product, int RN, bool projected>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_step(const ForwardStep<typename Product::Data> s) {
  const auto phase_0 = [&](const Tile& tile) {
    forward_phase<Cell, Product, RN, projected, 0>(s, tile);
  };
  if constexpr (kStages<Cell, projected> == 1) {
    only_stage<RN>(s.p.H, phase_0);
  } else {
    stage<RN>(s.p.H, s.rows, s.p.D, phase_0);
    if constexpr (Cell::phases == 2) {
      next_stage();
      stage<RN>(s.p.H, s.rows, s.p.D,
                [&](const Tile& tile) { forward_phase<Cell, Product, RN, projected, 1>(s, tile); });
    }
    if constexpr (projected) {
      next_stage();
      stage<RN>(s.p.P, s.rows, s.p.D,
                [&](const Tile& tile) { forward_project<Product, RN>(s, tile); });
    }
  }
}

}  // namespace rnnkern

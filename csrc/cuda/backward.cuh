// The backward pass (backpropagation through time; Werbos 1990), one visit a launch.
//
// The visits go through the steps against forward's order. One visit: the product of the dr that
// the visit before left, dh' = Rᵀ dr, completes the gradient of the state between the two steps;
// that gradient enters this step, or leaves the recurrence where the state was a row's initial or
// reset state; dy is added; and the phases run in reverse. One visit more than there are steps
// hands out the gradients of the initial states. R is transposed once, so that the product is
// forward's. Gradients of states stay in the accumulation type; dr, the operand, is in the data's.
//
// Stages of a visit: the state's gradient and the last phase, between them the product that goes
// back through the projection if there is one; then the first phase of a cell of two.
#pragma once

#include "cuda/steps.cuh"

namespace rnnkern {

template <class T>
struct BackwardScratch {
  T* first;                   // [P, gates of phase 0, H] R transposed, the first phase's rows
  T* second;                  // [H, gates of phase 1, H]
  T* projection;              // [H,P]
  T* dr[2];                   // [B, gates of phase 0, H]
  T* dr_second;               // [B, gates of phase 1, H]
  T* dh_projected;            // [B,P] gradient of h, the operand of the projection's product
  Accumulator<T>* dh_direct;  // [B,H] gradient of h' that does not come through a product
  Accumulator<T>* dh;         // [B,H] gradient of h, for phase 0 of a two-phase cell
  Accumulator<T>* dc;         // [B,H]
};

// The argument of every kernel of this file.
template <class T>
struct BackwardStep {
  BackwardProblem<T, Accumulator<T>> p;
  BackwardScratch<T> scratch[kMaxDirections];
  Step now[kMaxDirections], before[kMaxDirections];  // this visit's step, and the visit before's
  int64_t rows;                                      // the most that a direction has in the two
  int slot;                                          // where the dr of the visit before is
};

// out[c, r] = in[r, c]; one thread an element.
template <class T>
__global__ void transpose(const T* in, T* out, int64_t rows, int64_t columns) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index < rows * columns) out[index] = in[index % rows * columns + index / rows];
}

// A row without steps hands its final state's gradient through. One thread an element of
// [D, B, max(P, H)].
template <class Cell, class T>
__global__ void backward_prepare(const BackwardStep<T> s) {
  const auto& p = s.p;
  const int64_t width = p.P > p.H ? p.P : p.H;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.D * p.seq.B * width) return;
  const int64_t u = index % width, j = index / width % p.seq.B;
  const auto& io = p.dir[index / width / p.seq.B];
  if (runs(p.seq, Step{0, p.seq.B, 0}, j)) return;
  for (int k = 0; k < Cell::states; ++k) {
    const int64_t state_width = k == 0 ? p.P : p.H, at = p.seq.batch_row(j) * state_width + u;
    if (u < state_width && io.dfinal[k]) io.dinitial[k][at] = io.dfinal[k][at];
  }
}

// Where the gradient of state k, before the step of the visit before, goes; returns what enters
// this visit's step.
template <class T>
__device__ Value<Accumulator<T>> flow(const BackwardStep<T>& s, int d, int k, int64_t j, int64_t u,
                                      Value<Accumulator<T>> value) {
  using V = Value<Accumulator<T>>;
  const auto& p = s.p;
  const auto& io = p.dir[d];
  const V zero(Accumulator<T>(0));
  const int64_t at = p.seq.batch_row(j) * (k == 0 ? p.P : p.H) + u;
  if (!runs(p.seq, s.before[d], j)) return io.dfinal[k] ? fetch(io.dfinal[k] + at) : zero;
  const bool row_begins = !runs(p.seq, s.now[d], j);  // the step before was its first in forward
  const int64_t later = s.now[d].t > s.before[d].t ? s.now[d].t : s.before[d].t;
  const int64_t boundary = row_begins ? 0 : later;
  if (!(row_begins && io.reverse) && p.seq.reset_at(boundary, j)) {
    if (io.dreset[k]) io.dreset[k][at] += value.v;
    return zero;
  }
  if (!row_begins) return value;
  put(io.dinitial[k] + at, value);
  return zero;
}

template <class Cell, class T>
__device__ Value<Accumulator<T>> flow_c(const BackwardStep<T>& s, int d, int64_t j, int64_t u) {
  using V = Value<Accumulator<T>>;
  if constexpr (Cell::states < 2) {
    return V(Accumulator<T>(0));
  } else {
    const bool came = runs(s.p.seq, s.before[d], j);
    const V dc(came ? s.scratch[d].dc[j * s.p.H + u] : Accumulator<T>(0));
    return flow(s, d, 1, j, u, dc);
  }
}

template <class T>
__device__ Value<Accumulator<T>> fetch_dy(const BackwardStep<T>& s, int d, int64_t j, int64_t u) {
  const auto& p = s.p;
  if (!p.dir[d].dy) return Value<Accumulator<T>>(Accumulator<T>(0));
  return fetch(p.dir[d].dy + data_row(p.seq, p.y_rows, s.now[d], j) * p.D * p.P + u);
}

template <class Cell, class T>
__device__ BackwardUnit<Cell, Value<Accumulator<T>>> fetch_unit(const BackwardStep<T>& s, int d,
                                                                int64_t j, int64_t u) {
  const auto& p = s.p;
  const auto& io = p.dir[d];
  const int64_t row = data_row(p.seq, p.x_rows, s.now[d], j);
  BackwardUnit<Cell, Value<Accumulator<T>>> unit;
  for (int g = 0; g < Cell::gates; ++g)
    unit.gate[g] = fetch(io.gates + (row * p.D * Cell::gates + g) * p.H + u);
  for (int k = 0; k < Cell::saved; ++k)
    unit.saved[k] = fetch(io.saved + (row * Cell::saved + k) * p.H + u);
  if (!Cell::projects) unit.h_prev = fetch(io.h_prev + row * p.P + u);
  return unit;
}

template <class Cell, bool projected, int phase, class T>
__device__ void put_gradients(const BackwardStep<T>& s, int d, int64_t j, int64_t u,
                              const BackwardUnit<Cell, Value<Accumulator<T>>>& unit) {
  constexpr int g0 = Cell::first[phase], g1 = Cell::first[phase + 1];
  const auto& p = s.p;
  const BackwardScratch<T>& scratch = s.scratch[d];
  T* dx = p.dir[d].dx + data_row(p.seq, p.x_rows, s.now[d], j) * Cell::gates * p.H + u;
  T* dr = (phase == 0 ? scratch.dr[s.slot ^ 1] : scratch.dr_second) + j * (g1 - g0) * p.H + u;
  for (int g = g0; g < g1; ++g) {
    put(dx + g * p.H, unit.dx[g]);
    put(dr + (g - g0) * p.H, unit.dr[g]);
  }
  if (!projected) scratch.dh_direct[j * p.H + u] = unit.dprev[0].v;
  if (Cell::states == 2) scratch.dc[j * p.H + u] = unit.dprev[Cell::states - 1].v;
}

template <class Cell, bool projected, class T>
__device__ void last_phase(const BackwardStep<T>& s, int d, int64_t j, int64_t u,
                           Value<Accumulator<T>> dh, Value<Accumulator<T>> dc) {
  const auto& p = s.p;
  BackwardUnit<Cell, Value<Accumulator<T>>> unit = fetch_unit<Cell>(s, d, j, u);
  unit.dnext[0] = dh;
  if (Cell::states == 2) unit.dnext[Cell::states - 1] = dc;
  Cell::template backward<Cell::phases - 1>(unit);
  if (Cell::extra != Extra::none && p.dir[d].extra)
    put(p.dir[d].extra + data_row(p.seq, p.x_rows, s.now[d], j) * p.H + u, unit.extra);
  if (Cell::phases == 2) s.scratch[d].dh[j * p.H + u] = dh.v;
  put_gradients<Cell, projected, Cell::phases - 1>(s, d, j, u, unit);
}

// The product with the dr of the visit before, for rows [j0, j0 + 8·RN) of both steps.
template <class Cell, class Product, int RN>
__device__ void previous_state(const BackwardStep<typename Product::Data>& s, const Tile& tile,
                               Accumulator<typename Product::Data> (&dh)[1][RN]) {
  using T = typename Product::Data;
  for (int n = 0; n < RN; ++n) dh[0][n] = 0;
  if (s.before[tile.d].t < 0) return;
  const BackwardScratch<T>& scratch = s.scratch[tile.d];
  Product::run(Weights<T>{scratch.first, s.p.P, phase_gates<Cell, 0> * s.p.H},
               Operand<T>{scratch.dr[s.slot], s.before[tile.d].rows}, tile.u0, tile.j0, dh);
}

// Without a projection: the gradient of the state, and this step's last phase.
template <class Cell, class Product, int RN>
__device__ __forceinline__ void backward_enter(const BackwardStep<typename Product::Data>& s,
                                               const Tile& tile) {
  using T = typename Product::Data;
  using V = Value<Accumulator<T>>;
  const Sequence& seq = s.p.seq;
  const int d = tile.d;
  Accumulator<T> product[1][RN];
  previous_state<Cell, Product>(s, tile, product);
  const int64_t u = tile.unit();
#pragma unroll
  for (int n = 0; n < RN; ++n) {
    const int64_t j = tile.row(n);
    const bool now = runs(seq, s.now[d], j), before = runs(seq, s.before[d], j);
    if (u >= s.p.H || !(now || before)) continue;
    V dh(product[0][n]);
    if (before) dh = dh + V(s.scratch[d].dh_direct[j * s.p.H + u]);
    dh = flow(s, d, 0, j, u, dh);
    const V dc = flow_c<Cell>(s, d, j, u);
    if (now) last_phase<Cell, false>(s, d, j, u, dh + fetch_dy(s, d, j, u), dc);
  }
}

// With one: the whole gradient of h, before the product that takes it through the projection.
template <class Cell, class Product, int RN>
__device__ __forceinline__ void backward_enter_projected(
    const BackwardStep<typename Product::Data>& s, const Tile& tile) {
  using T = typename Product::Data;
  using V = Value<Accumulator<T>>;
  const auto& p = s.p;
  const int d = tile.d;
  Accumulator<T> product[1][RN];
  previous_state<Cell, Product>(s, tile, product);
  const int64_t u = tile.unit();
  for (int n = 0; n < RN; ++n) {
    const int64_t j = tile.row(n);
    const bool now = runs(p.seq, s.now[d], j), before = runs(p.seq, s.before[d], j);
    if (u >= p.P || !(now || before)) continue;
    V dh = flow(s, d, 0, j, u, V(product[0][n]));
    if (!now) continue;
    dh = dh + fetch_dy(s, d, j, u);
    put(s.scratch[d].dh_projected + j * p.P + u, dh);
    put(p.dir[d].dh + data_row(p.seq, p.x_rows, s.now[d], j) * p.P + u, dh);
  }
}

// dm = W_hrᵀ · dh, and the last phase.
template <class Cell, class Product, int RN>
__device__ __forceinline__ void backward_unproject(const BackwardStep<typename Product::Data>& s,
                                                   const Tile& tile) {
  using T = typename Product::Data;
  using V = Value<Accumulator<T>>;
  const auto& p = s.p;
  const int d = tile.d;
  const int64_t rows = s.now[d].t < 0 ? 0 : s.now[d].rows;
  Accumulator<T> dm[1][RN];
  Product::run(Weights<T>{s.scratch[d].projection, p.H, p.P},
               Operand<T>{s.scratch[d].dh_projected, rows}, tile.u0, tile.j0, dm);
  const int64_t u = tile.unit();
  for (int n = 0; n < RN; ++n) {
    const int64_t j = tile.row(n);
    const bool now = runs(p.seq, s.now[d], j), before = runs(p.seq, s.before[d], j);
    if (u >= p.H || !(now || before)) continue;
    const V dc = flow_c<Cell>(s, d, j, u);
    if (now) last_phase<Cell, true>(s, d, j, u, V(dm[0][n]), dc);
  }
}

// Phase 0 of a two-phase cell.
template <class Cell, class Product, int RN, bool projected>
__device__ __forceinline__ void backward_first_phase(const BackwardStep<typename Product::Data>& s,
                                                     const Tile& tile) {
  using T = typename Product::Data;
  using V = Value<Accumulator<T>>;
  const auto& p = s.p;
  const int d = tile.d;
  if (s.now[d].t < 0 || tile.j0 >= s.now[d].rows) return;
  const BackwardScratch<T>& scratch = s.scratch[d];
  Accumulator<T> dq[1][RN];
  Product::run(Weights<T>{scratch.second, p.H, phase_gates<Cell, Cell::phases - 1> * p.H},
               Operand<T>{scratch.dr_second, s.now[d].rows}, tile.u0, tile.j0, dq);
  const int64_t u = tile.unit();
  for (int n = 0; n < RN; ++n) {
    const int64_t j = tile.row(n);
    if (u >= p.H || !runs(p.seq, s.now[d], j)) continue;
    BackwardUnit<Cell, V> unit = fetch_unit<Cell>(s, d, j, u);
    unit.dnext[0] = V(scratch.dh[j * p.H + u]);
    unit.dprev[0] = V(projected ? Accumulator<T>(0) : scratch.dh_direct[j * p.H + u]);
    if (Cell::states == 2) unit.dprev[Cell::states - 1] = V(scratch.dc[j * p.H + u]);
    unit.dq = V(dq[0][n]);
    Cell::template backward<0>(unit);
    put_gradients<Cell, projected, 0>(s, d, j, u, unit);
  }
}

template <class Cell, class Product, int RN, bool projected>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_step(const BackwardStep<typename Product::Data> s) {
  const auto& p = s.p;
  const auto enter = [&](const Tile& tile) { backward_enter<Cell, Product, RN>(s, tile); };
  if constexpr (kStages<Cell, projected> == 1) {
    only_stage<RN>(p.H, enter);
  } else {
    if constexpr (projected) {
      stage<RN>(p.P, s.rows, p.D,
                [&](const Tile& tile) { backward_enter_projected<Cell, Product, RN>(s, tile); });
      next_stage();
      stage<RN>(p.H, s.rows, p.D,
                [&](const Tile& tile) { backward_unproject<Cell, Product, RN>(s, tile); });
    } else {
      stage<RN>(p.H, s.rows, p.D, enter);
    }
    if constexpr (Cell::phases == 2) {
      next_stage();
      stage<RN>(p.H, s.rows, p.D, [&](const Tile& tile) {
        backward_first_phase<Cell, Product, RN, projected>(s, tile);
      });
    }
  }
}

}  // namespace rnnkern

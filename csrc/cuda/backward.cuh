// The backward pass (backpropagation through time; Werbos 1990): what every kernel of it does for
// one unit of one row, and the kernel of one visit a launch.
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

// A whole call.
template <class T>
struct BackwardCall {
  BackwardProblem<T, Accumulator<T>> p;
  BackwardScratch<T> scratch[kMaxDirections];
  Exchange exchange;
  PackedSteps packed;
  int64_t resident;  // bytes of R that a block of a persistent kernel keeps
};

// The steps of this visit and of the one before, of one direction.
struct Visit {
  Step now, before;

  RNNKERN_HD int64_t rows() const { return now.rows > before.rows ? now.rows : before.rows; }
};

// One visit of a call: the argument of the step-wise kernels.
template <class T>
struct BackwardStep : BackwardCall<T> {
  Visit visit[kMaxDirections];
  int64_t rows;  // the most that a direction has
  int slot;      // where the dr of the visit before is
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
__global__ void backward_prepare(const BackwardCall<T> s) {
  const auto& p = s.p;
  const int64_t width = p.P > p.H ? p.P : p.H;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  nobody_arrived(s.exchange);
  if (index >= p.D * p.seq.B * width) return;
  const int64_t u = index % width, j = index / width % p.seq.B;
  const auto& io = p.dir[index / width / p.seq.B];
  if (runs(p.seq, Step{0, p.seq.B, 0}, j)) return;
  for (int k = 0; k < Cell::states; ++k) {
    const int64_t state_width = k == 0 ? p.P : p.H, at = p.seq.batch_row(j) * state_width + u;
    if (u < state_width && io.dfinal[k]) io.dinitial[k][at] = io.dfinal[k][at];
  }
}

// ---- one unit of one row, whose data row is `row` -----------------------------------------------
// Whether a row runs the steps of a visit.
struct Runs {
  bool now, before;

  __device__ static Runs of(const Sequence& seq, const Visit& visit, int64_t j) {
    return {runs(seq, visit.now, j), runs(seq, visit.before, j)};
  }
};

// Where the gradient of state k, before the step of the visit before, goes; returns what enters
// this visit's step.
template <class T>
__device__ Value<Accumulator<T>> flow(const BackwardProblem<T, Accumulator<T>>& p, int d, int k,
                                      const Visit& visit, Runs in, int64_t j, int64_t u,
                                      Value<Accumulator<T>> value) {
  using V = Value<Accumulator<T>>;
  const auto& io = p.dir[d];
  const V zero(Accumulator<T>(0));
  const int64_t at = p.seq.batch_row(j) * (k == 0 ? p.P : p.H) + u;
  if (!in.before) return io.dfinal[k] ? fetch(io.dfinal[k] + at) : zero;
  const bool row_begins = !in.now;  // the step before was its first in forward
  const int64_t later = visit.now.t > visit.before.t ? visit.now.t : visit.before.t;
  const int64_t boundary = row_begins ? 0 : later;
  if (!(row_begins && io.reverse) && p.seq.reset_at(boundary, j)) {
    if (io.dreset[k]) io.dreset[k][at] += value.v;
    return zero;
  }
  if (!row_begins) return value;
  put(io.dinitial[k] + at, value);
  return zero;
}

// Without a projection: the gradients of the states after this visit's step, but for dy, from the
// product and from what the visit before left in dprev.
template <class Cell, class T>
__device__ __forceinline__ void enter_step(const BackwardProblem<T, Accumulator<T>>& p, int d,
                                           const Visit& visit, Runs in, int64_t j, int64_t u,
                                           Value<Accumulator<T>> dh,
                                           BackwardUnit<Cell, Value<Accumulator<T>>>& unit) {
  constexpr int c = Cell::states - 1;
  if (h_enters_gates<Cell> && in.before) dh = dh + unit.dprev[0];
  unit.dnext[0] = flow(p, d, 0, visit, in, j, u, dh);
  if (c == 1) unit.dnext[c] = flow(p, d, c, visit, in, j, u, unit.dprev[c]);
}

template <class T>
__device__ __forceinline__ Value<Accumulator<T>> fetch_dy(
    const BackwardProblem<T, Accumulator<T>>& p, int d, const Step& now, int64_t j, int64_t u) {
  if (!p.dir[d].dy) return Value<Accumulator<T>>(Accumulator<T>(0));
  return fetch(p.dir[d].dy + data_row(p.seq, p.y_rows, now, j) * p.D * p.P + u);
}

// What forward kept.
template <class Cell, class T>
__device__ __forceinline__ void fetch_unit(const BackwardProblem<T, Accumulator<T>>& p, int d,
                                           int64_t row, int64_t u,
                                           BackwardUnit<Cell, Value<Accumulator<T>>>& unit) {
  const auto& io = p.dir[d];
#pragma unroll
  for (int g = 0; g < Cell::gates; ++g)
    unit.gate[g] = fetch(io.gates + (row * p.D * Cell::gates + g) * p.H + u);
#pragma unroll
  for (int k = 0; k < Cell::saved; ++k)
    unit.saved[k] = fetch(io.saved + (row * Cell::saved + k) * p.H + u);
  if (h_enters_gates<Cell>) unit.h_prev = fetch(io.h_prev + row * p.P + u);
}

// The gradients of h' and c' that come through no product, between two visits in the workspace.
template <class Cell, class T>
__device__ __forceinline__ void fetch_direct(const BackwardScratch<T>& scratch, int64_t at,
                                             BackwardUnit<Cell, Value<Accumulator<T>>>& unit) {
  using V = Value<Accumulator<T>>;
  constexpr int c = Cell::states - 1;
  if (h_enters_gates<Cell>) unit.dprev[0] = V(scratch.dh_direct[at]);
  if (c == 1) unit.dprev[c] = V(scratch.dc[at]);
}
template <class Cell, class T>
__device__ __forceinline__ void put_direct(const BackwardScratch<T>& scratch, int64_t at,
                                           const BackwardUnit<Cell, Value<Accumulator<T>>>& unit) {
  constexpr int c = Cell::states - 1;
  if (h_enters_gates<Cell>) scratch.dh_direct[at] = unit.dprev[0].v;
  if (c == 1) scratch.dc[at] = unit.dprev[c].v;
}

// The operand of the next product; dr is [B, gates of the phase, H].
template <class Cell, int phase, class T>
__device__ __forceinline__ void put_dr(T* dr, int64_t H, int64_t j, int64_t u,
                                       const BackwardUnit<Cell, Value<Accumulator<T>>>& unit) {
  constexpr int g0 = Cell::first[phase];
#pragma unroll
  for (int g = 0; g < phase_gates<Cell, phase>; ++g)
    put(dr + (j * phase_gates<Cell, phase> + g) * H + u, unit.dr[g0 + g]);
}

// What the GEMMs after this pass read.
template <class Cell, int phase, class T>
__device__ __forceinline__ void put_dx(const BackwardProblem<T, Accumulator<T>>& p, int d,
                                       int64_t row, int64_t u,
                                       const BackwardUnit<Cell, Value<Accumulator<T>>>& unit) {
  constexpr int g0 = Cell::first[phase], g1 = Cell::first[phase + 1];
  T* dx = p.dir[d].dx + row * Cell::gates * p.H + u;
#pragma unroll
  for (int g = g0; g < g1; ++g) put(dx + g * p.H, unit.dx[g]);
  if (phase == Cell::phases - 1 && Cell::extra != Extra::none && p.dir[d].extra)
    put(p.dir[d].extra + row * p.H + u, unit.extra);
}

// ---- one visit a launch -------------------------------------------------------------------------
// What the gate math of a phase has made, to wherever it is needed next.
template <class Cell, bool projected, int phase, class T>
__device__ void put_gradients(const BackwardStep<T>& s, int d, int64_t j, int64_t u,
                              const BackwardUnit<Cell, Value<Accumulator<T>>>& unit) {
  const auto& p = s.p;
  const BackwardScratch<T>& scratch = s.scratch[d];
  put_dx<Cell, phase>(p, d, data_row(p.seq, p.x_rows, s.visit[d].now, j), u, unit);
  put_dr<Cell, phase>(phase == 0 ? scratch.dr[s.slot ^ 1] : scratch.dr_second, p.H, j, u, unit);
  put_direct<Cell>(scratch, j * p.H + u, unit);
}

// From dnext on.
template <class Cell, bool projected, class T>
__device__ void last_phase(const BackwardStep<T>& s, int d, int64_t j, int64_t u,
                           BackwardUnit<Cell, Value<Accumulator<T>>>& unit) {
  const auto& p = s.p;
  fetch_unit<Cell>(p, d, data_row(p.seq, p.x_rows, s.visit[d].now, j), u, unit);
  Cell::template backward<Cell::phases - 1>(unit);
  if (Cell::phases == 2) s.scratch[d].dh[j * p.H + u] = unit.dnext[0].v;
  put_gradients<Cell, projected, Cell::phases - 1>(s, d, j, u, unit);
}

// use(u, j, product, in) for each unit of `units` and each row of a tile that runs now or ran
// before, with its product.
template <class T, int NU, int RN, class Use>
__device__ __forceinline__ void each_unit(const BackwardStep<T>& s, const Tile& tile, int64_t units,
                                          const Accumulator<T> (&product)[NU][1][RN], Use use) {
#pragma unroll
  for (int i = 0; i < NU * RN; ++i) {
    const int64_t u = tile.unit(i / RN), j = tile.row(i % RN);
    const Runs in = Runs::of(s.p.seq, s.visit[tile.d], j);
    if (u < units && (in.now || in.before))
      use(u, j, Value<Accumulator<T>>(product[i / RN][0][i % RN]), in);
  }
}

// The product with the dr of the visit before, for rows [j0, j0 + 8·RN) of both steps.
template <class Cell, class Product, int NU, int RN>
__device__ void previous_state(const BackwardStep<typename Product::Data>& s, const Tile& tile,
                               Accumulator<typename Product::Data> (&dh)[NU][1][RN]) {
  using T = typename Product::Data;
#pragma unroll
  for (int i = 0; i < NU * RN; ++i) dh[i / RN][0][i % RN] = 0;
  if (s.visit[tile.d].before.t < 0) return;
  const BackwardScratch<T>& scratch = s.scratch[tile.d];
  Product::run(Weights<T>{scratch.first, s.p.P, phase_gates<Cell, 0> * s.p.H},
               Operand<T>{scratch.dr[s.slot], s.visit[tile.d].before.rows}, tile.u0, tile.j0, dh);
}

// Without a projection: the gradient of the state, and this step's last phase.
template <class Cell, class Product, int NU, int RN>
__device__ __forceinline__ void backward_enter(const BackwardStep<typename Product::Data>& s,
                                               const Tile& tile) {
  using T = typename Product::Data;
  using V = Value<Accumulator<T>>;
  const auto& p = s.p;
  const int d = tile.d;
  Accumulator<T> product[NU][1][RN];
  previous_state<Cell, Product>(s, tile, product);
  each_unit(s, tile, p.H, product, [&](int64_t u, int64_t j, V dh, Runs in) {
    BackwardUnit<Cell, V> unit{};
    if (in.before) fetch_direct<Cell>(s.scratch[d], j * p.H + u, unit);
    enter_step(p, d, s.visit[d], in, j, u, dh, unit);
    if (!in.now) return;
    unit.dnext[0] = unit.dnext[0] + fetch_dy(p, d, s.visit[d].now, j, u);
    last_phase<Cell, false>(s, d, j, u, unit);
  });
}

// With one: the whole gradient of h, before the product that takes it through the projection.
template <class Cell, class Product, int NU, int RN>
__device__ __forceinline__ void backward_enter_projected(
    const BackwardStep<typename Product::Data>& s, const Tile& tile) {
  using T = typename Product::Data;
  using V = Value<Accumulator<T>>;
  const auto& p = s.p;
  const int d = tile.d;
  Accumulator<T> product[NU][1][RN];
  previous_state<Cell, Product>(s, tile, product);
  each_unit(s, tile, p.P, product, [&](int64_t u, int64_t j, V dh, Runs in) {
    dh = flow(p, d, 0, s.visit[d], in, j, u, dh);
    if (!in.now) return;
    dh = dh + fetch_dy(p, d, s.visit[d].now, j, u);
    put(s.scratch[d].dh_projected + j * p.P + u, dh);
    put(p.dir[d].dh + data_row(p.seq, p.x_rows, s.visit[d].now, j) * p.P + u, dh);
  });
}

// dm = W_hrᵀ · dh, and the last phase.
template <class Cell, class Product, int NU, int RN>
__device__ __forceinline__ void backward_unproject(const BackwardStep<typename Product::Data>& s,
                                                   const Tile& tile) {
  using T = typename Product::Data;
  using V = Value<Accumulator<T>>;
  const auto& p = s.p;
  const int d = tile.d;
  constexpr int c = Cell::states - 1;
  const int64_t rows = s.visit[d].now.rows;
  Accumulator<T> product[NU][1][RN];
  Product::run(Weights<T>{s.scratch[d].projection, p.H, p.P},
               Operand<T>{s.scratch[d].dh_projected, rows}, tile.u0, tile.j0, product);
  each_unit(s, tile, p.H, product, [&](int64_t u, int64_t j, V dm, Runs in) {
    BackwardUnit<Cell, V> unit{};
    if (in.before) fetch_direct<Cell>(s.scratch[d], j * p.H + u, unit);
    unit.dnext[0] = dm;
    if (c == 1) unit.dnext[c] = flow(p, d, c, s.visit[d], in, j, u, unit.dprev[c]);
    if (in.now) last_phase<Cell, true>(s, d, j, u, unit);
  });
}

// Phase 0 of a two-phase cell.
template <class Cell, class Product, int NU, int RN, bool projected>
__device__ __forceinline__ void backward_first_phase(const BackwardStep<typename Product::Data>& s,
                                                     const Tile& tile) {
  using T = typename Product::Data;
  using V = Value<Accumulator<T>>;
  const auto& p = s.p;
  const int d = tile.d;
  const Step& now = s.visit[d].now;
  if (tile.j0 >= now.rows) return;
  const BackwardScratch<T>& scratch = s.scratch[d];
  Accumulator<T> product[NU][1][RN];
  Product::run(Weights<T>{scratch.second, p.H, phase_gates<Cell, Cell::phases - 1> * p.H},
               Operand<T>{scratch.dr_second, now.rows}, tile.u0, tile.j0, product);
  each_unit(s, tile, p.H, product, [&](int64_t u, int64_t j, V dq, Runs in) {
    if (!in.now) return;
    BackwardUnit<Cell, V> unit;
    fetch_unit<Cell>(p, d, data_row(p.seq, p.x_rows, now, j), u, unit);
    fetch_direct<Cell>(scratch, j * p.H + u, unit);
    unit.dnext[0] = V(scratch.dh[j * p.H + u]);
    unit.dq = dq;
    Cell::template backward<0>(unit);
    put_gradients<Cell, projected, 0>(s, d, j, u, unit);
  });
}

// As kStepBlocks; where a wide kernel would spill with three, two.
template <class Product, int stages, bool wide>
constexpr int kBackwardBlocks =
    wide && kNeedsMoreRegisters ? 2 : kStepBlocks<Product, stages, wide>;

template <class Cell, class Product, int RN, bool wide, bool projected>
__global__ void __launch_bounds__(kThreads,
                                  kBackwardBlocks<Product, kStages<Cell, projected>, wide>)
    backward_step(const BackwardStep<typename Product::Data> s) {
  constexpr int NU = kUnitTiles<1, wide>;
  const auto& p = s.p;
  const auto enter = [&](const Tile& tile) { backward_enter<Cell, Product, NU, RN>(s, tile); };
  if constexpr (kStages<Cell, projected> == 1) {
    only_stage<NU, RN>(p.H, enter);
  } else {
    if constexpr (projected) {
      stage<NU, RN>(p.P, s.rows, p.D, [&](const Tile& tile) {
        backward_enter_projected<Cell, Product, NU, RN>(s, tile);
      });
      next_stage();
      stage<NU, RN>(p.H, s.rows, p.D,
                    [&](const Tile& tile) { backward_unproject<Cell, Product, NU, RN>(s, tile); });
    } else {
      stage<NU, RN>(p.H, s.rows, p.D, enter);
    }
    if constexpr (Cell::phases == 2) {
      next_stage();
      stage<NU, RN>(p.H, s.rows, p.D, [&](const Tile& tile) {
        backward_first_phase<Cell, Product, NU, RN, projected>(s, tile);
      });
    }
  }
}

}  // namespace rnnkern

// The forward pass in one launch, for cells of one phase without a projection; persistent.cuh says
// how. The blocks exchange h, the product's operand: a step reads one slot and writes the other.
#pragma once

#include "cuda/forward.cuh"
#include "cuda/persistent.cuh"

namespace rnnkern {

// What a thread knows of its unit of RN rows.
template <class Cell, class T, int RN>
struct Owned {
  using V = Value<Accumulator<T>>;
  ForwardUnit<Cell, V> unit[RN];
  V state[RN][Cell::states];  // before this step; h as the exchange has rounded it
  Bias<Cell, V> bias;
  bool runs_now[RN], goes_on[RN];  // whether the row has this step, and the next one

  // From where forward_prepare, or the step before, left them.
  __device__ __forceinline__ void fetch_states(const ForwardCall<T>& s, const Tile& tile,
                                               int slot) {
    const int64_t u = tile.unit();
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      const int64_t at = tile.row(n) * s.p.H + u;
      if (u >= s.p.H || tile.row(n) >= s.p.seq.B) continue;
      state[n][0] = fetch(s.scratch[tile.d].h[slot] + at);
      if (Cell::states == 2) state[n][Cell::states - 1] = V(s.scratch[tile.d].c[at]);
    }
  }

  __device__ __forceinline__ void fetch_x(const ForwardProblem<T>& p, const Tile& tile,
                                          const Step& now, const Step& next) {
    const int64_t u = tile.unit();
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      const int64_t j = tile.row(n);
      runs_now[n] = u < p.H && runs(p.seq, now, j);
      goes_on[n] = runs(p.seq, next, j);
      if (runs_now[n])
        fetch_gates<Cell, 0>(p, tile.d, data_row(p.seq, p.x_rows, now, j), u, unit[n]);
    }
  }

  // The gate math; h goes to the others, c stays here unless `shares` the registers with more rows.
  __device__ __forceinline__ void step(const ForwardCall<T>& s, const Tile& tile, const Step& now,
                                       const Step& next, int slot, bool shares,
                                       const Accumulator<T> (&r)[Cell::gates][RN]) {
    const int64_t u = tile.unit();
    const ForwardScratch<T>& scratch = s.scratch[tile.d];
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      if (!runs_now[n]) continue;
      const int64_t j = tile.row(n), at = j * s.p.H + u;
#pragma unroll
      for (int k = 0; k < Cell::states; ++k) unit[n].prev[k] = state[n][k];
      activate<Cell, 0>(bias, r, n, unit[n]);
      if (!goes_on[n]) continue;
#pragma unroll
      for (int k = 0; k < Cell::states; ++k)
        state[n][k] = state_before(s.p, tile.d, k, now, next, j, u, unit[n].next[k]);
      T* h = scratch.h[slot ^ 1] + at;
      put(h, state[n][0]);
      state[n][0] = V(widen(narrow<T>(state[n][0].v)));
      if (Cell::states == 2 && shares) scratch.c[at] = state[n][Cell::states - 1].v;
    }
  }

  // What nobody waits for.
  __device__ __forceinline__ void put_results(const ForwardProblem<T>& p, const Tile& tile,
                                              const Step& now) {
    const int64_t u = tile.unit();
#pragma unroll
    for (int n = 0; n < RN; ++n) {
      if (!runs_now[n]) continue;
      const int64_t j = tile.row(n), row = data_row(p.seq, p.x_rows, now, j);
      keep_gates<Cell, 0>(p, tile.d, row, u, unit[n]);
      if (p.dir[tile.d].h_prev) put(p.dir[tile.d].h_prev + row * p.H + u, unit[n].prev[0]);
#pragma unroll
      for (int k = 0; k < Cell::states; ++k)
        put_result(p, tile.d, k, now, goes_on[n], j, u, unit[n].next[k]);
    }
  }
};

template <class Cell, class Product, int RN>
__global__ void __launch_bounds__(kThreads, kSequenceBlocks)
    forward_sequence(const ForwardCall<typename Product::Data> s) {
  using T = typename Product::Data;
  const ForwardProblem<T>& p = s.p;
  const Part part = Part::of_block<RN>(p.seq, s.exchange);
  const int d = part.first.d;
  const Kept R{block_memory() + Product::template work<Cell::gates, RN>(), p.H};
  Product::template keep<Cell::gates>(Weights<T>{p.dir[d].R, p.H, p.H}, part.first.u0, R.data);

  Owned<Cell, T, RN> own;
  own.bias = fetch_bias<Cell, 0>(p, d, part.first.unit());
  if (!part.shares) own.fetch_states(s, part.first, 0);
  const int64_t way = p.dir[d].reverse ? -1 : 1;
  Step next = step_at(p.seq, p.dir[d].reverse ? p.seq.T - 1 : 0);
  for (int64_t i = 0; i < p.seq.T; ++i) {
    const Step now = next;
    const int slot = static_cast<int>(i % 2);
    next = step_at(p.seq, now.t + way);
    const auto compute = [&](const Tile& tile) {
      if (part.shares) own.fetch_states(s, tile, slot);
      Accumulator<T> r[Cell::gates][RN];
      Product::run(R, Operand<T>{s.scratch[d].h[slot], now.rows}, tile.u0, tile.j0, r);
      own.step(s, tile, now, next, slot, part.shares, r);
    };
    part.exchange(
        i, now.rows, [&](const Tile& tile) { own.fetch_x(p, tile, now, next); }, compute,
        [&](const Tile& tile) { own.put_results(p, tile, now); });
  }
}

}  // namespace rnnkern

// What the kernels of both passes share: one step as a kernel sees it, and where its rows are.
//
// But for the persistent kernels (persistent.cuh), the driver launches one grid a step, for all
// directions at once. A step of one stage has a block for each tile. Where a step has several, each
// needs all of the one before: the whole grid waits between them, and as it can be no larger than
// what the device runs at once, its blocks share the tiles of every stage.
//
// Packed rows of a step are the first `rows` ones; padded rows run while t < lengths[j] (a length
// outside [0, T] is taken for T, and the row's initial state for NaN, so that the mistake shows in
// every result of the row although nobody on the host has seen it).
#pragma once

#include <cooperative_groups.h>

#include "core/cell.h"
#include "core/problem.h"
#include "cuda/exchange.cuh"
#include "cuda/product.cuh"

namespace rnnkern {

// One direction's step. t < 0: there is none, before the first or after the last.
struct Step {
  int64_t t;
  int64_t rows;    // rows that may run; B for padded data
  int64_t offset;  // packed data: the first row of this step
};

// Step t of a sequence whose `active` and `offset` lie where this runs.
RNNKERN_HD Step step_at(const Sequence& seq, int64_t t) {
  if (t < 0 || t >= seq.T) return {-1, 0, 0};
  return {t, seq.rows_at(t), seq.offset ? seq.offset[t] : 0};
}

// Sequence::active and offset on the device, for a persistent kernel.
struct PackedSteps {
  int64_t *active, *offset;  // [T]
};

__device__ __forceinline__ bool valid_length(const Sequence& seq, int64_t j) {
  return !seq.lengths || (seq.lengths[j] >= 0 && seq.lengths[j] <= seq.T);
}

__device__ __forceinline__ bool runs(const Sequence& seq, const Step& step, int64_t j) {
  if (step.t < 0 || j >= step.rows) return false;
  return !seq.lengths || step.t < seq.lengths[j] || !valid_length(seq, j);
}

__device__ __forceinline__ int64_t data_row(const Sequence& seq, const Rows& rows, const Step& step,
                                            int64_t j) {
  return seq.offset ? step.offset + j : step.t * rows.stride_t + j * rows.stride_b;
}

// Stages of one step of a cell, with a projection or without.
template <class Cell, bool projected>
constexpr int kStages = Cell::phases + (projected ? 1 : 0);

// Blocks of a step-wise kernel on a multiprocessor at least: three leave 168 registers a thread,
// two 255, without which TF32's wide kernels of several stages spill.
template <class Product, int stages, bool wide>
constexpr int kStepBlocks =
    wide && stages > 1 && std::is_same_v<Product, TensorProduct<float>> ? 2 : 3;

// Tiles of kUnits units that a block of a step-wise kernel computes at once, in a stage that makes
// NG products a unit. A wide kernel has three or four tiles of weights to each row that it reads,
// as the gates of a GRU or an LSTM make them.
template <int NG, bool wide>
constexpr int kUnitTiles = wide && NG < 4 ? 4 / NG : 1;

// NU·kUnits units × 8·RN rows of one direction. A stage has at most INT32_MAX of them.
struct Tile {
  int64_t u0, j0;
  int d;

  // Units first, then rows.
  template <int NU, int RN>
  __device__ static Tile at(unsigned index, unsigned unit_tiles, unsigned d) {
    return {int64_t(index % unit_tiles) * NU * kUnits, int64_t(index / unit_tiles) * 8 * RN,
            int(d)};
  }
  __device__ static unsigned count(int64_t all, int each) {
    return static_cast<unsigned>((all + each - 1) / each);
  }
  __device__ int64_t unit(int m = 0) const { return u0 + threadIdx.x % kUnits + kUnits * m; }
  __device__ int64_t row(int n) const { return j0 + threadIdx.x / kUnits + 8 * n; }
};

// The only stage of a step: run(tile) for the tile of block (x, 0, direction).
template <int NU, int RN, class Run>
__device__ __forceinline__ void only_stage(int64_t units, Run run) {
  run(Tile::at<NU, RN>(blockIdx.x, Tile::count(units, NU * kUnits), blockIdx.z));
}

// One of several: run(tile) for every tile of units × rows × directions that falls to this block.
template <int NU, int RN, class Run>
__device__ __forceinline__ void stage(int64_t units, int64_t rows, int64_t directions, Run run) {
  const unsigned unit_tiles = Tile::count(units, NU * kUnits);
  const unsigned each = unit_tiles * Tile::count(rows, 8 * RN);
  for (unsigned i = blockIdx.x; i < each * static_cast<unsigned>(directions); i += gridDim.x) {
    if (i != blockIdx.x) __syncthreads();  // until all have read the last tile's shared memory
    run(Tile::at<NU, RN>(i % each, unit_tiles, i / each));
  }
}

// Sets the counters of a call to zero, by all threads of a grid before the one that waits.
__device__ __forceinline__ void nobody_arrived(const Exchange& exchange) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < exchange.words;
       i += threads)
    exchange.arrived[i] = 0;
}

// Between two stages: until every block of the grid has written what the next one reads.
__device__ __forceinline__ void next_stage() { cooperative_groups::this_grid().sync(); }

template <class T>
__device__ __forceinline__ Value<Accumulator<T>> fetch(const T* at) {
  return Value<Accumulator<T>>(widen(*at));
}
template <class T>
__device__ __forceinline__ void put(T* at, Value<Accumulator<T>> value) {
  *at = narrow<T>(value.v);
}

}  // namespace rnnkern

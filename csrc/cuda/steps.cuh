// What the kernels of both passes share: one step as a kernel sees it, and where its rows are.
//
// The driver launches one grid a stage of a step, for all directions at once. Packed rows of a step
// are the first `rows` ones; padded rows run while t < lengths[j] (a length outside [0, T] is taken
// for T, and the row's initial state for NaN, so that the mistake shows in every result of the row
// although nobody on the host has seen it).
#pragma once

#include "core/cell.h"
#include "core/problem.h"
#include "cuda/product.cuh"

namespace rnnkern {

// One direction's step. t < 0: there is none, before the first or after the last.
struct Step {
  int64_t t;
  int64_t rows;    // rows that may run; B for padded data
  int64_t offset;  // packed data: the first row of this step
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

// Block (x, y, z): a tile of kUnits units, a tile of rows, a direction.
struct Tile {
  int64_t u0, j0;
  int d;

  template <int RN>
  __device__ static Tile of_block(int64_t units) {
    const int64_t tiles = (units + kUnits - 1) / kUnits, x = blockIdx.x;
    return {x % tiles * kUnits, x / tiles * 8 * RN, static_cast<int>(blockIdx.z)};
  }
  __device__ int64_t unit() const { return u0 + threadIdx.x % kUnits; }
  __device__ int64_t row(int n) const { return j0 + threadIdx.x / kUnits + 8 * n; }
};

template <class T>
__device__ __forceinline__ Value<Accumulator<T>> fetch(const T* at) {
  return Value<Accumulator<T>>(widen(*at));
}
template <class T>
__device__ __forceinline__ void put(T* at, Value<Accumulator<T>> value) {
  *at = narrow<T>(value.v);
}

}  // namespace rnnkern

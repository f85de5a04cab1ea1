// What the persistent kernels of both passes share: all steps of a pass in one launch.
//
// R stays on the chip for the whole sequence. The blocks of a *group* hold one whole R of one
// direction between them, each that of kUnits units with all their gates, in shared memory; what
// does not fit there they read again in every step. A group computes the batch rows of every
// `groups`-th tile of 8·RN; what it does not compute, it never looks at, so groups do not wait for
// each other.
//
//   grid (blocks of a group, groups, directions)      all of it on the device at once
//
//   each exchange   operands of its own ahead │ wait │ product, gate math │ arrive │ results
//                                             └ what all of the group have made
//
// With a projection a block also has the rows of W_hr that belong to its units of P, which may be
// none (in backward those of the transposed R, beside those of the transposed W_hr for its units of
// H), and a step has a second exchange, of what is projected.
//
// What the blocks exchange goes through global memory; exchange.cuh says who waits for whom. What a
// thread carries from step to step for its unit stays in registers if the group has a single tile
// of rows; with more tiles the thread keeps it in the workspace. Sums are those of the step-wise
// kernels, in their order.
#pragma once

#include "cuda/exchange.cuh"
#include "cuda/plan.h"
#include "cuda/steps.cuh"

namespace rnnkern {

constexpr int kSequenceBlocks = 2;  // on a multiprocessor at least: leaves 255 registers a thread

// The shared memory of a block: the work of the product that needs most, then as much of the
// weights as is to be resident, those of the first stage first. Shape says for each stage how many
// gates the product makes of a unit, and of how many elements a row of its operand is.
template <class Shape, class Product, int RN>
struct BlockMemory {
  using T = typename Product::Data;
  static constexpr int last = Shape::stages - 1;

  RNNKERN_HD static constexpr int work(bool all_kept) {
    const int a = Product::template work<Shape::template gates<0>, RN>(all_kept);
    const int b = Product::template work<Shape::template gates<last>, RN>(all_kept);
    return a > b ? a : b;
  }
  RNNKERN_HD static int64_t all(const Widths& widths) {
    return whole<0>(widths) + (last == 1 ? whole<last>(widths) : 0);
  }
  // Bytes that are kept where there is room for so many.
  RNNKERN_HD static int64_t kept(const Widths& widths, int64_t room) {
    const int64_t first = part<0>(widths, room);
    return first + (last == 1 ? part<last>(widths, room - first) : 0);
  }
  // The weights of a stage of so many units, of which their part of `resident` bytes in all goes
  // into shared memory.
  template <int stage>
  __device__ static Kept<T> keep(const T* weights, int64_t units, const Widths& widths,
                                 int64_t resident, int64_t u0) {
    constexpr int NG = Shape::template gates<stage>;
    const int64_t before = stage == 0 ? 0 : part<0>(widths, resident);
    const int64_t depth = part<stage>(widths, resident - before) / piece<stage> * Product::kDepth;
    unsigned char* data = block_memory() + work(resident >= all(widths)) + before;
    const Kept<T> kept{{weights, units, Shape::template operand<stage>(widths)}, depth, data};
    Product::template keep<NG>(kept, u0);
    return kept;
  }

 private:
  template <int stage>
  static constexpr int piece = Product::template piece<Shape::template gates<stage>>();

  template <int stage>
  RNNKERN_HD static int64_t whole(const Widths& widths) {
    const int64_t K = Shape::template operand<stage>(widths);
    return (K + Product::kDepth - 1) / Product::kDepth * piece<stage>;
  }
  template <int stage>
  RNNKERN_HD static int64_t part(const Widths& widths, int64_t room) {
    const int64_t pieces = room / piece<stage> * piece<stage>;
    return pieces < whole<stage>(widths) ? pieces : whole<stage>(widths);
  }
};

// What a block computes, and with whom.
struct Part {
  Tile first;
  int64_t stride;  // rows from a tile to its next
  bool shares;     // several tiles of rows, in turns, have the block's registers
  Group group;

  template <int RN>
  __device__ static Part of_block(const Sequence& seq, const Exchange& exchange) {
    const int64_t rows = 8 * RN, stride = gridDim.y * rows;
    const int64_t group = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
    return {{static_cast<int64_t>(blockIdx.x) * kUnits, blockIdx.y * rows, int(blockIdx.z)},
            stride,
            stride < seq.B,
            {exchange.arrived + group * kCounterWords, gridDim.x}};
  }

  // One exchange, once every block has arrived `times` times: compute(tile) for the block's tiles
  // of the first `rows` rows, after ahead(tile), which may not look at what others make, and before
  // after(tile), which nobody waits for.
  template <class Ahead, class Compute, class After>
  __device__ __forceinline__ void exchange(int64_t times, int64_t rows, Ahead ahead,
                                           Compute compute, After after) const {
    Tile tile = first;
    ahead(tile);
    group.wait(static_cast<uint64_t>(times));
    bool arrived = false;
    for (; tile.j0 < rows; tile.j0 += stride) {
      if (tile.j0 != first.j0) {
        __syncthreads();  // until all have read the last tile's shared memory
        ahead(tile);
      }
      compute(tile);
      arrived = tile.j0 + stride >= rows;
      if (arrived) group.arrive();
      after(tile);
    }
    if (!arrived) group.arrive();  // has no row in this step
  }
};

// Steps of a packed sequence, which the host knows, in an argument of less than 4 KiB.
struct SomeSteps {
  static constexpr int kMost = 224;
  int64_t first, count;
  int64_t active[kMost], offset[kMost];
};

// Into [T] arrays on the device; one thread a step.
template <class Some>
__global__ void put_steps(const Some some, int64_t* active, int64_t* offset) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= some.count) return;
  active[some.first + i] = some.active[i];
  offset[some.first + i] = some.offset[i];
}

}  // namespace rnnkern

// The plan: how a team of threads shares one layer.
//
//   threads = direction_groups × (row_groups × unit_groups + helpers)
//
// Directions and batch rows never talk to each other, so a split over them costs nothing but the
// reading of the same weights by more cores. The threads of one unit split exchange the state at
// every step and meet at one barrier a stage. A helper takes no steps: where few threads can, it
// makes the products of whole chunks of steps meanwhile, forward those of the next chunk, backward
// those of the chunk before.
#pragma once

#include <cstdint>

namespace rnnkern {

// What the cost model needs to know of one call.
struct Work {
  int64_t T, B, D;
  int64_t weights;  // recurrent weight elements of one direction
  int64_t inputs;   // input weight elements of one direction, if the call multiplies by them
  int64_t sums;     // elements of one direction's gradients of weights
  bool packs;       // whether the weights are packed before the first step
  int64_t outputs;  // sum of the outputs of one step's products, per row and direction
  int64_t blocks;   // the fewest blocks of units that any of its products has
  // Of steps; 1: no helper. Where rows end, chunks are cleared before they are written; and
  // backward gains nothing from one with more than one row.
  int64_t chunks;
  int stages;  // products, and so barriers, in one step
  int element_bytes;
  int lanes;        // outputs in a vector
  int tile_rows;    // of operands that a pass over the weights is multiplied with
  int cycle_flops;  // of one core, at most
};

struct Plan {
  int direction_groups = 1, row_groups = 1, unit_groups = 1;
  int helpers = 0;               // 0 or 1, of each direction group
  double step_microseconds = 0;  // what the model expects of one step
  int group_threads() const { return row_groups * unit_groups + helpers; }
  int threads() const { return direction_groups * group_threads(); }
};

// The bytes of a core's L2, or 1 MiB where the system does not tell.
int64_t l2_bytes();

// The cheapest plan of at most `requested` threads, and of no more than usable_threads() allows.
Plan make_plan(const Work& work, int requested);

}  // namespace rnnkern

// How the recurrence of one call runs.
#pragma once

#include <cstdint>

#include "core/status.h"

namespace rnnkern {

struct CudaCall {
  int device;
  void* stream;     // cudaStream_t
  void* workspace;  // of forward_workspace or backward_workspace bytes, until the stream is past it
  bool tf32;        // float32 products may round their factors to TF32
  bool persistent;  // all steps in one launch where that can be
};

enum class CudaType { float64, float32, float16, bfloat16 };

// Of a layer; P = H without a projection.
struct Widths {
  int64_t H, P;
};

// The persistent kernel of one cell, pass, product and number of row tiles; see persistent.cuh.
struct PersistentKernel {
  const void* kernel;
  int64_t all;                                   // bytes of all a block's weights, of R and W_hr
  int64_t (*kept)(const Widths&, int64_t room);  // of these, what fits in so many
  int64_t work, streaming_work;  // bytes that its products take besides, if all is kept or not
  int64_t weights;               // elements that its products read of each unit's
  int64_t operand;               // and of each row
};
using FindPersistent = PersistentKernel (*)(bool tensor_cores, int row_tiles, const Widths&,
                                            bool projected);

// What a plan depends on, besides the device.
struct CudaSizes {
  CudaType type;
  int64_t B, D;
  Widths widths;
  bool projected;
  FindPersistent persistent;
};

struct CudaPlan {
  bool tensor_cores;
  int row_tiles;  // of 8 rows, a block at a time
  bool wide;      // a launch for each step: blocks of more units, where units have few products
  // The persistent kernel's; blocks_of_group 0: a launch for each step.
  int64_t blocks_of_group;
  int64_t groups;    // of each direction
  int64_t resident;  // bytes of weights in a block's shared memory
  int64_t streamed;  // bytes that the rest would take, which it reads in every step
  int64_t memory;    // bytes of a block's shared memory
};

// The only function that decides. It fails where the device does not tell what the results depend
// on.
Status make_cuda_plan(const CudaCall& call, const CudaSizes& sizes, CudaPlan& plan);

}  // namespace rnnkern

// How the blocks of a persistent kernel tell each other of their steps.
//
// A block that has written its part of what the others read adds one to its group's counter; a step
// begins when the counter says that all have. What the next step reads has two slots, of which a
// step reads the one and writes the other; what the next exchange of the same step reads has one.
// That a slot is read out before anyone overwrites it follows: who writes it has waited for those
// that read it.
#pragma once

#include "cuda/intrinsics.cuh"

namespace rnnkern {

constexpr int kCounterWords = 16;          // counters of two groups are in different cache lines
constexpr uint64_t kMostPolls = 1u << 27;  // about a minute, after which a wait is a fault

// The counters of a call.
struct Exchange {
  uint64_t* arrived;  // [groups of all directions, kCounterWords], zero at first, or null
  int64_t words;
};

// The blocks that wait for each other. Thread 0 speaks for its block: the barriers around it make
// what it releases or acquires the whole block's.
struct Group {
  uint64_t* arrived;  // [1]
  uint64_t blocks;

  // What this block has written is there for all that have waited for it, and what it has read may
  // be overwritten.
  __device__ void arrive() const {
    __syncthreads();
    if (blocks > 1 && threadIdx.x == 0) add_release(arrived, 1);
  }
  // Until every block has arrived `times` times.
  __device__ void wait(uint64_t times) const {
    if (blocks > 1 && threadIdx.x == 0) {
      for (uint64_t polls = 0; load_acquire(arrived) < times * blocks; ++polls) {
        if (polls == kMostPolls) __trap();
      }
    }
    __syncthreads();
  }
};

}  // namespace rnnkern

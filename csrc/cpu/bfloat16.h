// bfloat16 data as the kernels store it: the upper half of a float. Sums of it are float.
#pragma once

#include <cstdint>

#include "core/accumulator.h"
#include "core/problem.h"

namespace rnnkern {

struct Bfloat16 {
  uint16_t bits;
};

template <class T>
using CpuBackwardProblem = BackwardProblem<T, Accumulator<T>>;

}  // namespace rnnkern

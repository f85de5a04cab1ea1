// bfloat16 data as the kernels store it: the upper half of a float. Sums of it are float.
#pragma once

#include <cstdint>

#include "core/problem.h"

namespace rnnkern {

struct Bfloat16 {
  uint16_t bits;
};

template <class T>
struct AccumulateIn {
  using type = T;
};
template <>
struct AccumulateIn<Bfloat16> {
  using type = float;
};
// What data of a type is computed with and summed in.
template <class T>
using Accumulator = typename AccumulateIn<T>::type;

template <class T>
using CpuBackwardProblem = BackwardProblem<T, Accumulator<T>>;

}  // namespace rnnkern

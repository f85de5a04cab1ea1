// What data of a type is computed with and summed in: float64 for float64, float32 for all others.
#pragma once

namespace rnnkern {

template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulateIn<T>::type;

}  // namespace rnnkern

// float64 data; see launch.cuh.
#include "cuda/launch.cuh"

namespace rnnkern {
RNNKERN_CUDA_TYPE(double)
}  // namespace rnnkern

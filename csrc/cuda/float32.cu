// float32 data; see launch.cuh.
#include "cuda/launch.cuh"

namespace rnnkern {
RNNKERN_CUDA_TYPE(float)
}  // namespace rnnkern

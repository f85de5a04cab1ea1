// float16 data; see launch.cuh.
#include "cuda/launch.cuh"

namespace rnnkern {
RNNKERN_CUDA_TYPE(__half)
}  // namespace rnnkern

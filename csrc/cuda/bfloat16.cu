// bfloat16 data; see launch.cuh.
#include "cuda/launch.cuh"

namespace rnnkern {
RNNKERN_CUDA_TYPE(__nv_bfloat16)
}  // namespace rnnkern

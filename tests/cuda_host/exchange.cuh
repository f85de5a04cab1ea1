// How the probes' blocks exchange flags through global memory: as the kernels do, and by stores
// that release. On the host those are plain accesses after which another thread may go on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/intrinsics.cuh"

namespace probe {

using rnnkern::add_release;
using rnnkern::load_acquire;

#if defined(__CUDACC__)
__device__ __forceinline__ void store_release(uint64_t* at, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
#else
inline void store_release(uint64_t* at, uint64_t value) { cuda_host::replace(at, value); }
#endif

}  // namespace probe

// How blocks exchange flags through global memory: loads that acquire, stores and additions that
// release, for the whole device. On the host they are plain accesses after which another thread may
// go on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace probe {

#if defined(__CUDACC__)
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ uint64_t load_acquire(const uint64_t* at) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(uint64_t* at, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
__device__ __forceinline__ void add_release(uint32_t* at, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
#else
template <class T>
T load_acquire(const T* at) {
  const T value = *at;
  cuda_host::make_way(at, value, value);
  return value;
}
inline void store_release(uint64_t* at, uint64_t value) { cuda_host::replace(at, value); }
inline void add_release(uint32_t* at, uint32_t value) { cuda_host::replace(at, *at + value); }
#endif

}  // namespace probe

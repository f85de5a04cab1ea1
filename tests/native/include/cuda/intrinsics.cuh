// As much of CUDA as the exchange of a persistent kernel uses, for blocks whose threads are threads
// of the host. Found before the real file when csrc/cuda/exchange.cuh is compiled for
// exchange_test.cpp, which defines sync_block and may take things away.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <thread>

#define __device__
#define __trap() std::abort()
#define __syncthreads() sync_block()

inline thread_local struct {
  unsigned x;
} threadIdx;
void sync_block();

inline bool waits = true, releases = true;

namespace rnnkern {

inline uint64_t load_acquire(const uint64_t* at) {
  if (!waits) return UINT64_MAX;
  std::this_thread::yield();  // there are more threads than cores
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}
inline void add_release(uint64_t* at, uint64_t value) {
  __atomic_fetch_add(at, value, releases ? __ATOMIC_RELEASE : __ATOMIC_RELAXED);
}

}  // namespace rnnkern

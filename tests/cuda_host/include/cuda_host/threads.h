// What CUDA C++ has inside a kernel, for threads that are fibers on one OS thread (see fibers.cpp).
// Included by cuda_runtime.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// Of the fiber that runs now.
extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

unsigned char* block_memory();
void sync_block();
void sync_grid();
// Blocks until all 32 lanes of the warp are here; the last to come calls run(arguments of all).
void collective(const char* name, void* argument, void (*run)(void* const* arguments));
// Lets other threads go on.
void make_way();
// The same after an access to memory that blocks share; `before` and `after` are the value there,
// equal where it was only read. A launch in which every thread only finds what it found before ends
// as a deadlock.
void make_way(const void* address, uint64_t before, uint64_t after);
// Whether a test wants this thread's next release, or what it acquires until then, left out.
bool drops_release();
bool drops_wait();
// Ends the launch with this message.
void fail(const char* message);

}  // namespace cuda_host

inline void __syncthreads() { ::cuda_host::sync_block(); }
inline void __threadfence() { ::cuda_host::make_way(); }
inline void __nanosleep(unsigned) { ::cuda_host::make_way(); }
inline void __trap() { ::cuda_host::fail("__trap()"); }

// ---- warps, always whole ones -------------------------------------------------------------------
namespace cuda_host {

inline unsigned lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("a partial mask: the lanes of a warp meet all or not at all");
}

template <class Word>
struct Exchanged {
  Word value, result;
  unsigned source;
};

// Kind only tells one kind of shuffle from the others.
template <class Kind, class Word>
void exchange(void* const* arguments) {
  for (int i = 0; i < 32; ++i) {
    auto* mine = static_cast<Exchanged<Word>*>(arguments[i]);
    mine->result = static_cast<Exchanged<Word>*>(arguments[mine->source])->value;
  }
}

template <class Kind, class T>
T shuffle(const char* name, unsigned mask, T value, unsigned source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  check_mask(mask);
  Exchanged<Word> mine{0, 0, source};
  std::memcpy(&mine.value, &value, sizeof value);
  collective(name, &mine, exchange<Kind, Word>);
  std::memcpy(&value, &mine.result, sizeof value);
  return value;
}

inline void meet(void* const*) {}

struct Indexed;
struct Crossed;
struct Upward;
struct Downward;

}  // namespace cuda_host

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_host::check_mask(mask);
  cuda_host::collective("__syncwarp", nullptr, cuda_host::meet);
}

// A lane whose source lies outside its segment of `width` lanes keeps its own value, except that
// __shfl_sync wraps around, and __shfl_xor_sync may look into segments before its own.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned segment = cuda_host::lane() & ~(width - 1u);
  return cuda_host::shuffle<cuda_host::Indexed>("__shfl_sync", mask, value,
                                                segment | (source & (width - 1u)));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const unsigned own = cuda_host::lane(), source = own ^ lanes;
  const bool there = source <= (own | (width - 1u));
  return cuda_host::shuffle<cuda_host::Crossed>("__shfl_xor_sync", mask, value,
                                                there ? source : own);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned own = cuda_host::lane();
  const bool there = (own & (width - 1u)) >= delta;
  return cuda_host::shuffle<cuda_host::Upward>("__shfl_up_sync", mask, value,
                                               there ? own - delta : own);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned own = cuda_host::lane();
  const bool there = (own & (width - 1u)) + delta < static_cast<unsigned>(width);
  return cuda_host::shuffle<cuda_host::Downward>("__shfl_down_sync", mask, value,
                                                 there ? own + delta : own);
}

// ---- atomics: fibers change places at known points, so that a plain access is one ---------------
namespace cuda_host {

template <class T>
T replace(T* at, T value) {
  const T before = *at;
  *at = value;
  make_way(at, before, value);
  return before;
}

}  // namespace cuda_host

inline int atomicAdd(int* at, int value) { return cuda_host::replace(at, *at + value); }
inline unsigned atomicAdd(unsigned* at, unsigned value) {
  return cuda_host::replace(at, *at + value);
}
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return cuda_host::replace(at, *at + value);
}
inline int atomicExch(int* at, int value) { return cuda_host::replace(at, value); }
inline unsigned atomicExch(unsigned* at, unsigned value) { return cuda_host::replace(at, value); }
inline unsigned long long atomicExch(unsigned long long* at, unsigned long long value) {
  return cuda_host::replace(at, value);
}

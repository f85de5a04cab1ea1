// csrc/cuda/intrinsics.cuh on the host; what the fragments hold is drawn there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace rnnkern {

using std::memcpy;

// A kernel that reads between the arrays finds NaN; one that writes there makes its launch fail.
struct WorkspaceWatch {
  static constexpr size_t gap = 256;
  WorkspaceWatch() { cuda_host::forget_gaps(); }
  void keep(unsigned char* begin, unsigned char* end) { cuda_host::keep_gap(begin, end); }
};

constexpr bool kNeedsMoreRegisters = false;

inline unsigned char* block_memory() { return cuda_host::block_memory(); }

// Plain accesses after which another thread may go on; a test may drop them.
inline uint64_t load_acquire(const uint64_t* at) {
  if (cuda_host::drops_wait()) return UINT64_MAX;
  const uint64_t value = *at;
  cuda_host::make_way(at, value, value);
  return value;
}
inline void add_release(uint64_t* at, uint64_t value) {
  if (!cuda_host::drops_release()) cuda_host::replace(at, *at + value);
}

inline uint32_t to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return x - x == 0 ? (bits + 0x1000) & ~0x1fffu : bits;
}

template <class T>
struct Fragments {
  float* c;
  uint32_t a[4], b[2];
};

// The element `index` of a 32-bit word.
template <class T>
float element(uint32_t word, int index) {
  if constexpr (sizeof(T) == 4) {
    word &= ~0x1fffu;  // the tensor cores do not see the lowest bits
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
  } else {
    const T value{static_cast<uint16_t>(word >> 16 * index)};
    if constexpr (std::is_same_v<T, __half>) {
      return __half2float(value);
    } else {
      return __bfloat162float(value);
    }
  }
}

template <class T>
void multiply_fragments(void* const* arguments) {
  constexpr int each = 4 / static_cast<int>(sizeof(T));  // elements of a word
  const auto lane = [&](int i) { return static_cast<Fragments<T>*>(arguments[i]); };
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float sum = 0.0f;
      for (int k = 0; k < 8 * each; ++k) {
        const int q = k / each % 4, half = k / each / 4;
        const uint32_t a = lane(4 * (m % 8) + q)->a[m / 8 + 2 * half];
        const uint32_t b = lane(4 * n + q)->b[half];
        sum += element<T>(a, k % each) * element<T>(b, k % each);
      }
      lane(4 * (m % 8) + n / 2)->c[m / 8 * 2 + n % 2] += sum;
    }
  }
}

template <class T>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
         uint32_t b1) {
  Fragments<T> mine{c, {a0, a1, a2, a3}, {b0, b1}};
  cuda_host::collective("mma", &mine, multiply_fragments<T>);
}

}  // namespace rnnkern

// The device's own: shared memory, tensor-core products, TF32. What the kernels use beyond CUDA C++
// stands here and nowhere else, so that a host build replaces this one file (tests/cuda_host).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace rnnkern {

// Told of the bytes between the arrays of a workspace; on the host they are watched.
struct WorkspaceWatch {
  static constexpr size_t gap = 0;  // the fewest there are
  void keep(unsigned char* /*begin*/, unsigned char* /*end*/) {}
};

// Whether kernels that fit into the registers of other architectures need a few more on this one.
#if __CUDA_ARCH__ >= 1200
constexpr bool kNeedsMoreRegisters = true;
#else
constexpr bool kNeedsMoreRegisters = false;
#endif

// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* block_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// How blocks exchange flags: a load that acquires and an addition that releases, for the whole
// device. What a thread wrote before it released is there for all that have acquired the flag.
__device__ __forceinline__ uint64_t load_acquire(const uint64_t* at) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ void add_release(uint64_t* at, uint64_t value) {
  asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

// The nearest TF32 value; ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
  bits = __float_as_uint(x);
#endif
  return bits;
}

// c[16×8] += a[16×K] · b[K×8] by one warp, K = 16 for 16-bit types and 8 for TF32. A lane
// q + 4 r (q < 4, r < 8) holds, in the PTX manual's fragments:
//   c: (r, 2q) (r, 2q+1) (r+8, 2q) (r+8, 2q+1)
//   a: the words (r, q) (r+8, q) (r, q+4) (r+8, q+4);   b: the words (q, r) (q+4, r)
// where a word of 32 bits is one element of TF32 or two neighbours in K. Needs sm_80; sm_75 has it
// for __half alone, and in halves of K = 8. The whole warp comes to it: it is volatile, lest the
// compiler take it for a function of each lane and move it into a branch that some do not take.
#if __CUDA_ARCH__ >= 800
#define RNNKERN_MMA(shape_and_types)                            \
  asm volatile("mma.sync.aligned." shape_and_types              \
               " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "       \
               "{%0,%1,%2,%3};"                                 \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
#else
#define RNNKERN_MMA(shape_and_types) __trap()
#endif
__device__ __forceinline__ void mma_of_sm_75(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  RNNKERN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
#else
  mma_of_sm_75(c, a0, a1, b0);
  mma_of_sm_75(c, a2, a3, b1);
#endif
}
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], uint32_t a0, uint32_t a1,
                                                   uint32_t a2, uint32_t a3, uint32_t b0,
                                                   uint32_t b1) {
  RNNKERN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
template <>
__device__ __forceinline__ void mma<float>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                           uint32_t a3, uint32_t b0, uint32_t b1) {
  RNNKERN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef RNNKERN_MMA

}  // namespace rnnkern

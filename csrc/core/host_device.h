// Marks functions that both the host compiler and nvcc compile.
#pragma once

#if defined(__CUDACC__)
#define RNNKERN_HD __host__ __device__ __forceinline__
#else
#define RNNKERN_HD inline __attribute__((always_inline))
#endif

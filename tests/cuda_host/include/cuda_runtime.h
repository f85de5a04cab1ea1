// As much of CUDA's runtime as rnnkern's kernels and driver use, on the host: launches run at once,
// every thread of the grid as a fiber (see shim.cpp). Found before the real header when
// csrc/cuda is compiled as host C++.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---- inside a kernel ----------------------------------------------------------------------------
// Of the fiber that runs now.
extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

unsigned char* block_memory();
void sync_block();
// Blocks until all 32 lanes of the warp are here; the last to come calls run(arguments of all).
void collective(const char* name, void* argument, void (*run)(void* const* arguments));

}  // namespace cuda_host

inline void __syncthreads() { ::cuda_host::sync_block(); }

// ---- on the host --------------------------------------------------------------------------------
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = struct CUstream_st*;

struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

namespace cuda_host {
cudaError_t attributes(cudaFuncAttributes* attributes);
cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
}  // namespace cuda_host

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  return cuda_host::attributes(attributes);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return cuda_host::launch(*config, [&] { kernel(Parameters(arguments)...); });
}

// Devices, the plan, errors: what does not depend on the type of the data.
#include <atomic>

#include "cells/registry.h"
#include "cuda/driver.h"
#include "cuda/launch.cuh"

namespace rnnkern {
namespace {

std::string& last_error() {
  thread_local std::string message;
  return message;
}

constexpr int kKnownDevices = 64;

// The architecture, as 10 · major + minor, that the kernels on a device were compiled for: that of
// their PTX, since a newer device may run what was written for an older one. 0: not known.
int kernel_architecture(int device) {
  static std::atomic<int> known[kKnownDevices];
  const bool keeps = device >= 0 && device < kKnownDevices;
  if (keeps && known[device] != 0) return known[device];
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes{};
  if (guard.error() != cudaSuccess) return 0;
  if (cudaFuncGetAttributes(&attributes, transpose<float>) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  if (keeps) known[device] = attributes.ptxVersion;
  return attributes.ptxVersion;
}

// The first architecture whose tensor cores multiply this type; 0: none are to.
int tensor_cores_from(CudaType type, bool tf32) {
  switch (type) {
    case CudaType::float64: return 0;
    case CudaType::float32: return tf32 ? 80 : 0;
    case CudaType::float16: return 75;
    case CudaType::bfloat16: return 80;
  }
  return 0;
}

}  // namespace

Status device_failed(cudaError_t error) {
  last_error() = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  cudaGetLastError();  // the next call starts clean, unless the error is the context's
  return Status::device_error;
}

const std::string& cuda_error() { return last_error(); }

std::string device_problem(int device) {
  const DeviceGuard guard(device);
  cudaError_t error = guard.error();
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, transpose<float>);
  if (error == cudaSuccess) return "";
  device_failed(error);
  return cuda_error();
}

// Tensor cores where the architecture that the kernels were compiled for has them for the type;
// blocks of 8 rows for small batches, so that units fill the device, and of 32 otherwise, so that
// weights are read by fewer blocks. Results depend on the first choice only.
CudaPlan make_cuda_plan(const CudaCall& call, int64_t B, CudaType type) {
  CudaPlan plan{};
  const int least = tensor_cores_from(type, call.tf32);
  plan.tensor_cores = least > 0 && kernel_architecture(call.device) >= least;
  plan.row_tiles = B <= 8 ? 1 : 4;
  return plan;
}

int cuda_cell_count() {
#define RNNKERN_ROW(Cell) +1
  return 0 RNNKERN_CELLS(RNNKERN_ROW);
#undef RNNKERN_ROW
}

}  // namespace rnnkern

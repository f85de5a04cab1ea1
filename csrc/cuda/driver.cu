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

// Tensor cores where the type allows them and the kernels were compiled for sm_80 or newer; blocks
// of 8 rows for small batches, so that units fill the device, and of 32 otherwise, so that weights
// are read by fewer blocks. Results depend on the first choice only.
CudaPlan make_cuda_plan(const CudaCall& call, int64_t B, int element_bytes) {
  CudaPlan plan{};
  const bool allowed = element_bytes == 2 || (element_bytes == 4 && call.tf32);
  plan.tensor_cores = allowed && kernel_architecture(call.device) >= 80;
  plan.row_tiles = B <= 8 ? 1 : 4;
  return plan;
}

int cuda_cell_count() {
#define RNNKERN_ROW(Cell) +1
  return 0 RNNKERN_CELLS(RNNKERN_ROW);
#undef RNNKERN_ROW
}

}  // namespace rnnkern

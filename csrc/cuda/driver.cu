// Devices and errors: what does not depend on the type of the data.
#include "cells/registry.h"
#include "cuda/driver.h"
#include "cuda/launch.cuh"

namespace rnnkern {
namespace {

std::string& last_error() {
  thread_local std::string message;
  return message;
}

}  // namespace

Status device_failed(cudaError_t error) {
  last_error() = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  cudaGetLastError();  // the next call starts clean, unless the error is the context's
  return error == cudaErrorMemoryAllocation ? Status::out_of_memory : Status::device_error;
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

std::string cooperation_problem(int device) {
  int cooperates = 0;
  cudaError_t error = cudaDeviceGetAttribute(&cooperates, cudaDevAttrCooperativeLaunch, device);
  if (error == cudaSuccess && cooperates) return "";
  device_failed(error == cudaSuccess ? cudaErrorNotSupported : error);
  return cuda_error();
}

int cuda_cell_count() {
#define RNNKERN_ROW(Cell) +1
  return 0 RNNKERN_CELLS(RNNKERN_ROW);
#undef RNNKERN_ROW
}

}  // namespace rnnkern

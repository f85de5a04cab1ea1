// What the two halves of the shim know of each other: runtime.cpp the devices and launches,
// fibers.cpp the threads of one launch.
#pragma once

#include <cuda_runtime.h>

#include <string>

namespace cuda_host {

inline unsigned count(dim3 n) { return n.x * n.y * n.z; }

// Runs a grid to its end. Returns why it failed, or nothing.
std::string run_grid(const cudaLaunchConfig_t& config, bool cooperative,
                     const std::function<void()>& kernel);

}  // namespace cuda_host

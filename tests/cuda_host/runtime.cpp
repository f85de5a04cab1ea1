// The host's side of CUDA's runtime: three pretend devices, and launches on them.
//
// Device 0 is of sm_90 and has tensor cores; device 1 is of sm_75; device 2 is like the first, but
// refuses cooperative launches. All have few and small multiprocessors, so that grids which do not
// fit can be tested.
#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "shim.h"

namespace cuda_host {
namespace {

constexpr size_t kKiB = 1024;
constexpr size_t kPlainMemory = 48 * kKiB;  // of a block, without asking for more
constexpr int kThreadsOfBlock = 1024;

struct Device {
  int architecture;  // 10 · major + minor
  size_t block_memory, multiprocessor_memory;
  size_t reserved_memory;  // of every block
  bool cooperates;
};
constexpr int kDevices = 3;
constexpr Device kDevice[kDevices] = {{90, 227 * kKiB, 228 * kKiB, kKiB, true},
                                      {75, 64 * kKiB, 64 * kKiB, 0, true},
                                      {90, 227 * kKiB, 228 * kKiB, kKiB, false}};

int multiprocessors = 4, threads_of_multiprocessor = 1024;
int claimed_multiprocessors = 4;    // what a device says of itself
size_t memory_of_block = SIZE_MAX;  // less than a device has, if a test wants it so
std::atomic<long> launches[2];      // cooperative or not
thread_local int current_device = 0;
thread_local std::string failure;
thread_local cudaError_t last_error = cudaSuccess;  // what cudaGetLastError has to tell

constexpr unsigned char kUntouched = 0xff;  // of which every floating-point type makes a NaN
thread_local std::vector<std::pair<unsigned char*, unsigned char*>> gaps;

// Of each device and kernel, what cudaFuncSetAttribute allowed.
std::mutex allowed_guard;
std::map<std::pair<int, const void*>, size_t> allowed;

size_t block_memory_of(const Device& device) {
  return device.block_memory < memory_of_block ? device.block_memory : memory_of_block;
}
size_t multiprocessor_memory_of(const Device& device) {
  const size_t of_one = block_memory_of(device) + device.reserved_memory;
  return of_one < device.multiprocessor_memory ? of_one : device.multiprocessor_memory;
}

size_t allowed_memory(const void* kernel) {
  const std::lock_guard<std::mutex> hold(allowed_guard);
  const auto found = allowed.find({current_device, kernel});
  return found == allowed.end() ? kPlainMemory : found->second;
}

// Every call of the runtime ends in this, as CUDA's do.
cudaError_t told(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

bool untouched() {
  return std::all_of(gaps.begin(), gaps.end(), [](const auto& gap) {
    return std::all_of(gap.first, gap.second, [](unsigned char c) { return c == kUntouched; });
  });
}

bool valid(const cudaLaunchConfig_t& config) {
  const dim3 g = config.gridDim, b = config.blockDim;
  return g.x && g.y && g.z && g.y < 65536 && g.z < 65536 && b.x && b.y && b.z &&
         count(b) <= kThreadsOfBlock;
}

}  // namespace

cudaError_t attributes(cudaFuncAttributes* out) {
  out->ptxVersion = kDevice[current_device].architecture;
  return cudaSuccess;
}

cudaError_t allow_memory(const void* kernel, cudaFuncAttribute, int bytes) {
  const size_t most = block_memory_of(kDevice[current_device]);
  if (bytes < 0 || static_cast<size_t>(bytes) > most) return told(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> hold(allowed_guard);
  allowed[{current_device, kernel}] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t occupancy(int* blocks, const void* kernel, int threads, size_t memory) {
  if (threads < 1) return told(cudaErrorInvalidValue);
  const Device& device = kDevice[current_device];
  const size_t each = memory + device.reserved_memory;
  const size_t by_memory = each ? multiprocessor_memory_of(device) / each : SIZE_MAX;
  const size_t by_threads = threads_of_multiprocessor / ((threads + 31) / 32 * 32);
  const bool fits = threads <= kThreadsOfBlock && memory <= allowed_memory(kernel);
  *blocks = fits ? static_cast<int>(by_memory < by_threads ? by_memory : by_threads) : 0;
  return cudaSuccess;
}

void keep_gap(unsigned char* begin, unsigned char* end) {
  std::fill(begin, end, kUntouched);
  gaps.emplace_back(begin, end);
}

void forget_gaps() { gaps.clear(); }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& call) {
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeCooperative) return told(cudaErrorNotSupported);
    cooperative = config.attrs[i].val.cooperative != 0;
  }
  if (!valid(config)) return told(cudaErrorInvalidConfiguration);
  if (config.dynamicSmemBytes > allowed_memory(kernel)) return told(cudaErrorInvalidValue);
  if (cooperative) {
    if (!kDevice[current_device].cooperates) return told(cudaErrorNotSupported);
    int each = 0;
    occupancy(&each, kernel, static_cast<int>(count(config.blockDim)), config.dynamicSmemBytes);
    if (count(config.gridDim) > static_cast<unsigned>(each * multiprocessors))
      return told(cudaErrorCooperativeLaunchTooLarge);
  }
  ++launches[cooperative];
  failure = run_grid(config, cooperative, call);
  if (failure.empty() && !untouched()) failure = "a kernel wrote between arrays of its workspace";
  return told(failure.empty() ? cudaSuccess : cudaErrorLaunchFailure);
}

}  // namespace cuda_host

cudaError_t cudaGetDevice(int* device) {
  *device = cuda_host::current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cuda_host::kDevices) return cuda_host::told(cudaErrorInvalidDevice);
  cuda_host::current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= cuda_host::kDevices) return cuda_host::told(cudaErrorInvalidDevice);
  const auto answer = [&](size_t found) {
    *value = static_cast<int>(found);
    return cudaSuccess;
  };
  const cuda_host::Device& d = cuda_host::kDevice[device];
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock: return answer(cuda_host::kPlainMemory);
    case cudaDevAttrMultiProcessorCount: return answer(cuda_host::claimed_multiprocessors);
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return answer(cuda_host::threads_of_multiprocessor);
    case cudaDevAttrComputeCapabilityMajor: return answer(d.architecture / 10);
    case cudaDevAttrComputeCapabilityMinor: return answer(d.architecture % 10);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return answer(cuda_host::multiprocessor_memory_of(d));
    case cudaDevAttrCooperativeLaunch: return answer(d.cooperates);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return answer(cuda_host::block_memory_of(d));
    case cudaDevAttrReservedSharedMemoryPerBlock: return answer(d.reserved_memory);
  }
  return cuda_host::told(cudaErrorInvalidValue);
}
// A launch has run when cudaLaunchKernelEx returns, and has returned its error.
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_host::last_error;
  cuda_host::last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
  }
  return "unknown";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? cuda_host::failure.c_str() : cudaGetErrorName(error);
}

// ---- for the tests, through ctypes --------------------------------------------------------------
#pragma GCC visibility push(default)
extern "C" {
// The error that nobody has asked for yet.
int cuda_host_pending_error() { return cuda_host::last_error; }
// The size of all devices from here on, and what they claim, which may be more.
void cuda_host_multiprocessors(int count, int claimed) {
  cuda_host::multiprocessors = count;
  cuda_host::claimed_multiprocessors = claimed;
}
void cuda_host_threads_of_multiprocessor(int count) {
  cuda_host::threads_of_multiprocessor = count;
}
// Shared memory of a block on all devices from here on, and with it of a multiprocessor; at most
// what they have.
void cuda_host_block_memory(size_t bytes) { cuda_host::memory_of_block = bytes; }
// How many grids have been launched so far.
long cuda_host_launches(int cooperative) { return cuda_host::launches[cooperative != 0]; }
}
#pragma GCC visibility pop

// The host's side of CUDA's runtime: pretend devices, and launches on them.
//
// Device 0 is of sm_90 and has tensor cores; device 1 is of sm_75; device 2 is like the first, but
// refuses cooperative launches; device 64 is like the first, too, and one more than the driver
// remembers anything of. All have few and small multiprocessors, so that grids which do not fit can
// be tested.
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
  int index;
  int architecture;  // 10 · major + minor
  size_t block_memory, multiprocessor_memory;
  size_t reserved_memory;  // of every block
  bool cooperates;
};
constexpr Device kDevices[] = {{0, 90, 227 * kKiB, 228 * kKiB, kKiB, true},
                               {1, 75, 64 * kKiB, 64 * kKiB, 0, true},
                               {2, 90, 227 * kKiB, 228 * kKiB, kKiB, false},
                               {64, 90, 227 * kKiB, 228 * kKiB, kKiB, true}};

// Null: there is none.
const Device* find_device(int index) {
  for (const Device& device : kDevices)
    if (device.index == index) return &device;
  return nullptr;
}

int multiprocessors = 4, threads_of_multiprocessor = 1024;
int claimed_multiprocessors = 4;    // what a device says of itself
size_t memory_of_block = SIZE_MAX;  // less than a device has, if a test wants it so
std::atomic<long> launches[2];      // cooperative or not
thread_local const Device* current_device = kDevices;
thread_local long launches_to_failure = -1;  // as many succeed; -1: all do
thread_local cudaError_t launch_error = cudaSuccess;
thread_local cudaError_t attributes_error = cudaSuccess;  // what the next question is answered with
thread_local std::string failure;
thread_local cudaError_t last_error = cudaSuccess;  // what cudaGetLastError has to tell

constexpr unsigned char kUntouched = 0xff;  // of which every floating-point type makes a NaN
thread_local std::vector<std::pair<unsigned char*, unsigned char*>> gaps;

// Of each device and kernel, what cudaFuncSetAttribute allowed; of each device and stream, its
// launches.
std::mutex maps_guard;
std::map<std::pair<int, const void*>, size_t> allowed;
std::map<std::pair<int, const void*>, long> launches_on;

size_t block_memory_of(const Device& device) {
  return device.block_memory < memory_of_block ? device.block_memory : memory_of_block;
}
size_t multiprocessor_memory_of(const Device& device) {
  const size_t of_one = block_memory_of(device) + device.reserved_memory;
  return of_one < device.multiprocessor_memory ? of_one : device.multiprocessor_memory;
}

size_t allowed_memory(const void* kernel) {
  const std::lock_guard<std::mutex> hold(maps_guard);
  const auto found = allowed.find({current_device->index, kernel});
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
  out->ptxVersion = current_device->architecture;
  return told(std::exchange(attributes_error, cudaSuccess));
}

cudaError_t allow_memory(const void* kernel, cudaFuncAttribute, int bytes) {
  const size_t most = block_memory_of(*current_device);
  if (bytes < 0 || static_cast<size_t>(bytes) > most) return told(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> hold(maps_guard);
  allowed[{current_device->index, kernel}] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t occupancy(int* blocks, const void* kernel, int threads, size_t memory) {
  if (threads < 1) return told(cudaErrorInvalidValue);
  const Device& device = *current_device;
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
    if (!current_device->cooperates) return told(cudaErrorNotSupported);
    int each = 0;
    occupancy(&each, kernel, static_cast<int>(count(config.blockDim)), config.dynamicSmemBytes);
    if (count(config.gridDim) > static_cast<unsigned>(each * multiprocessors))
      return told(cudaErrorCooperativeLaunchTooLarge);
  }
  if (launches_to_failure >= 0 && launches_to_failure-- == 0) return told(launch_error);
  ++launches[cooperative];
  {
    const std::lock_guard<std::mutex> hold(maps_guard);
    ++launches_on[{current_device->index, config.stream}];
  }
  failure = run_grid(config, cooperative, call);
  if (failure.empty() && !untouched()) failure = "a kernel wrote between arrays of its workspace";
  return told(failure.empty() ? cudaSuccess : cudaErrorLaunchFailure);
}

}  // namespace cuda_host

cudaError_t cudaGetDevice(int* device) {
  *device = cuda_host::current_device->index;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  const cuda_host::Device* found = cuda_host::find_device(device);
  if (!found) return cuda_host::told(cudaErrorInvalidDevice);
  cuda_host::current_device = found;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const cuda_host::Device* asked = cuda_host::find_device(device);
  if (!asked) return cuda_host::told(cudaErrorInvalidDevice);
  const auto answer = [&](size_t found) {
    *value = static_cast<int>(found);
    return cudaSuccess;
  };
  const cuda_host::Device& d = *asked;
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
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
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
long cuda_host_launches_on(int device, const void* stream) {
  const std::lock_guard<std::mutex> hold(cuda_host::maps_guard);
  return cuda_host::launches_on[{device, stream}];
}
// Of this thread's launches, so many succeed from here on and the next fails with this error, once;
// -1: none fails.
void cuda_host_fail_launch(long index, int error) {
  cuda_host::launches_to_failure = index;
  cuda_host::launch_error = static_cast<cudaError_t>(error);
}
// Lets this thread's next cudaFuncGetAttributes fail; 0: it does not.
void cuda_host_fail_attributes(int error) {
  cuda_host::attributes_error = static_cast<cudaError_t>(error);
}
int cuda_host_current_device() { return cuda_host::current_device->index; }
void cuda_host_make_current(int device) { cudaSetDevice(device); }
}
#pragma GCC visibility pop

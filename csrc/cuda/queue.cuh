// What a call does on the host: makes its device current, cuts up its workspace, queues kernels.
#pragma once

#include "cuda/driver.h"
#include "cuda/steps.cuh"

namespace rnnkern {

Status device_failed(cudaError_t error);  // remembers it for cuda_error()

// Makes a device current, and what was current before again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess && before_ != device;
    if (error_ != cudaSuccess) cudaGetLastError();  // or torch's next check would find it
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

// Cuts the workspace into arrays; without memory it only counts.
struct Carver {
  unsigned char* base;
  size_t used = 0;
  WorkspaceWatch watch{};

  template <class T>
  void take(T*& array, int64_t elements) {
    array = base ? reinterpret_cast<T*>(base + used) : nullptr;
    const size_t end = used + static_cast<size_t>(elements) * sizeof(T);
    used = (end + 255) / 256 * 256 + watch.gap;
    if (base) watch.keep(base + end, base + used);
  }
};

constexpr int kPlainMemory = 48 << 10;  // bytes of shared memory that a block has without asking

// What the launches of all steps have in common, of one stage or several.
template <class Argument>
struct StepKernel {
  void (*kernel)(Argument);
  int stages = 0;
  int64_t unit_tiles = 0;  // blocks that 8·RN rows take in the stage that takes most
  int memory = 0;          // of a block, in the stage that needs most

  // One more stage, of NG products a unit.
  template <class Product, int NG, int RN, bool wide>
  void add_stage(int64_t units) {
    constexpr int NU = kUnitTiles<NG, wide>;
    constexpr int needed = Product::template memory<NU, NG, RN>();
    static_assert(needed <= kPlainMemory, "too many gates in one phase");
    const int64_t tiles = (units + NU * kUnits - 1) / (NU * kUnits);
    ++stages;
    unit_tiles = tiles > unit_tiles ? tiles : unit_tiles;
    memory = needed > memory ? needed : memory;
  }
};

// Queues kernels on the call's stream; after the first failure it does nothing more.
class Queue {
 public:
  Queue(const CudaCall& call, const CudaPlan& plan)
      : device_(call.device),
        stream_(static_cast<cudaStream_t>(call.stream)),
        rows_of_block_(8 * plan.row_tiles) {}

  template <class Argument>
  void elements(void (*kernel)(Argument), int64_t count, const Argument& argument) {
    launch(kernel, dim3(blocks(count, kThreads)), {}, argument);
  }

  // Blocks of a step of several stages that the device runs at once, since they wait for each
  // other; asked for once a call. 0 for a step of one stage, whose grid has no limit.
  template <class Argument>
  int64_t resident(const StepKernel<Argument>& step) {
    if (step.stages == 1) return 0;
    int cooperates = 0, multiprocessors = 0, each = 0;
    fail(cudaDeviceGetAttribute(&cooperates, cudaDevAttrCooperativeLaunch, device_));
    fail(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device_));
    fail(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, step.kernel, kThreads, step.memory));
    if (!cooperates) fail(cudaErrorNotSupported);
    if (each < 1 || multiprocessors < 1) fail(cudaErrorCooperativeLaunchTooLarge);
    return static_cast<int64_t>(each) * multiprocessors;
  }

  // A context may have less of the device than the device says. Then `resident` shrinks until CUDA
  // takes the grid: results do not depend on it.
  template <class Argument>
  void step(const StepKernel<Argument>& step, int64_t& resident, const Argument& argument) {
    const int64_t tiles =
        step.unit_tiles * static_cast<int64_t>(blocks(argument.rows, rows_of_block_));
    const int64_t directions = argument.p.D;
    if (tiles == 0) return;
    if (tiles > INT32_MAX / directions) return fail(cudaErrorInvalidConfiguration);
    if (step.stages == 1) {
      const dim3 grid(static_cast<unsigned>(tiles), 1, static_cast<unsigned>(directions));
      launch(step.kernel, grid, {step.memory, false}, argument);
    } else {
      const int64_t all = tiles * directions;
      int64_t grid = all < resident ? all : resident;
      const auto start = [&] {
        return try_launch(step.kernel, dim3(static_cast<unsigned>(grid)), {step.memory, true},
                          argument);
      };
      cudaError_t error = start();
      while (error == cudaErrorCooperativeLaunchTooLarge && grid > 1) {
        cudaGetLastError();
        resident = grid = grid / 2;
        error = start();
      }
      fail(error);
    }
  }

  struct Options {
    int memory = 0;            // dynamic shared memory of a block
    bool cooperative = false;  // the grid runs all at once, or the launch fails
  };
  template <class... Arguments>
  void launch(void (*kernel)(Arguments...), dim3 grid, const Options& options,
              Arguments... arguments) {
    fail(try_launch(kernel, grid, options, arguments...));
  }
  template <class... Arguments>
  cudaError_t try_launch(void (*kernel)(Arguments...), dim3 grid, const Options& options,
                         Arguments... arguments) {
    if (error_ != cudaSuccess) return error_;
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(options.memory);
    config.stream = stream_;
    config.attrs = &cooperative;
    config.numAttrs = options.cooperative ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
  }

  static unsigned blocks(int64_t count, int64_t each) {
    return static_cast<unsigned>((count + each - 1) / each);
  }

  void fail(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }
  cudaError_t error() const { return error_; }
  Status status() const { return error_ == cudaSuccess ? Status::ok : device_failed(error_); }

 private:
  int device_;
  cudaStream_t stream_;
  int64_t rows_of_block_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace rnnkern

// Runs a grid on one OS thread. Every CUDA thread is a fiber, and whenever one waits, at a block's
// barrier or for its warp, a randomly drawn other one goes on; so code that lacks a barrier soon
// reads what has not been written. Shared memory starts as NaN. A few blocks, drawn at random too,
// are on the "device" at a time.
//
// What it cannot see: data races within the order it draws, and the GPU's memory model.
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define CUDA_HOST_ADDRESS_SANITIZER 1
#else
#define CUDA_HOST_ADDRESS_SANITIZER 0
#endif

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {
namespace {

constexpr size_t kStackBytes = CUDA_HOST_ADDRESS_SANITIZER ? 512 << 10 : 128 << 10;
constexpr unsigned kResidentBlocks = 4;

thread_local std::mt19937_64 generator{1};
thread_local long dropped_barrier = -1;
thread_local int current_device = 0;
thread_local std::string failure;
constexpr int kDevices = 2;
constexpr int kArchitecture[kDevices] = {90, 75};  // 10 · major + minor

struct Fiber;

struct Warp {
  std::vector<void*> arguments;
  std::vector<Fiber*> waiting;
  const char* name = nullptr;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<Fiber*> at_barrier;
  std::unique_ptr<unsigned char[]> memory;
  unsigned live = 0;
};

using Stack = std::unique_ptr<unsigned char[]>;

struct Fiber {
  dim3 index, block_index;
  Block* block;
  Stack stack;
  ucontext_t context;
  jmp_buf where;
  bool started = false;
  long barriers = 0;
  void* fake_stack = nullptr;
};

struct Grid {
  const std::function<void()>* kernel;
  ucontext_t context;
  jmp_buf where;
  std::vector<Fiber*> runnable;
  Fiber* now = nullptr;
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
};

thread_local Grid* grid = nullptr;
thread_local std::vector<Stack> spare_stacks;

unsigned draw(size_t n) { return static_cast<unsigned>(generator() % n); }

// ---- switching: setjmp is fast; AddressSanitizer wants to be told, and gets ucontext ----------
#if CUDA_HOST_ADDRESS_SANITIZER
void resume(Fiber& f) {
  __sanitizer_start_switch_fiber(&grid->fake_stack, f.stack.get(), kStackBytes);
  swapcontext(&grid->context, &f.context);
  __sanitizer_finish_switch_fiber(grid->fake_stack, nullptr, nullptr);
}
void leave(Fiber& f, bool for_good) {
  __sanitizer_start_switch_fiber(for_good ? nullptr : &f.fake_stack, grid->stack_bottom,
                                 grid->stack_bytes);
  swapcontext(&f.context, &grid->context);
  __sanitizer_finish_switch_fiber(f.fake_stack, &grid->stack_bottom, &grid->stack_bytes);
}
void entered() {
  __sanitizer_finish_switch_fiber(nullptr, &grid->stack_bottom, &grid->stack_bytes);
}
#else
void resume(Fiber& f) {
  if (_setjmp(grid->where)) return;
  if (f.started) _longjmp(f.where, 1);
  f.started = true;
  setcontext(&f.context);
}
void leave(Fiber& f, bool for_good) {
  if (for_good || !_setjmp(f.where)) _longjmp(grid->where, 1);
}
void entered() {}
#endif

void fiber_main() {
  entered();
  (*grid->kernel)();
  Fiber& f = *grid->now;
  --f.block->live;
  leave(f, true);
}

// The fiber that runs waits until someone makes it runnable again.
void wait() { leave(*grid->now, false); }

void release(std::vector<Fiber*>& waiting) {
  for (Fiber* f : waiting) grid->runnable.push_back(f);
  waiting.clear();
}

std::unique_ptr<Block> start_block(const cudaLaunchConfig_t& config, unsigned index) {
  auto block = std::make_unique<Block>();
  const dim3 size = config.blockDim, count = config.gridDim;
  const unsigned threads = size.x * size.y * size.z;
  block->memory.reset(new unsigned char[config.dynamicSmemBytes]);
  std::memset(block->memory.get(), 0xff, config.dynamicSmemBytes);
  block->warps.resize((threads + 31) / 32);
  block->live = threads;
  for (unsigned i = 0; i < threads; ++i) {
    auto f = std::make_unique<Fiber>();
    if (spare_stacks.empty()) spare_stacks.emplace_back(new unsigned char[kStackBytes]);
    f->stack = std::move(spare_stacks.back());
    spare_stacks.pop_back();
    f->block = block.get();
    f->block_index = dim3(index % count.x, index / count.x % count.y, index / count.x / count.y);
    f->index = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack.get();
    f->context.uc_stack.ss_size = kStackBytes;
    f->context.uc_link = nullptr;
    makecontext(&f->context, fiber_main, 0);
    grid->runnable.push_back(f.get());
    block->fibers.push_back(std::move(f));
  }
  return block;
}

void run(const cudaLaunchConfig_t& config) {
  std::vector<unsigned> queue(config.gridDim.x * config.gridDim.y * config.gridDim.z);
  for (unsigned i = 0; i < queue.size(); ++i) queue[i] = i;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  std::vector<std::unique_ptr<Block>> resident;
  while (!queue.empty() || !resident.empty()) {
    while (!queue.empty() && resident.size() < kResidentBlocks) {
      std::swap(queue[draw(queue.size())], queue.back());
      resident.push_back(start_block(config, queue.back()));
      queue.pop_back();
    }
    if (grid->runnable.empty()) throw std::runtime_error("deadlock: threads wait for each other");
    std::swap(grid->runnable[draw(grid->runnable.size())], grid->runnable.back());
    grid->now = grid->runnable.back();
    grid->runnable.pop_back();
    Block* block = grid->now->block;
    threadIdx = grid->now->index;
    blockIdx = grid->now->block_index;
    resume(*grid->now);
    if (!failure.empty()) throw std::runtime_error(failure);
    if (block->live > 0) continue;
    for (size_t i = 0; i < resident.size(); ++i) {
      if (resident[i].get() != block) continue;
      for (auto& f : block->fibers) spare_stacks.push_back(std::move(f->stack));
      std::swap(resident[i], resident.back());
      resident.pop_back();
      break;
    }
  }
}

}  // namespace

unsigned char* block_memory() { return grid->now->block->memory.get(); }

void sync_block() {
  Fiber& f = *grid->now;
  if (f.barriers++ == dropped_barrier) return;
  Block& block = *f.block;
  if (block.live != block.fibers.size()) failure = "a thread left before a barrier of its block";
  block.at_barrier.push_back(&f);
  if (block.at_barrier.size() == block.fibers.size()) release(block.at_barrier);
  wait();
}

void collective(const char* name, void* argument, void (*run)(void* const* arguments)) {
  Fiber& f = *grid->now;
  const unsigned index = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  Warp& warp = f.block->warps[index / 32];
  if (warp.waiting.empty()) {
    warp.name = name;
    warp.arguments.assign(32, nullptr);
  }
  if (std::strcmp(warp.name, name) != 0) failure = "lanes of a warp wait for different things";
  warp.arguments[index % 32] = argument;
  warp.waiting.push_back(&f);
  if (warp.waiting.size() == 32) {
    run(warp.arguments.data());
    release(warp.waiting);
  }
  wait();
}

cudaError_t attributes(cudaFuncAttributes* out) {
  out->ptxVersion = kArchitecture[current_device];
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const dim3 g = config.gridDim, b = config.blockDim;
  const bool valid = g.x && g.y && g.z && g.y < 65536 && g.z < 65536 && b.x && b.y && b.z &&
                     b.x * b.y * b.z <= 1024 && config.dynamicSmemBytes <= 48 << 10;
  if (!valid) return cudaErrorInvalidConfiguration;
  Grid here;
  here.kernel = &kernel;
  failure.clear();
  grid = &here;
  cudaError_t error = cudaSuccess;
  try {
    run(config);
  } catch (const std::runtime_error& e) {
    failure = e.what();
    error = cudaErrorLaunchFailure;
  }
  grid = nullptr;
  return error;
}

}  // namespace cuda_host

cudaError_t cudaGetDevice(int* device) {
  *device = cuda_host::current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cuda_host::kDevices) return cudaErrorInvalidDevice;
  cuda_host::current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "unknown";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? cuda_host::failure.c_str() : cudaGetErrorName(error);
}

// ---- for the tests, through ctypes --------------------------------------------------------------
#pragma GCC visibility push(default)
extern "C" {
// The order of all threads from here on follows from the seed.
void cuda_host_seed(uint64_t seed) { cuda_host::generator.seed(seed); }
// In every thread of every launch, barrier number `index` does not wait; -1: all do.
void cuda_host_drop_barrier(long index) { cuda_host::dropped_barrier = index; }
}
#pragma GCC visibility pop

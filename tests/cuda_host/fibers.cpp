// Runs a grid on one OS thread. Every CUDA thread is a fiber. Where one waits, at a barrier of its
// block or grid or for its warp, or touches memory as blocks do to exchange flags, a randomly drawn
// other one goes on; so code that lacks a barrier soon reads what has not been written. In half of
// all launches some warps are seldom drawn, so that the others get far ahead of them. Shared memory
// starts as NaN. A few blocks, drawn at random too, are on the "device" at a time; of a
// cooperative launch, all. Threads that wait for what never comes end the launch as a deadlock.
//
// What it cannot see: data races within the order it draws, and the GPU's memory model.
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "shim.h"

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
constexpr unsigned kMostBlocks = 4;  // at a time, if the launch is not cooperative
// Polls that find nothing new, in a row, for each runnable thread: a thread that could go on is not
// drawn in so many draws with a probability of e^-100.
constexpr size_t kIdlePolls = 100;
// Polls until someone writes, whatever else happens, for each thread: for loops with a barrier in.
constexpr size_t kMostPolls = 1 << 13;
// One of so many draws of a thread of a slow warp counts, and one of so many warps is slow.
constexpr size_t kSlowness = 64, kSlowWarps = 4;

thread_local std::mt19937_64 generator{1};
thread_local long dropped_barrier = -1, dropped_grid_barrier = -1;
thread_local long dropped_release = -1, dropped_wait = -1;

struct Fiber;

// From stack to stack. AddressSanitizer must be told; and in its own versions of libc's functions
// it clears what it knows of a whole stack at every switch, so there the compiler's serve.
#if CUDA_HOST_ADDRESS_SANITIZER
using Place = void* [5];
#define SET_PLACE(place) __builtin_setjmp(place)
#define GO_TO(place) __builtin_longjmp(place, 1)
#define START_SWITCH __sanitizer_start_switch_fiber
#define FINISH_SWITCH __sanitizer_finish_switch_fiber
#else
using Place = jmp_buf;
#define SET_PLACE(place) _setjmp(place)
#define GO_TO(place) _longjmp(place, 1)
#define START_SWITCH(...)
#define FINISH_SWITCH(...)
#endif

struct Warp {
  std::vector<void*> arguments;
  std::vector<Fiber*> waiting;
  const char* name = nullptr;
  void (*run)(void* const*) = nullptr;
  bool slow = false;
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
  Warp* warp;
  Stack stack;
  ucontext_t context;
  Place where;
  bool started = false;
  long barriers = 0, grid_barriers = 0, releases = 0;
  const void* polled = nullptr;  // where, and what was there
  uint64_t found = 0;
  void* fake_stack = nullptr;
};

struct Grid {
  const std::function<void()>* kernel;
  bool cooperative;
  unsigned threads;
  bool slow_warps;
  unsigned left = 0;  // threads that have returned
  std::vector<Fiber*> at_barrier;
  size_t idle_polls = 0;
  size_t polls = 0;
  std::string failure;
  Place where;
  std::vector<Fiber*> runnable;
  Fiber* now = nullptr;
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
};

thread_local Grid* grid = nullptr;
thread_local std::vector<Stack> spare_stacks;

unsigned draw(size_t n) { return static_cast<unsigned>(generator() % n); }

// Not instrumented, since the stack pointer in them is not always of the stack they are told of.
__attribute__((no_sanitize("address"))) void resume(Fiber& f) {
  START_SWITCH(&grid->fake_stack, f.stack.get(), kStackBytes);
  if (!SET_PLACE(grid->where)) {
    if (f.started) GO_TO(f.where);
    f.started = true;
    setcontext(&f.context);
  }
  FINISH_SWITCH(grid->fake_stack, nullptr, nullptr);
}

__attribute__((no_sanitize("address"))) void leave(Fiber& f, bool for_good) {
  START_SWITCH(for_good ? nullptr : &f.fake_stack, grid->stack_bottom, grid->stack_bytes);
  if (for_good || !SET_PLACE(f.where)) GO_TO(grid->where);
  FINISH_SWITCH(f.fake_stack, &grid->stack_bottom, &grid->stack_bytes);
}

void fiber_main() {
  FINISH_SWITCH(nullptr, &grid->stack_bottom, &grid->stack_bytes);
  (*grid->kernel)();
  Fiber& f = *grid->now;
  --f.block->live;
  ++grid->left;
  grid->idle_polls = 0;
  grid->polls = 0;
  leave(f, true);
}

// The fiber that runs waits until someone makes it runnable again.
void wait() {
  grid->idle_polls = 0;
  leave(*grid->now, false);
}

// Of several reasons in one launch the first stands.
void record(const std::string& reason) {
  if (grid->failure.empty()) grid->failure = reason;
}

std::string place(const char* what, dim3 at) {
  return std::string(what) + " (" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " +
         std::to_string(at.z) + ")";
}

void go_on_later() {
  if (grid->idle_polls > kIdlePolls * (grid->runnable.size() + 10) ||
      ++grid->polls > kMostPolls * grid->threads)
    record("deadlock: threads poll for what nobody writes");
  grid->runnable.push_back(grid->now);
  leave(*grid->now, false);
}

void release(std::vector<Fiber*>& waiting) {
  for (Fiber* f : waiting) grid->runnable.push_back(f);
  waiting.clear();
}

std::unique_ptr<Block> start_block(const cudaLaunchConfig_t& config, unsigned index) {
  auto block = std::make_unique<Block>();
  const dim3 size = config.blockDim, blocks = config.gridDim;
  const unsigned threads = count(size);
  block->memory.reset(new unsigned char[config.dynamicSmemBytes]);
  std::memset(block->memory.get(), 0xff, config.dynamicSmemBytes);
  block->warps.resize((threads + 31) / 32);
  for (Warp& warp : block->warps) warp.slow = grid->slow_warps && draw(kSlowWarps) == 0;
  block->live = threads;
  for (unsigned i = 0; i < threads; ++i) {
    auto f = std::make_unique<Fiber>();
    if (spare_stacks.empty()) spare_stacks.emplace_back(new unsigned char[kStackBytes]);
    f->stack = std::move(spare_stacks.back());
    spare_stacks.pop_back();
    f->block = block.get();
    f->warp = &block->warps[i / 32];
    f->block_index =
        dim3(index % blocks.x, index / blocks.x % blocks.y, index / blocks.x / blocks.y);
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

// The place of the thread that goes on. Where threads poll, no warp is slow: they would poll often
// enough to be taken for a deadlock.
size_t draw_runnable() {
  const std::vector<Fiber*>& from = grid->runnable;
  size_t i = draw(from.size());
  while (grid->idle_polls == 0 && from[i]->warp->slow && draw(kSlowness) != 0)
    i = draw(from.size());
  return i;
}

void run(const cudaLaunchConfig_t& config) {
  std::vector<unsigned> queue(count(config.gridDim));
  for (unsigned i = 0; i < queue.size(); ++i) queue[i] = i;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  const size_t room = grid->cooperative ? queue.size() : 1 + draw(kMostBlocks);
  std::vector<std::unique_ptr<Block>> resident;
  while (!queue.empty() || !resident.empty()) {
    while (!queue.empty() && resident.size() < room) {
      std::swap(queue[draw(queue.size())], queue.back());
      resident.push_back(start_block(config, queue.back()));
      queue.pop_back();
    }
    if (grid->runnable.empty()) return record("deadlock: threads wait for each other");
    std::swap(grid->runnable[draw_runnable()], grid->runnable.back());
    grid->now = grid->runnable.back();
    grid->runnable.pop_back();
    Block* block = grid->now->block;
    threadIdx = grid->now->index;
    blockIdx = grid->now->block_index;
    resume(*grid->now);
    if (!grid->failure.empty()) return;
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
  if (block.live != block.fibers.size()) record("a thread left before a barrier of its block");
  block.at_barrier.push_back(&f);
  if (block.at_barrier.size() == block.fibers.size()) release(block.at_barrier);
  wait();
}

void sync_grid() {
  Fiber& f = *grid->now;
  if (!grid->cooperative) return fail("a grid's barrier in a launch that is not cooperative,");
  if (f.grid_barriers++ == dropped_grid_barrier) return;
  if (grid->left > 0) record("a thread left before a barrier of its grid");
  grid->at_barrier.push_back(&f);
  if (grid->at_barrier.size() == grid->threads) release(grid->at_barrier);
  wait();
}

void collective(const char* name, void* argument, void (*run)(void* const* arguments)) {
  Fiber& f = *grid->now;
  const unsigned index = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  Warp& warp = *f.warp;
  if (warp.waiting.empty()) {
    warp.name = name;
    warp.run = run;
    warp.arguments.assign(32, nullptr);
  }
  if (warp.run != run) {
    record(std::string("lanes of a warp part: ") + warp.name + " and " + name +
           ", or one of them on different types");
    return wait();
  }
  warp.arguments[index % 32] = argument;
  warp.waiting.push_back(&f);
  if (warp.waiting.size() == 32) {
    run(warp.arguments.data());
    release(warp.waiting);
  }
  wait();
}

void make_way() { go_on_later(); }

void make_way(const void* address, uint64_t before, uint64_t after) {
  Fiber& f = *grid->now;
  const bool idle = before == after && f.polled == address && f.found == after;
  grid->idle_polls = idle ? grid->idle_polls + 1 : 0;
  if (before != after) grid->polls = 0;
  f.polled = address;
  f.found = after;
  go_on_later();
}

bool drops_release() { return grid->now->releases++ == dropped_release; }
bool drops_wait() { return dropped_wait >= 0 && grid->now->releases == dropped_wait + 1; }

void fail(const char* message) {
  record(message + place(" in block", blockIdx) + place(", thread", threadIdx));
  wait();
}

std::string run_grid(const cudaLaunchConfig_t& config, bool cooperative,
                     const std::function<void()>& kernel) {
  Grid here;
  here.kernel = &kernel;
  here.cooperative = cooperative;
  here.threads = count(config.gridDim) * count(config.blockDim);
  here.slow_warps = draw(2) == 0;
  grid = &here;
  run(config);
  grid = nullptr;
  return here.failure;
}

}  // namespace cuda_host

// ---- for the tests, through ctypes --------------------------------------------------------------
#pragma GCC visibility push(default)
extern "C" {
// The order of all threads from here on follows from the seed.
void cuda_host_seed(uint64_t seed) { cuda_host::generator.seed(seed); }
// In every thread of every launch, barrier number `index` does not wait; -1: all do.
void cuda_host_drop_barrier(long index) { cuda_host::dropped_barrier = index; }
void cuda_host_drop_grid_barrier(long index) { cuda_host::dropped_grid_barrier = index; }
// In every thread of every launch, release number `index` is left out; or what the thread acquires
// between that release and its next one is found at once; -1: none.
void cuda_host_drop_release(long index) { cuda_host::dropped_release = index; }
void cuda_host_drop_wait(long index) { cuda_host::dropped_wait = index; }
}
#pragma GCC visibility pop

// The exchange between the blocks of a group (cuda/exchange.cuh) alone, every thread of every block
// a thread of the host, so that ThreadSanitizer sees which access is ordered before which. A step
// reads all of one slot and writes the thread's own element of the other, as those of
// forward_sequence and backward_sequence do; then the same with a second exchange in each step, of
// what has one slot. An argument takes a part of the protocol away, and a race must be reported:
//
//   exchange_test [wait | release | barrier | slot]
#include "cuda/exchange.cuh"

#include <pthread.h>

#include <cstdio>
#include <cstring>
#include <vector>

namespace {

using rnnkern::Group;

constexpr unsigned kBlocks = 3, kThreadsOfBlock = 2, kThreads = kBlocks * kThreadsOfBlock;
constexpr uint64_t kSteps = 300;

uint64_t h[2][kThreads], q[kThreads], arrived[rnnkern::kCounterWords];
pthread_barrier_t barrier_of_block[kBlocks];
thread_local pthread_barrier_t* own_barrier;
bool barriers = true;
unsigned slots = 2;

uint64_t next_h(const uint64_t (&before)[kThreads], unsigned unit) {
  uint64_t sum = unit;
  for (unsigned k = 0; k < kThreads; ++k) sum = sum * 31 + before[k];
  return sum;
}

void run_thread(unsigned phases, unsigned block, unsigned thread) {
  threadIdx.x = thread;
  own_barrier = &barrier_of_block[block];
  const Group group{arrived, kBlocks};
  const unsigned unit = block * kThreadsOfBlock + thread;
  for (uint64_t i = 0; i < kSteps; ++i) {
    const auto& before = h[i % slots];
    group.wait(phases * i);
    if (phases == 2) {
      q[unit] = next_h(before, unit);
      group.arrive();
      group.wait(phases * i + 1);
    }
    h[(i + 1) % slots][unit] = next_h(phases == 2 ? q : before, unit);
    group.arrive();
  }
}

void run(unsigned phases) {
  std::memset(h, 0, sizeof h);
  arrived[0] = 0;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < kThreads; ++i)
    threads.emplace_back(run_thread, phases, i / kThreadsOfBlock, i % kThreadsOfBlock);
  for (std::thread& thread : threads) thread.join();
}

bool same_as_in_turn(unsigned phases) {
  uint64_t expected[kThreads] = {};
  for (uint64_t i = 0; i < phases * kSteps; ++i) {
    uint64_t next[kThreads];
    for (unsigned unit = 0; unit < kThreads; ++unit) next[unit] = next_h(expected, unit);
    std::memcpy(expected, next, sizeof next);
  }
  return std::memcmp(expected, h[kSteps % slots], sizeof expected) == 0;
}

// Returns whether there is such a part.
bool take_away(const char* part) {
  const auto is = [&](const char* name) { return std::strcmp(part, name) == 0; };
  waits = !is("wait");
  releases = !is("release");
  barriers = !is("barrier");
  slots = is("slot") ? 1 : 2;
  return !waits || !releases || !barriers || slots == 1;
}

}  // namespace

void sync_block() {
  if (barriers) pthread_barrier_wait(own_barrier);
}

int main(int count, char** arguments) {
  if (count > 1 && !take_away(arguments[1])) {
    std::fprintf(stderr, "usage: exchange_test [wait | release | barrier | slot]\n");
    return 2;
  }
  for (auto& barrier : barrier_of_block) pthread_barrier_init(&barrier, nullptr, kThreadsOfBlock);
  for (const unsigned phases : {1u, 2u}) {
    run(phases);
    if (same_as_in_turn(phases)) continue;
    std::fprintf(stderr, "exchange_test: h is not what one thread computes\n");
    return 1;
  }
  return 0;
}

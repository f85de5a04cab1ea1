// The exchange of h between the blocks of a group (cuda/exchange.cuh) alone, every thread of every
// block a thread of the host, so that ThreadSanitizer sees which access is ordered before which. A
// step reads all of one slot and writes the thread's own element of the other, as those of
// forward_sequence do. An argument takes a part of the protocol away, and a race must be reported:
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

uint64_t h[2][kThreads], arrived[rnnkern::kCounterWords];
pthread_barrier_t barrier_of_block[kBlocks];
thread_local pthread_barrier_t* own_barrier;
bool barriers = true;
unsigned slots = 2;

uint64_t next_h(const uint64_t (&before)[kThreads], unsigned unit) {
  uint64_t sum = unit;
  for (unsigned k = 0; k < kThreads; ++k) sum = sum * 31 + before[k];
  return sum;
}

void run_thread(unsigned block, unsigned thread) {
  threadIdx.x = thread;
  own_barrier = &barrier_of_block[block];
  const Group group{arrived, kBlocks};
  const unsigned unit = block * kThreadsOfBlock + thread;
  for (uint64_t i = 0; i < kSteps; ++i) {
    group.wait(i);
    h[(i + 1) % slots][unit] = next_h(h[i % slots], unit);
    group.arrive();
  }
}

bool same_as_in_turn() {
  uint64_t expected[2][kThreads] = {};
  for (uint64_t i = 0; i < kSteps; ++i) {
    for (unsigned unit = 0; unit < kThreads; ++unit)
      expected[(i + 1) % 2][unit] = next_h(expected[i % 2], unit);
  }
  return std::memcmp(expected[kSteps % 2], h[kSteps % slots], sizeof h[0]) == 0;
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
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < kThreads; ++i)
    threads.emplace_back(run_thread, i / kThreadsOfBlock, i % kThreadsOfBlock);
  for (std::thread& thread : threads) thread.join();
  if (same_as_in_turn()) return 0;
  std::fprintf(stderr, "exchange_test: h is not what one thread computes\n");
  return 1;
}

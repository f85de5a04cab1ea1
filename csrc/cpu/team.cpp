// The barrier, the fork watch, and the team on OpenMP (or std::thread, for ThreadSanitizer).
#include "cpu/team.h"

#include <algorithm>
#include <chrono>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(RNNKERN_STD_THREADS)  // ThreadSanitizer cannot see into libgomp
#include <thread>
#include <vector>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace rnnkern {
namespace {

using Clock = std::chrono::steady_clock;

// About 20 µs on a 4 GHz core: longer than a step of most layers, shorter than a scheduler's time
// slice.
constexpr int kSpins = 2000;
// A yield that takes longer has let another thread run for about a time slice.
constexpr auto kLongYield = std::chrono::microseconds(500);

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void yield() {
#if defined(__unix__) || defined(__APPLE__)
  sched_yield();
#endif
}

// Sleeps while `word` has this value; where the system has no such thing, lets others run.
void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(SYS_futex)
  static_assert(sizeof(word) == sizeof(uint32_t));
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  (void)word, (void)value;
  yield();
#endif
}

void wake_all(std::atomic<uint32_t>& word) {
#if defined(SYS_futex)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

thread_local Patience patience;

// Lets others run; notes whether they did.
void offer_cpu() {
  const Clock::time_point before = Clock::now();
  yield();
  patience.yielded(Clock::now() - before > kLongYield);
}

std::atomic<bool> sleeps_at_once{false};
std::atomic<bool> forked_child{false};
std::atomic<bool> oversubscribing{false};

struct ForkWatch {
  ForkWatch() {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { forked_child.store(true, std::memory_order_relaxed); });
#endif
  }
} fork_watch;

}  // namespace

void Barrier::wait() {
  const uint32_t epoch = epoch_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == members_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    // Sequentially consistent, as what a sleeper does: it is seen here, or it sees the new epoch.
    epoch_.store(epoch + 1);
    if (sleepers_.load() > 0) wake_all(epoch_);
    return;
  }
  const auto waits = [&] { return epoch_.load(std::memory_order_acquire) == epoch; };
  const bool at_once = sleeps_at_once.load(std::memory_order_relaxed);
  for (int spins = at_once ? kSpins : 0; spins < kSpins; ++spins) {
    if (!waits()) return;
    relax();
  }
  while (waits()) {
    if (!at_once && !patience.sleeps()) {
      offer_cpu();
      continue;
    }
    sleepers_.fetch_add(1);
    sleep_while(epoch_, epoch);
    sleepers_.fetch_sub(1);
  }
}

void sleep_at_once(bool on) { sleeps_at_once.store(on, std::memory_order_relaxed); }

void allow_oversubscription(bool allow) { oversubscribing.store(allow, std::memory_order_relaxed); }

bool in_forked_child() { return forked_child.load(std::memory_order_relaxed); }

int usable_threads(int requested) {
  if (in_forked_child()) return 1;
  int cpus = requested;
#if defined(_OPENMP)
  // Not sched_getaffinity: with OMP_PROC_BIND the calling thread is bound to one CPU.
  if (!oversubscribing.load(std::memory_order_relaxed)) cpus = omp_get_num_procs();
#endif
  return std::max(1, std::min(requested, cpus));
}

void run_team(int threads, TeamBody body, void* context) {
  if (threads <= 1) return body(0, 1, context);
#if defined(RNNKERN_STD_THREADS)
  std::vector<std::thread> team;
  for (int rank = 1; rank < threads; ++rank) team.emplace_back(body, rank, threads, context);
  body(0, threads, context);
  for (std::thread& thread : team) thread.join();
#elif defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    const int rank = omp_get_thread_num();
    if (omp_get_num_threads() == threads) {
      body(rank, threads, context);
    } else if (rank == 0) {
      body(0, 1, context);
    }
  }
#else
  body(0, 1, context);
#endif
}

}  // namespace rnnkern

// The persistent thread team: all threads enter once, stay for the whole sequence, and meet at
// barriers.
//
// The pool is OpenMP's (torch's own libgomp, when torch was imported first). The barrier spins a
// bounded time and then yields, so more threads than cores slow a run down but never stall it. In a
// forked child the parent's pool does not exist, and an OpenMP region would wait for it forever:
// there the team is always one thread, which changes no result.
#pragma once

#include <atomic>
#include <cstdint>

namespace rnnkern {

class Barrier {
 public:
  explicit Barrier(int members = 1) : members_(members) {}
  void set_members(int members) { members_ = members; }
  void wait();

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  int members_;
};

// Whether this process is a forked child, which has none of its parent's OpenMP threads.
bool in_forked_child();

// The most threads a call should use now: `requested`, at most the CPUs this process may run on
// (unless that is lifted, as the tests do), and one in a forked child.
int usable_threads(int requested);
void allow_oversubscription(bool allow);

// Calls body(rank, size, context) on `threads` threads at once. The runtime may grant fewer than
// asked for; then rank 0 alone is called, with size 1.
using TeamBody = void (*)(int rank, int size, void* context);
void run_team(int threads, TeamBody body, void* context);

}  // namespace rnnkern

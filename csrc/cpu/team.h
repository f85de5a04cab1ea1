// The persistent thread team: all threads enter once, stay for the whole sequence, and meet at
// barriers.
//
// The pool is OpenMP's (torch's own libgomp, when torch was imported first). In a forked child the
// parent's pool does not exist, and an OpenMP region would wait for it forever: there the team is
// always one thread, which changes no result.
//
// The barrier. Most waits are shorter than a step, so a thread spins. After that another one of the
// team has probably lost its CPU, and this one offers its own to whoever waits for it. The offer
// returns at once where nobody does, and soon where another team takes it that will wait in turn.
// Where a thread takes it that never waits, a time slice is gone, and this one is away when the
// others come back: teams that go on so lose a slice at every barrier. So after a few such offers
// it sleeps instead, until the last of its team has come. Sleeping always would be worse
// beside another team: the scheduler may then put both threads of a team on one CPU.
#pragma once

#include <atomic>
#include <cstdint>

namespace rnnkern {

// Whether a thread that waits long sleeps, by what its yields have cost it: after kLongYields long
// ones in a row somebody is taken to want its CPU who never waits, and kSleeps waits end in sleep
// before a yield is tried again.
class Patience {
 public:
  static constexpr int kLongYields = 3, kSleeps = 64;
  void yielded(bool was_long) {
    in_a_row_ = was_long ? in_a_row_ + 1 : 0;
    if (in_a_row_ < kLongYields) return;
    in_a_row_ = 0;
    sleeps_left_ = kSleeps;
  }
  bool sleeps() { return sleeps_left_ > 0 && sleeps_left_-- > 0; }

 private:
  int in_a_row_ = 0, sleeps_left_ = 0;
};

class Barrier {
 public:
  explicit Barrier(int members = 1) : members_(members) {}
  void set_members(int members) { members_ = members; }
  void wait();

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<int> sleepers_{0};  // beside what they sleep on
  int members_;
};

// Lets threads sleep at a barrier without spinning first, as the tests do.
void sleep_at_once(bool on);

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

// Chooses the selected ISA's loops and times them on the team.
#include "cpu/roofline.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/driver.h"
#include "cpu/team.h"

namespace rnnkern {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kMostBytes = int64_t{1} << 40;

const RooflineLoops* const all_loops[] = {
    &baseline_roofline,
#if defined(__x86_64__)
    &avx2_roofline,     &avx512_roofline, &avx512_bf16_roofline, &amx_bf16_roofline,
#endif
};

const RooflineLoops* selected_loops() {
  for (const RooflineLoops* loops : all_loops) {
    if (std::strcmp(loops->isa, current_isa()) == 0) return loops;
  }
  return all_loops[0];
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Run {
  const RooflineLoops* loops;
  Quantity quantity;
  int64_t elements;  // of one thread's slice of data
  int64_t repeats;
  float* data;  // [threads,elements]
  Barrier barrier;
  Measured result;
  std::atomic<float> sink{0};  // what the loops return goes here, so that they are not left out

  void work(int rank, int64_t n) {
    float sum = 0;
    switch (quantity) {
      case Quantity::fma: sum = loops->fma(n); break;
      case Quantity::bf16: sum = loops->bf16(n); break;
      case Quantity::read: sum = loops->read(data + rank * elements, elements, n); break;
      case Quantity::barrier:
        for (int64_t i = 0; i < n; ++i) barrier.wait();
    }
    sink.store(sum, std::memory_order_relaxed);
  }

  double unit() const {
    switch (quantity) {
      case Quantity::fma: return loops->fma_flops;
      case Quantity::bf16: return loops->bf16_flops;
      case Quantity::read: return static_cast<double>(elements) * sizeof(float);
      case Quantity::barrier: return 1;
    }
    return 0;
  }

  void body(int rank, int size) {
    using Clock = std::chrono::steady_clock;
    if (size == 1) barrier.set_members(1);  // fewer threads than asked for were granted
    // The thread that reads a slice is the one that writes it first, so its memory is near.
    if (data) std::memset(data + rank * elements, 0, static_cast<size_t>(elements) * sizeof(float));
    meet(size);
    work(rank, quantity == Quantity::barrier ? repeats : 1);
    meet(size);
    const Clock::time_point start = Clock::now();
    work(rank, repeats);
    meet(size);
    if (rank != 0) return;
    result.seconds = std::chrono::duration<double>(Clock::now() - start).count();
    result.threads = size;
    const double threads = quantity == Quantity::barrier ? 1 : size;
    result.amount = unit() * static_cast<double>(repeats) * threads;
  }

  void meet(int size) {
    if (size > 1) barrier.wait();
  }
};

}  // namespace

bool has_quantity(Quantity quantity) {
  return quantity != Quantity::bf16 || selected_loops()->bf16;
}

Status measure(Quantity quantity, int threads, int64_t bytes, int64_t repeats, Measured& result) {
  if (!has_quantity(quantity) || threads < 1 || repeats < 1 || bytes < 0 || bytes > kMostBytes) {
    return Status::bad_problem;
  }
  const int team = usable_threads(threads);
  Run run{selected_loops(), quantity, 0, repeats, nullptr, Barrier(team), {}};
  std::unique_ptr<float, Free> data;
  if (quantity == Quantity::read) {
    const int64_t slice = (bytes + kPage) / kPage * kPage;
    data.reset(static_cast<float*>(std::aligned_alloc(kPage, static_cast<size_t>(slice * team))));
    if (!data) return Status::out_of_memory;
    run.elements = slice / static_cast<int64_t>(sizeof(float));
    run.data = data.get();
  }
  run_team(
      team, [](int rank, int size, void* context) { static_cast<Run*>(context)->body(rank, size); },
      &run);
  result = run.result;
  return Status::ok;
}

}  // namespace rnnkern

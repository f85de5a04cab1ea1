// t_step = max(flops / peak, bytes(weight slice) / bandwidth(level it fits)) + pointwise
//        + [unit split] · stages · barrier + inputs
//
// where with a helper the last sum is max(.., inputs), but for the one chunk of inputs that nothing
// hides; and a call costs T steps, the packing of the weights, the writing of their gradients, and
// the waking of the team. The constants are of a current server core; they only have to rank the
// plans of one call against each other.
#include "cpu/plan.h"

#include <algorithm>
#include <cmath>

#if defined(__unix__)
#include <unistd.h>
#endif

#include "cpu/team.h"

namespace rnnkern {
namespace {

constexpr double kGigahertz = 3.5;
constexpr double kBarrier = 0.25;           // µs, two to eight cores of one socket
constexpr double kTeamStart = 4.5;          // µs, to wake the pool
constexpr double kPackPerElement = 0.1e-3;  // µs
constexpr double kPointwise = 4e-3;         // µs for a vector of outputs: loads, gate math, stores
constexpr double kL1 = 32e3, kL3 = 24e6;    // bytes of weights each level holds
constexpr double kL1Rate = 300e3, kL2Rate = 100e3, kL3Rate = 50e3;  // bytes per µs and core
constexpr double kMemoryRate = 10e3;
constexpr double kUnpackedRate = 60e3;  // at most: sums across lanes

double weight_rate(double bytes, bool packed) {
  if (!packed) return std::min(kUnpackedRate, weight_rate(bytes, true));
  if (bytes <= kL1) return kL1Rate;
  if (bytes <= static_cast<double>(l2_bytes())) return kL2Rate;
  return bytes <= kL3 ? kL3Rate : kMemoryRate;
}

double call_microseconds(const Work& work, Plan& plan) {
  const double directions = static_cast<double>(work.D) / plan.direction_groups;
  const double rows = static_cast<double>((work.B + plan.row_groups - 1) / plan.row_groups);
  const double share =
      static_cast<double>((work.blocks + plan.unit_groups - 1) / plan.unit_groups) / work.blocks;
  const double elements = static_cast<double>(work.weights) * share;
  const double flops_per_us = 1e3 * work.cycle_flops * kGigahertz;
  const double tiles = std::ceil(rows / work.tile_rows);  // each streams the slice once
  const double bytes = elements * work.element_bytes;
  const double product =
      std::max(2 * elements * rows / flops_per_us, tiles * bytes / weight_rate(bytes, work.packs));
  const double inputs = static_cast<double>(work.inputs) * (plan.helpers ? 1 : share);
  const double input_bytes =
      work.packs ? 0 : inputs * work.element_bytes;  // few rows: for each step
  const double input =
      std::max(2 * inputs * (plan.helpers ? static_cast<double>(work.B) : rows) / flops_per_us,
               input_bytes / weight_rate(input_bytes, false));
  const double pointwise =
      static_cast<double>(work.outputs) * share * rows / work.lanes * kPointwise;
  const double barrier = plan.unit_groups > 1 ? work.stages * kBarrier : 0;
  const double recurrence = product + pointwise + barrier;
  plan.step_microseconds = directions * (plan.helpers ? std::max(recurrence, input) +
                                                            input / static_cast<double>(work.chunks)
                                                      : recurrence + input);
  const double packed = work.packs ? static_cast<double>(work.D * (work.weights + work.inputs)) : 0;
  const double pack = packed * kPackPerElement / plan.threads();
  const double sums = static_cast<double>(work.D * work.sums * work.element_bytes) / kL3Rate;
  return static_cast<double>(work.T) * plan.step_microseconds + pack +
         sums / (plan.helpers ? plan.direction_groups : plan.threads()) +
         (plan.threads() > 1 ? kTeamStart : 0);
}

}  // namespace

int64_t l2_bytes() {
  static const int64_t bytes = [] {
    int64_t found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found > 0 ? found : int64_t{1} << 20;
  }();
  return bytes;
}

Plan make_plan(const Work& work, int requested) {
  Plan best;
  double best_time = call_microseconds(work, best);
  // No team can be faster, and counting the CPUs would take longer than choosing.
  if (best_time <= kTeamStart) return best;
  const int threads = usable_threads(requested);
  const int max_directions = static_cast<int>(std::min<int64_t>(work.D, threads));
  // Powers of two, and all threads that are left: a few dozen candidates even for 64 threads.
  const auto next = [](int n, int most) { return n < most ? std::min(2 * n, most) : most + 1; };
  const auto try_groups = [&](int directions, int helpers) {
    const int runners = threads / directions - helpers;
    const int most_rows = static_cast<int>(std::min<int64_t>(work.B, runners));
    for (int r = 1; r <= most_rows; r = next(r, most_rows)) {
      const int most_units = static_cast<int>(std::min<int64_t>(work.blocks, runners / r));
      for (int u = 1; u <= most_units; u = next(u, most_units)) {
        Plan plan;
        plan.direction_groups = directions;
        plan.row_groups = r;
        plan.unit_groups = u;
        plan.helpers = helpers;
        const double time = call_microseconds(work, plan);
        if (time < best_time) {
          best = plan;
          best_time = time;
        }
      }
    }
  };
  for (int d = 1; d <= max_directions; ++d) {
    try_groups(d, 0);
    if (work.chunks > 1) try_groups(d, 1);
  }
  return best;
}

}  // namespace rnnkern

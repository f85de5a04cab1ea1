// The ISA table and its choice at load; one call: plan, scratch, team.
#include "cpu/driver.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "cells/registry.h"
#include "cpu/kernels.h"
#include "cpu/team.h"

namespace rnnkern {
namespace {

template <class Cell>
constexpr CellInfo info() {
  return {Cell::name,  Cell::gates,   Cell::states,
          Cell::saved, Cell::phases,  Cell::first[Cell::phases - 1],
          Cell::extra, Cell::projects};
}

constexpr CellInfo cells[] = {
#define RNNKERN_ROW(Cell) info<Cell>(),
    RNNKERN_CELLS(RNNKERN_ROW)
#undef RNNKERN_ROW
};

struct Isa {
  const IsaKernels* kernels;
  bool (*runs_here)();
};

const Isa isas[] = {
    {&baseline_kernels, [] { return true; }},
#if defined(__x86_64__)
    {&avx2_kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {&avx512_kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
     }},
#endif
};

const IsaKernels* best_isa() {
  const IsaKernels* best = nullptr;
  for (const Isa& isa : isas) {
    if (isa.runs_here()) best = isa.kernels;
  }
  return best;
}

std::atomic<const IsaKernels*>& selected() {
  static std::atomic<const IsaKernels*> isa{best_isa()};
  return isa;
}

template <class T>
const CellKernels<T>& kernels(int cell) {
  const IsaKernels& isa = *selected().load();
  if constexpr (sizeof(T) == sizeof(float)) {
    return isa.float32[cell];
  } else {
    return isa.float64[cell];
  }
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Scratch for one call, of at least one element, aligned to a cache line; null if there is no
// memory.
template <class T>
std::unique_ptr<T, Free> allocate(int64_t elements) {
  const int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t rounded = (elements + line) / line * line;
  const size_t bytes = static_cast<size_t>(rounded) * sizeof(T);
  return std::unique_ptr<T, Free>(static_cast<T*>(std::aligned_alloc(64, bytes)));
}

template <class Problem, class T>
struct Call {
  const LoopKernel<Problem, T>& kernel;
  const Problem& problem;
  Plan plan;
  T* scratch;
  Barrier* barriers;

  static void body(int rank, int size, void* context) {
    const Call& call = *static_cast<const Call*>(context);
    const Plan alone;
    call.kernel.run(call.problem, size == 1 ? alone : call.plan, call.scratch, call.barriers, rank);
  }
};

template <class Problem, class T>
Status run(const LoopKernel<Problem, T>& kernel, const Problem& problem, int threads) {
  const Plan plan = make_plan(kernel.work(problem), usable_threads(threads));
  const auto scratch = allocate<T>(kernel.scratch_elements(problem, plan.threads()));
  const int first = 1 + plan.direction_groups;  // see Place for their order
  const int count = first + plan.direction_groups * plan.row_groups;
  const std::unique_ptr<Barrier[]> barriers(new (std::nothrow) Barrier[static_cast<size_t>(count)]);
  if (!scratch || !barriers) return Status::out_of_memory;
  barriers[0].set_members(plan.threads());
  for (int i = 1; i < count; ++i)
    barriers[i].set_members(plan.unit_groups * (i < first ? plan.row_groups : 1));
  Call<Problem, T> call{kernel, problem, plan, scratch.get(), barriers.get()};
  run_team(plan.threads(), Call<Problem, T>::body, &call);
  return Status::ok;
}

template <class Problem>
Status check(int cell, const Problem& p) {
  if (cell < 0 || cell >= cell_count()) return Status::unknown_cell;
  return valid_sizes(p, cells[cell].projects) ? Status::ok : Status::bad_problem;
}

}  // namespace

int cell_count() { return static_cast<int>(sizeof(cells) / sizeof(cells[0])); }
CellInfo cell_info(int cell) { return cells[cell]; }

const char* supported_isa(int index) {
  for (const Isa& isa : isas) {
    if (isa.runs_here() && index-- == 0) return isa.kernels->name;
  }
  return nullptr;
}

const char* current_isa() { return selected().load()->name; }

bool select_isa(const char* name) {
  for (const Isa& isa : isas) {
    if (std::strcmp(isa.kernels->name, name) == 0 && isa.runs_here()) {
      selected().store(isa.kernels);
      return true;
    }
  }
  return false;
}

template <class T>
Status run_forward(int cell, const ForwardProblem<T>& problem, int threads) {
  const Status status = check(cell, problem);
  return status == Status::ok ? run(kernels<T>(cell).forward, problem, threads) : status;
}

template <class T>
Status run_backward(int cell, const BackwardProblem<T>& problem, int threads) {
  const Status status = check(cell, problem);
  return status == Status::ok ? run(kernels<T>(cell).backward, problem, threads) : status;
}

template <class T>
Plan plan_forward(int cell, const ForwardProblem<T>& problem, int threads) {
  return make_plan(kernels<T>(cell).forward.work(problem), usable_threads(threads));
}

template <class T>
Plan plan_backward(int cell, const BackwardProblem<T>& problem, int threads) {
  return make_plan(kernels<T>(cell).backward.work(problem), usable_threads(threads));
}

template Status run_forward<float>(int, const ForwardProblem<float>&, int);
template Status run_forward<double>(int, const ForwardProblem<double>&, int);
template Status run_backward<float>(int, const BackwardProblem<float>&, int);
template Status run_backward<double>(int, const BackwardProblem<double>&, int);
template Plan plan_forward<float>(int, const ForwardProblem<float>&, int);
template Plan plan_forward<double>(int, const ForwardProblem<double>&, int);
template Plan plan_backward<float>(int, const BackwardProblem<float>&, int);
template Plan plan_backward<double>(int, const BackwardProblem<double>&, int);

}  // namespace rnnkern

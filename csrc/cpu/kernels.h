// The table of entry points that each per-ISA file fills in, one row a cell.
#pragma once

#include "core/problem.h"
#include "cpu/plan.h"
#include "cpu/team.h"

namespace rnnkern {

template <class Problem, class T>
struct LoopKernel {
  int64_t (*scratch_elements)(const Problem&, int threads);
  Work (*work)(const Problem&);
  void (*run)(const Problem&, const Plan&, T* scratch, Barrier* barriers, int rank);
};

template <class T>
struct CellKernels {
  LoopKernel<ForwardProblem<T>, T> forward;
  LoopKernel<BackwardProblem<T>, T> backward;
};

// The cells in the registry's order.
struct IsaKernels {
  const char* name;
  const CellKernels<float>* float32;
  const CellKernels<double>* float64;
};

extern const IsaKernels baseline_kernels;
#if defined(__x86_64__)
extern const IsaKernels avx2_kernels;
extern const IsaKernels avx512_kernels;
#endif

}  // namespace rnnkern

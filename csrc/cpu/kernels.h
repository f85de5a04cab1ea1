// The table of entry points that each per-ISA file fills in, one row a cell.
#pragma once

#include "core/problem.h"
#include "cpu/plan.h"
#include "cpu/team.h"

namespace rnnkern {

template <class Problem, class T>
struct LoopKernel {
  int64_t (*scratch_elements)(const Problem&);
  Work (*work)(const Problem&);
  void (*run)(const Problem&, const Plan&, T* scratch, Barrier* barriers, int rank);
};

template <class T>
struct CellKernels {
  LoopKernel<ForwardProblem<T>, T> forward;
  LoopKernel<BackwardProblem<T>, T> backward;
};

template <class Problem, class T>
struct ProductKernel {
  int64_t (*scratch_elements)(const Problem&, int threads);
  int64_t (*work_items)(const Problem&);  // threads beyond this many would idle
  void (*run)(const Problem&, T* scratch, int rank, int size);
};

template <class T>
struct TypeKernels {
  const CellKernels<T>* cells;  // in the registry's order
  ProductKernel<LinearProblem<T>, T> linear;
  ProductKernel<OuterProblem<T>, T> outer;
};

struct IsaKernels {
  const char* name;
  TypeKernels<float> float32;
  TypeKernels<double> float64;
};

extern const IsaKernels baseline_kernels;
#if defined(__x86_64__)
extern const IsaKernels avx2_kernels;
extern const IsaKernels avx512_kernels;
#endif

}  // namespace rnnkern

// The table of entry points that each per-ISA file fills in, one row a cell.
#pragma once

#include "core/problem.h"
#include "cpu/bfloat16.h"
#include "cpu/plan.h"
#include "cpu/team.h"

namespace rnnkern {

template <class Problem>
struct LoopKernel {
  int64_t (*scratch_bytes)(const Problem&, const Plan&);
  Work (*work)(const Problem&);
  void (*run)(const Problem&, const Plan&, unsigned char* scratch, Barrier* barriers, int rank);
};

template <class T>
struct CellKernels {
  LoopKernel<ForwardProblem<T>> forward;
  LoopKernel<CpuBackwardProblem<T>> backward;
};

// The cells in the registry's order.
struct IsaKernels {
  const CellKernels<float>* float32;
  const CellKernels<double>* float64;
};

extern const IsaKernels baseline_kernels;
#if defined(__x86_64__)
extern const IsaKernels avx2_kernels;
extern const IsaKernels avx512_kernels;
// For AVX512_BF16 and AMX_BF16, which add bfloat16 to what AVX-512 computes.
extern const CellKernels<Bfloat16>* const avx512_bf16_cells;
extern const CellKernels<Bfloat16>* const amx_bf16_cells;
#endif

}  // namespace rnnkern

// Included once by each per-ISA file: instantiates every loop of every cell for that file's ISA.
#pragma once

#include "cells/registry.h"
#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/kernels.h"
#include "cpu/vmath.h"

namespace rnnkern {
namespace {

template <class Loop, class Problem>
constexpr LoopKernel<Problem> loop_kernel() {
  return {
      [](const Problem& p, const Plan& plan) { return Loop(p, plan, nullptr).scratch_bytes(); },
      [](const Problem& p) { return Loop(p, Plan{}, nullptr).work(); },
      [](const Problem& p, const Plan& plan, unsigned char* scratch, Barrier* barriers, int rank) {
        Loop(p, plan, scratch).run(plan, barriers, rank);
      },
  };
}

template <class Cell, class T>
constexpr CellKernels<T> cell_kernels() {
  return {loop_kernel<ForwardLoop<Cell, T>, ForwardProblem<T>>(),
          loop_kernel<BackwardLoop<Cell, T>, CpuBackwardProblem<T>>()};
}

template <class T>
constexpr CellKernels<T> all_cells[] = {
#define RNNKERN_ROW(Cell) cell_kernels<Cell, T>(),
    RNNKERN_CELLS(RNNKERN_ROW)
#undef RNNKERN_ROW
};

}  // namespace
}  // namespace rnnkern

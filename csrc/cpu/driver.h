// The CPU backend as the bindings see it: ISAs, cells, and one call for each layer and pass.
#pragma once

#include <type_traits>

#include "core/cell.h"
#include "core/problem.h"
#include "core/status.h"
#include "cpu/bfloat16.h"
#include "cpu/plan.h"

namespace rnnkern {

struct CellInfo {
  const char* name;
  int gates, states, saved, phases;
  int last_phase;  // the first gate of the last phase
  Extra extra;
  bool projects, recovers;

  // Whether forward keeps h' of data of type T for backward, with a projection or without.
  template <class T>
  bool keeps_h_prev(bool projection) const {
    return projection || !recovers || !std::is_same_v<T, Accumulator<T>>;
  }
};

int cell_count();
CellInfo cell_info(int cell);

// The ISAs this CPU can run, slowest first; null beyond the last.
const char* supported_isa(int index);
const char* current_isa();
// False if the name is unknown or the CPU cannot run it; then nothing changes.
bool select_isa(const char* name);
// Whether the current ISA has kernels for bfloat16 data.
bool computes_bfloat16();

// T is float, double, or where computes_bfloat16() is true, Bfloat16.
template <class T>
Status run_forward(int cell, const ForwardProblem<T>& problem, int threads);
template <class T>
Status run_backward(int cell, const CpuBackwardProblem<T>& problem, int threads);

// The plan that run_forward and run_backward would choose.
template <class T>
Status plan_forward(int cell, const ForwardProblem<T>& problem, int threads, Plan& plan);
template <class T>
Status plan_backward(int cell, const CpuBackwardProblem<T>& problem, int threads, Plan& plan);

}  // namespace rnnkern

// The driver: what one call runs, from its plan. Included by one file for each type, which
// instantiates it for every cell.
#pragma once

#include "cells/registry.h"
#include "cuda/driver.h"
#include "cuda/launch_backward.cuh"
#include "cuda/launch_forward.cuh"

namespace rnnkern {

// run(product, row tiles, wide); no kernel is wide with one row tile, or if its product is not to.
template <class Product, class Run>
auto with_tile(const CudaPlan& plan, Run&& run) {
  using std::integral_constant;
  if (plan.row_tiles == 1) return run(Product{}, integral_constant<int, 1>{}, std::false_type{});
  if constexpr (Product::kWidens) {
    if (plan.wide) return run(Product{}, integral_constant<int, 4>{}, std::true_type{});
  }
  return run(Product{}, integral_constant<int, 4>{}, std::false_type{});
}

// float64 never runs on tensor cores, float16 always: every device has them.
template <class T, class Run>
auto with_plan(const CudaPlan& plan, Run&& run) {
  if constexpr (std::is_same_v<T, double>) {
    return with_tile<ExactProduct<T>>(plan, run);
  } else if constexpr (std::is_same_v<T, __half>) {
    return with_tile<TensorProduct<T>>(plan, run);
  } else {
    return plan.tensor_cores ? with_tile<TensorProduct<T>>(plan, run)
                             : with_tile<ExactProduct<T>>(plan, run);
  }
}

template <class T>
constexpr CudaType cuda_type = std::is_same_v<T, double>   ? CudaType::float64
                               : std::is_same_v<T, float>  ? CudaType::float32
                               : std::is_same_v<T, __half> ? CudaType::float16
                                                           : CudaType::bfloat16;

template <class Cell, class Run>
auto with_projection(bool projected, Run&& run) {
  if constexpr (Cell::projects) {
    if (projected) return run(std::true_type{});
  }
  return run(std::false_type{});
}

// run(product, row tiles, wide, projected): what the kernels of a plan are templates of.
template <class Cell, class T, class Run>
auto with_kernel(const CudaPlan& plan, bool is_projected, Run&& run) {
  return with_plan<T>(plan, [&](auto product, auto rows, auto wide) {
    return with_projection<Cell>(
        is_projected, [&](auto projected) { return run(product, rows, wide, projected); });
  });
}

// A persistent kernel, from how much its products read of a unit's weights and of a row.
template <class Memory>
PersistentKernel described(const void* kernel, const Widths& widths, int64_t weights,
                           int64_t operand) {
  return {
      kernel, Memory::all(widths), Memory::kept, Memory::work(true), Memory::work(false), weights,
      operand};
}

template <class Cell, class T, bool forward>
PersistentKernel persistent_kernel(bool tensor_cores, int row_tiles, const Widths& widths,
                                   bool is_projected) {
  CudaPlan plan{};
  plan.tensor_cores = tensor_cores;
  plan.row_tiles = row_tiles;
  return with_kernel<Cell, T>(plan, is_projected, [&](auto product, auto rows, auto, auto flag) {
    using Product = decltype(product);
    constexpr int RN = decltype(rows)::value;
    constexpr bool projected = decltype(flag)::value;
    const int64_t H = widths.H, P = widths.P, G = Cell::gates;
    if constexpr (forward) {
      return described<BlockMemory<ForwardShape<Cell, projected>, Product, RN>>(
          reinterpret_cast<const void*>(forward_sequence<Cell, Product, RN, projected>), widths,
          G * P + (projected ? H : 0), P + (kStages<Cell, projected> - 1) * H);
    } else {
      const int64_t reads = G * H + (projected ? P : 0);
      return described<BlockMemory<BackwardShape<Cell, projected>, Product, RN>>(
          reinterpret_cast<const void*>(backward_sequence<Cell, Product, RN, projected>), widths,
          reads, reads);
    }
  });
}

template <class T>
struct CellDriver {
  bool projects;
  bool widens;  // forward without a projection; with one it does, and so does all of backward
  FindPersistent forward_kernel, backward_kernel;
  size_t (*forward_workspace)(const ForwardProblem<T>&, const CudaCall&);
  size_t (*backward_workspace)(const BackwardProblem<T, Accumulator<T>>&, const CudaCall&);
  Status (*forward)(const ForwardProblem<T>&, const CudaCall&, const CudaPlan&);
  Status (*backward)(const BackwardProblem<T, Accumulator<T>>&, const CudaCall&, const CudaPlan&);
};

// All steps at once, if that is the plan; step by step, if not or if CUDA refuses: a context may
// have less of the device than the device says. No step has run then.
template <class AtOnce, class Steps>
Status at_once_or_steps(const CudaPlan& plan, AtOnce&& at_once, Steps&& steps) {
  if (plan.blocks_of_group > 0) {
    const cudaError_t error = at_once();
    if (error == cudaSuccess) return Status::ok;
    const Status status = device_failed(error);
    if (error != cudaErrorCooperativeLaunchTooLarge) return status;
  }
  return steps();
}

template <class Cell, class T>
Status run_forward(const ForwardProblem<T>& p, const CudaCall& call, const CudaPlan& plan) {
  const auto run = [&](auto product, auto rows, auto is_wide, auto flag) {
    using Product = decltype(product);
    constexpr int RN = decltype(rows)::value;
    constexpr bool wide = decltype(is_wide)::value, projected = decltype(flag)::value;
    return at_once_or_steps(
        plan, [&] { return forward_at_once<Cell, Product, RN, projected>(p, call, plan); },
        [&] { return forward_steps<Cell, Product, RN, wide, projected>(p, call, plan); });
  };
  return with_kernel<Cell, T>(plan, p.dir[0].W_hr, run);
}

template <class Cell, class T>
Status run_backward(const BackwardProblem<T, Accumulator<T>>& p, const CudaCall& call,
                    const CudaPlan& plan) {
  const auto run = [&](auto product, auto rows, auto is_wide, auto flag) {
    using Product = decltype(product);
    constexpr int RN = decltype(rows)::value;
    constexpr bool wide = decltype(is_wide)::value, projected = decltype(flag)::value;
    return at_once_or_steps(
        plan, [&] { return backward_at_once<Cell, Product, RN, projected>(p, call, plan); },
        [&] { return backward_steps<Cell, Product, RN, wide, projected>(p, call, plan); });
  };
  return with_kernel<Cell, T>(plan, p.dir[0].W_hr, run);
}

// Bytes of a workspace; Call is ForwardCall or BackwardCall.
template <class Cell, class Call, class Problem>
size_t workspace_of(const Problem& p, const CudaCall& call) {
  Call counted{};
  counted.p = p;
  CudaCall nowhere = call;
  nowhere.workspace = nullptr;
  return lay_out<Cell>(counted, nowhere);
}

template <class Cell, class T>
constexpr CellDriver<T> cell_driver() {
  CellDriver<T> driver{};
  driver.projects = Cell::projects;
  driver.widens = kForwardWidens<Cell, false>;
  driver.forward_kernel = persistent_kernel<Cell, T, true>;
  driver.backward_kernel = persistent_kernel<Cell, T, false>;
  driver.forward_workspace = workspace_of<Cell, ForwardCall<T>, ForwardProblem<T>>;
  driver.backward_workspace =
      workspace_of<Cell, BackwardCall<T>, BackwardProblem<T, Accumulator<T>>>;
  driver.forward = run_forward<Cell, T>;
  driver.backward = run_backward<Cell, T>;
  return driver;
}

template <class T>
constexpr CellDriver<T> cell_drivers[] = {
#define RNNKERN_ROW(Cell) cell_driver<Cell, T>(),
    RNNKERN_CELLS(RNNKERN_ROW)
#undef RNNKERN_ROW
};

template <class T, class Problem>
Status check_problem(int cell, const Problem& p) {
  if (cell < 0 || cell >= cuda_cell_count()) return Status::unknown_cell;
  return valid_sizes(p, cell_drivers<T>[cell].projects) ? Status::ok : Status::bad_problem;
}

template <class T, class Problem>
Status plan_of(FindPersistent persistent, const Problem& p, const CudaCall& call, CudaPlan& plan) {
  const CudaSizes sizes{cuda_type<T>, p.seq.B, p.D, {p.H, p.P}, p.dir[0].W_hr != nullptr,
                        persistent};
  return make_cuda_plan(call, sizes, plan);
}

template <class T>
Status forward_plan(int cell, const ForwardProblem<T>& p, const CudaCall& call, CudaPlan& plan) {
  const CellDriver<T>& driver = cell_drivers<T>[cell];
  const Status status = plan_of<T>(driver.forward_kernel, p, call, plan);
  plan.wide = plan.wide && (driver.widens || p.dir[0].W_hr);
  return status;
}

template <class T, class A>
Status backward_plan(int cell, const BackwardProblem<T, A>& p, const CudaCall& call,
                     CudaPlan& plan) {
  return plan_of<T>(cell_drivers<T>[cell].backward_kernel, p, call, plan);
}

// make(plan), then run(driver, plan).
template <class T, class Problem, class Make, class Run>
Status run_call(int cell, const Problem& problem, const CudaCall& call, Make&& make, Run&& run) {
  Status status = check_problem<T>(cell, problem);
  if (status != Status::ok) return status;
  const DeviceGuard guard(call.device);
  if (guard.error() != cudaSuccess) return device_failed(guard.error());
  CudaPlan plan;
  status = make(plan);
  return status == Status::ok ? run(cell_drivers<T>[cell], plan) : status;
}

template <class T>
size_t forward_workspace(int cell, const ForwardProblem<T>& p, const CudaCall& call) {
  return cell_drivers<T>[cell].forward_workspace(p, call);
}

template <class T, class A>
size_t backward_workspace(int cell, const BackwardProblem<T, A>& p, const CudaCall& call) {
  return cell_drivers<T>[cell].backward_workspace(p, call);
}

template <class T>
Status run_forward_cuda(int cell, const ForwardProblem<T>& p, const CudaCall& call) {
  return run_call<T>(
      cell, p, call, [&](CudaPlan& plan) { return forward_plan(cell, p, call, plan); },
      [&](const CellDriver<T>& driver, const CudaPlan& plan) {
        return driver.forward(p, call, plan);
      });
}

template <class T, class A>
Status run_backward_cuda(int cell, const BackwardProblem<T, A>& p, const CudaCall& call) {
  return run_call<T>(
      cell, p, call, [&](CudaPlan& plan) { return backward_plan(cell, p, call, plan); },
      [&](const CellDriver<T>& driver, const CudaPlan& plan) {
        return driver.backward(p, call, plan);
      });
}

#define RNNKERN_CUDA_TYPE(T)                                                                  \
  template size_t forward_workspace<T>(int, const ForwardProblem<T>&, const CudaCall&);       \
  template size_t backward_workspace<T>(int, const BackwardProblem<T, Accumulator<T>>&,       \
                                        const CudaCall&);                                     \
  template Status run_forward_cuda<T>(int, const ForwardProblem<T>&, const CudaCall&);        \
  template Status run_backward_cuda<T>(int, const BackwardProblem<T, Accumulator<T>>&,        \
                                       const CudaCall&);                                      \
  template Status forward_plan<T>(int, const ForwardProblem<T>&, const CudaCall&, CudaPlan&); \
  template Status backward_plan<T>(int, const BackwardProblem<T, Accumulator<T>>&,            \
                                   const CudaCall&, CudaPlan&);

}  // namespace rnnkern

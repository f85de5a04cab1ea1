// The driver: lays out the workspace and queues one kernel for each step, or one for all, with both
// directions in it. Included by one file for each type, which instantiates it for every cell.
#pragma once

#include "cells/registry.h"
#include "cuda/backward.cuh"
#include "cuda/driver.h"
#include "cuda/forward.cuh"
#include "cuda/persistent.cuh"
#include "cuda/queue.cuh"

namespace rnnkern {

constexpr int kPlainMemory = 48 << 10;  // bytes of shared memory that a block has without asking

// For a call that may run a persistent kernel, also what that needs in any plan.
template <class Cell, class T>
size_t lay_out(ForwardCall<T>& s, const CudaCall& call) {
  Carver carver{static_cast<unsigned char*>(call.workspace)};
  const ForwardProblem<T>& p = s.p;
  const bool projects = p.dir[0].W_hr;
  for (int d = 0; d < p.D; ++d) {
    ForwardScratch<T>& scratch = s.scratch[d];
    carver.take(scratch.h[0], p.seq.B * p.P);
    carver.take(scratch.h[1], p.seq.B * p.P);
    if (Cell::states == 2) carver.take(scratch.c, p.seq.B * p.H);
    if (Cell::phases == 2 || projects) carver.take(scratch.operand, p.seq.B * p.H);
  }
  s.exchange = {nullptr, 0};
  s.packed = {nullptr, nullptr};
  if (call.persistent) {
    s.exchange.words = p.D * ((p.seq.B + 7) / 8) * kCounterWords;
    carver.take(s.exchange.arrived, s.exchange.words);
    if (p.seq.offset) {
      carver.take(s.packed.active, p.seq.T);
      carver.take(s.packed.offset, p.seq.T);
    }
  }
  return carver.used;
}

template <class Cell, class T>
size_t lay_out(const BackwardProblem<T, Accumulator<T>>& p, BackwardScratch<T>* scratch,
               void* workspace) {
  Carver carver{static_cast<unsigned char*>(workspace)};
  const bool projects = p.dir[0].W_hr;
  const int64_t first = phase_gates<Cell, 0> * p.H;
  const int64_t second = phase_gates<Cell, Cell::phases - 1> * p.H;
  for (int d = 0; d < p.D; ++d) {
    BackwardScratch<T>& s = scratch[d];
    s = {};
    carver.take(s.first, p.P * first);
    carver.take(s.dr[0], p.seq.B * first);
    carver.take(s.dr[1], p.seq.B * first);
    if (Cell::states == 2) carver.take(s.dc, p.seq.B * p.H);
    if (Cell::phases == 2) {
      carver.take(s.second, p.H * second);
      carver.take(s.dr_second, p.seq.B * second);
      carver.take(s.dh, p.seq.B * p.H);
    }
    if (projects) {
      carver.take(s.projection, p.H * p.P);
      carver.take(s.dh_projected, p.seq.B * p.P);
    } else {
      carver.take(s.dh_direct, p.seq.B * p.H);
    }
  }
  return carver.used;
}

template <class Cell, class Product, int RN, bool projected>
Status forward_steps(const ForwardProblem<typename Product::Data>& p, const CudaCall& call,
                     const CudaPlan& plan) {
  using T = typename Product::Data;
  constexpr int first = Product::template memory<phase_gates<Cell, 0>, RN>();
  constexpr int last = Product::template memory<phase_gates<Cell, Cell::phases - 1>, RN>();
  static_assert(Cell::phases == 1 || !Cell::projects,
                "one array is the operand of a second phase or of a projection, not of both");
  static_assert(first <= kPlainMemory && last <= kPlainMemory, "too many gates in one phase");
  const StepKernel<ForwardStep<T>> kernel{forward_step<Cell, Product, RN, projected>,
                                          kStages<Cell, projected>, p.P > p.H ? p.P : p.H,
                                          first > last ? first : last};
  ForwardStep<T> step{};
  step.p = p;
  lay_out<Cell>(step, call);
  Queue queue(call, plan);
  int64_t resident = queue.resident(kernel);
  queue.elements<ForwardCall<T>>(forward_prepare<Cell, T>, p.D * p.seq.B * kernel.units, step);
  for (int64_t i = 0; i < p.seq.T && queue.status() == Status::ok; ++i, step.slot ^= 1) {
    step.rows = 0;
    for (int d = 0; d < p.D; ++d) {
      const int64_t t = p.dir[d].reverse ? p.seq.T - 1 - i : i;
      step.now[d] = step_at(p.seq, t);
      step.next[d] = step_at(p.seq, p.dir[d].reverse ? t - 1 : t + 1);
      step.rows = step.now[d].rows > step.rows ? step.now[d].rows : step.rows;
    }
    queue.step(kernel, resident, step);
  }
  return queue.status();
}

// Packed data: the host's table of steps, into the workspace, where the kernel reads it.
template <class T>
void queue_steps(Queue& queue, ForwardCall<T>& s) {
  Sequence& seq = s.p.seq;
  for (int64_t first = 0; first < seq.T; first += SomeSteps::kMost) {
    SomeSteps some{
        first, seq.T - first < SomeSteps::kMost ? seq.T - first : SomeSteps::kMost, {}, {}};
    for (int64_t i = 0; i < some.count; ++i) {
      const Step step = step_at(seq, first + i);
      some.active[i] = step.rows;
      some.offset[i] = step.offset;
    }
    queue.launch(put_steps<SomeSteps>, dim3(Queue::blocks(some.count, kThreads)), {}, some,
                 s.packed.active, s.packed.offset);
  }
  seq.active = s.packed.active;
  seq.offset = s.packed.offset;
}

template <class Cell, class Product, int RN>
cudaError_t forward_at_once(const ForwardProblem<typename Product::Data>& p, const CudaCall& call,
                            const CudaPlan& plan) {
  using T = typename Product::Data;
  ForwardCall<T> s{};
  s.p = p;
  lay_out<Cell>(s, call);
  Queue queue(call, plan);
  queue.elements(forward_prepare<Cell, T>, p.D * p.seq.B * p.H, s);
  if (p.seq.offset) queue_steps(queue, s);
  const dim3 grid(static_cast<unsigned>(plan.blocks_of_group), static_cast<unsigned>(plan.groups),
                  static_cast<unsigned>(p.D));
  queue.launch(forward_sequence<Cell, Product, RN>, grid, {static_cast<int>(plan.memory), true}, s);
  return queue.error();
}

template <class Cell, class Product, int RN, bool projected>
Status backward_steps(const BackwardProblem<typename Product::Data, typename Product::A>& p,
                      const CudaCall& call, const CudaPlan& plan) {
  using T = typename Product::Data;
  const StepKernel<BackwardStep<T>> kernel{backward_step<Cell, Product, RN, projected>,
                                           kStages<Cell, projected>, p.P > p.H ? p.P : p.H,
                                           Product::template memory<1, RN>()};
  BackwardStep<T> step{p, {}, {}, {}, 0, 0};
  lay_out<Cell>(p, step.scratch, call.workspace);
  Queue queue(call, plan);
  int64_t resident = queue.resident(kernel);
  const auto turn = [&](const T* in, T* out, int64_t rows, int64_t columns) {
    queue.launch(transpose<T>, dim3(Queue::blocks(rows * columns, kThreads)), {}, in, out, rows,
                 columns);
  };
  for (int d = 0; d < p.D; ++d) {
    const auto& io = p.dir[d];
    turn(io.R, step.scratch[d].first, phase_gates<Cell, 0> * p.H, p.P);
    if (Cell::phases == 2) {
      turn(io.R + Cell::first[Cell::phases - 1] * p.H * p.P, step.scratch[d].second,
           phase_gates<Cell, Cell::phases - 1> * p.H, p.P);
    }
    if (projected) turn(io.W_hr, step.scratch[d].projection, p.P, p.H);
    step.now[d] = {-1, 0, 0};
  }
  queue.elements(backward_prepare<Cell, T>, p.D * p.seq.B * kernel.units, step);
  for (int64_t i = 0; i <= p.seq.T && queue.status() == Status::ok; ++i, step.slot ^= 1) {
    step.rows = 0;
    for (int d = 0; d < p.D; ++d) {
      step.before[d] = step.now[d];
      step.now[d] = step_at(p.seq, p.dir[d].reverse ? i : p.seq.T - 1 - i);
      for (const Step& s : {step.now[d], step.before[d]})
        step.rows = s.rows > step.rows ? s.rows : step.rows;
    }
    queue.step(kernel, resident, step);
  }
  return queue.status();
}

// ---- one call -----------------------------------------------------------------------------------
template <class Product, class Run>
auto with_rows(const CudaPlan& plan, Run&& run) {
  return plan.row_tiles == 1 ? run(Product{}, std::integral_constant<int, 1>{})
                             : run(Product{}, std::integral_constant<int, 4>{});
}

// float64 never runs on tensor cores, float16 always: every device has them.
template <class T, class Run>
auto with_plan(const CudaPlan& plan, Run&& run) {
  if constexpr (std::is_same_v<T, double>) {
    return with_rows<ExactProduct<T>>(plan, run);
  } else if constexpr (std::is_same_v<T, __half>) {
    return with_rows<TensorProduct<T>>(plan, run);
  } else {
    return plan.tensor_cores ? with_rows<TensorProduct<T>>(plan, run)
                             : with_rows<ExactProduct<T>>(plan, run);
  }
}

template <class T>
constexpr CudaType cuda_type = std::is_same_v<T, double>   ? CudaType::float64
                               : std::is_same_v<T, float>  ? CudaType::float32
                               : std::is_same_v<T, __half> ? CudaType::float16
                                                           : CudaType::bfloat16;

template <class Cell, class Problem, class Run>
Status with_projection(const Problem& p, Run&& run) {
  if constexpr (Cell::projects) {
    if (p.dir[0].W_hr) return run(std::true_type{});
  }
  return run(std::false_type{});
}

template <class Cell, class T>
PersistentKernel persistent_kernel(bool tensor_cores, int row_tiles, int64_t H) {
  CudaPlan plan{};
  plan.tensor_cores = tensor_cores;
  plan.row_tiles = row_tiles;
  return with_plan<T>(plan, [&](auto product, auto rows) {
    using Product = decltype(product);
    constexpr int G = Cell::gates, RN = decltype(rows)::value;
    return PersistentKernel{reinterpret_cast<const void*>(forward_sequence<Cell, Product, RN>),
                            Product::template kept_bytes<G>(H), Product::template work<G, RN>()};
  });
}

template <class T>
struct CellDriver {
  bool projects;
  int gates;
  PersistentKernel (*persistent)(bool tensor_cores, int row_tiles, int64_t H);  // or null
  size_t (*forward_workspace)(const ForwardProblem<T>&, const CudaCall&);
  size_t (*backward_workspace)(const BackwardProblem<T, Accumulator<T>>&);
  Status (*forward)(const ForwardProblem<T>&, const CudaCall&, const CudaPlan&);
  Status (*backward)(const BackwardProblem<T, Accumulator<T>>&, const CudaCall&, const CudaPlan&);
};

template <class Cell, class T>
Status run_forward(const ForwardProblem<T>& p, const CudaCall& call, const CudaPlan& plan) {
  return with_plan<T>(plan, [&](auto product, auto rows) {
    using Product = decltype(product);
    constexpr int RN = decltype(rows)::value;
    if constexpr (Cell::phases == 1) {
      if (plan.blocks_of_group > 0) {
        const cudaError_t error = forward_at_once<Cell, Product, RN>(p, call, plan);
        if (error == cudaSuccess) return Status::ok;
        const Status status = device_failed(error);
        // A context may have less of the device than the device says. No step has run then.
        if (error != cudaErrorCooperativeLaunchTooLarge) return status;
      }
    }
    return with_projection<Cell>(p, [&](auto projected) {
      return forward_steps<Cell, Product, RN, decltype(projected)::value>(p, call, plan);
    });
  });
}

template <class Cell, class T>
constexpr CellDriver<T> cell_driver() {
  using Backward = BackwardProblem<T, Accumulator<T>>;
  CellDriver<T> driver{};
  driver.projects = Cell::projects;
  driver.gates = Cell::gates;
  if constexpr (Cell::phases == 1) driver.persistent = persistent_kernel<Cell, T>;
  driver.forward_workspace = [](const ForwardProblem<T>& p, const CudaCall& call) {
    ForwardCall<T> counted{};
    counted.p = p;
    CudaCall nowhere = call;
    nowhere.workspace = nullptr;
    return lay_out<Cell>(counted, nowhere);
  };
  driver.backward_workspace = [](const Backward& p) {
    BackwardScratch<T> scratch[kMaxDirections];
    return lay_out<Cell>(p, scratch, nullptr);
  };
  driver.forward = run_forward<Cell, T>;
  driver.backward = [](const Backward& p, const CudaCall& call, const CudaPlan& plan) {
    return with_plan<T>(plan, [&](auto product, auto rows) {
      return with_projection<Cell>(p, [&](auto projected) {
        return backward_steps<Cell, decltype(product), decltype(rows)::value,
                              decltype(projected)::value>(p, call, plan);
      });
    });
  };
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

// The recurrence of a layer without a projection may be a persistent kernel's.
template <class T>
CudaPlan forward_plan(int cell, const ForwardProblem<T>& p, const CudaCall& call) {
  const CellDriver<T>& driver = cell_drivers<T>[cell];
  const auto persistent = p.dir[0].W_hr ? nullptr : driver.persistent;
  return make_cuda_plan(call, {cuda_type<T>, p.seq.B, p.H, p.D, driver.gates, persistent});
}

template <class T, class A>
CudaPlan backward_plan(int cell, const BackwardProblem<T, A>& p, const CudaCall& call) {
  const int gates = cell_drivers<T>[cell].gates;
  return make_cuda_plan(call, {cuda_type<T>, p.seq.B, p.H, p.D, gates, nullptr});
}

template <class T, class Problem, class Run>
Status run_call(int cell, const Problem& problem, const CudaCall& call, Run&& run) {
  const Status status = check_problem<T>(cell, problem);
  if (status != Status::ok) return status;
  const DeviceGuard guard(call.device);
  if (guard.error() != cudaSuccess) return device_failed(guard.error());
  return run(cell_drivers<T>[cell]);
}

template <class T>
size_t forward_workspace(int cell, const ForwardProblem<T>& p, const CudaCall& call) {
  return cell_drivers<T>[cell].forward_workspace(p, call);
}

template <class T, class A>
size_t backward_workspace(int cell, const BackwardProblem<T, A>& p) {
  return cell_drivers<T>[cell].backward_workspace(p);
}

template <class T>
Status run_forward_cuda(int cell, const ForwardProblem<T>& p, const CudaCall& call) {
  return run_call<T>(cell, p, call, [&](const CellDriver<T>& driver) {
    return driver.forward(p, call, forward_plan(cell, p, call));
  });
}

template <class T, class A>
Status run_backward_cuda(int cell, const BackwardProblem<T, A>& p, const CudaCall& call) {
  return run_call<T>(cell, p, call, [&](const CellDriver<T>& driver) {
    return driver.backward(p, call, backward_plan(cell, p, call));
  });
}

#define RNNKERN_CUDA_TYPE(T)                                                             \
  template size_t forward_workspace<T>(int, const ForwardProblem<T>&, const CudaCall&);  \
  template size_t backward_workspace<T>(int, const BackwardProblem<T, Accumulator<T>>&); \
  template Status run_forward_cuda<T>(int, const ForwardProblem<T>&, const CudaCall&);   \
  template Status run_backward_cuda<T>(int, const BackwardProblem<T, Accumulator<T>>&,   \
                                       const CudaCall&);                                 \
  template CudaPlan forward_plan<T>(int, const ForwardProblem<T>&, const CudaCall&);     \
  template CudaPlan backward_plan<T>(int, const BackwardProblem<T, Accumulator<T>>&,     \
                                     const CudaCall&);

}  // namespace rnnkern

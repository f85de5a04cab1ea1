// The step-wise driver: lays out the workspace and queues one kernel for each step, which has both
// directions in it. Included by one file for each type, which instantiates it for every cell.
#pragma once

#include "cells/registry.h"
#include "cuda/backward.cuh"
#include "cuda/driver.h"
#include "cuda/forward.cuh"

namespace rnnkern {

Status device_failed(cudaError_t error);  // remembers it for cuda_error()

// Makes a device current, and what was current before again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess && before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

// Cuts the workspace into arrays; without memory it only counts.
struct Carver {
  unsigned char* base;
  size_t used = 0;

  template <class T>
  void take(T*& array, int64_t elements) {
    array = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (static_cast<size_t>(elements) * sizeof(T) + 255) / 256 * 256;
  }
};

inline Step step_at(const Sequence& seq, int64_t t) {
  if (t < 0 || t >= seq.T) return {-1, 0, 0};
  return {t, seq.rows_at(t), seq.offset ? seq.offset[t] : 0};
}

constexpr int kPlainMemory = 48 << 10;  // bytes of shared memory that a block has without asking

// What the launches of all steps have in common.
template <class Argument>
struct StepKernel {
  void (*kernel)(Argument);
  int stages;
  int64_t units;  // of the widest stage
  int memory;     // of a block, for the stage that needs most
};

// Queues kernels on the call's stream; after the first failure it does nothing more.
class Queue {
 public:
  Queue(const CudaCall& call, const CudaPlan& plan)
      : device_(call.device),
        stream_(static_cast<cudaStream_t>(call.stream)),
        rows_of_block_(8 * plan.row_tiles) {}

  template <class Argument>
  void elements(void (*kernel)(Argument), int64_t count, const Argument& argument) {
    launch(kernel, dim3(blocks(count, kThreads)), {}, argument);
  }

  // Blocks of a step of several stages that the device runs at once, since they wait for each
  // other; asked for once a call. 0 for a step of one stage, whose grid has no limit.
  template <class Argument>
  int64_t resident(const StepKernel<Argument>& step) {
    if (step.stages == 1) return 0;
    int cooperates = 0, multiprocessors = 0, each = 0;
    fail(cudaDeviceGetAttribute(&cooperates, cudaDevAttrCooperativeLaunch, device_));
    fail(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device_));
    fail(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, step.kernel, kThreads, step.memory));
    if (!cooperates) fail(cudaErrorNotSupported);
    if (each < 1 || multiprocessors < 1) fail(cudaErrorCooperativeLaunchTooLarge);
    return static_cast<int64_t>(each) * multiprocessors;
  }

  template <class Argument>
  void step(const StepKernel<Argument>& step, int64_t resident, const Argument& argument) {
    const int64_t tiles = static_cast<int64_t>(blocks(step.units, kUnits)) *
                          static_cast<int64_t>(blocks(argument.rows, rows_of_block_));
    const int64_t directions = argument.p.D;
    if (tiles == 0) return;
    if (tiles > INT32_MAX / directions) return fail(cudaErrorInvalidConfiguration);
    if (step.stages == 1) {
      const dim3 grid(static_cast<unsigned>(tiles), 1, static_cast<unsigned>(directions));
      launch(step.kernel, grid, {step.memory, false}, argument);
    } else {
      const int64_t all = tiles * directions;
      const dim3 grid(static_cast<unsigned>(all < resident ? all : resident));
      launch(step.kernel, grid, {step.memory, true}, argument);
    }
  }

  struct Options {
    int memory = 0;            // dynamic shared memory of a block
    bool cooperative = false;  // the grid runs all at once, or the launch fails
  };
  template <class... Arguments>
  void launch(void (*kernel)(Arguments...), dim3 grid, const Options& options,
              Arguments... arguments) {
    if (error_ != cudaSuccess) return;
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(options.memory);
    config.stream = stream_;
    config.attrs = &cooperative;
    config.numAttrs = options.cooperative ? 1 : 0;
    fail(cudaLaunchKernelEx(&config, kernel, arguments...));
  }

  static unsigned blocks(int64_t count, int64_t each) {
    return static_cast<unsigned>((count + each - 1) / each);
  }

  void fail(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }
  Status status() const { return error_ == cudaSuccess ? Status::ok : device_failed(error_); }

 private:
  int device_;
  cudaStream_t stream_;
  int64_t rows_of_block_;
  cudaError_t error_ = cudaSuccess;
};

template <class Cell, class T>
size_t lay_out(const ForwardProblem<T>& p, ForwardScratch<T>* scratch, void* workspace) {
  Carver carver{static_cast<unsigned char*>(workspace)};
  const bool projects = p.dir[0].W_hr;
  for (int d = 0; d < p.D; ++d) {
    ForwardScratch<T>& s = scratch[d];
    s = {};
    carver.take(s.h[0], p.seq.B * p.P);
    carver.take(s.h[1], p.seq.B * p.P);
    if (Cell::states == 2) carver.take(s.c, p.seq.B * p.H);
    if (Cell::phases == 2 || projects) carver.take(s.operand, p.seq.B * p.H);
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
  ForwardStep<T> step{p, {}, {}, {}, 0, 0};
  lay_out<Cell>(p, step.scratch, call.workspace);
  Queue queue(call, plan);
  const int64_t resident = queue.resident(kernel);
  queue.elements(forward_prepare<Cell, T>, p.D * p.seq.B * kernel.units, step);
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
  const int64_t resident = queue.resident(kernel);
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
Status with_rows(const CudaPlan& plan, Run&& run) {
  return plan.row_tiles == 1 ? run(Product{}, std::integral_constant<int, 1>{})
                             : run(Product{}, std::integral_constant<int, 4>{});
}

// float64 never runs on tensor cores, float16 always: every device has them.
template <class T, class Run>
Status with_plan(const CudaPlan& plan, Run&& run) {
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

template <class T>
struct CellDriver {
  bool projects;
  size_t (*forward_workspace)(const ForwardProblem<T>&);
  size_t (*backward_workspace)(const BackwardProblem<T, Accumulator<T>>&);
  Status (*forward)(const ForwardProblem<T>&, const CudaCall&, const CudaPlan&);
  Status (*backward)(const BackwardProblem<T, Accumulator<T>>&, const CudaCall&, const CudaPlan&);
};

template <class Cell, class T>
constexpr CellDriver<T> cell_driver() {
  using Backward = BackwardProblem<T, Accumulator<T>>;
  return {Cell::projects,
          [](const ForwardProblem<T>& p) {
            ForwardScratch<T> scratch[kMaxDirections];
            return lay_out<Cell>(p, scratch, nullptr);
          },
          [](const Backward& p) {
            BackwardScratch<T> scratch[kMaxDirections];
            return lay_out<Cell>(p, scratch, nullptr);
          },
          [](const ForwardProblem<T>& p, const CudaCall& call, const CudaPlan& plan) {
            return with_plan<T>(plan, [&](auto product, auto rows) {
              return with_projection<Cell>(p, [&](auto projected) {
                return forward_steps<Cell, decltype(product), decltype(rows)::value,
                                     decltype(projected)::value>(p, call, plan);
              });
            });
          },
          [](const Backward& p, const CudaCall& call, const CudaPlan& plan) {
            return with_plan<T>(plan, [&](auto product, auto rows) {
              return with_projection<Cell>(p, [&](auto projected) {
                return backward_steps<Cell, decltype(product), decltype(rows)::value,
                                      decltype(projected)::value>(p, call, plan);
              });
            });
          }};
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

template <class T, class Problem, class Run>
Status run_call(int cell, const Problem& problem, const CudaCall& call, Run&& run) {
  const Status status = check_problem<T>(cell, problem);
  if (status != Status::ok) return status;
  const DeviceGuard guard(call.device);
  if (guard.error() != cudaSuccess) return device_failed(guard.error());
  return run(make_cuda_plan(call, problem.seq.B, cuda_type<T>));
}

template <class T>
size_t forward_workspace(int cell, const ForwardProblem<T>& p) {
  return cell_drivers<T>[cell].forward_workspace(p);
}

template <class T, class A>
size_t backward_workspace(int cell, const BackwardProblem<T, A>& p) {
  return cell_drivers<T>[cell].backward_workspace(p);
}

template <class T>
Status run_forward_cuda(int cell, const ForwardProblem<T>& p, const CudaCall& call) {
  return run_call<T>(cell, p, call, [&](const CudaPlan& plan) {
    return cell_drivers<T>[cell].forward(p, call, plan);
  });
}

template <class T, class A>
Status run_backward_cuda(int cell, const BackwardProblem<T, A>& p, const CudaCall& call) {
  return run_call<T>(cell, p, call, [&](const CudaPlan& plan) {
    return cell_drivers<T>[cell].backward(p, call, plan);
  });
}

#define RNNKERN_CUDA_TYPE(T)                                                             \
  template size_t forward_workspace<T>(int, const ForwardProblem<T>&);                   \
  template size_t backward_workspace<T>(int, const BackwardProblem<T, Accumulator<T>>&); \
  template Status run_forward_cuda<T>(int, const ForwardProblem<T>&, const CudaCall&);   \
  template Status run_backward_cuda<T>(int, const BackwardProblem<T, Accumulator<T>>&,   \
                                       const CudaCall&);

}  // namespace rnnkern

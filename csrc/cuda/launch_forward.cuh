// Forward's launches: the layout of its workspace, and one kernel for each step, or one for all,
// with both directions in it.
#pragma once

#include "cuda/forward.cuh"
#include "cuda/launches.cuh"
#include "cuda/persistent_forward.cuh"

namespace rnnkern {

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
  lay_out_exchange(carver, call, s);
  return carver.used;
}

template <class Cell, class Product, int RN, bool asked_wide, bool projected>
Status forward_steps(const ForwardProblem<typename Product::Data>& p, const CudaCall& call,
                     const CudaPlan& plan) {
  using T = typename Product::Data;
  static_assert(Cell::phases == 1 || !Cell::projects,
                "one array is the operand of a second phase or of a projection, not of both");
  constexpr int first_gates = phase_gates<Cell, 0>;
  constexpr int last_gates = phase_gates<Cell, Cell::phases - 1>;
  constexpr bool wide =
      asked_wide && kForwardWidens<Cell, projected>;  // else one kernel would be two
  StepKernel<ForwardStep<T>> kernel{forward_step<Cell, Product, RN, wide, projected>};
  kernel.template add_stage<Product, first_gates, RN, wide>(p.H);
  if (Cell::phases == 2) kernel.template add_stage<Product, last_gates, RN, wide>(p.H);
  if (projected) kernel.template add_stage<Product, 1, RN, wide>(p.P);
  ForwardStep<T> step{};
  step.p = p;
  lay_out<Cell>(step, call);
  Queue queue(call, plan);
  int64_t resident = queue.resident(kernel);
  const int64_t width = p.P > p.H ? p.P : p.H;
  queue.elements<ForwardCall<T>>(forward_prepare<Cell, T>, p.D * p.seq.B * width, step);
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
cudaError_t forward_at_once(const ForwardProblem<typename Product::Data>& p, const CudaCall& call,
                            const CudaPlan& plan) {
  using T = typename Product::Data;
  ForwardCall<T> s{};
  s.p = p;
  lay_out<Cell>(s, call);
  Queue queue(call, plan);
  const int64_t width = p.P > p.H ? p.P : p.H;
  queue.elements(forward_prepare<Cell, T>, p.D * p.seq.B * width, s);
  queue_steps(queue, s);
  queue_sequence(queue, forward_sequence<Cell, Product, RN, projected>, plan, s);
  return queue.error();
}

}  // namespace rnnkern

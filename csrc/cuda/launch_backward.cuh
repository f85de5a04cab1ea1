// Backward's launches, as launch_forward.cuh has forward's; before them the weights are transposed.
#pragma once

#include "cuda/backward.cuh"
#include "cuda/launches.cuh"
#include "cuda/persistent_backward.cuh"

namespace rnnkern {

template <class Cell, class T>
size_t lay_out(BackwardCall<T>& s, const CudaCall& call) {
  Carver carver{static_cast<unsigned char*>(call.workspace)};
  const auto& p = s.p;
  const bool projects = p.dir[0].W_hr;
  const int64_t first = phase_gates<Cell, 0> * p.H;
  const int64_t second = phase_gates<Cell, Cell::phases - 1> * p.H;
  for (int d = 0; d < p.D; ++d) {
    BackwardScratch<T>& scratch = s.scratch[d];
    carver.take(scratch.first, p.P * first);
    carver.take(scratch.dr[0], p.seq.B * first);
    carver.take(scratch.dr[1], p.seq.B * first);
    if (Cell::states == 2) carver.take(scratch.dc, p.seq.B * p.H);
    if (Cell::phases == 2) {
      carver.take(scratch.second, p.H * second);
      carver.take(scratch.dr_second, p.seq.B * second);
      carver.take(scratch.dh, p.seq.B * p.H);
    }
    if (projects) {
      carver.take(scratch.projection, p.H * p.P);
      carver.take(scratch.dh_projected, p.seq.B * p.P);
    }
    if (h_enters_gates<Cell>) carver.take(scratch.dh_direct, p.seq.B * p.H);
  }
  lay_out_exchange(carver, call, s);
  return carver.used;
}

// The weights, transposed, and what rows without steps and a persistent kernel need.
template <class Cell, class T>
void queue_preparation(Queue& queue, const BackwardCall<T>& s) {
  const auto& p = s.p;
  const auto turn = [&](const T* in, T* out, int64_t rows, int64_t columns) {
    queue.launch(transpose<T>, dim3(Queue::blocks(rows * columns, kThreads)), {}, in, out, rows,
                 columns);
  };
  for (int d = 0; d < p.D; ++d) {
    const auto& io = p.dir[d];
    turn(io.R, s.scratch[d].first, phase_gates<Cell, 0> * p.H, p.P);
    if (Cell::phases == 2) {
      turn(io.R + Cell::first[Cell::phases - 1] * p.H * p.P, s.scratch[d].second,
           phase_gates<Cell, Cell::phases - 1> * p.H, p.P);
    }
    if (io.W_hr) turn(io.W_hr, s.scratch[d].projection, p.P, p.H);
  }
  const int64_t width = p.P > p.H ? p.P : p.H;
  queue.elements(backward_prepare<Cell, T>, p.D * p.seq.B * width, s);
}

template <class Cell, class Product, int RN, bool wide, bool projected>
Status backward_steps(const BackwardProblem<typename Product::Data, typename Product::A>& p,
                      const CudaCall& call, const CudaPlan& plan) {
  using T = typename Product::Data;
  StepKernel<BackwardStep<T>> kernel{backward_step<Cell, Product, RN, wide, projected>};
  kernel.template add_stage<Product, 1, RN, wide>(projected ? p.P : p.H);
  for (int i = 1; i < kStages<Cell, projected>; ++i)
    kernel.template add_stage<Product, 1, RN, wide>(p.H);
  BackwardStep<T> step{};
  step.p = p;
  lay_out<Cell>(step, call);
  Queue queue(call, plan);
  int64_t resident = queue.resident(kernel);
  queue_preparation<Cell, T>(queue, step);
  for (Visit& visit : step.visit) visit.now = {-1, 0, 0};
  for (int64_t i = 0; i <= p.seq.T && queue.status() == Status::ok; ++i, step.slot ^= 1) {
    step.rows = 0;
    for (int d = 0; d < p.D; ++d) {
      Visit& visit = step.visit[d];
      visit = {step_at(p.seq, p.dir[d].reverse ? i : p.seq.T - 1 - i), visit.now};
      step.rows = visit.rows() > step.rows ? visit.rows() : step.rows;
    }
    queue.step(kernel, resident, step);
  }
  return queue.status();
}

template <class Cell, class Product, int RN, bool projected>
cudaError_t backward_at_once(const BackwardProblem<typename Product::Data, typename Product::A>& p,
                             const CudaCall& call, const CudaPlan& plan) {
  using T = typename Product::Data;
  BackwardCall<T> s{};
  s.p = p;
  lay_out<Cell>(s, call);
  Queue queue(call, plan);
  queue_preparation<Cell, T>(queue, s);
  queue_steps(queue, s);
  queue_sequence(queue, backward_sequence<Cell, Product, RN, projected>, plan, s);
  return queue.error();
}

}  // namespace rnnkern

// What the units of one step read and write: rows of the step in data, to be asked for by index,
// and of the loop's private matrices. The time loops make a view once a step and keep it local (see
// StepRows).
#pragma once

#include "cpu/gradients.h"

namespace rnnkern {
namespace {

template <class T>
struct ForwardView {
  using A = Accumulator<T>;
  StepRows rows;
  Matrix<A> x, c;
  Matrix<T> h, next_h, operand, gates, saved, y, next_h_prev;
  int64_t H, rows_next, t_boundary;  // the last: whose resets lie between this step and the next
  bool training, projects, resets;
};

template <class Cell, class T>
struct BackwardView {
  using A = Accumulator<T>;
  StepRows rows;
  Matrix<const T> gates, saved, h_prev, dy, gates_before;
  typename Gradients<Cell, T>::StepOfChunk chunk;
  Matrix<T> dr, dr_second, dh_projected;  // copies, or null
  Matrix<A> dh_direct, dh, dc;
  // How many rows run this step, the one visited before it, and the one before it in forward's
  // order; and whose resets lie between this step and either of them.
  int64_t now, prev, before, t_prev, t_before;
  int64_t H;
  bool resets, reverse, projects;
};

}  // namespace
}  // namespace rnnkern

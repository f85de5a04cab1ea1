// A stack of layers, one forward problem each; the outputs between them live in two buffers.
#include "cpu/stack.h"

#include <memory>
#include <new>

#include "cpu/driver.h"

namespace rnnkern {
namespace {

template <class T>
ForwardProblem<T> layer_problem(const StackProblem<T>& s, int64_t layer) {
  ForwardProblem<T> p{};
  p.seq.T = s.T_;
  p.seq.B = s.B;
  p.H = s.H;
  p.P = s.P;
  p.D = s.D;
  p.I = layer == 0 ? s.I : s.D * s.P;
  p.x_rows = layer == 0 && s.batch_first ? Rows{1, s.T_} : Rows{s.B, 1};
  p.y_rows = {s.B, 1};
  for (int64_t d = 0; d < s.D; ++d) {
    const int64_t row = layer * s.D + d, widths[kMaxStates] = {s.P, s.H};
    const T* const* w = s.weights + row * s.weights_of_direction();
    ForwardDirection<T>& io = p.dir[d];
    io.reverse = d == 1;
    io.W = w[0];
    io.R = w[1];
    if (s.bias) io.b_ih = w[2], io.b = w[3];
    if (s.P != s.H) io.W_hr = w[s.weights_of_direction() - 1];
    for (int k = 0; k < kMaxStates; ++k) {
      const int64_t at = row * s.B * widths[k];
      if (s.initial[k]) io.initial[k] = s.initial[k] + at;
      if (s.final[k]) io.final[k] = s.final[k] + at;
    }
  }
  return p;
}

}  // namespace

template <class T>
Status run_stack(int cell, const StackProblem<T>& s, int threads) {
  if (s.D < 1 || s.D > kMaxDirections) return Status::bad_problem;
  const int64_t width = s.D * s.P, elements = s.T_ * s.B * width;
  std::unique_ptr<T[]> between[2];
  for (int i = 0; i < 2 && i < s.layers - 1; ++i) {
    between[i].reset(new (std::nothrow) T[static_cast<size_t>(elements)]);
    if (!between[i]) return Status::out_of_memory;
  }
  for (int64_t layer = 0; layer < s.layers; ++layer) {
    ForwardProblem<T> p = layer_problem(s, layer);
    p.input = layer == 0 ? s.input : between[(layer - 1) % 2].get();
    T* y = layer == s.layers - 1 ? s.y : between[layer % 2].get();
    for (int64_t d = 0; d < s.D; ++d) p.dir[d].y = y + d * s.P;
    const Status status = run_forward(cell, p, threads);
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

template Status run_stack<float>(int, const StackProblem<float>&, int);
template Status run_stack<double>(int, const StackProblem<double>&, int);
template Status run_stack<Bfloat16>(int, const StackProblem<Bfloat16>&, int);

}  // namespace rnnkern

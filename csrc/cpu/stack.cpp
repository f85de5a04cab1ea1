// A stack of layers, one forward problem each; the outputs between them live in two buffers.
#include "cpu/stack.h"

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/driver.h"

namespace rnnkern {
namespace {

// The most rows of a piece: two pieces of half as many are as fast as one (docs/performance.md).
constexpr int64_t kPieceRows = 4096;

// Steps [begin, end) of one layer. A piece after the first goes on from the final states of the one
// before.
template <class T>
ForwardProblem<T> layer_problem(const StackProblem<T>& s, int64_t layer, int64_t begin,
                                int64_t end) {
  ForwardProblem<T> p{};
  const bool batch_major = layer == 0 && s.batch_first;
  p.seq.T = end - begin;
  p.seq.B = s.B;
  p.H = s.H;
  p.P = s.P;
  p.D = s.D;
  p.I = layer == 0 ? s.I : s.D * s.P;
  p.input = s.input + begin * s.I * (batch_major ? 1 : s.B);  // of layer 0
  p.x_rows = batch_major ? Rows{1, s.T_} : Rows{s.B, 1};
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
      if (s.final[k]) io.final[k] = s.final[k] + at;
      if (begin > 0) {
        io.initial[k] = io.final[k];
      } else if (s.initial[k]) {
        io.initial[k] = s.initial[k] + at;
      }
    }
  }
  return p;
}

// A state is rounded to the data's type between two pieces, which must not change it.
template <class T>
bool may_cut(const StackProblem<T>& s) {
  return std::is_same_v<T, Accumulator<T>> && s.layers > 1 && s.D == 1;
}

}  // namespace

template <class T>
Status run_stack(int cell, const StackProblem<T>& s, int threads) {
  if (s.D < 1 || s.D > kMaxDirections || s.T_ < 1 || s.B < 1) return Status::bad_problem;
  const int64_t width = s.D * s.P;
  const int64_t most = may_cut(s) ? std::clamp<int64_t>(kPieceRows / s.B, 1, s.T_) : s.T_;
  // Nearly equal: a short last piece would be of few_rows, which are summed in another order.
  const int64_t pieces = (s.T_ + most - 1) / most;
  std::unique_ptr<T[]> between[2];
  for (int i = 0; i < 2 && i < s.layers - 1; ++i) {
    between[i].reset(new (std::nothrow) T[static_cast<size_t>(most * s.B * width)]);
    if (!between[i]) return Status::out_of_memory;
  }
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t begin = s.T_ * i / pieces, end = s.T_ * (i + 1) / pieces;
    for (int64_t layer = 0; layer < s.layers; ++layer) {
      ForwardProblem<T> p = layer_problem(s, layer, begin, end);
      if (layer > 0) p.input = between[(layer - 1) % 2].get();
      T* y = layer == s.layers - 1 ? s.y + begin * s.B * width : between[layer % 2].get();
      for (int64_t d = 0; d < s.D; ++d) p.dir[d].y = y + d * s.P;
      const Status status = run_forward(cell, p, threads);
      if (status != Status::ok) return status;
    }
  }
  return Status::ok;
}

template Status run_stack<float>(int, const StackProblem<float>&, int);
template Status run_stack<double>(int, const StackProblem<double>&, int);
template Status run_stack<Bfloat16>(int, const StackProblem<Bfloat16>&, int);

}  // namespace rnnkern

// The problem of each layer and direction, and the pieces of a stack; the outputs between its
// layers live in two buffers.
#include "cpu/padded.h"

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/driver.h"

namespace rnnkern {
namespace {

// The most rows of a piece: two pieces of half as many are as fast as one (docs/performance.md).
constexpr int64_t kPieceRows = 4096;

bool valid(int cell, const PaddedSizes& s) {
  return cell >= 0 && cell < cell_count() && s.D >= 1 && s.D <= kMaxDirections && s.T >= 1 &&
         s.B >= 1 && s.layers >= 1;
}

Rows rows_of(bool batch_first, const PaddedSizes& s) {
  return batch_first ? Rows{1, s.T} : Rows{s.B, 1};
}

template <class Problem>
void set_sizes(Problem& p, const PaddedSizes& s, int64_t steps, int64_t I) {
  p.seq.T = steps;
  p.seq.B = s.B;
  p.H = s.H;
  p.P = s.P;
  p.D = s.D;
  p.I = I;
}

// The weights of one direction, by name; null where there is none.
template <class W>
struct Named {
  W *W_ih, *R, *b_ih, *b_hh, *W_hr;

  Named(const PaddedSizes& s, W* const* weights, int64_t row) {
    W* const* w = weights + row * s.weights_of_direction();
    W_ih = w[0];
    R = w[1];
    b_ih = s.bias ? w[2] : nullptr;
    b_hh = s.bias ? w[3] : nullptr;
    W_hr = s.P != s.H ? w[s.weights_of_direction() - 1] : nullptr;
  }
};

// Steps [begin, end) of one layer. A piece after the first goes on from the final states of the one
// before.
template <class T>
ForwardProblem<T> layer_problem(const CellInfo& cell, const PaddedForward<T>& f, int64_t layer,
                                int64_t begin, int64_t end) {
  const PaddedSizes& s = f.sizes;
  ForwardProblem<T> p{};
  const bool batch_major = layer == 0 && s.batch_first;
  set_sizes(p, s, end - begin, layer == 0 ? s.I : s.D * s.P);
  p.input = f.input + begin * s.I * (batch_major ? 1 : s.B);  // of layer 0
  p.x_rows = rows_of(batch_major, s);
  p.y_rows = rows_of(false, s);
  p.training = f.gates != nullptr;
  for (int64_t d = 0; d < s.D; ++d) {
    const int64_t row = layer * s.D + d, N = s.T * s.B, widths[kMaxStates] = {s.P, s.H};
    const Named<const T> w(s, f.weights, row);
    ForwardDirection<T>& io = p.dir[d];
    io.reverse = d == 1;
    io.W = w.W_ih;
    io.b_ih = w.b_ih;
    io.R = w.R;
    io.b = w.b_hh;
    io.W_hr = w.W_hr;
    for (int k = 0; k < kMaxStates; ++k) {
      const int64_t at = row * s.B * widths[k];
      if (f.final[k]) io.final[k] = f.final[k] + at;
      if (begin > 0) {
        io.initial[k] = io.final[k];
      } else if (f.initial[k]) {
        io.initial[k] = f.initial[k] + at;
      }
    }
    if (!p.training) continue;
    io.x = f.gates + d * cell.gates * s.H;
    if (f.h_prev) io.h_prev = f.h_prev + d * N * s.P;
    io.saved = f.saved + d * N * cell.saved * s.H;
  }
  return p;
}

// A state is rounded to the data's type between two pieces, which must not change it.
template <class T>
bool may_cut(const PaddedSizes& s) {
  return std::is_same_v<T, Accumulator<T>> && s.layers > 1 && s.D == 1;
}

}  // namespace

template <class T>
Status run_padded_forward(int cell, const PaddedForward<T>& f, int threads) {
  const PaddedSizes& s = f.sizes;
  if (!valid(cell, s) || (f.gates && s.layers > 1)) return Status::bad_problem;
  const CellInfo info = cell_info(cell);
  const int64_t width = s.D * s.P;
  const int64_t most = may_cut<T>(s) ? std::clamp<int64_t>(kPieceRows / s.B, 1, s.T) : s.T;
  // Nearly equal: a short last piece would be of few_rows, which are summed in another order.
  const int64_t pieces = (s.T + most - 1) / most;
  std::unique_ptr<T[]> between[2];
  for (int i = 0; i < 2 && i < s.layers - 1; ++i) {
    between[i].reset(new (std::nothrow) T[static_cast<size_t>(most * s.B * width)]);
    if (!between[i]) return Status::out_of_memory;
  }
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t begin = s.T * i / pieces, end = s.T * (i + 1) / pieces;
    for (int64_t layer = 0; layer < s.layers; ++layer) {
      ForwardProblem<T> p = layer_problem(info, f, layer, begin, end);
      if (layer > 0) p.input = between[(layer - 1) % 2].get();
      T* y = layer == s.layers - 1 ? f.y + begin * s.B * width : between[layer % 2].get();
      for (int64_t d = 0; d < s.D; ++d) p.dir[d].y = y + d * s.P;
      const Status status = run_forward(cell, p, threads);
      if (status != Status::ok) return status;
    }
  }
  return Status::ok;
}

template <class T>
Status run_padded_backward(int cell, const PaddedBackward<T>& b, int threads) {
  const PaddedSizes& s = b.sizes;
  if (!valid(cell, s) || s.layers > 1) return Status::bad_problem;
  const CellInfo info = cell_info(cell);
  CpuBackwardProblem<T> p{};
  set_sizes(p, s, s.T, s.I);
  p.x_rows = rows_of(s.batch_first, s);
  p.y_rows = rows_of(b.dy_batch_first, s);
  p.input = b.input;
  p.dinput = b.dinput;
  for (int64_t d = 0; d < s.D; ++d) {
    const int64_t N = s.T * s.B, widths[kMaxStates] = {s.P, s.H};
    const Named<const T> w(s, b.weights, d);
    const Named<Accumulator<T>> dw(s, b.dweights, d);
    auto& io = p.dir[d];
    io.reverse = d == 1;
    io.R = w.R;
    io.W_hr = w.W_hr;
    io.gates = b.gates + d * info.gates * s.H;
    if (b.h_prev) io.h_prev = b.h_prev + d * N * s.P;
    if (b.h0) io.h0 = b.h0 + d * s.B * s.P;
    io.saved = b.saved + d * N * info.saved * s.H;
    if (b.dy) io.dy = b.dy + d * s.P;
    for (int k = 0; k < kMaxStates; ++k) {
      const int64_t at = d * s.B * widths[k];
      if (b.dfinal[k]) io.dfinal[k] = b.dfinal[k] + at;
      if (b.dinitial[k]) io.dinitial[k] = b.dinitial[k] + at;
    }
    io.W = w.W_ih;
    io.sums = {dw.W_ih, dw.R, dw.b_ih, dw.b_hh, dw.W_hr};
  }
  return run_backward(cell, p, threads);
}

#define RNNKERN_PADDED_TYPE(T)                                              \
  template Status run_padded_forward<T>(int, const PaddedForward<T>&, int); \
  template Status run_padded_backward<T>(int, const PaddedBackward<T>&, int);
RNNKERN_PADDED_TYPE(float)
RNNKERN_PADDED_TYPE(double)
RNNKERN_PADDED_TYPE(Bfloat16)
#undef RNNKERN_PADDED_TYPE

}  // namespace rnnkern

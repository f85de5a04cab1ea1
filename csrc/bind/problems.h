// Tuples of integers from Python -> problem structs, the same for every backend.
//
// Every tensor is an address (0: absent); shapes stand in core/problem.h. The caller keeps the
// tensors alive, contiguous where that file says so, and large enough; only the modules
// beside rnnkern._native call it.
#pragma once

#include <pybind11/pybind11.h>

#include "core/problem.h"

namespace rnnkern {
namespace py = pybind11;

template <class V>
V* pointer(const py::handle& address) {
  return reinterpret_cast<V*>(address.cast<uintptr_t>());
}

inline int64_t integer(const py::handle& value) { return value.cast<int64_t>(); }

inline Rows rows(const py::tuple& strides) { return {integer(strides[0]), integer(strides[1])}; }

// (T, B, active, order, offset, resets, resets_stride_t, resets_stride_b, lengths)
inline Sequence sequence(const py::tuple& t) {
  Sequence s{};
  s.T = integer(t[0]);
  s.B = integer(t[1]);
  s.active = pointer<const int64_t>(t[2]);
  s.order = pointer<const int64_t>(t[3]);
  s.offset = pointer<const int64_t>(t[4]);
  s.resets = pointer<const uint8_t>(t[5]);
  s.resets_rows = {integer(t[6]), integer(t[7])};
  s.lengths = pointer<const int64_t>(t[8]);
  return s;
}

// (H, P, x_rows, y_rows, I, input)
template <class Problem>
void set_sizes(Problem& p, const py::tuple& seq, const py::tuple& sizes,
               const py::tuple& directions) {
  p.seq = sequence(seq);
  p.H = integer(sizes[0]);
  p.P = integer(sizes[1]);
  p.x_rows = rows(sizes[2]);
  p.y_rows = rows(sizes[3]);
  p.I = integer(sizes[4]);
  p.input = pointer<const typename Problem::Data>(sizes[5]);
  p.D = static_cast<int64_t>(directions.size());
  if (p.D > kMaxDirections) throw py::value_error("directions: at most 2");
}

// (reverse, W, b_ih, R, b, W_hr, x, h0, c0, reset_h, reset_c, hn, cn, y, h_prev, saved)
template <class T>
ForwardProblem<T> forward_problem(const py::tuple& seq, const py::tuple& sizes, bool training,
                                  const py::tuple& directions) {
  ForwardProblem<T> p{};
  set_sizes(p, seq, sizes, directions);
  p.training = training;
  for (size_t d = 0; d < directions.size(); ++d) {
    const auto t = directions[d].cast<py::tuple>();
    p.dir[d] = {t[0].cast<bool>(),
                pointer<const T>(t[1]),
                pointer<const T>(t[2]),
                pointer<const T>(t[3]),
                pointer<const T>(t[4]),
                pointer<const T>(t[5]),
                pointer<T>(t[6]),
                {pointer<const T>(t[7]), pointer<const T>(t[8])},
                {pointer<const T>(t[9]), pointer<const T>(t[10])},
                {pointer<T>(t[11]), pointer<T>(t[12])},
                pointer<T>(t[13]),
                pointer<T>(t[14]),
                pointer<T>(t[15])};
  }
  return p;
}

// Sizes as above, then dinput; directions (reverse, R, W_hr, gates, h_prev, saved, h0, reset_h, dy,
// dhn, dcn, dh0, dc0, dreset_h, dreset_c, W, dW, dR, db_ih, db_hh, dW_hr, dx, extra, dh)
template <class T, class A = T>
BackwardProblem<T, A> backward_problem(const py::tuple& seq, const py::tuple& sizes,
                                       const py::tuple& directions) {
  BackwardProblem<T, A> p{};
  set_sizes(p, seq, sizes, directions);
  p.dinput = pointer<T>(sizes[6]);
  for (size_t d = 0; d < directions.size(); ++d) {
    const auto t = directions[d].cast<py::tuple>();
    p.dir[d] = {t[0].cast<bool>(),
                pointer<const T>(t[1]),
                pointer<const T>(t[2]),
                pointer<const T>(t[3]),
                pointer<const T>(t[4]),
                pointer<const T>(t[5]),
                pointer<const T>(t[6]),
                pointer<const T>(t[7]),
                pointer<const T>(t[8]),
                {pointer<const T>(t[9]), pointer<const T>(t[10])},
                {pointer<A>(t[13]), pointer<A>(t[14])},
                {pointer<T>(t[11]), pointer<T>(t[12])},
                pointer<const T>(t[15]),
                {pointer<A>(t[16]), pointer<A>(t[17]), pointer<A>(t[18]), pointer<A>(t[19]),
                 pointer<A>(t[20])},
                pointer<T>(t[21]),
                pointer<T>(t[22]),
                pointer<T>(t[23])};
  }
  return p;
}

}  // namespace rnnkern

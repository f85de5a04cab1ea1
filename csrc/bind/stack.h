// A stack of layers on torch's tensors, whole calls at once: looks at the tensors, makes those of
// the results, and runs the kernels on their addresses (cpu/padded.h). What is unusual in a tensor
// or in torch's state is left to the operators: then the answer is None.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "bind/status.h"
#include "bind/tensors.h"
#include "cpu/driver.h"
#include "cpu/padded.h"

namespace rnnkern {

class Stack {
 public:
  Stack(int cell, int64_t I, int64_t H, int64_t P, int64_t layers, int64_t D, bool bias,
        bool batch_first)
      : cell_(cell), sizes_{0, 0, I, H, P, D, layers, bias, batch_first} {
    if (cell < 0 || cell >= cell_count()) raise(Status::unknown_cell);
    info_ = cell_info(cell);
  }

  int cell() const { return cell_; }
  const PaddedSizes& sizes() const { return sizes_; }

  // Layer 0, or one of those above it, alone.
  Stack layer(int64_t index) const {
    Stack one = *this;
    one.sizes_.layers = 1;
    if (index > 0) {
      one.sizes_.I = sizes_.D * sizes_.P;
      one.sizes_.batch_first = false;
    }
    return one;
  }

  // Whether this call may be made here: `states` is None or a tuple of the initial ones.
  bool fits(py::handle input, py::handle states, py::handle weights) const {
    Operands o;
    return unwatched() && gather(input.ptr(), states.ptr(), weights.ptr(), o);
  }

  // y [T,B,D·P] and the final states, or None.
  py::object infer(py::handle input, py::handle states, py::handle weights) const {
    return run_forward(input, states, weights,
                       [](const Operands&, auto&, py::tuple results) { return results; });
  }

  // One layer in training: the results, and a tuple of what backward needs of it, which is None if
  // nothing has a gradient. That is gates, h_prev and saved, None for those that are empty, in one
  // dimension each, or one after another in one tensor if they are small.
  py::object forward(py::handle input, py::handle states, py::handle weights) const {
    return run_forward(
        input, states, weights, [&](const Operands& o, auto& f, const py::tuple& results) {
          const bool keeps = requires_grad(input.ptr(), states.ptr(), weights.ptr());
          return py::make_tuple(results, keeps ? py::object(set_kept(o, f)) : py::none());
        });
  }

  // The gradients of (input, h0, c0, *weights) that `needs` asks for, from `saved`: these, and what
  // forward kept; and from the gradients of y and the final states, None for zero. None if a tensor
  // is unusual: hooks may have put others in the places of those that were saved.
  py::object backward(const py::tuple& saved, py::handle dy, py::handle dhn, py::handle dcn,
                      const py::tuple& needs) const {
    const size_t given = 3 + static_cast<size_t>(sizes_.weight_count());
    if (needs.size() != given || (saved.size() != given + 1 && saved.size() != given + 3))
      throw py::value_error("saved, needs: expected one entry for each tensor");
    Operands o;
    if ((dy.is_none() && dhn.is_none() && dcn.is_none()) || !unwatched() ||
        !gather_input(saved[0].ptr(), o) ||
        !gather_weights(&PyTuple_GET_ITEM(saved.ptr(), 3), given - 3, o))
      return py::none();
    return dispatch(o.kind, [&](auto element) -> py::object {
      return run_backward(decltype(element){}, o, saved, dy, dhn, dcn, needs);
    });
  }

 private:
  struct Operands {
    Kind kind;
    PaddedSizes sizes;
    void* input;
    void* initial[kMaxStates] = {};
    std::vector<void*> weights;
  };
  // Elements of what forward keeps.
  struct Kept {
    int64_t gates, h_prev, saved;
    int64_t all() const { return gates + h_prev + saved; }
  };
  // In one tensor below this size; beyond it each in its own, because glibc hands a block over
  // 32 MiB back to the system at every free.
  static constexpr int64_t kOneTensor = 1 << 20;  // bytes

  template <class T>
  Kept kept_of(const PaddedSizes& s) const {
    const int64_t N = s.T * s.B * s.D;
    const int64_t states = info_.template keeps_h_prev<T>(s.P != s.H) ? N * s.P : 0;
    return {N * info_.gates * s.H, states, N * info_.saved * s.H};
  }

  static int64_t state_width(const PaddedSizes& s, int k) { return k == 0 ? s.P : s.H; }

  template <class Use>
  static py::object dispatch(Kind kind, Use&& use) {
    switch (kind) {
      case Kind::float32: return use(float{});
      case Kind::float64: return use(double{});
      default: return use(Bfloat16{});
    }
  }

  template <class Call>
  static void run(Call&& kernels) {
    const int threads = static_cast<int>(PyLong_AsLong(call(Torch::get().get_threads).ptr()));
    Status status;
    {
      py::gil_scoped_release release;
      status = kernels(threads);
    }
    raise(status);
  }

  // The kernels write what `finish` returns, made of the results and of what it sets besides.
  template <class Finish>
  py::object run_forward(py::handle input, py::handle states, py::handle weights,
                         Finish&& finish) const {
    Operands o;
    if (!unwatched() || !gather(input.ptr(), states.ptr(), weights.ptr(), o)) return py::none();
    return dispatch(o.kind, [&](auto element) -> py::object {
      PaddedForward<decltype(element)> f{};
      py::tuple results = set_forward(o, f);
      py::object made = finish(o, f, std::move(results));
      run([&](int threads) { return run_padded_forward(cell_, f, threads); });
      return made;
    });
  }

  bool gather_input(PyObject* input, Operands& o) const {
    View v;
    if (!look(input, v) || v.rank != 3 || !v.dense()) return false;
    o.kind = v.kind;
    o.sizes = sizes_;
    o.sizes.T = v.shape[sizes_.batch_first ? 1 : 0];
    o.sizes.B = v.shape[sizes_.batch_first ? 0 : 1];
    o.input = v.data;
    return v.shape[2] == sizes_.I && o.sizes.T > 0 && o.sizes.B > 0 && sizes_.I > 0 &&
           sizes_.H > 0 && (v.kind != Kind::bfloat16 || computes_bfloat16());
  }

  // A tensor that a kernel can read, of the input's type.
  static bool gather_one(PyObject* object, const Operands& o, std::initializer_list<int64_t> shape,
                         void*& data) {
    View v;
    if (!look(object, v) || v.kind != o.kind || !v.has_shape(shape) || !v.dense()) return false;
    data = v.data;
    return true;
  }

  static bool requires_grad(PyObject* input, PyObject* states, PyObject* weights) {
    std::vector<PyObject*> all{input};
    for (PyObject* tensors : {states, weights}) {
      if (tensors == Py_None) continue;
      PyObject* const* first = PySequence_Fast_ITEMS(tensors);
      all.insert(all.end(), first, first + PySequence_Fast_GET_SIZE(tensors));
    }
    const py::object& any = Torch::get().any_requires_grad;
    const auto found = owned(PyObject_Vectorcall(any.ptr(), all.data(), all.size(), nullptr));
    return found.ptr() == Py_True;
  }

  // Calls use(shape) for weight i, in the order of PaddedSizes.
  template <class Use>
  auto with_weight_shape(size_t i, Use&& use) const {
    using Shape = std::initializer_list<int64_t>;
    const PaddedSizes& s = sizes_;
    const auto each = static_cast<size_t>(s.weights_of_direction());
    const int64_t GH = info_.gates * s.H;
    const bool first = static_cast<int64_t>(i / each) < s.D;  // of the layers
    const size_t which = i % each;
    if (which == 0) return use(Shape{GH, first ? s.I : s.D * s.P});
    if (which == 1) return use(Shape{GH, s.P});
    if (which < 4 && s.bias) return use(Shape{GH});
    return use(Shape{s.P, s.H});
  }

  bool gather_weights(PyObject* const* items, size_t count, Operands& o) const {
    if (static_cast<int64_t>(count) != sizes_.weight_count()) return false;
    o.weights.resize(count);
    for (size_t i = 0; i < count; ++i) {
      const auto gather_it = [&](std::initializer_list<int64_t> shape) {
        return gather_one(items[i], o, shape, o.weights[i]);
      };
      if (!with_weight_shape(i, gather_it)) return false;
    }
    return true;
  }

  bool gather(PyObject* input, PyObject* states, PyObject* weights, Operands& o) const {
    if (!gather_input(input, o)) return false;
    if (states != Py_None) {
      if (!PyTuple_CheckExact(states) || PyTuple_GET_SIZE(states) != info_.states) return false;
      const int64_t rows = sizes_.layers * sizes_.D;
      for (int k = 0; k < info_.states; ++k) {
        if (!gather_one(PyTuple_GET_ITEM(states, k), o, {rows, o.sizes.B, state_width(sizes_, k)},
                        o.initial[k]))
          return false;
      }
    }
    if (!PyList_CheckExact(weights) && !PyTuple_CheckExact(weights)) return false;
    return gather_weights(PySequence_Fast_ITEMS(weights),
                          static_cast<size_t>(PySequence_Fast_GET_SIZE(weights)), o);
  }

  // Sets all but what training keeps, and returns the results that the kernels will write.
  template <class T>
  py::tuple set_forward(const Operands& o, PaddedForward<T>& f) const {
    const PaddedSizes& s = f.sizes = o.sizes;
    f.input = static_cast<const T*>(o.input);
    f.weights = reinterpret_cast<const T* const*>(o.weights.data());
    py::tuple results(1 + info_.states);
    void* data = nullptr;
    results[0] = make(o.kind, {s.T, s.B, s.D * s.P}, data);
    f.y = static_cast<T*>(data);
    for (int k = 0; k < info_.states; ++k) {
      f.initial[k] = static_cast<const T*>(o.initial[k]);
      results[1 + k] = make(o.kind, {s.layers * s.D, s.B, state_width(s, k)}, data);
      f.final[k] = static_cast<T*>(data);
    }
    return results;
  }

  template <class T>
  py::tuple set_kept(const Operands& o, PaddedForward<T>& f) const {
    const Kept n = kept_of<T>(o.sizes);
    const bool one = n.all() * static_cast<int64_t>(sizeof(T)) <= kOneTensor;
    py::tuple kept(one ? 1 : 3);
    void* data[3] = {};
    const auto add = [&](size_t i, int64_t elements) {
      kept[i] = elements ? make(o.kind, {elements}, data[i]) : py::none();
    };
    add(0, one ? n.all() : n.gates);
    if (!one) add(1, n.h_prev);
    if (!one) add(2, n.saved);
    set_parts<T>(n, data, one, f);
    return kept;
  }

  // Where each part lies in data's one block or three; null if it is empty.
  template <class T, class Parts>
  static void set_parts(const Kept& n, void* const* data, bool one, Parts& parts) {
    T* rest = static_cast<T*>(data[0]);
    const auto next = [&](size_t i, int64_t elements) -> T* {
      if (!elements || !one) return static_cast<T*>(data[i]);
      T* part = rest;
      rest += elements;
      return part;
    };
    parts.gates = next(0, n.gates);
    parts.h_prev = next(1, n.h_prev);
    parts.saved = next(2, n.saved);
  }

  // The same for backward; false if they are unusual.
  template <class T>
  bool gather_kept(PyObject* const* kept, size_t count, const Operands& o,
                   PaddedBackward<T>& b) const {
    const Kept n = kept_of<T>(o.sizes);
    const bool one = count == 1;
    const int64_t elements[] = {one ? n.all() : n.gates, n.h_prev, n.saved};
    void* data[3] = {};
    for (size_t i = 0; i < count; ++i) {
      if (elements[i] && !gather_one(kept[i], o, {elements[i]}, data[i])) return false;
    }
    set_parts<T>(n, data, one, b);
    return true;
  }

  // Looks at the gradient of a result; one that does not lie as a kernel reads it is copied, and
  // `keep` then owns the copy. False if it is unusual otherwise.
  static bool gather_gradient(py::handle given, const Operands& o,
                              std::initializer_list<int64_t> shape, bool* transposed, void*& data,
                              py::object& keep) {
    data = nullptr;
    if (given.is_none()) return true;
    View v;
    if (!look(given.ptr(), v) || v.kind != o.kind || !v.has_shape(shape)) return false;
    if (!v.dense()) {
      if (transposed && v.transposed().dense()) {
        *transposed = true;
      } else {
        keep = call(Torch::get().contiguous, given.ptr());
        if (!locate(keep.ptr(), v)) return false;
      }
    }
    data = v.data;
    return true;
  }

  template <class T>
  py::object run_backward(T, const Operands& o, const py::tuple& saved, py::handle dy,
                          py::handle dhn, py::handle dcn, const py::tuple& needs) const {
    const PaddedSizes& s = o.sizes;
    PaddedBackward<T> b{};
    b.sizes = s;
    b.input = static_cast<const T*>(o.input);
    b.weights = reinterpret_cast<const T* const*>(o.weights.data());
    const size_t given = needs.size();
    if (!gather_kept(&PyTuple_GET_ITEM(saved.ptr(), given), saved.size() - given, o, b))
      return py::none();
    py::object copies[1 + kMaxStates];
    void* data = nullptr;
    if (!saved[1].is_none()) {
      if (!gather_one(saved[1].ptr(), o, {s.D, s.B, s.P}, data)) return py::none();
      b.h0 = static_cast<const T*>(data);
    }
    if (!gather_gradient(dy, o, {s.T, s.B, s.D * s.P}, &b.dy_batch_first, data, copies[0]))
      return py::none();
    b.dy = static_cast<const T*>(data);
    const py::handle dfinal[] = {dhn, dcn};
    for (int k = 0; k < kMaxStates; ++k) {
      if (!gather_gradient(dfinal[k], o, {s.D, s.B, state_width(s, k)}, nullptr, data,
                           copies[1 + k]))
        return py::none();
      b.dfinal[k] = static_cast<const T*>(data);
    }

    const size_t count = o.weights.size();
    py::tuple grads(3 + count);
    const auto wanted = [&](size_t i) { return needs[i].ptr() == Py_True; };
    const auto add = [&](size_t i, Kind kind, std::initializer_list<int64_t> shape) {
      void* made = nullptr;
      grads[i] = wanted(i) ? make(kind, shape, made) : py::none();
      return made;
    };
    const int64_t first = s.batch_first ? s.B : s.T, second = s.batch_first ? s.T : s.B;
    b.dinput = static_cast<T*>(add(0, o.kind, {first, second, s.I}));
    for (int k = 0; k < kMaxStates; ++k)
      b.dinitial[k] =
          static_cast<T*>(add(static_cast<size_t>(1 + k), o.kind, {s.D, s.B, state_width(s, k)}));
    const Kind summed = o.kind == Kind::bfloat16 ? Kind::float32 : o.kind;
    std::vector<void*> dweights(count);
    for (size_t i = 0; i < count; ++i) {
      const auto add_it = [&](std::initializer_list<int64_t> shape) {
        return add(3 + i, summed, shape);
      };
      dweights[i] = with_weight_shape(i, add_it);
    }
    b.dweights = reinterpret_cast<Accumulator<T>* const*>(dweights.data());
    run([&](int threads) { return run_padded_backward(cell_, b, threads); });
    if (summed != o.kind) {
      const Torch& torch = Torch::get();
      for (size_t i = 3; i < grads.size(); ++i) {
        if (wanted(i)) grads[i] = torch.converted(grads[i], torch.dtypes[static_cast<int>(o.kind)]);
      }
    }
    return std::move(grads);
  }

  int cell_;
  CellInfo info_;
  PaddedSizes sizes_;  // T and B are each call's
};

}  // namespace rnnkern

// rnnkern._cpu: integers from Python -> problem structs, statuses -> exceptions. Nothing else
// happens here.
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "bind/problems.h"
#include "bind/roofline.h"
#include "bind/tensors.h"
#include "cpu/driver.h"
#include "cpu/padded.h"
#include "cpu/team.h"

using namespace rnnkern;

namespace {

void raise(Status status) {
  switch (status) {
    case Status::ok: return;
    case Status::out_of_memory: throw std::bad_alloc();  // MemoryError
    case Status::unknown_cell: throw py::value_error("cell: no such index in the registry");
    case Status::unsupported_type:
      throw py::value_error(std::string("bfloat16: not computed by the ISA ") + current_isa());
    case Status::device_error: break;  // of the CUDA backend only
    case Status::bad_problem: throw py::value_error("problem: sizes out of range for this cell");
  }
}

template <class T>
void forward(int cell, int threads, const py::tuple& seq, const py::tuple& sizes, bool training,
             const py::tuple& directions) {
  const ForwardProblem<T> p = forward_problem<T>(seq, sizes, training, directions);
  Status status;
  {
    py::gil_scoped_release release;
    status = run_forward<T>(cell, p, threads);
  }
  raise(status);
}

template <class T>
void backward(int cell, int threads, const py::tuple& seq, const py::tuple& sizes,
              const py::tuple& directions) {
  const CpuBackwardProblem<T> p = backward_problem<T, Accumulator<T>>(seq, sizes, directions);
  Status status;
  {
    py::gil_scoped_release release;
    status = run_backward<T>(cell, p, threads);
  }
  raise(status);
}

// Addresses, as a list of pointers and in the order that a signature gives them.
template <class T>
struct Addresses {
  std::vector<T*> all;
  size_t taken = 0;

  Addresses(const char* name, const py::tuple& given, int64_t expected) : all(given.size()) {
    if (static_cast<int64_t>(all.size()) != expected)
      throw py::value_error(std::string(name) + ": expected " + std::to_string(expected) +
                            " addresses, got " + std::to_string(all.size()));
    for (size_t i = 0; i < all.size(); ++i) all[i] = pointer<T>(given[i]);
  }
  T* next() { return all[taken++]; }
  T* const* next(int64_t count) {
    T* const* first = all.data() + taken;
    taken += static_cast<size_t>(count);
    return first;
  }
};

// `read`: input, h0, c0, the weights; `written`: y, hn, cn, gates, h_prev, saved (see cpu/padded.h;
// 0: absent).
template <class T>
void padded_forward(int cell, int threads, int64_t T_, int64_t B, int64_t I, int64_t H, int64_t P,
                    int64_t D, int64_t layers, bool bias, bool batch_first, const py::tuple& read,
                    const py::tuple& written) {
  PaddedForward<T> f{};
  f.sizes = {T_, B, I, H, P, D, layers, bias, batch_first};
  Addresses<const T> in("read", read, 3 + f.sizes.weight_count());
  Addresses<T> out("written", written, 6);
  f.input = in.next();
  for (auto& state : f.initial) state = in.next();
  f.weights = in.next(f.sizes.weight_count());
  f.y = out.next();
  for (auto& state : f.final) state = out.next();
  f.gates = out.next();
  f.h_prev = out.next();
  f.saved = out.next();
  Status status;
  {
    py::gil_scoped_release release;
    status = run_padded_forward<T>(cell, f, threads);
  }
  raise(status);
}

// `read`: input, gates, h_prev, saved, dy, dhn, dcn, the weights; `written`: the gradients of the
// input, h0, c0 and the weights.
template <class T>
void padded_backward(int cell, int threads, int64_t T_, int64_t B, int64_t I, int64_t H, int64_t P,
                     int64_t D, bool bias, bool batch_first, bool dy_batch_first,
                     const py::tuple& read, const py::tuple& written) {
  PaddedBackward<T> b{};
  b.sizes = {T_, B, I, H, P, D, 1, bias, batch_first};
  b.dy_batch_first = dy_batch_first;
  const int64_t weights = b.sizes.weight_count();
  Addresses<const T> in("read", read, 7 + weights);
  Addresses<void> out("written", written, 3 + weights);
  b.input = in.next();
  b.gates = in.next();
  b.h_prev = in.next();
  b.saved = in.next();
  b.dy = in.next();
  for (auto& state : b.dfinal) state = in.next();
  b.weights = in.next(weights);
  b.dinput = static_cast<T*>(out.next());
  for (auto& state : b.dinitial) state = static_cast<T*>(out.next());
  b.dweights = reinterpret_cast<Accumulator<T>* const*>(out.next(weights));
  Status status;
  {
    py::gil_scoped_release release;
    status = run_padded_backward<T>(cell, b, threads);
  }
  raise(status);
}

template <class T>
py::dict plan(int cell, int threads, int64_t T_, int64_t B, int64_t H, int64_t P, int64_t D,
              int64_t I, bool back) {
  if (D < 1 || D > kMaxDirections) throw py::value_error("D: expected 1 or 2");
  T some{};  // only whether there is a projection, or a gradient of the input, counts
  const auto sized = [&](auto problem) {
    problem.seq.T = T_;
    problem.seq.B = B;
    problem.H = H;
    problem.P = P;
    problem.I = I;
    problem.D = D;
    if (P != H) problem.dir[0].W_hr = &some;
    return problem;
  };
  CpuBackwardProblem<T> backward{};
  backward.dinput = &some;
  Plan chosen;
  raise(back ? plan_backward<T>(cell, sized(backward), threads, chosen)
             : plan_forward<T>(cell, sized(ForwardProblem<T>{}), threads, chosen));
  py::dict d;
  d["threads"] = chosen.threads();
  d["direction_groups"] = chosen.direction_groups;
  d["row_groups"] = chosen.row_groups;
  d["unit_groups"] = chosen.unit_groups;
  d["step_microseconds"] = chosen.step_microseconds;
  return d;
}

const char* extra_name(Extra extra) {
  switch (extra) {
    case Extra::none: return "none";
    case Extra::recurrent_gradient: return "recurrent_gradient";
    case Extra::operand: return "operand";
    case Extra::output: return "output";
  }
  return "";
}

py::list cells() {
  py::list list;
  for (int i = 0; i < cell_count(); ++i) {
    const CellInfo info = cell_info(i);
    py::dict d;
    d["name"] = info.name;
    d["gates"] = info.gates;
    d["states"] = info.states;
    d["saved"] = info.saved;
    d["phases"] = info.phases;
    d["last_phase"] = info.last_phase;
    d["extra"] = extra_name(info.extra);
    d["projects"] = info.projects;
    list.append(d);
  }
  return list;
}

py::list supported_isas() {
  py::list list;
  for (int i = 0; supported_isa(i); ++i) list.append(supported_isa(i));
  return list;
}

void pin_isa(const std::string& name) {
  if (select_isa(name.c_str())) return;
  std::string message =
      "RNNKERN_ISA: '" + name + "' is unknown or not supported by this CPU; supported:";
  for (int i = 0; supported_isa(i); ++i) message += std::string(i ? ", " : " ") + supported_isa(i);
  throw py::value_error(message);
}

template <class T>
void define(py::module_& m, const std::string& type) {
  m.def(("forward_" + type).c_str(), &forward<T>);
  m.def(("backward_" + type).c_str(), &backward<T>);
  m.def(("padded_forward_" + type).c_str(), &padded_forward<T>);
  m.def(("padded_backward_" + type).c_str(), &padded_backward<T>);
  m.def(("plan_" + type).c_str(), &plan<T>);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "rnnkern's CPU kernels";
  m.def("cells", &cells);
  m.def("isa", &current_isa);
  m.def("supported_isas", &supported_isas);
  m.def("select_isa", &pin_isa);
  m.def("allow_oversubscription", &allow_oversubscription);
  m.def("computes_bfloat16", &computes_bfloat16);
  define<float>(m, "float32");
  define<double>(m, "float64");
  define<Bfloat16>(m, "bfloat16");
  m.def("roofline", &roofline);
  m.def("reads_exchange_api", &reads_exchange_api);
  m.def("addresses", &addresses);
  const char* isa = std::getenv("RNNKERN_ISA");
  if (isa && *isa) pin_isa(isa);
}

// rnnkern._cpu: integers from Python -> problem structs, and stacks of layers on torch's tensors;
// statuses -> exceptions. Nothing else happens here.
#include <cstdlib>
#include <string>

#include "bind/problems.h"
#include "bind/roofline.h"
#include "bind/stack.h"
#include "bind/status.h"
#include "bind/tensors.h"
#include "cpu/driver.h"
#include "cpu/team.h"

using namespace rnnkern;

namespace {

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

// `ragged`: with lengths, or packed.
template <class T>
py::dict plan(int cell, int threads, int64_t T_, int64_t B, int64_t H, int64_t P, int64_t D,
              int64_t I, bool back, bool ragged) {
  if (D < 1 || D > kMaxDirections) throw py::value_error("D: expected 1 or 2");
  // Only whether there is a projection, a gradient of the input, or rows that end counts.
  T some{};
  const int64_t active = 0;
  const auto sized = [&](auto problem) {
    problem.seq.T = T_;
    problem.seq.B = B;
    if (ragged) problem.seq.active = &active;
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
  d["helpers"] = chosen.helpers;
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
    d["recovers"] = info.recovers;
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
  m.def("sleep_at_once", &sleep_at_once);
  m.def("computes_bfloat16", &computes_bfloat16);
  define<float>(m, "float32");
  define<double>(m, "float64");
  define<Bfloat16>(m, "bfloat16");
  m.def("roofline", &roofline);
  m.def("use_torch", &use_torch);
  py::class_<Stack>(m, "Stack")
      .def(py::init<int, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool>())
      .def_property_readonly("cell", &Stack::cell)
      .def_property_readonly("H", [](const Stack& s) { return s.sizes().H; })
      .def_property_readonly("P", [](const Stack& s) { return s.sizes().P; })
      .def_property_readonly("layers", [](const Stack& s) { return s.sizes().layers; })
      .def_property_readonly("directions", [](const Stack& s) { return s.sizes().D; })
      .def_property_readonly("bias", [](const Stack& s) { return s.sizes().bias; })
      .def_property_readonly("batch_first", [](const Stack& s) { return s.sizes().batch_first; })
      .def("layer", &Stack::layer)
      .def("fits", &Stack::fits)
      .def("infer", &Stack::infer)
      .def("forward", &Stack::forward)
      .def("backward", &Stack::backward);
  const char* isa = std::getenv("RNNKERN_ISA");
  if (isa && *isa) pin_isa(isa);
}

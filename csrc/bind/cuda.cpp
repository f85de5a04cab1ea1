// rnnkern._cuda: as rnnkern._cpu, for the CUDA backend. Addresses are the device's, except those of
// a packed sequence's sizes and offsets. Importing it needs neither a driver nor a device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "bind/problems.h"
#include "cuda/driver.h"

using namespace rnnkern;

namespace {

// What a device said, as an error of torch's own kind where it has one; `what`: which call failed.
[[noreturn]] void raise_error_of(const std::string& what, int device, bool memory) {
  const std::string message =
      "rnnkern: " + what + " on device " + std::to_string(device) + ": " + cuda_error();
  if (!memory) throw std::runtime_error(message);
  PyErr_SetString(py::module_::import("torch").attr("OutOfMemoryError").ptr(), message.c_str());
  throw py::error_already_set();
}

void raise(Status status, const char* what = "", int device = 0) {
  switch (status) {
    case Status::ok: return;
    case Status::out_of_memory: raise_error_of(what, device, true);
    case Status::unknown_cell: throw py::value_error("cell: no such index in the registry");
    case Status::bad_problem: throw py::value_error("problem: sizes out of range for this cell");
    case Status::unsupported_type: break;  // of the CPU backend only
    case Status::device_error: raise_error_of(what, device, false);
  }
}

// (device, stream, workspace, tf32, persistent)
CudaCall cuda_call(const py::tuple& t) {
  return {t[0].cast<int>(), pointer<void>(t[1]), pointer<void>(t[2]), t[3].cast<bool>(),
          t[4].cast<bool>()};
}

void check_cell(int cell) {
  if (cell < 0 || cell >= cuda_cell_count()) raise(Status::unknown_cell);
}

// Without a workspace, only its size in bytes is returned.
template <class T>
size_t forward(int cell, const py::tuple& where, const py::tuple& seq, const py::tuple& sizes,
               bool training, const py::tuple& directions) {
  check_cell(cell);
  const auto p = forward_problem<T>(seq, sizes, training, directions);
  const CudaCall call = cuda_call(where);
  if (call.workspace) {
    Status status;
    {
      py::gil_scoped_release release;
      status = run_forward_cuda<T>(cell, p, call);
    }
    raise(status, "forward", call.device);
  }
  return forward_workspace<T>(cell, p, call);
}

template <class T, class A>
size_t backward(int cell, const py::tuple& where, const py::tuple& seq, const py::tuple& sizes,
                const py::tuple& directions) {
  check_cell(cell);
  const auto p = backward_problem<T, A>(seq, sizes, directions);
  const CudaCall call = cuda_call(where);
  if (call.workspace) {
    Status status;
    {
      py::gil_scoped_release release;
      status = run_backward_cuda<T, A>(cell, p, call);
    }
    raise(status, "backward", call.device);
  }
  return backward_workspace<T, A>(cell, p, call);
}

py::dict as_dict(const CudaPlan& plan) {
  py::dict d;
  d["kind"] = plan.blocks_of_group > 0 ? "persistent" : "stepwise";
  d["tensor_cores"] = plan.tensor_cores;
  d["rows_of_a_block"] = 8 * plan.row_tiles;
  d["wide_blocks"] = plan.wide;
  d["blocks_of_a_group"] = plan.blocks_of_group;
  d["groups"] = plan.groups;
  d["resident_bytes"] = plan.resident;
  d["streamed_bytes"] = plan.streamed;
  d["shared_memory_bytes"] = plan.memory;
  return d;
}

// (B, H, D, P), P = 0 without a projection -> the plans of forward and backward
template <class T, class A>
py::dict plan(int cell, const py::tuple& where, const py::tuple& sizes) {
  check_cell(cell);
  const CudaCall call = cuda_call(where);
  const auto set = [&](auto problem) {
    problem.seq.B = integer(sizes[0]);
    problem.H = integer(sizes[1]);
    problem.D = integer(sizes[2]);
    const int64_t P = integer(sizes[3]);
    static const T present{};
    problem.dir[0].W_hr = P > 0 ? &present : nullptr;
    problem.P = P > 0 ? P : problem.H;
    return problem;
  };
  CudaPlan forward, backward;
  Status status = forward_plan<T>(cell, set(ForwardProblem<T>{}), call, forward);
  if (status == Status::ok)
    status = backward_plan<T, A>(cell, set(BackwardProblem<T, A>{}), call, backward);
  raise(status, "plan", call.device);
  py::dict d;
  d["forward"] = as_dict(forward);
  d["backward"] = as_dict(backward);
  return d;
}

}  // namespace

#if !defined(RNNKERN_CUDA_MODULE)
#define RNNKERN_CUDA_MODULE _cuda
#endif

PYBIND11_MODULE(RNNKERN_CUDA_MODULE, m) {
  m.doc() = "rnnkern's CUDA kernels";
  m.def("device_problem", &device_problem);
  m.def("cooperation_problem", &cooperation_problem);
  m.def("forward_float32", &forward<float>);
  m.def("forward_float64", &forward<double>);
  m.def("forward_float16", &forward<__half>);
  m.def("forward_bfloat16", &forward<__nv_bfloat16>);
  m.def("backward_float32", &backward<float, float>);
  m.def("backward_float64", &backward<double, double>);
  m.def("backward_float16", &backward<__half, float>);
  m.def("backward_bfloat16", &backward<__nv_bfloat16, float>);
  m.def("plan_float32", &plan<float, float>);
  m.def("plan_float64", &plan<double, double>);
  m.def("plan_float16", &plan<__half, float>);
  m.def("plan_bfloat16", &plan<__nv_bfloat16, float>);
}

// Where tensors are and how they lie, asked through DLPack's C exchange API: a table of functions
// that a type of tensors carries as `__dlpack_c_exchange_api__`. It links nothing of torch, and
// takes less than half as long as asking for a tensor's attributes one by one.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace rnnkern {
namespace py = pybind11;

// The parts of https://github.com/dmlc/dlpack that are read here; their layout is that of its ABI,
// which one major version does not change.
namespace dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t* shape;
  const int64_t* strides;  // in elements; null: those of compact rows
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major_version, minor_version;
  void* previous_api;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*from_object)(void* object, Tensor* out);  // null: not supported; 0: done
  void* current_stream;
};

}  // namespace dlpack

inline const dlpack::ExchangeApi& exchange_api(py::handle capsule) {
  auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  return *api;
}

// Whether `addresses` can use what a type of tensors carries.
inline bool reads_exchange_api(py::handle capsule) {
  const dlpack::ExchangeApi& api = exchange_api(capsule);
  return api.major_version == dlpack::kMajorVersion && api.from_object;
}

// Whether a tensor has this shape, with its elements side by side in memory that is the CPU's.
inline bool is_dense(const dlpack::Tensor& t, py::handle shape) {
  if (t.device_type != dlpack::kCpu || !PyTuple_Check(shape.ptr()) ||
      t.ndim != PyTuple_GET_SIZE(shape.ptr()))
    return false;
  int64_t elements = 1;
  for (int32_t i = t.ndim - 1; i >= 0; --i) {
    const int64_t size = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
    if (size == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (t.shape[i] != size) return false;
    if (t.strides && size != 1 && t.strides[i] != elements) return false;
    elements *= size;
  }
  return t.data || elements == 0;
}

// The addresses of tensors that a kernel can read, each of one of `types`, with `bits` of DLPack's
// type `code`, dense, and of its shape in `shapes`; None if one of them is not so.
inline py::object addresses(py::handle capsule, const py::list& tensors, const py::tuple& types,
                            int code, int bits, const py::tuple& shapes) {
  const dlpack::ExchangeApi& api = exchange_api(capsule);
  const size_t count = tensors.size();
  if (shapes.size() != count)
    throw py::value_error("shapes: expected one for each of " + std::to_string(count) + " tensors");
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  py::tuple found(count);
  for (size_t i = 0; i < count; ++i) {
    PyObject* object = tensors[i].ptr();
    bool known = false;
    for (py::handle type : types)
      known |= reinterpret_cast<PyObject*>(Py_TYPE(object)) == type.ptr();
    if (!known) return py::none();
    dlpack::Tensor t;
    if (api.from_object(object, &t) != 0) {  // no memory of its own
      PyErr_Clear();
      return py::none();
    }
    if (t.type_code != code || t.type_bits != bits || t.type_lanes != 1 || !is_dense(t, shapes[i]))
      return py::none();
    auto negative = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, is_neg));
    if (!negative) throw py::error_already_set();
    if (negative.ptr() != Py_False) return py::none();
    found[i] = reinterpret_cast<uintptr_t>(static_cast<char*>(t.data) + t.byte_offset);
  }
  return std::move(found);
}

}  // namespace rnnkern

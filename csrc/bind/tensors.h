// torch's tensors as the kernels read them, and new ones for what they write. Nothing of torch is
// linked: where a tensor is and how it lies is asked through DLPack's C exchange API, a table of
// functions that a type of tensors carries as `__dlpack_c_exchange_api__` (torch 2.10 and later),
// otherwise of a function in Python; all else is torch's Python, looked up once and called from
// here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <utility>

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

constexpr int kMaxRank = 3;

// The types of data that have kernels, by what DLPack calls them.
enum class Kind { float32, float64, bfloat16, other };

inline Kind kind(int code, int bits) {
  if (code == 2) return bits == 32 ? Kind::float32 : bits == 64 ? Kind::float64 : Kind::other;
  return code == 4 && bits == 16 ? Kind::bfloat16 : Kind::other;
}

// What is used of torch; see rnnkern.plain, which hands it over. Never freed, as long as the
// interpreter's own modules.
struct Torch {
  const dlpack::ExchangeApi* exchange = nullptr;  // null: `describe` is called
  py::object tensor, parameter;                   // the types of tensors that are plain
  py::object describe;           // tensor -> (address, code, bits, *shape, *strides) or None
  py::object is_neg;             // tensor -> bool
  py::object any_requires_grad;  // tensors -> bool
  py::object contiguous;         // tensor -> tensor
  py::object converted;          // tensor, dtype -> tensor
  py::object empty;              // shape, strides, dtype -> tensor
  py::object get_threads;        // -> int
  py::object dtypes[3];          // of each Kind
  py::tuple watchers;            // -> whether operators are traced, transformed, changed or watched

  static Torch& get() {
    static Torch& torch = *new Torch;
    return torch;
  }
};

inline py::object owned(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline py::object call(const py::object& f) { return owned(PyObject_CallNoArgs(f.ptr())); }
inline py::object call(const py::object& f, PyObject* a) {
  return owned(PyObject_CallOneArg(f.ptr(), a));
}

// Whether operators do now what they always do, and nobody looks at them.
inline bool unwatched() {
  const py::tuple watchers = Torch::get().watchers;  // its own reference: others may connect again
  for (py::handle watcher : watchers) {
    const py::object found = owned(PyObject_CallNoArgs(watcher.ptr()));
    if (found.ptr() == Py_False || found.ptr() == Py_None) continue;
    const int watches = PyObject_IsTrue(found.ptr());
    if (watches < 0) throw py::error_already_set();
    if (watches) return false;
  }
  return true;
}

// A tensor's memory, the CPU's.
struct View {
  void* data;
  Kind kind;
  int rank;
  int64_t shape[kMaxRank], strides[kMaxRank];  // strides in elements

  bool has_shape(std::initializer_list<int64_t> expected) const {
    if (rank != static_cast<int>(expected.size())) return false;
    const int64_t* own = shape;
    for (const int64_t size : expected) {
      if (*own++ != size) return false;
    }
    return true;
  }
  bool dense() const {
    int64_t elements = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != elements) return false;
      elements *= shape[i];
    }
    return true;
  }
  // The same with the first two dimensions in the other order.
  View transposed() const {
    View v = *this;
    std::swap(v.shape[0], v.shape[1]);
    std::swap(v.strides[0], v.strides[1]);
    return v;
  }
};

// Where a tensor is; false if it has no memory of the CPU's, or no kernel reads its type.
inline bool locate(PyObject* object, View& v) {
  const Torch& torch = Torch::get();
  if (torch.exchange) {
    dlpack::Tensor t;
    if (torch.exchange->from_object(object, &t) != 0) {
      PyErr_Clear();
      return false;
    }
    if (t.device_type != dlpack::kCpu || t.type_lanes != 1 || t.ndim > kMaxRank) return false;
    v.data = static_cast<char*>(t.data) + t.byte_offset;
    v.kind = kind(t.type_code, t.type_bits);
    v.rank = t.ndim;
    int64_t elements = 1;
    for (int i = v.rank - 1; i >= 0; --i) {
      v.shape[i] = t.shape[i];
      v.strides[i] = t.strides ? t.strides[i] : elements;
      elements *= t.shape[i];
    }
    return t.data && v.kind != Kind::other;
  }
  const py::object found = call(torch.describe, object);
  if (found.is_none()) return false;
  const auto values = found.cast<py::tuple>();
  v.rank = static_cast<int>(values.size() - 3) / 2;
  if (v.rank > kMaxRank) return false;
  v.data = reinterpret_cast<void*>(values[0].cast<uintptr_t>());
  v.kind = kind(values[1].cast<int>(), values[2].cast<int>());
  for (int i = 0; i < v.rank; ++i) {
    v.shape[i] = values[3 + i].cast<int64_t>();
    v.strides[i] = values[3 + v.rank + i].cast<int64_t>();
  }
  return v.data && v.kind != Kind::other;
}

// Likewise; false too for a type whose operators may do anything, and for values that are the
// negative of what memory has.
inline bool look(PyObject* object, View& v) {
  const Torch& torch = Torch::get();
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != torch.parameter.ptr() && type != torch.tensor.ptr()) return false;
  return locate(object, v) && call(torch.is_neg, object).ptr() == Py_False;
}

inline py::tuple integers(const int64_t* values, int count) {
  py::tuple t(count);
  for (int i = 0; i < count; ++i)
    PyTuple_SET_ITEM(t.ptr(), i, owned(PyLong_FromLongLong(values[i])).release().ptr());
  return t;
}

// A new tensor, the elements of which are not set; `data` becomes its address.
inline py::object make(Kind kind, std::initializer_list<int64_t> shape, void*& data) {
  const int rank = static_cast<int>(shape.size());
  int64_t strides[kMaxRank], elements = 1;
  for (int i = rank - 1; i >= 0; --i) {
    strides[i] = elements;
    elements *= shape.begin()[i];
  }
  const Torch& torch = Torch::get();
  const py::tuple sizes = integers(shape.begin(), rank), steps = integers(strides, rank);
  PyObject* args[] = {sizes.ptr(), steps.ptr(), torch.dtypes[static_cast<int>(kind)].ptr()};
  py::object made = owned(PyObject_Vectorcall(torch.empty.ptr(), args, 3, nullptr));
  View v;
  if (!locate(made.ptr(), v)) throw py::value_error("empty: expected a tensor in memory");
  data = v.data;
  return made;
}

// Whether the table of functions that a type of tensors carries can be used.
inline bool reads_exchange_api(const dlpack::ExchangeApi& api) {
  return api.major_version == dlpack::kMajorVersion && api.from_object;
}

inline void use_torch(const py::object& exchange, const py::dict& functions,
                      const py::tuple& dtypes, const py::tuple& watchers) {
  Torch& torch = Torch::get();
  torch.exchange = nullptr;
  if (!exchange.is_none()) {
    auto* api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    if (reads_exchange_api(*api)) torch.exchange = api;
  }
  torch.tensor = functions["tensor"];
  torch.parameter = functions["parameter"];
  torch.describe = functions["describe"];
  torch.is_neg = functions["is_neg"];
  torch.any_requires_grad = functions["any_requires_grad"];
  torch.contiguous = functions["contiguous"];
  torch.converted = functions["converted"];
  torch.empty = functions["empty"];
  torch.get_threads = functions["get_threads"];
  for (size_t i = 0; i < 3; ++i) torch.dtypes[i] = dtypes[i];
  torch.watchers = watchers;
}

}  // namespace rnnkern

// Statuses of the CPU's kernels -> Python's exceptions.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>
#include <string>

#include "core/status.h"
#include "cpu/driver.h"

namespace rnnkern {
namespace py = pybind11;

inline void raise(Status status) {
  switch (status) {
    case Status::ok: return;
    case Status::out_of_memory: throw std::bad_alloc();  // MemoryError
    case Status::unknown_cell: throw py::value_error("cell: no such index in the registry");
    case Status::unsupported_type:
      throw py::value_error(std::string("bfloat16: not computed by the ISA ") + current_isa());
    case Status::bad_problem: throw py::value_error("problem: sizes out of range for this cell");
    case Status::device_error: throw std::logic_error("an error of a device, on the CPU");
  }
}

}  // namespace rnnkern

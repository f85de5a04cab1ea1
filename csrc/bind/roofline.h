// The measurements of cpu/roofline.h for Python.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <string>

#include "cpu/roofline.h"

namespace rnnkern {
namespace py = pybind11;

inline Quantity quantity_named(const std::string& name) {
  if (name == "fma") return Quantity::fma;
  if (name == "bf16") return Quantity::bf16;
  if (name == "read") return Quantity::read;
  if (name == "barrier") return Quantity::barrier;
  throw py::value_error("quantity: expected fma, bf16, read or barrier, got '" + name + "'");
}

// (seconds, amount of flops, bytes or waits, threads), or None if the CPU or the ISA cannot do it.
inline py::object roofline(const std::string& name, int threads, int64_t bytes, int64_t repeats) {
  const Quantity quantity = quantity_named(name);
  if (!has_quantity(quantity)) return py::none();
  Measured result;
  Status status;
  {
    py::gil_scoped_release release;
    status = measure(quantity, threads, bytes, repeats, result);
  }
  if (status == Status::out_of_memory) throw std::bad_alloc();
  if (status != Status::ok) throw py::value_error("threads, bytes, repeats: out of range");
  return py::make_tuple(result.seconds, result.amount, result.threads);
}

}  // namespace rnnkern

// Status codes of the native core. The core never throws, prints or exits; `bind` turns a status
// into a Python exception.
#pragma once

namespace rnnkern {

enum class Status {
  ok,
  out_of_memory,     // for scratch buffers, or CUDA's for a launch; then see cuda_error()
  unknown_cell,      // no cell of that name in cells/registry.h
  bad_problem,       // sizes or pointers that no caller in Python can produce
  unsupported_type,  // the selected ISA has no kernels for the type
  device_error,      // CUDA refused a call; see cuda_error()
};

}  // namespace rnnkern

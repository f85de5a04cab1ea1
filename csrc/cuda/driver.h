// The CUDA backend as the bindings see it: whether a device can run it, and one call for each layer
// and pass. A call only queues kernels on the stream; it neither waits for the device nor reads
// what lies on it, so it can be captured in a CUDA graph.
//
// Pointers are the device's, except Sequence::active and Sequence::offset, which the host reads.
#pragma once

#include <cstddef>
#include <string>

#include "core/problem.h"
#include "core/status.h"
#include "cuda/plan.h"

namespace rnnkern {

// Why this build cannot run on a device; empty if it can.
std::string device_problem(int device);
// Why a device cannot run steps of several stages; empty if it can.
std::string cooperation_problem(int device);
// What the last call failed with, on this thread, that returned Status::device_error or
// Status::out_of_memory.
const std::string& cuda_error();

int cuda_cell_count();

// T is float, double, __half or __nv_bfloat16; A is float for the 16-bit types.
template <class T>
size_t forward_workspace(int cell, const ForwardProblem<T>& problem, const CudaCall& call);
template <class T, class A>
size_t backward_workspace(int cell, const BackwardProblem<T, A>& problem, const CudaCall& call);
template <class T>
Status run_forward_cuda(int cell, const ForwardProblem<T>& problem, const CudaCall& call);
template <class T, class A>
Status run_backward_cuda(int cell, const BackwardProblem<T, A>& problem, const CudaCall& call);

// How these would run; of the problem, only sizes and whether there is a projection count.
template <class T>
Status forward_plan(int cell, const ForwardProblem<T>& problem, const CudaCall& call,
                    CudaPlan& plan);
template <class T, class A>
Status backward_plan(int cell, const BackwardProblem<T, A>& problem, const CudaCall& call,
                     CudaPlan& plan);

}  // namespace rnnkern

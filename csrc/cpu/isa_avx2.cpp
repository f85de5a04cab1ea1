// The kernels, compiled for AVX2 and FMA; the flags stand in CMakeLists.txt.
#include "cpu/isa.h"
#include "cpu/roofline_loops.h"

namespace rnnkern {
const IsaKernels avx2_kernels = {all_cells<float>, all_cells<double>};
const RooflineLoops avx2_roofline = roofline_loops("avx2");
}  // namespace rnnkern

// The kernels, compiled for AVX-512 F, VL, DQ and BW; the flags stand in CMakeLists.txt.
#include "cpu/isa.h"
#include "cpu/roofline_loops.h"

namespace rnnkern {
const IsaKernels avx512_kernels = {all_cells<float>, all_cells<double>};
const RooflineLoops avx512_roofline = roofline_loops("avx512");
}  // namespace rnnkern

// The kernels, compiled for the compiler's default; the flags stand in CMakeLists.txt.
#include "cpu/isa.h"
#include "cpu/roofline_loops.h"

namespace rnnkern {
const IsaKernels baseline_kernels = {all_cells<float>, all_cells<double>};
const RooflineLoops baseline_roofline = roofline_loops("baseline");
}  // namespace rnnkern

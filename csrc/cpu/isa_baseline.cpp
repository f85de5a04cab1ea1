// The kernels, compiled for the compiler's default; the flags stand in CMakeLists.txt.
#include "cpu/isa.h"
#include "cpu/roofline_loops.h"

namespace rnnkern {
const IsaKernels baseline_kernels = {"baseline", type_kernels<float>, type_kernels<double>};
const RooflineLoops baseline_roofline = roofline_loops("baseline");
}  // namespace rnnkern

#include "cpu/isa.h"

namespace rnnkern {
const IsaKernels baseline_kernels = {"baseline", all_cells<float>, all_cells<double>};
}

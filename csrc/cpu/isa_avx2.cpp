#include "cpu/isa.h"

namespace rnnkern {
const IsaKernels avx2_kernels = {"avx2", all_cells<float>, all_cells<double>};
}

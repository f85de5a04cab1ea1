#include "cpu/isa.h"

namespace rnnkern {
const IsaKernels avx512_kernels = {"avx512", all_cells<float>, all_cells<double>};
}

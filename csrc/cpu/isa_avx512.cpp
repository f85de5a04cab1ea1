#include "cpu/isa.h"

namespace rnnkern {
const IsaKernels avx512_kernels = {"avx512", type_kernels<float>, type_kernels<double>};
}

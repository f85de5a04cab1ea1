// The kernels, compiled for AVX-512 F, VL, DQ and BW; the flags stand in CMakeLists.txt.
#include "cpu/isa.h"

namespace rnnkern {
const IsaKernels avx512_kernels = {"avx512", type_kernels<float>, type_kernels<double>};
}

// The kernels of bfloat16 data, compiled for AVX-512 with BF16 and AMX; the flags stand in
// CMakeLists.txt.
#include "cpu/isa.h"
#include "cpu/roofline_loops.h"

namespace rnnkern {
const CellKernels<Bfloat16>* const amx_bf16_cells = all_cells<Bfloat16>;
const RooflineLoops amx_bf16_roofline = roofline_loops("amx_bf16");
}  // namespace rnnkern

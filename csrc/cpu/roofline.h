// What this machine can do at most, measured: floating-point peaks, read bandwidth, the barrier.
//
// `rnnkern bench` compares the kernels with these. The loops (cpu/roofline_loops.h) are compiled
// once for each ISA, like the kernels, and run by the same team.
#pragma once

#include <cstdint>

#include "core/status.h"

namespace rnnkern {

struct RooflineLoops {
  const char* isa;
  double fma_flops;   // of one repeat of fma
  double bf16_flops;  // of one repeat of bf16
  // Every function returns a sum that depends on all it computed, so that nothing is left out.
  float (*fma)(int64_t repeats);
  float (*bf16)(int64_t repeats);  // null where the ISA has no bfloat16 dot product
  float (*read)(const float* data, int64_t n, int64_t repeats);  // data [n]
};

extern const RooflineLoops baseline_roofline;
#if defined(__x86_64__)
extern const RooflineLoops avx2_roofline;
extern const RooflineLoops avx512_roofline;
extern const RooflineLoops avx512_bf16_roofline;
extern const RooflineLoops amx_bf16_roofline;
#endif

enum class Quantity { fma, bf16, read, barrier };

struct Measured {
  double seconds = 0;
  double amount = 0;  // of flops, bytes or waits, by all threads together
  int threads = 0;    // that did it
};

// Whether the CPU and the selected ISA have what the quantity needs.
bool has_quantity(Quantity quantity);

// Times `repeats` repeats on every thread of a team at once, after an untimed one. `bytes` is the
// size of each thread's own buffer, and counts for Quantity::read only.
Status measure(Quantity quantity, int threads, int64_t bytes, int64_t repeats, Measured& result);

}  // namespace rnnkern

// Included once by each per-ISA file: the loops that reach that ISA's limits.
#pragma once

#include "cpu/amx.h"
#include "cpu/roofline.h"

namespace rnnkern {
namespace {

// Chains that do not depend on each other: more than latency times throughput (4 cycles, 2 a
// cycle), and as many as leave registers for the factors.
constexpr int kChains = kRegisters == 32 ? 24 : 12;
constexpr int kSteps = 64;  // of each chain in one repeat

// Steps of a chain: x <- a·x + b, which stays near b / (1 - a) for ever.
constexpr float kFactor = 0.5f, kTerm = 1.0f;

RNNKERN_INLINE float sum(const Pack<float>* packs, int n) {
  Pack<float> total = packs[0];
  for (int i = 1; i < n; ++i) total = total + packs[i];
  float lanes[Pack<float>::lanes], all = 0;
  total.store(lanes);
  for (float lane : lanes) all += lane;
  return all;
}

float roofline_fma(int64_t repeats) {
  const Pack<float> a(kFactor), b(kTerm);
  Pack<float> chain[kChains];
  // Different values, or the compiler would see that all chains compute the same.
  for (int i = 0; i < kChains; ++i) chain[i] = Pack<float>(static_cast<float>(i));
  for (int64_t r = 0; r < repeats * kSteps; ++r) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chain[i] = fma(a, chain[i], b);
  }
  return sum(chain, kChains);
}

float roofline_read(const float* data, int64_t n, int64_t repeats) {
  constexpr int kSums = 8, kLanes = Pack<float>::lanes;
  Pack<float> sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = Pack<float>(0.0f);
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t k = 0; k + kSums * kLanes <= n; k += kSums * kLanes) {
#pragma GCC unroll 8
      for (int i = 0; i < kSums; ++i) {
        sums[i] = sums[i] + Pack<float>::load(data + k + i * kLanes);
      }
    }
  }
  return sum(sums, kSums);
}

#if defined(__AMX_BF16__)
// Four sums in turn, so that none waits for its last product.
constexpr double kBf16Flops = 2.0 * 4 * kSteps * kTileRows * kTileRows * kTileFactors;
float roofline_bf16(int64_t repeats) {
  const TileRegisters<Bfloat16> registers;
  TileRegisters<Bfloat16>::set_height(2 * kTileRows);
  TileSums<Bfloat16, 2, 2>::clear();
  for (int64_t r = 0; r < repeats * kSteps; ++r) {  // factors are zero since the setting up
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  Pack<float> sums[2 * kTileRows * 2];
  auto* out = reinterpret_cast<float*>(sums);
  TileSums<Bfloat16, 2, 2>::store({out, out + Pack<float>::lanes}, 2 * Pack<float>::lanes);
  return sum(sums, 2 * kTileRows * 2);
}
constexpr auto kBf16Loop = roofline_bf16;
#elif defined(__AVX512BF16__)
constexpr double kBf16Flops = 4.0 * kChains * kSteps * Pack<float>::lanes;
float roofline_bf16(int64_t repeats) {
  __m512 chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512i small = _mm512_set1_epi16(0x3000);  // 2^-31 in bfloat16: the sums stay finite
  __m512bh a;
  std::memcpy(&a, &small, sizeof(a));
  for (int64_t r = 0; r < repeats * kSteps; ++r) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chain[i] = _mm512_dpbf16_ps(chain[i], a, a);
  }
  Pack<float> packs[kChains];
  for (int i = 0; i < kChains; ++i) packs[i] = Pack<float>(chain[i]);
  return sum(packs, kChains);
}
constexpr auto kBf16Loop = roofline_bf16;
#else
constexpr double kBf16Flops = 0;
constexpr float (*kBf16Loop)(int64_t) = nullptr;
#endif

constexpr RooflineLoops roofline_loops(const char* isa) {
  return {isa,        2.0 * kChains * kSteps * Pack<float>::lanes,
          kBf16Flops, roofline_fma,
          kBf16Loop,  roofline_read};
}

}  // namespace
}  // namespace rnnkern

// The recurrent product of one block: kUnits hidden units with all their gates × up to 8·RN rows.
//
//   r[g][u][j] = Σ_k w[(g·N + u), k] · a[j, k]        w [NG·N, K], a [rows, K], both dense in k
//
// A block has kThreads threads. Whatever computes the product, thread i ends with unit i % kUnits
// of the tile and the rows i / kUnits + 8·n (n < RN), all gates, in registers, where the cell's
// gate math takes them; neighbouring threads have neighbouring units, so memory is touched in
// pieces of kUnits elements. The order of a sum depends on neither RN nor the grid.
#pragma once

#include "cuda/value.cuh"

namespace rnnkern {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kUnits = 16;
constexpr int kBlocks = 3;  // on a multiprocessor at least: leaves 168 registers a thread
static_assert(kThreads == 8 * kUnits, "a pass over the tile covers 8 rows");

template <class T>
struct Weights {
  const T* data;  // [NG·N,K]
  int64_t N, K;   // units, operand elements
};

template <class T>
struct Operand {
  const T* data;  // [rows,K]
  int64_t rows;   // of which there are; beyond, the product is zero
};

// ---- exact: fused multiply-adds in the accumulation type, tiles in shared memory ------------
template <class T>
struct ExactProduct {
  using Data = T;
  using A = Accumulator<T>;
  static constexpr int kDepth = 32;  // k at a time

  template <int NG, int RN>
  static constexpr int memory() {
    return kDepth * (pitch(NG * kUnits) + pitch(8 * RN)) * static_cast<int>(sizeof(A));
  }

  template <int NG, int RN>
  __device__ static void run(const Weights<T>& w, const Operand<T>& a, int64_t u0, int64_t j0,
                             A (&r)[NG][RN]) {
    constexpr int M = NG * kUnits, J = 8 * RN;
    A* tile_w = reinterpret_cast<A*>(block_memory());  // [kDepth][pitch(M)]
    A* tile_a = tile_w + kDepth * pitch(M);            // [kDepth][pitch(J)]
    const int unit = threadIdx.x % kUnits, row = threadIdx.x / kUnits;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int g = 0; g < NG; ++g) {
#pragma unroll
      for (int n = 0; n < RN; ++n) r[g][n] = A(0);
    }
    for (int64_t k0 = 0; k0 < w.K; k0 += kDepth) {
      const int64_t k = k0 + lane;
      for (int m = warp; m < M; m += kWarps) {
        const int64_t u = u0 + m % kUnits;
        const bool in = u < w.N && k < w.K;
        tile_w[lane * pitch(M) + m] = in ? widen(w.data[(m / kUnits * w.N + u) * w.K + k]) : A(0);
      }
      for (int m = warp; m < J; m += kWarps) {
        const bool in = j0 + m < a.rows && k < w.K;
        tile_a[lane * pitch(J) + m] = in ? widen(a.data[(j0 + m) * w.K + k]) : A(0);
      }
      __syncthreads();
#pragma unroll 8
      for (int i = 0; i < kDepth; ++i) {
        A row_values[RN];
#pragma unroll
        for (int n = 0; n < RN; ++n) row_values[n] = tile_a[i * pitch(J) + row + 8 * n];
#pragma unroll
        for (int g = 0; g < NG; ++g) {
          const A weight = tile_w[i * pitch(M) + g * kUnits + unit];
#pragma unroll
          for (int n = 0; n < RN; ++n) r[g][n] = fma(weight, row_values[n], r[g][n]);
        }
      }
      __syncthreads();
    }
  }

 private:
  RNNKERN_HD static constexpr int pitch(int n) {
    return n + 1;
  }  // lanes write columns: other banks
};

// ---- tensor cores: 16-bit types, and float by way of TF32 ----------------------------------
// Each warp takes every fourth piece of K and the four sums are added in order. A lane loads 16
// bytes of a row at once; that its words are not the k that the fragments of intrinsics.cuh are
// drawn with does not matter, since w and a are permuted alike.
template <class T>
struct TensorProduct {
  using Data = T;
  using A = float;
  static constexpr int kWords = 4;                                    // of a lane
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));  // of a lane
  static constexpr int kDepth = 4 * kElements;                        // k of a warp at a time

  template <int NG, int RN>
  static constexpr int memory() {
    return kWarps * NG * kUnits * pitch(RN) * static_cast<int>(sizeof(float));
  }

  template <int NG, int RN>
  __device__ static void run(const Weights<T>& w, const Operand<T>& a, int64_t u0, int64_t j0,
                             float (&r)[NG][RN]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int q = lane % 4, row = lane / 4;
    float c[NG][RN][4];
#pragma unroll
    for (int g = 0; g < NG; ++g) {
#pragma unroll
      for (int n = 0; n < RN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[g][n][i] = 0.0f;
      }
    }
    const bool aligned =
        w.K % kElements == 0 &&
        (reinterpret_cast<uintptr_t>(w.data) | reinterpret_cast<uintptr_t>(a.data)) % 16 == 0;
    for (int64_t k0 = warp * kDepth; k0 < w.K; k0 += kWarps * kDepth) {
      const int64_t k = k0 + q * kElements;
      uint32_t rows[RN][kWords];
#pragma unroll
      for (int n = 0; n < RN; ++n) load(a.data, j0 + row + 8 * n, a.rows, k, w.K, aligned, rows[n]);
#pragma unroll
      for (int g = 0; g < NG; ++g) {
        uint32_t low[kWords], high[kWords];
        load(w.data + g * w.N * w.K, u0 + row, w.N, k, w.K, aligned, low);
        load(w.data + g * w.N * w.K, u0 + row + 8, w.N, k, w.K, aligned, high);
#pragma unroll
        for (int n = 0; n < RN; ++n) {
#pragma unroll
          for (int i = 0; i < kWords; i += 2)
            mma<T>(c[g][n], low[i], high[i], low[i + 1], high[i + 1], rows[n][i], rows[n][i + 1]);
        }
      }
    }
    float* sums = reinterpret_cast<float*>(block_memory());  // [kWarps][NG·kUnits][pitch(RN)]
#pragma unroll
    for (int g = 0; g < NG; ++g) {
#pragma unroll
      for (int n = 0; n < RN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int m = g * kUnits + row + i / 2 * 8, j = n * 8 + 2 * q + i % 2;
          sums[(warp * NG * kUnits + m) * pitch(RN) + j] = c[g][n][i];
        }
      }
    }
    __syncthreads();
    const int unit = threadIdx.x % kUnits, first_row = threadIdx.x / kUnits;
#pragma unroll
    for (int g = 0; g < NG; ++g) {
#pragma unroll
      for (int n = 0; n < RN; ++n) {
        const float* at = sums + (g * kUnits + unit) * pitch(RN) + first_row + 8 * n;
        float sum = at[0];
#pragma unroll
        for (int i = 1; i < kWarps; ++i) sum += at[i * NG * kUnits * pitch(RN)];
        r[g][n] = sum;
      }
    }
  }

 private:
  RNNKERN_HD static constexpr int pitch(int RN) { return 8 * RN + 1; }

  // Elements k .. k + kElements - 1 of one row; zero outside.
  __device__ static void load(const T* data, int64_t row, int64_t rows, int64_t k, int64_t K,
                              bool aligned, uint32_t (&words)[kWords]) {
    const T* at = data + row * K + k;
    alignas(16) T elements[kElements];
    if (row < rows && k < K && aligned) {
      *reinterpret_cast<uint4*>(elements) = *reinterpret_cast<const uint4*>(at);
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        elements[i] = row < rows && k + i < K ? at[i] : narrow<T>(0.0f);
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 4) {
        words[i] = to_tf32(elements[i]);
      } else {
        memcpy(&words[i], elements + i * (kElements / kWords), sizeof(uint32_t));
      }
    }
  }
};

}  // namespace rnnkern

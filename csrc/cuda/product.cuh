// The recurrent product of one block: NU·kUnits units with all their gates × up to 8·RN rows.
//
//   r[g][u][j] = Σ_k w[(g·N + u), k] · a[j, k]        w [NG·N, K], a [rows, K], both dense in k
//
// A block has kThreads threads. Whatever computes the product, thread i ends with the units
// i % kUnits + kUnits·m (m < NU) of the tile and the rows i / kUnits + 8·n (n < RN), all gates, in
// registers, r[m][g][n], where the cell's gate math takes them; neighbouring threads have
// neighbouring units, so memory is touched in pieces of kUnits elements. The order of a sum depends
// on neither NU nor RN nor the grid, nor on where w is: in global memory, or, for a block that
// multiplies by the same rows again and again, kept in its shared memory (`keep`, then `run` with a
// Kept; NU = 1), all of it or the first of k.
#pragma once

#include "cuda/value.cuh"

namespace rnnkern {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kUnits = 16;
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

// The weights of one block: the first of k in shared memory, in an order of the product's own, and
// the others, if there are, where all are.
template <class T>
struct Kept {
  Weights<T> all;
  int64_t depth;        // of k that are in shared memory; a multiple of the product's kDepth
  unsigned char* data;  // aligned to 16 bytes
};

// ---- exact: fused multiply-adds in the accumulation type, tiles in shared memory ------------
template <class T>
struct ExactProduct {
  using Data = T;
  using A = Accumulator<T>;
  static constexpr int kDepth = 32;                          // k at a time
  static constexpr bool kWidens = std::is_same_v<T, float>;  // see make_cuda_plan

  template <int NU, int NG, int RN>
  RNNKERN_HD static constexpr int memory() {
    return work<NU * NG, RN>(false);
  }

  template <int NU, int NG, int RN>
  __device__ static void run(const Weights<T>& w, const Operand<T>& a, int64_t u0, int64_t j0,
                             A (&r)[NU][NG][RN]) {
    A* tile_a = reinterpret_cast<A*>(block_memory());  // [kDepth][pitch(8·RN)]
    A* tile_w = tile_a + kDepth * pitch(8 * RN);       // [kDepth][pitch(NU·NG·kUnits)]
    const auto weights = [&](int64_t k0) {
      copy<NU, NG>(w, u0, k0, tile_w);
      return tile_w;
    };
    multiply(w.K, weights, a, j0, tile_a, r);
  }

  // ---- weights that are kept: [depth][pitch(NG·kUnits)]
  template <int NG>
  RNNKERN_HD static constexpr int piece() {  // bytes of kDepth of k
    return kDepth * pitch(NG * kUnits) * static_cast<int>(sizeof(A));
  }
  template <int NG, int RN>
  RNNKERN_HD static constexpr int work(bool all_kept) {  // bytes that run takes besides
    return kDepth * pitch(8 * RN) * static_cast<int>(sizeof(A)) + (all_kept ? 0 : piece<NG>());
  }
  template <int NG>
  __device__ static void keep(const Kept<T>& w, int64_t u0) {
    for (int64_t k0 = 0; k0 < w.depth; k0 += kDepth)
      copy<1, NG>(w.all, u0, k0, reinterpret_cast<A*>(w.data) + k0 * pitch(NG * kUnits));
  }
  template <int NG, int RN>
  __device__ static void run(const Kept<T>& w, const Operand<T>& a, int64_t u0, int64_t j0,
                             A (&r)[1][NG][RN]) {
    constexpr int M = NG * kUnits;
    A* tile_a = reinterpret_cast<A*>(block_memory());
    A* tile_w = tile_a + kDepth * pitch(8 * RN);  // there unless all is kept
    const auto weights = [&](int64_t k0) {
      if (k0 < w.depth) return reinterpret_cast<const A*>(w.data) + k0 * pitch(M);
      copy<1, NG>(w.all, u0, k0, tile_w);
      return static_cast<const A*>(tile_w);
    };
    multiply(w.all.K, weights, a, j0, tile_a, r);
  }

 private:
  RNNKERN_HD static constexpr int pitch(int n) {
    return n + 1;
  }  // lanes write columns: other banks

  // The tile's rows of w, [NU][NG][kUnits], k = k0 .. k0 + kDepth - 1; zero outside.
  template <int NU, int NG>
  __device__ static void copy(const Weights<T>& w, int64_t u0, int64_t k0, A* tile) {
    constexpr int M = NU * NG * kUnits;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t k = k0 + lane;
    for (int i = warp; i < M; i += kWarps) {
      const int64_t u = u0 + i / (NG * kUnits) * kUnits + i % kUnits;
      const bool in = u < w.N && k < w.K;
      tile[lane * pitch(M) + i] = in ? widen(w.data[(i / kUnits % NG * w.N + u) * w.K + k]) : A(0);
    }
  }

  // weights(k0) is the tile of w from k0 on, complete after the next barrier.
  template <int NU, int NG, int RN, class TileAt>
  __device__ __forceinline__ static void multiply(int64_t K, TileAt weights, const Operand<T>& a,
                                                  int64_t j0, A* tile_a, A (&r)[NU][NG][RN]) {
    constexpr int M = NU * NG * kUnits, J = 8 * RN;
    const int unit = threadIdx.x % kUnits, row = threadIdx.x / kUnits;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < NU * NG; ++i) {
#pragma unroll
      for (int n = 0; n < RN; ++n) r[i / NG][i % NG][n] = A(0);
    }
    for (int64_t k0 = 0; k0 < K; k0 += kDepth) {
      const A* tile_w = weights(k0);
      const int64_t k = k0 + lane;
      for (int m = warp; m < J; m += kWarps) {
        const bool in = j0 + m < a.rows && k < K;
        tile_a[lane * pitch(J) + m] = in ? widen(a.data[(j0 + m) * K + k]) : A(0);
      }
      __syncthreads();
#pragma unroll 8
      for (int i = 0; i < kDepth; ++i) {
        A row_values[RN];
#pragma unroll
        for (int n = 0; n < RN; ++n) row_values[n] = tile_a[i * pitch(J) + row + 8 * n];
#pragma unroll
        for (int q = 0; q < NU * NG; ++q) {
          const A weight = tile_w[i * pitch(M) + q * kUnits + unit];
          A(&sums)[RN] = r[q / NG][q % NG];
#pragma unroll
          for (int n = 0; n < RN; ++n) sums[n] = fma(weight, row_values[n], sums[n]);
        }
      }
      __syncthreads();
    }
  }
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
  static constexpr bool kWidens = true;

  template <int NU, int NG, int RN>
  RNNKERN_HD static constexpr int memory() {
    return kWarps * NU * NG * kUnits * pitch(RN) * static_cast<int>(sizeof(float));
  }

  template <int NU, int NG, int RN>
  __device__ static void run(const Weights<T>& w, const Operand<T>& a, int64_t u0, int64_t j0,
                             float (&r)[NU][NG][RN]) {
    float c[NU * NG][RN][4] = {};
    multiply(0, w.K, there<NG>(w, u0), a, w.K, j0, c);
    add_up(c, r);
  }

  // ---- weights that are kept: [depth / kDepth][NG][low, high][lane] of 16 bytes, which a lane
  // reads as the words that mma wants
  template <int NG>
  RNNKERN_HD static constexpr int piece() {
    return NG * 2 * 32 * static_cast<int>(sizeof(uint4));
  }
  template <int NG, int RN>
  RNNKERN_HD static constexpr int work(bool) {
    return memory<1, NG, RN>();
  }
  template <int NG>
  __device__ static void keep(const Kept<T>& w, int64_t u0) {
    const auto weights = there<NG>(w.all, u0);
    for (int64_t k0 = threadIdx.x / 32 * kDepth; k0 < w.depth; k0 += kWarps * kDepth) {
#pragma unroll
      for (int g = 0; g < NG; ++g) {
        uint32_t low[kWords], high[kWords];
        weights(g, k0, low, high);
        uint4 one, other;  // stored whole, where memcpy to shared memory may go byte by byte
        memcpy(&one, low, sizeof one);
        memcpy(&other, high, sizeof other);
        uint4* to = place<NG>(w.data, g, k0);
        to[0] = one;
        to[32] = other;
      }
    }
  }
  template <int NG, int RN>
  __device__ static void run(const Kept<T>& w, const Operand<T>& a, int64_t u0, int64_t j0,
                             float (&r)[1][NG][RN]) {
    const auto kept = [&](int g, int64_t k0, uint32_t (&low)[kWords], uint32_t (&high)[kWords]) {
      const uint4* from = place<NG>(w.data, g, k0);
      const uint4 one = from[0], other = from[32];
      memcpy(low, &one, sizeof low);
      memcpy(high, &other, sizeof high);
    };
    float c[NG][RN][4] = {};
    multiply(0, w.depth, kept, a, w.all.K, j0, c);
    multiply(w.depth, w.all.K, there<NG>(w.all, u0), a, w.all.K, j0, c);
    add_up(c, r);
  }

 private:
  RNNKERN_HD static constexpr int pitch(int RN) { return 8 * RN + 1; }

  // Where this lane's words of 16 rows and of kDepth elements from k0 on are kept.
  template <int NG>
  __device__ static uint4* place(unsigned char* data, int g, int64_t k0) {
    return reinterpret_cast<uint4*>(data) + (k0 / kDepth * NG + g) * 64 + threadIdx.x % 32;
  }

  // Whether every 16 bytes of a row that start where a lane may read lie so in memory.
  __device__ static bool aligned(const T* data, int64_t K) {
    return K % kElements == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }

  // The weights in global memory, as `multiply` wants them.
  template <int NG>
  __device__ __forceinline__ static auto there(const Weights<T>& w, int64_t u0) {
    const bool whole = aligned(w.data, w.K);
    return [=](int i, int64_t k0, uint32_t (&low)[kWords], uint32_t (&high)[kWords]) {
      const int64_t u = u0 + i / NG * kUnits + threadIdx.x % 32 / 4;
      const int64_t k = k0 + threadIdx.x % 4 * kElements;
      const T* data = w.data + i % NG * w.N * w.K;
      load(data, u, w.N, k, w.K, whole, low);
      load(data, u + 8, w.N, k, w.K, whole, high);
    };
  }

  // Adds the product over k in [begin, end) to c; begin is a multiple of kDepth. The words of w
  // that this lane needs, of the i-th kUnits of M·kUnits rows and of kDepth elements from k0 on, of
  // its row and of the one 8 below, are weights(i, k0, low, high).
  template <int M, int RN, class WordsAt>
  __device__ __forceinline__ static void multiply(int64_t begin, int64_t end, WordsAt weights,
                                                  const Operand<T>& a, int64_t K, int64_t j0,
                                                  float (&c)[M][RN][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int q = lane % 4, row = lane / 4;
    const int64_t turn = (warp - begin / kDepth) & (kWarps - 1);  // the warp takes every fourth
    const bool whole = aligned(a.data, K);
    for (int64_t k0 = begin + turn * kDepth; k0 < end; k0 += kWarps * kDepth) {
      const int64_t k = k0 + q * kElements;
      uint32_t rows[RN][kWords];
#pragma unroll
      for (int n = 0; n < RN; ++n) load(a.data, j0 + row + 8 * n, a.rows, k, K, whole, rows[n]);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        uint32_t low[kWords], high[kWords];
        weights(m, k0, low, high);
#pragma unroll
        for (int n = 0; n < RN; ++n) {
#pragma unroll
          for (int i = 0; i < kWords; i += 2)
            mma<T>(c[m][n], low[i], high[i], low[i + 1], high[i + 1], rows[n][i], rows[n][i + 1]);
        }
      }
    }
  }

  // The sums of the four warps' fragments, in order.
  template <int NU, int NG, int RN>
  __device__ __forceinline__ static void add_up(const float (&c)[NU * NG][RN][4],
                                                float (&r)[NU][NG][RN]) {
    constexpr int M = NU * NG;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int q = lane % 4, row = lane / 4;
    float* sums = reinterpret_cast<float*>(block_memory());  // [kWarps][M·kUnits][pitch(RN)]
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < RN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = m * kUnits + row + i / 2 * 8, j = n * 8 + 2 * q + i % 2;
          sums[(warp * M * kUnits + at) * pitch(RN) + j] = c[m][n][i];
        }
      }
    }
    __syncthreads();
    const int unit = threadIdx.x % kUnits, first_row = threadIdx.x / kUnits;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < RN; ++n) {
        const float* at = sums + (m * kUnits + unit) * pitch(RN) + first_row + 8 * n;
        float sum = at[0];
#pragma unroll
        for (int i = 1; i < kWarps; ++i) sum += at[i * M * kUnits * pitch(RN)];
        r[m / NG][m % NG][n] = sum;
      }
    }
  }

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

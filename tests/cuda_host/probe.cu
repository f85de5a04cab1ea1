// Kernels that test the host shim, in CUDA C++ that nvcc compiles too: shuffles in a warp, and
// blocks that read in every phase what the others wrote in the one before,
//
//   v[p+1][i] = i + Σ_j (2j + 1) · v[p][j]   mod 2^32,      v[0][i] = i,
//
// one thread an element, with each way of waiting for the others. The functions at the end are for
// ctypes; they return the error, "" if there is none.
#include <cooperative_groups.h>

#include <string>

#include "cuda/intrinsics.cuh"
#include "exchange.cuh"

namespace probe {

// What a test leaves out or limits.
struct Faults {
  int buffers;          // 1: the next phase overwrites what is still being read
  int waits;            // 0: nobody waits for another block
  unsigned most_polls;  // after which a waiting thread traps; 0: never
};

struct Exchange {
  uint32_t* values;   // [2,N]
  uint64_t* words;    // [2,N], value and phase, zeros at first
  uint64_t* arrived;  // [1], zero at first
  int phases;
  Faults faults;
};

__device__ uint32_t threads() { return gridDim.x * blockDim.x; }
__device__ uint32_t index() { return blockIdx.x * blockDim.x + threadIdx.x; }

template <class Ready>
__device__ void wait_until(const Faults& faults, Ready ready) {
  for (unsigned polls = 0; faults.waits && !ready(); ++polls) {
    if (faults.most_polls && polls == faults.most_polls) __trap();
    __nanosleep(20);
  }
}

// All phases on plain memory; wait(p) returns when all blocks have written phase p.
template <class Wait>
__device__ void run_phases(const Exchange& e, Wait wait) {
  const uint32_t n = threads(), i = index();
  e.values[i] = i;
  for (int p = 0; p < e.phases; ++p) {
    wait(p);
    uint32_t sum = i;
    for (uint32_t j = 0; j < n; ++j) sum += (2 * j + 1) * e.values[p % e.faults.buffers * n + j];
    if (e.faults.buffers == 1) __syncthreads();
    e.values[(p + 1) % e.faults.buffers * n + i] = sum;
  }
}

__global__ void by_grid_barrier(Exchange e) {
  run_phases(e, [](int) { cooperative_groups::this_grid().sync(); });
}

__global__ void by_counter(Exchange e) {
  run_phases(e, [&](int p) {
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(e.arrived, 1);
      const uint64_t all = gridDim.x * (p + 1);
      wait_until(e.faults, [&] { return load_acquire(e.arrived) >= all; });
    }
    __syncthreads();
  });
}

// The same with what CUDA had before PTX's memory model.
__global__ void by_atomics(Exchange e) {
  run_phases(e, [&](int p) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      auto* arrived = reinterpret_cast<unsigned long long*>(e.arrived);
      atomicAdd(arrived, 1ull);
      const uint64_t all = gridDim.x * (p + 1);
      wait_until(e.faults, [&] { return atomicAdd(arrived, 0ull) >= all; });
      __threadfence();
    }
    __syncthreads();
  });
}

// Every word says which phase it is of, so that a thread waits for just what it reads, and no block
// for its own threads. Whoever writes phase p + 2 has seen all words of p + 1, so that nobody reads
// those of p any more.
__global__ void by_epoch(Exchange e) {
  const uint32_t n = threads(), i = index();
  uint32_t value = i;
  for (int p = 0; p <= e.phases; ++p) {
    store_release(e.words + p % e.faults.buffers * n + i, uint64_t(p + 1) << 32 | value);
    if (p == e.phases) break;
    value = i;
    for (uint32_t j = 0; j < n; ++j) {
      uint64_t word = 0;
      const auto ready = [&] {
        word = load_acquire(e.words + p % e.faults.buffers * n + j);
        return word >> 32 == uint64_t(p + 1);
      };
      if (!ready()) wait_until(e.faults, ready);
      value += (2 * j + 1) * static_cast<uint32_t>(word);
    }
  }
  e.values[e.phases % 2 * n + i] = value;
}

// out[k,lane]: the four shuffles, then the sum of the warp.
template <class T>
__global__ void shuffles(const T* in, T* out, int argument, int width) {
  constexpr unsigned all = 0xffffffffu;
  const int lane = threadIdx.x;
  T sum = in[lane];
  out[lane] = __shfl_sync(all, sum, argument, width);
  out[32 + lane] = __shfl_xor_sync(all, sum, argument, width);
  out[64 + lane] = __shfl_up_sync(all, sum, argument, width);
  out[96 + lane] = __shfl_down_sync(all, sum, argument, width);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(all, sum, step);
  out[128 + lane] = sum;
}

// Neighbours hand a value on through shared memory, which a barrier of the warp makes safe.
__global__ void turn(const float* in, float* out) {
  float* memory = reinterpret_cast<float*>(rnnkern::block_memory());
  memory[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = memory[(threadIdx.x + 1) % 32];
}

// Mistakes, one at a time.
__global__ void parted(int how, float* out) {
  const int lane = threadIdx.x;
  const float x = static_cast<float>(lane);
  if (how == 0) {
    if (lane < 16) {
      __syncwarp();
    } else {
      out[lane] = __shfl_sync(0xffffffffu, x, 0);
    }
  } else if (how == 1) {
    if (lane < 16) {
      out[lane] = __shfl_sync(0xffffffffu, x, 0);
    } else {
      out[lane] = static_cast<float>(__shfl_sync(0xffffffffu, static_cast<double>(x), 0));
    }
  } else if (how == 2) {
    if (lane < 16) out[lane] = __shfl_sync(0x0000ffffu, x, 0);
  } else if (how == 3) {
    if (lane != 7) __syncwarp();
  } else {
    while (load_acquire(reinterpret_cast<const uint64_t*>(out)) == 0) __syncwarp();
  }
}

std::string error_text(cudaError_t error) {
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  if (error == cudaSuccess) return "";
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int blocks, int threads, size_t memory,
                   bool cooperative, Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = memory;
  config.attrs = &attribute;
  config.numAttrs = 1;
  static std::string text;
  text = error_text(cudaLaunchKernelEx(&config, kernel, arguments...));
  return text.c_str();
}

__global__ void write_one(float* memory, int at) {
  if (threadIdx.x == 0) memory[at] = 1.0f;
}

}  // namespace probe

#pragma GCC visibility push(default)
extern "C" {

const char* probe_exchange(int how, int blocks, int threads, size_t memory, int cooperative,
                           probe::Exchange exchange) {
  constexpr void (*kernels[])(probe::Exchange) = {probe::by_grid_barrier, probe::by_counter,
                                                  probe::by_atomics, probe::by_epoch};
  return probe::launch(kernels[how], blocks, threads, memory, cooperative != 0, exchange);
}

// kind: 0 float, 1 double, 2 uint32, 3 uint64.
const char* probe_shuffles(int kind, const void* in, void* out, int argument, int width) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return probe::launch(probe::shuffles<T>, 1, 32, 0, false, static_cast<const T*>(in),
                         static_cast<T*>(out), argument, width);
  };
  if (kind == 0) return run(0.0f);
  if (kind == 1) return run(0.0);
  return kind == 2 ? run(0u) : run(0ull);
}

const char* probe_turn(const float* in, float* out) {
  return probe::launch(probe::turn, 1, 32, 32 * sizeof(float), false, in, out);
}

const char* probe_parted(int how, float* out) {
  return probe::launch(probe::parted, 1, 32, 0, false, how, out);
}

// How many blocks of the first kernel the current device holds at once; negative: the error.
int probe_largest_grid(int threads, int memory) {
  int device = 0, supported = 0, multiprocessors = 0, each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&supported, cudaDevAttrCooperativeLaunch, device);
  if (!error) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (!error) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, probe::by_grid_barrier, threads,
                                                          memory);
  }
  return error ? -error : supported * multiprocessors * each;
}

// Allows the first kernel so much dynamic shared memory a block; returns the error's number.
int probe_allow_memory(int bytes) {
  return cudaFuncSetAttribute(probe::by_grid_barrier, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              bytes);
}

// Keeps elements[1..2] of `memory` from a kernel that writes element `at`.
const char* probe_gap(float* memory, int at) {
  rnnkern::WorkspaceWatch watch;
  watch.keep(reinterpret_cast<unsigned char*>(memory + 1),
             reinterpret_cast<unsigned char*>(memory + 3));
  return probe::launch(probe::write_one, 1, 32, 0, false, memory, at);
}

int probe_last_error() { return cudaGetLastError(); }

}  // extern "C"
#pragma GCC visibility pop

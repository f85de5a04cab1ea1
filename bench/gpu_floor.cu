// What a recurrence that stays on the chip rests on, measured: the cost of exchanging a state
// between blocks, and the bandwidths its weights come with.
//
//   nvcc -O3 -std=c++17 -arch=native bench/gpu_floor.cu -o gpu_floor
//   ./gpu_floor "$(git rev-parse HEAD)"
//
// Prints one JSON object, with the commit if it is given. Times are of CUDA events around one
// launch of many rounds, medians of kRepeats launches; null is a launch that the device refuses.
// Every wait is bounded: a fault ends in an error, never in a hung device.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

namespace cg = cooperative_groups;

namespace {

constexpr int kThreads = 256, kRounds = 2000, kRepeats = 9;
constexpr int kPortableCluster = 8, kMostCluster = 16;  // blocks
constexpr unsigned kMostSpins = 1u << 26;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Whether a launch is one that this device cannot do, which leaves it as it was.
bool refused(cudaError_t error) {
  for (const cudaError_t one :
       {cudaErrorNotSupported, cudaErrorCooperativeLaunchTooLarge, cudaErrorInvalidClusterSize,
        cudaErrorInvalidConfiguration, cudaErrorLaunchOutOfResources}) {
    if (error == one) return true;
  }
  return false;
}

__device__ void spin_until(const volatile unsigned* at, unsigned value) {
  for (unsigned spins = 0; *at < value; ++spins) {
    if (spins == kMostSpins) __trap();
  }
}

// All blocks arrive at one counter and wait for the others.
__global__ void grid_barrier(unsigned* counter) {
  for (unsigned round = 1; round <= kRounds; ++round) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counter, 1);
      spin_until(counter, round * gridDim.x);
      __threadfence();
    }
    __syncthreads();
  }
}

// Every block writes kThreads words that carry their round, and reads those of all blocks of its
// group: an exchange of a state without a barrier. words: [2][gridDim.x][kThreads].
__global__ void flag_exchange(uint64_t* words, int group) {
  const int first = static_cast<int>(blockIdx.x) / group * group;
  for (unsigned round = 1; round <= kRounds; ++round) {
    volatile uint64_t* slot = words + static_cast<size_t>(round % 2) * gridDim.x * kThreads;
    slot[blockIdx.x * kThreads + threadIdx.x] = static_cast<uint64_t>(round) << 32 | threadIdx.x;
    for (int other = first; other < first + group; ++other) {
      const volatile uint64_t* from = &slot[other * kThreads + threadIdx.x];
      for (unsigned spins = 0; *from >> 32 < round; ++spins) {
        if (spins == kMostSpins) __trap();
      }
    }
    __syncthreads();
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// The same within a cluster: into the shared memory of every other block, then the cluster's
// barrier.
__global__ void cluster_exchange(unsigned* out) {
  __shared__ unsigned state[2][kMostCluster][kThreads];
  cg::cluster_group cluster = cg::this_cluster();
  const unsigned rank = cluster.block_rank(), blocks = cluster.num_blocks();
  for (unsigned round = 1; round <= kRounds; ++round) {
    for (unsigned other = 0; other < blocks; ++other)
      *cluster.map_shared_rank(&state[round % 2][rank][threadIdx.x], other) = round;
    cluster.sync();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = state[kRounds % 2][0][0];
}
#else
__global__ void cluster_exchange(unsigned*) { __trap(); }
#endif

// Every block reads the whole buffer, which fits L2, `rounds` times; count is a power of two.
__global__ void read_l2(const uint4* data, unsigned count, int rounds, unsigned* out) {
  unsigned sum = 0;
  for (int round = 0; round < rounds; ++round) {
#pragma unroll 8
    for (unsigned i = threadIdx.x; i < count; i += kThreads) {
      const uint4 v = __ldcg(data + ((i + blockIdx.x * 4096) & (count - 1)));
      sum += v.x ^ v.y ^ v.z ^ v.w;
    }
  }
  if (sum == 1) out[0] = sum;
}

__global__ void read_shared(int rounds, unsigned* out) {
  extern __shared__ uint4 memory[];
  constexpr unsigned kCount = 2048;  // 32 KB
  for (unsigned i = threadIdx.x; i < kCount; i += kThreads) memory[i] = make_uint4(i, i, i, i);
  __syncthreads();
  const unsigned base = static_cast<unsigned>(__cvta_generic_to_shared(memory));
  unsigned sum = 0;
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (unsigned i = 0; i < kCount; i += kThreads) {
      uint4 v;
      asm volatile("ld.volatile.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(base + (i + threadIdx.x) * 16));
      sum += v.x ^ v.y ^ v.z ^ v.w;
    }
  }
  if (sum == 1) out[0] = sum;
}

// Returns NaN where the device refuses the launch.
template <class Launch>
double milliseconds(Launch&& launch) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i <= kRepeats; ++i) {
    check(cudaEventRecord(start), "record");
    const cudaError_t error = launch();
    if (refused(error)) {
      cudaGetLastError();  // which forgets it
      return NAN;
    }
    check(error, "launch");
    check(cudaGetLastError(), "launch");
    check(cudaEventRecord(end), "record");
    check(cudaEventSynchronize(end), "kernel");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, end), "elapsed");
    if (i > 0) times.push_back(ms);  // the first one loads the code
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <class... Parameters>
cudaError_t launch_together(void (*kernel)(Parameters...), int blocks, Parameters... parameters) {
  void* arguments[] = {&parameters...};
  return cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), dim3(blocks), dim3(kThreads),
                                     arguments);
}

// As many clusters as the device holds at once, so that none waits for another to end.
double cluster_microseconds(int size, int blocks, unsigned* out) {
  if (size > kPortableCluster) {
    const cudaError_t error =
        cudaFuncSetAttribute(cluster_exchange, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (refused(error)) {
      cudaGetLastError();
      return NAN;
    }
    check(error, "clusters that are not portable");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks / size * size);
  config.blockDim = dim3(kThreads);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, cluster_exchange, &config);
  if (refused(error)) {
    cudaGetLastError();
    return NAN;
  }
  check(error, "clusters at once");
  if (clusters == 0) return NAN;
  config.gridDim = dim3(std::min(blocks / size, clusters) * size);
  return milliseconds([&] { return cudaLaunchKernelEx(&config, cluster_exchange, out); }) * 1e3 /
         kRounds;
}

// A number, or null for NaN.
void print(double value, int decimals) {
  if (std::isnan(value)) {
    std::printf("null");
  } else {
    std::printf("%.*f", decimals, value);
  }
}

// One entry of an object of times.
void print_entry(int key, double us, bool first) {
  std::printf("%s\"%d\": ", first ? "" : ", ", key);
  print(us, 3);
}

bool is_a_commit(const char* text) {
  if (*text == 0) return false;
  for (; *text != 0; ++text) {
    if (!std::isalnum(static_cast<unsigned char>(*text))) return false;
  }
  return true;
}

// The version of the kernel's driver, e.g. 580.65.06, which the CUDA runtime does not tell.
std::string driver_version() {
  std::ifstream file("/proc/driver/nvidia/version");
  for (std::string word; file >> word;) {
    if (word.find_first_not_of("0123456789.") == std::string::npos) return word;
  }
  return "unknown";
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 2 || (count == 2 && !is_a_commit(arguments[1]))) {
    std::fprintf(stderr, "usage: %s [COMMIT]\n", arguments[0]);
    return 2;
  }
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  const int blocks = device.multiProcessorCount;
  void* memory;
  const size_t words = size_t{2} * blocks * kThreads;
  size_t buffer = 16 << 20;  // a power of two that L2 holds with room to spare
  while (2 * buffer > static_cast<size_t>(device.l2CacheSize) && buffer > (1 << 20)) buffer /= 2;
  check(cudaMalloc(&memory, std::max(words * sizeof(uint64_t), buffer)), "memory");
  int cuda = 0, runtime = 0;
  check(cudaDriverGetVersion(&cuda), "driver");
  check(cudaRuntimeGetVersion(&runtime), "runtime");
  std::printf("{\"device\": \"%s\", \"multiprocessors\": %d", device.name, blocks);
  std::printf(", \"driver\": \"%s\", \"cuda_of_driver\": %d", driver_version().c_str(), cuda);
  std::printf(", \"cuda_runtime\": %d", runtime);
  if (count == 2) std::printf(", \"commit\": \"%s\"", arguments[1]);

  std::printf(",\n \"grid_barrier_us\": {");
  for (int n = 2; n <= blocks; n = n < blocks ? std::min(2 * n, blocks) : n + 1) {
    const double ms = milliseconds([&] {
      check(cudaMemsetAsync(memory, 0, sizeof(unsigned)), "memset");
      return launch_together(grid_barrier, n, static_cast<unsigned*>(memory));
    });
    print_entry(n, ms * 1e3 / kRounds, n == 2);
  }

  std::printf("},\n \"flag_exchange_us\": {");
  for (int group = 2; group <= 32 && group <= blocks; group *= 2) {
    const double ms = milliseconds([&] {
      check(cudaMemsetAsync(memory, 0, words * sizeof(uint64_t)), "memset");
      return launch_together(flag_exchange, blocks / group * group, static_cast<uint64_t*>(memory),
                             group);
    });
    print_entry(group, ms * 1e3 / kRounds, group == 2);
  }
  std::printf("}");

  if (device.major >= 9) {
    std::printf(",\n \"cluster_exchange_us\": {");
    for (int size = 2; size <= kMostCluster && size <= blocks; size *= 2) {
      print_entry(size, cluster_microseconds(size, blocks, static_cast<unsigned*>(memory)),
                  size == 2);
    }
    std::printf("}");
  }

  check(cudaMemset(memory, 0, buffer), "memset");
  unsigned* out = static_cast<unsigned*>(memory);
  const int reads = 8, passes = 20000;
  const double l2 = milliseconds([&] {
    read_l2<<<8 * blocks, kThreads>>>(static_cast<const uint4*>(memory), buffer / 16, reads, out);
    return cudaGetLastError();
  });
  const double shared = milliseconds([&] {
    read_shared<<<blocks, kThreads, 32 << 10>>>(passes, out);
    return cudaGetLastError();
  });
  std::printf(",\n \"l2_gb_s\": ");
  print(8.0 * blocks * reads * static_cast<double>(buffer) / l2 / 1e6, 0);
  std::printf(", \"shared_gb_s\": ");
  print(static_cast<double>(blocks) * passes * (32 << 10) / shared / 1e6, 0);
  std::printf("}\n");
  check(cudaFree(memory), "free");
  return 0;
}

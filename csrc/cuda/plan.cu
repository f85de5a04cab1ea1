// The plan: tensor cores or not, and one launch a step or one for all.
//
// A persistent kernel fits where the groups of all directions are on the device at once: blocks of
// one unit tile each, with their rows of R and the products' work in shared memory. For one block
// on a multiprocessor and for two, R is resident as far as there is room, and the rest is streamed.
// Of the grids that fit, the one with the least modelled time of a step is taken, and of equals the
// one with fewer blocks. In clocks of a multiprocessor,
//
//   step = passes · blocks on the busiest multiprocessor · pass
//   pass = streamed / 64 + resident / 128 + bytes of the operand / 64     on tensor cores
//        = streamed / 64 + 4 · (W + row tiles · K) · (size of the type summed in / 4)     otherwise
//
// where a pass is one tile of 8·row tiles rows, of which a group has `passes`, W the weights of a
// unit, over all products of a step, and K the elements of a row that these read: H for each phase
// in forward, G·H in backward, with a projection P and H or G·H and P. What is resident comes from
// shared memory, what is streamed and the operand by way of L2; exact products are bound by what a
// warp loads for its multiply-adds. The time of the exchange is the same for all and left out. No
// GPU has confirmed any of it.
#include <atomic>
#include <climits>

#include "cuda/persistent.cuh"
#include "cuda/plan.h"
#include "cuda/queue.cuh"

namespace rnnkern {
namespace {

constexpr int kKnownDevices = 64;

// The architecture, as 10 · major + minor, that the kernels on a device were compiled for: that of
// their PTX, since a newer device may run what was written for an older one.
cudaError_t kernel_architecture(int device, int& architecture) {
  static std::atomic<int> known[kKnownDevices];
  const bool keeps = device >= 0 && device < kKnownDevices;
  architecture = keeps ? known[device].load() : 0;
  if (architecture != 0) return cudaSuccess;
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes{};
  cudaError_t error = guard.error();
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, put_steps<SomeSteps>);
  if (error != cudaSuccess) return error;
  architecture = attributes.ptxVersion;
  if (keeps) known[device] = architecture;
  return cudaSuccess;
}

int multiprocessors(int device) {
  int count = 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess)
    return count;
  cudaGetLastError();
  return INT_MAX;
}

// The first architecture whose tensor cores multiply this type; 0: none are to.
int tensor_cores_from(CudaType type, bool tf32) {
  switch (type) {
    case CudaType::float64: return 0;
    case CudaType::float32: return tf32 ? 80 : 0;
    case CudaType::float16: return 75;
    case CudaType::bfloat16: return 80;
  }
  return 0;
}

int64_t size_of(CudaType type) {
  switch (type) {
    case CudaType::float64: return 8;
    case CudaType::float32: return 4;
    case CudaType::float16: return 2;
    case CudaType::bfloat16: return 2;
  }
  return 0;
}

int64_t tiles(int64_t all, int64_t each) { return (all + each - 1) / each; }

struct Device {
  int cooperates = 0, multiprocessors = 0;
  int block_memory = 0, multiprocessor_memory = 0;  // shared
  int reserved_memory = 0;                          // of a block's share, by the system
};

// What the persistent kernels need to know; no cooperation if the device does not answer.
Device ask(int device) {
  Device d;
  const auto answers = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, device) == cudaSuccess;
  };
  if (!answers(&d.multiprocessors, cudaDevAttrMultiProcessorCount) ||
      !answers(&d.block_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin) ||
      !answers(&d.multiprocessor_memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor) ||
      !answers(&d.reserved_memory, cudaDevAttrReservedSharedMemoryPerBlock) ||
      !answers(&d.cooperates, cudaDevAttrCooperativeLaunch)) {
    cudaGetLastError();
    return {};
  }
  return d;
}

// Blocks of a kernel that a multiprocessor holds; 0 if it cannot run. The kernel is allowed all
// the shared memory there is, since a thread with other sizes may launch it at the same time.
int64_t held(const Device& device, const void* kernel, int64_t memory) {
  if (memory > device.block_memory) return 0;
  int blocks = 0;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           device.block_memory) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads,
                                                    static_cast<size_t>(memory)) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return blocks;
}

// Shared memory of a block where so many are on a multiprocessor.
int64_t room_of(const Device& device, int blocks) {
  const int64_t room = device.multiprocessor_memory / blocks - device.reserved_memory;
  return room < device.block_memory ? room : device.block_memory;
}

double clocks_of_pass(const CudaSizes& s, const CudaPlan& plan, const PersistentKernel& found) {
  const auto K = static_cast<double>(found.operand);
  const double streamed = double(plan.streamed) / 64;
  if (plan.tensor_cores) {
    const double rows = 8.0 * plan.row_tiles;
    return streamed + double(plan.resident) / 128 + rows * K * double(size_of(s.type)) / 64;
  }
  const double words = s.type == CudaType::float64 ? 2 : 1;
  return streamed + 4.0 * (double(found.weights) + plan.row_tiles * K) * words;
}

// Completes `tried`, whose rows a tile and bytes of R are set, by the best number of groups, and
// takes it for the plan if it takes less time.
void take_better(const Device& device, const CudaSizes& s, const PersistentKernel& found,
                 CudaPlan tried, double& least, CudaPlan& plan) {
  const int64_t all = held(device, found.kernel, tried.memory) * device.multiprocessors;
  const int64_t row_blocks = tiles(s.B, 8 * tried.row_tiles);
  const int64_t blocks = s.D * tried.blocks_of_group;
  const double pass = clocks_of_pass(s, tried, found);
  for (tried.groups = 1; tried.groups <= row_blocks && tried.groups <= all / blocks;
       ++tried.groups) {
    const int64_t crowd = tiles(blocks * tried.groups, device.multiprocessors);
    const double time = double(tiles(row_blocks, tried.groups) * crowd) * pass;
    if (plan.blocks_of_group > 0 && time >= least) continue;
    least = time;
    plan = tried;
  }
}

// Completes a plan by the best grid of the persistent kernel; leaves it as it is if none fits.
void make_persistent(const Device& device, const CudaSizes& s, CudaPlan& plan) {
  double least = 0;
  CudaPlan tried = plan;
  tried.wide = false;
  const Widths& widths = s.widths;
  tried.blocks_of_group = tiles(widths.P > widths.H ? widths.P : widths.H, kUnits);
  for (const int row_tiles : {1, 4}) {
    const PersistentKernel found = s.persistent(plan.tensor_cores, row_tiles, widths, s.projected);
    tried.row_tiles = row_tiles;
    for (const int blocks : {1, 2}) {
      const int64_t room = room_of(device, blocks);
      const bool all = found.all + found.work <= room;
      if (!all && found.streaming_work > room) continue;
      tried.resident = all ? found.all : found.kept(widths, room - found.streaming_work);
      tried.streamed = found.all - tried.resident;
      tried.memory = tried.resident + (all ? found.work : found.streaming_work);
      take_better(device, s, found, tried, least, plan);
    }
  }
}

}  // namespace

// Tensor cores where the architecture that the kernels were compiled for has them for the type:
// results depend on this choice only. A launch for each step has blocks of 8 rows for small
// batches, so that units fill the device, and of 32 otherwise, so that weights are read by fewer
// blocks; and of four tiles of units where these give every multiprocessor a block in every stage,
// of H units or P, so that the operand is read by fewer blocks too. float64, and
// bfloat16 without tensor cores, are not worth the compile time (the products' kWidens).
Status make_cuda_plan(const CudaCall& call, const CudaSizes& sizes, CudaPlan& plan) {
  plan = {};
  if (const int least = tensor_cores_from(sizes.type, call.tf32)) {
    int architecture;
    const cudaError_t error = kernel_architecture(call.device, architecture);
    if (error != cudaSuccess) return device_failed(error);
    plan.tensor_cores = architecture >= least;
  }
  plan.row_tiles = sizes.B <= 8 ? 1 : 4;
  const bool widens = plan.tensor_cores || sizes.type == CudaType::float32;
  const Widths& widths = sizes.widths;
  const int64_t units = widths.P < widths.H ? widths.P : widths.H;
  plan.wide =
      widens && sizes.B > 8 &&
      sizes.D * tiles(sizes.B, 32) * tiles(units, 4 * kUnits) >= multiprocessors(call.device);
  if (!call.persistent) return Status::ok;
  const DeviceGuard guard(call.device);
  const Device device = guard.error() == cudaSuccess ? ask(call.device) : Device{};
  if (device.cooperates) make_persistent(device, sizes, plan);
  return Status::ok;
}

}  // namespace rnnkern

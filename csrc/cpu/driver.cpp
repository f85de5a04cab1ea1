// The ISA table and its choice at load; one call: plan, scratch, team.
#include "cpu/driver.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cells/registry.h"
#include "cpu/kernels.h"
#include "cpu/pages.h"
#include "cpu/team.h"

namespace rnnkern {
namespace {

template <class Cell>
constexpr CellInfo info() {
  return {Cell::name,  Cell::gates,    Cell::states,
          Cell::saved, Cell::phases,   Cell::first[Cell::phases - 1],
          Cell::extra, Cell::projects, Cell::recovers};
}

constexpr CellInfo cells[] = {
#define RNNKERN_ROW(Cell) info<Cell>(),
    RNNKERN_CELLS(RNNKERN_ROW)
#undef RNNKERN_ROW
};

struct Isa {
  const char* name;
  const IsaKernels* kernels;
  const CellKernels<Bfloat16>* bfloat16;  // null: not computed in bfloat16
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux gives the matrix unit's registers, 8 KiB a thread, only to processes that ask for them.
bool has_amx_bf16() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  static const bool granted =
      (d & kBf16) && (d & kTile) && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

const Isa isas[] = {
    {"baseline", &baseline_kernels, nullptr, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", &avx2_kernels, nullptr,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {"avx512", &avx512_kernels, nullptr, has_avx512},
    {"avx512_bf16", &avx512_kernels, avx512_bf16_cells, has_avx512_bf16},
    {"amx_bf16", &avx512_kernels, amx_bf16_cells, has_amx_bf16},
#endif
};

const Isa* best_isa() {
  const Isa* best = nullptr;
  for (const Isa& isa : isas) {
    if (isa.runs_here()) best = &isa;
  }
  return best;
}

std::atomic<const Isa*>& selected() {
  static std::atomic<const Isa*> isa{best_isa()};
  return isa;
}

// The cells of the selected ISA; null if it does not compute in this type.
template <class T>
const CellKernels<T>* kernels() {
  const Isa& isa = *selected().load();
  if constexpr (std::is_same_v<T, Bfloat16>) {
    return isa.bfloat16;
  } else if constexpr (std::is_same_v<T, float>) {
    return isa.kernels->float32;
  } else {
    return isa.kernels->float64;
  }
}

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kSmall = 64;  // so that everything is on the heap, the end of which is watched
#else
constexpr size_t kSmall = 8192;
#endif

// Memory of one call, aligned to a cache line: on the stack while it is small, because the way to
// the heap and back is a good part of a call of one step.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes <= static_cast<int64_t>(kSmall)) return;
    large_.reset(static_cast<unsigned char*>(
        std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64))));
    at_ = large_.get();
    prefer_huge_pages(at_, bytes);
  }
  unsigned char* data() const { return at_; }  // null if there is no memory

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  alignas(64) unsigned char small_[kSmall];
  std::unique_ptr<unsigned char, Free> large_;
  unsigned char* at_ = small_;
};

// What a call writes for the first time, if its caller has just allocated it.
template <class T>
void prepare_outputs(const CellInfo& cell, const ForwardProblem<T>& p) {
  const int64_t N = p.seq.data_rows(), size = sizeof(T);
  prefer_huge_pages(p.dir[0].y, N * p.D * p.P * size);
  if (!p.training) return;
  prefer_huge_pages(p.dir[0].x, N * p.D * cell.gates * p.H * size);
  for (int d = 0; d < p.D; ++d) {
    prefer_huge_pages(p.dir[d].h_prev, N * p.P * size);
    prefer_huge_pages(p.dir[d].saved, N * cell.saved * p.H * size);
  }
}
template <class T, class A>
void prepare_outputs(const CellInfo& cell, const BackwardProblem<T, A>& p) {
  prefer_huge_pages(p.dinput, p.seq.data_rows() * p.I * static_cast<int64_t>(sizeof(T)));
  const int64_t rows = cell.gates * p.H * static_cast<int64_t>(sizeof(A));
  for (int d = 0; d < p.D; ++d) {
    prefer_huge_pages(p.dir[d].sums.dW, rows * p.I);
    prefer_huge_pages(p.dir[d].sums.dR, rows * p.P);
  }
}

template <class Problem>
struct Call {
  const LoopKernel<Problem>& kernel;
  const Problem& problem;
  Plan plan;
  unsigned char* scratch;
  Barrier* barriers;

  static void body(int rank, int size, void* context) {
    const Call& call = *static_cast<const Call*>(context);
    const Plan alone;
    call.kernel.run(call.problem, size == 1 ? alone : call.plan, call.scratch, call.barriers, rank);
  }
};

template <class Problem>
Status run(const LoopKernel<Problem>& kernel, const Problem& problem, int threads) {
  const Plan plan = make_plan(kernel.work(problem), threads);
  const int first = 1 + plan.direction_groups;  // see Place for their order
  const int count = first + plan.direction_groups * plan.row_groups;
  const auto barrier_bytes = static_cast<int64_t>(sizeof(Barrier)) * count;
  const Scratch memory(barrier_bytes + kernel.scratch_bytes(problem, plan));
  if (!memory.data()) return Status::out_of_memory;
  auto* barriers = reinterpret_cast<Barrier*>(memory.data());
  for (int i = 0; i < count; ++i) {
    new (barriers + i) Barrier(i == 0      ? plan.threads()
                               : i < first ? plan.group_threads()
                                           : plan.unit_groups);
  }
  Call<Problem> call{kernel, problem, plan, memory.data() + barrier_bytes, barriers};
  run_team(plan.threads(), Call<Problem>::body, &call);
  return Status::ok;
}

// Hands the cell's kernels to `use` if the selected ISA has them and they can run the problem.
template <class T, class Problem, class Use>
Status with_kernels(int cell, const Problem& p, Use&& use) {
  const CellKernels<T>* table = kernels<T>();
  if (!table) return Status::unsupported_type;
  if (cell < 0 || cell >= cell_count()) return Status::unknown_cell;
  if (!valid_sizes(p, cells[cell].projects)) return Status::bad_problem;
  return use(table[cell]);
}

}  // namespace

int cell_count() { return static_cast<int>(sizeof(cells) / sizeof(cells[0])); }
CellInfo cell_info(int cell) { return cells[cell]; }

const char* supported_isa(int index) {
  for (const Isa& isa : isas) {
    if (isa.runs_here() && index-- == 0) return isa.name;
  }
  return nullptr;
}

const char* current_isa() { return selected().load()->name; }
bool computes_bfloat16() { return kernels<Bfloat16>(); }

bool select_isa(const char* name) {
  for (const Isa& isa : isas) {
    if (std::strcmp(isa.name, name) == 0 && isa.runs_here()) {
      selected().store(&isa);
      return true;
    }
  }
  return false;
}

template <class T>
Status run_forward(int cell, const ForwardProblem<T>& problem, int threads) {
  return with_kernels<T>(cell, problem, [&](const CellKernels<T>& own) {
    prepare_outputs(cells[cell], problem);
    return run(own.forward, problem, threads);
  });
}

template <class T>
Status run_backward(int cell, const CpuBackwardProblem<T>& problem, int threads) {
  return with_kernels<T>(cell, problem, [&](const CellKernels<T>& own) {
    const bool keeps = cells[cell].template keeps_h_prev<T>(problem.dir[0].W_hr);
    if (keeps && !problem.dir[0].h_prev) return Status::bad_problem;
    prepare_outputs(cells[cell], problem);
    return run(own.backward, problem, threads);
  });
}

template <class T>
Status plan_forward(int cell, const ForwardProblem<T>& problem, int threads, Plan& plan) {
  return with_kernels<T>(cell, problem, [&](const CellKernels<T>& own) {
    plan = make_plan(own.forward.work(problem), threads);
    return Status::ok;
  });
}

template <class T>
Status plan_backward(int cell, const CpuBackwardProblem<T>& problem, int threads, Plan& plan) {
  return with_kernels<T>(cell, problem, [&](const CellKernels<T>& own) {
    plan = make_plan(own.backward.work(problem), threads);
    return Status::ok;
  });
}

#define RNNKERN_CPU_TYPE(T)                                                   \
  template Status run_forward<T>(int, const ForwardProblem<T>&, int);         \
  template Status run_backward<T>(int, const CpuBackwardProblem<T>&, int);    \
  template Status plan_forward<T>(int, const ForwardProblem<T>&, int, Plan&); \
  template Status plan_backward<T>(int, const CpuBackwardProblem<T>&, int, Plan&);
RNNKERN_CPU_TYPE(float)
RNNKERN_CPU_TYPE(double)
RNNKERN_CPU_TYPE(Bfloat16)
#undef RNNKERN_CPU_TYPE

}  // namespace rnnkern

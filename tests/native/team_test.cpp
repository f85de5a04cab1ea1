// The thread team, without Python: every cell, pass, split and sequence form runs on teams of two
// sizes, and every bit of its results must be that of one thread. Built with a sanitizer it also
// finds races and stray accesses: each buffer is an allocation of its own, of exactly the size in
// core/problem.h. See sanitize.sh.
//
// ThreadSanitizer does not see AVX-512's masked loads and stores; the other ISAs run the same loops
// with plain ones. So it leaves AVX-512 out, but for bfloat16, which has loops of its own.
#include "cpu/team.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <thread>
#include <vector>

#include "cpu/driver.h"

namespace {

using namespace rnnkern;

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

struct Shape {
  int64_t T, B, H, D;
};
// With 8 threads the cost model makes of these: splits by unit (B = 1), by row, by direction, and
// combinations; and of the last one, a helper. 1, 7 and 33 leave tails in every register and block;
// 55 steps of 5 rows are several chunks.
constexpr Shape kShapes[] = {
    {1, 1, 1, 1},  {5, 1, 160, 1}, {4, 1, 96, 2},  {6, 3, 33, 1},   {5, 3, 64, 2},
    {4, 17, 7, 2}, {3, 8, 160, 1}, {55, 5, 33, 2}, {160, 1, 40, 1},
};
constexpr int kTeams[] = {3, 8};

// What a call may come with besides sizes; each form sets a few.
struct Form {
  const char* name;
  bool training, lengths, packed, resets, reset_state, batch_first, bare;
};
constexpr Form kForms[] = {
    {"inference, no bias", false, false, false, false, false, false, true},
    {"training", true, false, false, false, false, false, false},
    {"lengths, resets", true, true, false, true, false, false, false},
    {"lengths, resets to a state, batch_first", true, true, false, true, true, true, false},
    {"packed, resets to a state", true, false, true, true, true, false, false},
    {"inference, packed, resets", false, false, true, true, false, false, false},
};

template <class T>
using Buffer = std::vector<T>;

template <class T>
T* pointer(Buffer<T>& buffer) {
  return buffer.empty() ? nullptr : buffer.data();
}

template <class T>
Buffer<T> random_buffer(std::mt19937& generator, int64_t size, Accumulator<T> scale) {
  std::uniform_real_distribution<Accumulator<T>> uniform(-scale, scale);
  Buffer<T> buffer(static_cast<size_t>(size));
  for (T& value : buffer) {
    const Accumulator<T> drawn = uniform(generator);  // bfloat16 takes its upper half
    std::memcpy(&value, reinterpret_cast<const char*>(&drawn + 1) - sizeof(T), sizeof(T));
  }
  return buffer;
}

template <class T>
bool equal(const Buffer<T>& a, const Buffer<T>& b) {
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// The tensors of one direction; their shapes stand in core/problem.h. Empty: absent.
template <class T>
struct Tensors {
  Buffer<T> W, b_ih, R, b, W_hr, initial[kMaxStates], reset[kMaxStates], dfinal[kMaxStates];
  Buffer<T> final[kMaxStates], h_prev, saved;  // out of forward
  Buffer<T> dinitial[kMaxStates];              // out of backward
  Buffer<Accumulator<T>> dreset[kMaxStates], dW, dR, db_ih, db_hh, dW_hr;
};

// One layer with random weights and data. It is copied for every run, so all runs start alike.
template <class T>
class Layer {
  using A = Accumulator<T>;

 public:
  Layer(int cell, const Shape& shape, int64_t P, const Form& form)
      : cell_(cell), info_(cell_info(cell)), shape_(shape), P_(P), form_(form) {
    make_structure();
    const int64_t B = shape.B, H = shape.H, G = info_.gates, I = I_;
    const A scale = static_cast<A>(1 / std::sqrt(static_cast<double>(P)));
    input_ = random(N_ * I, 1);
    if (form.training) gates_ = Buffer<T>(N_ * shape.D * G * H);
    if (form.training && !form.bare) dinput_ = Buffer<T>(N_ * I);
    y_ = Buffer<T>(N_ * shape.D * P);
    if (!form.bare) dy_ = random(N_ * shape.D * P, 1);
    for (int64_t d = 0; d < shape.D; ++d) {
      Tensors<T>& t = dir_[d];
      t.W = random(G * H * I, scale);
      t.R = random(G * H * P, scale);
      if (!form.bare) t.b_ih = random(G * H, 1);
      if (!form.bare) t.b = random(G * H, 1);
      if (projects()) t.W_hr = random(P * H, scale);
      for (int k = 0; k < info_.states; ++k) {
        const int64_t size = B * (k == 0 ? P : H);
        t.initial[k] = random(size, 1);
        if (form.reset_state) t.reset[k] = random(size, 1);
        if (!form.bare) t.dfinal[k] = random(size, 1);
        t.final[k] = t.dinitial[k] = Buffer<T>(size);
        if (form.reset_state) t.dreset[k] = Buffer<A>(size);
      }
      if (!form.training) continue;
      if (info_.template keeps_h_prev<T>(projects())) t.h_prev = Buffer<T>(N_ * P);
      t.saved = Buffer<T>(N_ * info_.saved * H);
      t.dW = Buffer<A>(G * H * I);
      t.dR = Buffer<A>(G * H * P);
      t.db_ih = t.db_hh = Buffer<A>(G * H);
      if (projects()) t.dW_hr = Buffer<A>(P * H);
    }
  }

  // Both passes; false if the driver refused. The plans they took are counted by the caller.
  bool run(int threads) {
    const ForwardProblem<T> forward = forward_problem();
    if (plan_forward<T>(cell_, forward, threads, forward_plan) != Status::ok) return false;
    if (run_forward<T>(cell_, forward, threads) != Status::ok) return false;
    if (!form_.training) return true;
    const CpuBackwardProblem<T> backward = backward_problem();
    if (plan_backward<T>(cell_, backward, threads, backward_plan) != Status::ok) return false;
    return run_backward<T>(cell_, backward, threads) == Status::ok;
  }

  bool same_bits(const Layer& other) const {
    bool same = equal(gates_, other.gates_) && equal(y_, other.y_) && equal(dinput_, other.dinput_);
    for (int64_t d = 0; d < shape_.D; ++d) {
      const Tensors<T>&a = dir_[d], &b = other.dir_[d];
      same = same && equal(a.h_prev, b.h_prev) && equal(a.saved, b.saved) && equal(a.dW, b.dW) &&
             equal(a.dR, b.dR) && equal(a.db_ih, b.db_ih) && equal(a.db_hh, b.db_hh) &&
             equal(a.dW_hr, b.dW_hr);
      for (int k = 0; k < info_.states; ++k) {
        same = same && equal(a.final[k], b.final[k]) && equal(a.dinitial[k], b.dinitial[k]) &&
               equal(a.dreset[k], b.dreset[k]);
      }
    }
    return same;
  }

  Plan forward_plan, backward_plan;

 private:
  bool projects() const { return P_ != shape_.H; }

  Buffer<T> random(int64_t size, A scale) { return random_buffer<T>(generator_, size, scale); }

  // Sorted row j has length T - 2j (at least 0, or 1 if packed); the order is a rotation.
  void make_structure() {
    const int64_t T_ = shape_.T, B = shape_.B;
    N_ = T_ * B;
    if (form_.lengths || form_.packed) {
      N_ = 0;
      for (int64_t t = 0; t < T_; ++t) {
        int64_t rows = 0;
        for (int64_t j = 0; j < B; ++j) rows += t < std::max<int64_t>(T_ - 2 * j, form_.packed);
        active_.push_back(rows);
        if (form_.packed) offset_.push_back(N_);
        N_ += rows;
      }
      if (!form_.packed) N_ = T_ * B;
      for (int64_t j = 0; j < B; ++j) order_.push_back((j + 1) % B);
    }
    for (int64_t i = 0; form_.resets && i < T_ * B; ++i) resets_.push_back(generator_() % 3 == 0);
  }

  template <class Problem>
  Problem sized() {
    Problem p{};
    const Rows time_major{shape_.B, 1}, batch_major{1, shape_.T};
    p.seq = {shape_.T,         shape_.B,         pointer(active_), pointer(order_),
             pointer(offset_), pointer(resets_), time_major};
    p.H = shape_.H;
    p.P = P_;
    p.D = shape_.D;
    p.I = I_;
    p.input = pointer(input_);
    p.x_rows = p.y_rows = form_.batch_first ? batch_major : time_major;
    return p;
  }

  ForwardProblem<T> forward_problem() {
    auto p = sized<ForwardProblem<T>>();
    p.training = form_.training;
    for (int64_t d = 0; d < shape_.D; ++d) {
      Tensors<T>& t = dir_[d];
      ForwardDirection<T>& io = p.dir[d];
      io.reverse = d == 1;
      io.W = pointer(t.W);
      io.b_ih = pointer(t.b_ih);
      io.R = pointer(t.R);
      io.b = pointer(t.b);
      io.W_hr = pointer(t.W_hr);
      if (form_.training) io.x = pointer(gates_) + d * info_.gates * shape_.H;
      for (int k = 0; k < info_.states; ++k) {
        io.initial[k] = pointer(t.initial[k]);
        io.reset[k] = pointer(t.reset[k]);
        io.final[k] = pointer(t.final[k]);
      }
      io.y = pointer(y_) + d * P_;
      io.h_prev = pointer(t.h_prev);
      io.saved = pointer(t.saved);
    }
    return p;
  }

  CpuBackwardProblem<T> backward_problem() {
    auto p = sized<CpuBackwardProblem<T>>();
    p.dinput = pointer(dinput_);
    for (int64_t d = 0; d < shape_.D; ++d) {
      Tensors<T>& t = dir_[d];
      BackwardDirection<T, A>& io = p.dir[d];
      io.reverse = d == 1;
      io.R = pointer(t.R);
      io.W_hr = pointer(t.W_hr);
      io.gates = pointer(gates_) + d * info_.gates * shape_.H;
      io.h_prev = pointer(t.h_prev);
      io.saved = pointer(t.saved);
      io.h0 = pointer(t.initial[0]);
      io.reset_h = pointer(t.reset[0]);
      io.dy = dy_.empty() ? nullptr : pointer(dy_) + d * P_;
      for (int k = 0; k < info_.states; ++k) {
        io.dfinal[k] = pointer(t.dfinal[k]);
        io.dinitial[k] = pointer(t.dinitial[k]);
        io.dreset[k] = pointer(t.dreset[k]);
      }
      io.W = pointer(t.W);
      io.sums = {pointer(t.dW), pointer(t.dR), pointer(t.db_ih), pointer(t.db_hh),
                 pointer(t.dW_hr)};
    }
    return p;
  }

  int cell_;
  CellInfo info_;
  Shape shape_;
  int64_t P_, I_ = shape_.H / 2 + 3, N_ = 0;
  Form form_;
  std::mt19937 generator_{2};
  std::vector<int64_t> active_, order_, offset_;
  std::vector<uint8_t> resets_;
  Buffer<T> input_, gates_, y_, dy_, dinput_;  // [N,I], [N,D,G,H], [N,D,P], [N,D,P], [N,I]
  Tensors<T> dir_[kMaxDirections];
};

int failures = 0;

const char* type_name(size_t bytes) {
  return bytes == 2 ? "bfloat16" : bytes == 4 ? "float32" : "float64";
}

// Nobody passes a barrier before all have come to it, whether they spin or sleep meanwhile.
void check_barrier(int size, bool asleep) {
  constexpr int kRounds = 3000;
  Barrier barrier(size);
  std::vector<int> come(static_cast<size_t>(size));  // the round that each thread is in
  std::atomic<int> early{0};
  sleep_at_once(asleep);
  std::vector<std::thread> team;
  for (int& mine : come) {
    team.emplace_back([&] {
      for (int round = 1; round <= kRounds; ++round) {
        mine = round;
        barrier.wait();
        for (const int other : come) early += other != round;
        barrier.wait();
      }
    });
  }
  for (std::thread& thread : team) thread.join();
  sleep_at_once(false);
  if (early == 0) return;
  ++failures;
  std::printf("FAILED: barrier of %d, %s\n", size, asleep ? "asleep" : "awake");
}

// Sleep comes after three long yields in a row, for 64 waits, and then not before as many again.
void check_patience() {
  Patience patience;
  bool good = !patience.sleeps();
  for (int again = 0; again < 2; ++again) {
    for (const bool was_long : {true, true, false, true, true}) patience.yielded(was_long);
    good = good && !patience.sleeps();
    patience.yielded(true);
    for (int wait = 0; wait < 64; ++wait) good = good && patience.sleeps();
    good = good && !patience.sleeps();
  }
  if (good) return;
  ++failures;
  std::printf("FAILED: patience\n");
}

#if defined(__linux__)
double thread_seconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// A thread that sleeps at a barrier takes next to none of its CPU's time meanwhile.
void check_sleep() {
  Barrier barrier(2);
  double used = 0;
  sleep_at_once(true);
  std::thread sleeper([&] {
    const double before = thread_seconds();
    barrier.wait();
    used = thread_seconds() - before;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  barrier.wait();
  sleeper.join();
  sleep_at_once(false);
  if (used < 0.02) return;
  ++failures;
  std::printf("FAILED: a thread that slept for 0.2 s ran for %.3f\n", used);
}
#endif

// How often each way to split the work was taken.
struct Coverage {
  int by_unit = 0, by_row = 0, by_direction = 0, mixed = 0, helped = 0;
  void count(const Plan& plan) {
    by_unit += plan.unit_groups > 1;
    by_row += plan.row_groups > 1;
    by_direction += plan.direction_groups > 1;
    helped += plan.helpers > 0;
    mixed += plan.unit_groups > 1 && plan.direction_groups * plan.row_groups > 1;
  }
  bool complete() const { return by_unit && by_row && by_direction && mixed; }
};

template <class T>
void check_layer(int cell, const Shape& shape, int64_t P, const Form& form, Coverage& coverage) {
  const Layer<T> fresh(cell, shape, P, form);
  Layer<T> expected = fresh;
  bool good = expected.run(1);
  for (const int threads : kTeams) {
    // Awake, threads without a CPU of their own spin in each other's time.
    sleep_at_once(threads > static_cast<int>(std::thread::hardware_concurrency()));
    Layer<T> actual = fresh;
    good = actual.run(threads) && actual.same_bits(expected) && good;
    coverage.count(actual.forward_plan);
    coverage.count(actual.backward_plan);
  }
  sleep_at_once(false);
  // And from several threads at once, each with a team of its own. AddressSanitizer has seen all of
  // that by now; races between callers are ThreadSanitizer's to find.
  if (!kAddressSanitizer) {
    Layer<T> callers[] = {fresh, fresh};
    std::vector<std::thread> threads;
    for (Layer<T>& layer : callers) threads.emplace_back([&layer] { layer.run(2); });
    for (std::thread& thread : threads) thread.join();
    for (const Layer<T>& layer : callers) good = layer.same_bits(expected) && good;
  }
  if (good) return;
  ++failures;
  std::printf("FAILED: %s, %s, %s, T=%d B=%d H=%d P=%d D=%d, %s\n", current_isa(),
              cell_info(cell).name, type_name(sizeof(T)), static_cast<int>(shape.T),
              static_cast<int>(shape.B), static_cast<int>(shape.H), static_cast<int>(P),
              static_cast<int>(shape.D), form.name);
}

void check_cell(int cell) {
  const CellInfo info = cell_info(cell);
  Coverage coverage;
  for (const Shape& shape : kShapes) {
    for (const Form& form : kForms) {
      if (shape.T > 100 && (form.lengths || form.packed)) continue;  // they have no helper
      for (const int64_t P : {shape.H, shape.H / 2}) {
        if (P != shape.H && (P == 0 || !info.projects)) continue;
        if (computes_bfloat16()) {  // the rest is that of an ISA without it
          check_layer<Bfloat16>(cell, shape, P, form, coverage);
        } else {
          check_layer<float>(cell, shape, P, form, coverage);
          check_layer<double>(cell, shape, P, form, coverage);
        }
      }
    }
  }
  std::printf(
      "%-12s%-18s plans split by unit %d, row %d, direction %d, mixed %d, helped %d times\n",
      current_isa(), info.name, coverage.by_unit, coverage.by_row, coverage.by_direction,
      coverage.mixed, coverage.helped);
  // The products of bfloat16 may be too fast for a helper to pay.
  if (!coverage.complete() || (!coverage.helped && !computes_bfloat16())) {
    ++failures;
    std::printf("FAILED: some way to split the work was never taken; other shapes are needed\n");
  }
}

}  // namespace

// Arguments: the ISAs to run; by default all that this CPU supports (see above).
int main(int argc, char** argv) {
  for (const bool asleep : {false, true}) {
    for (const int size : {1, 2, 3, 8}) check_barrier(size, asleep);
  }
  check_patience();
#if defined(__linux__)
  check_sleep();
#endif
  rnnkern::allow_oversubscription(true);  // teams larger than the machine
  std::vector<const char*> isas(argv + 1, argv + argc);
  for (int i = 0; argc == 1 && supported_isa(i); ++i) {
    if (!kThreadSanitizer || std::strcmp(supported_isa(i), "avx512") != 0)
      isas.push_back(supported_isa(i));
  }
  for (const char* isa : isas) {
    if (!select_isa(isa)) {
      std::printf("%s: not an ISA of this CPU\n", isa);
      return 2;
    }
    for (int cell = 0; cell < cell_count(); ++cell) check_cell(cell);
  }
  std::printf(failures ? "%d failures\n" : "all results are equal\n", failures);
  return failures ? 1 : 0;
}

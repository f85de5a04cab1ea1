// The forward time loop of one layer.
//
// The states of all rows live in small private matrices: h' and the next h in two slots (all
// threads of a group read the one while they write the other), c in place. A step runs its phases;
// with a projection one more product follows (Sak et al. 2014: h = W_hr · m, where m is what the
// cell calls h). Whatever happens between two steps is decided when the state is written: a row
// that ends goes to the final state, one that is reset gets its reset state, and a row whose first
// step comes later finds the initial state that was put there at the start.
#pragma once

#include "cpu/input.h"
#include "cpu/views.h"

namespace rnnkern {
namespace {

template <class Cell, class T>
class ForwardLoop {
  static_assert(Cell::phases <= 2, "the loop has room for two products");
  static constexpr int G = Cell::gates, S = Cell::states, K = Cell::saved, F = Cell::phases;
  using A = Accumulator<T>;
  using P = Pack<A>;
  using View = ForwardView<T>;
  static constexpr int L = P::lanes;
  static constexpr bool kInPlace = std::is_same_v<T, A>;  // gates are kept where x was

 public:
  // Lays the scratch out in `base`; null only measures it (see scratch_bytes).
  ForwardLoop(const ForwardProblem<T>& problem, const Plan& plan, unsigned char* base)
      : p_(problem), projects_(problem.dir[0].W_hr) {
    Carver carver{base};
    for (int d = 0; d < p_.D; ++d) {
      Direction& s = dir_[d];
      s.input = {p_, d, plan, carver};
      const auto place = [&](auto& w, int64_t K, int64_t N) {
        w = {K, N, few_rows(p_.seq) ? nullptr : carver.take<A>(w.size(K, N))};
        w.one_row = p_.seq.B == 1;
      };
      place(s.first, p_.P, p_.H);
      if constexpr (F == 2) place(s.second, p_.H, p_.H);
      if (projects_) place(s.projection, p_.H, p_.P);
      s.h[0] = Matrix<T>::carve(carver, p_.seq.B, p_.P);
      s.h[1] = Matrix<T>::carve(carver, p_.seq.B, p_.P);
      if (S == 2) s.c = Matrix<A>::carve(carver, p_.seq.B, p_.H);
      if (F == 2 || projects_) s.operand = Matrix<T>::carve(carver, p_.seq.B, p_.H);
    }
    scratch_bytes_ = carver.used;
  }

  int64_t scratch_bytes() const { return scratch_bytes_; }

  Work work() const {
    const Direction& s = dir_[0];
    Work w{};
    w.T = p_.seq.T;
    w.B = p_.seq.B;
    w.D = p_.D;
    w.weights = G * p_.H * p_.P + (projects_ ? p_.H * p_.P : 0);
    w.outputs = G * p_.H + (projects_ ? p_.P : 0);
    w.inputs = G * p_.H * p_.I;
    w.packs = !few_rows(p_.seq);
    w.blocks = s.first.blocks(p_.H);
    if constexpr (F == 2) w.blocks = minimum(w.blocks, s.second.blocks(p_.H));
    if (projects_) w.blocks = minimum(w.blocks, s.projection.blocks(p_.P));
    w.chunks = p_.seq.active ? 1 : s.input.chunks();
    w.stages = F + (projects_ ? 1 : 0);
    w.element_bytes = sizeof(T);
    w.lanes = P::lanes;
    w.tile_rows = Weights<T, 1>::MR;
    w.cycle_flops = Weights<T, 1>::kCycleFlops;
    return w;
  }

  // Run by every thread of the team.
  void run(const Plan& plan, Barrier* barriers, int rank) {
    const TileRegisters<T> registers;
    const Place place(plan, rank);
    const Range mine = part(p_.D, place.direction_group, plan.direction_groups);
    for (int64_t d = mine.begin; d < mine.end; ++d) prepare(static_cast<int>(d), place);
    if (plan.threads() > 1) barriers[0].wait();
    for (int64_t d = mine.begin; d < mine.end; ++d) {
      time_loop(static_cast<int>(d), place,
                place.share.count > 1 ? &barriers[place.direction_barrier()] : nullptr,
                place.unit_groups > 1 && !place.helps ? &barriers[place.barrier()] : nullptr);
    }
  }

 private:
  struct Direction {
    InputProduct<T, G> input;
    Weights<T, phase_gates<Cell, 0>> first;
    Weights<T, phase_gates<Cell, F - 1>> second;
    Weights<T, 1> projection;
    Matrix<T> h[2];     // [B,P] h' and the next h
    Matrix<A> c;        // [B,H]
    Matrix<T> operand;  // [B,H] q of a two-phase cell, or m before the projection
  };

  struct Step {
    int64_t t, rows;            // this step
    int64_t t_next, rows_next;  // the step that runs after it; rows_next = 0 after the last
    int slot;                   // where h' is
    typename InputProduct<T, G>::Chunk chunk;
  };

  // Packs this thread's part of the weights and sets the states of its part of the rows.
  void prepare(int d, const Place& place) {
    Direction& s = dir_[d];
    const ForwardDirection<T>& io = p_.dir[d];
    s.input.prepare(place.share);
    const auto pack = [&](auto& w, const T* R, int64_t ldr, const T* b) {
      w.set_rows(R, ldr, b, place.share.of(w.blocks(w.N)));
    };
    pack(s.first, io.R, p_.P, io.b);
    if constexpr (F == 2) {
      const int64_t gate = Cell::first[1] * p_.H;
      pack(s.second, io.R + gate * p_.P, p_.P, io.b ? io.b + gate : nullptr);
    }
    if (projects_) pack(s.projection, io.W_hr, p_.H, nullptr);
    const Range rows = place.share.of(p_.seq.B);
    for (int64_t j = rows.begin; j < rows.end; ++j) set_initial(d, j);
  }

  void set_initial(int d, int64_t j) {
    Direction& s = dir_[d];
    const ForwardDirection<T>& io = p_.dir[d];
    const int64_t b = p_.seq.batch_row(j);
    const bool runs = j < p_.seq.rows_at(0);
    const bool reset = runs && !io.reverse && p_.seq.reset_at(0, j);
    for (int k = 0; k < S; ++k) {
      const int64_t width = state_width(k);
      const T* from = reset ? io.reset[k] : io.initial[k];
      if (from) from += b * width;
      if (!runs) {
        copy_row(from, io.final[k] + b * width, width);
      } else if (k > 0) {
        copy_row(from, s.c.row(j), width);
      } else {
        copy_row(from, s.h[0].row(j), width);
        copy_row(from, s.h[1].row(j), width);
        const int64_t t = io.reverse ? last_step(j) : 0;
        if (io.h_prev) copy_row(from, io.h_prev + p_.seq.data_row(p_.x_rows, t, j) * p_.P, width);
      }
    }
  }

  // A row of a state, converted if it is kept in another type; null: zero.
  template <class To>
  static void copy_row(const T* from, To* to, int64_t width) {
    for (int64_t u = 0; u < width; u += L) {
      const int n = static_cast<int>(minimum(width - u, L));
      store(to + u, from ? load(from + u, n) : P(A(0)), n);
    }
  }

  // The last step at which row j runs.
  int64_t last_step(int64_t j) const {
    int64_t low = 0, high = p_.seq.T;  // active[low] > j, active[high] <= j
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (p_.seq.rows_at(middle) > j ? low : high) = middle;
    }
    return low;
  }

  int64_t state_width(int k) const { return k == 0 ? p_.P : p_.H; }

  // Chunks of x, and their steps. `all`: of the threads that share the direction; `barrier`: of
  // those that share its rows.
  void time_loop(int d, const Place& place, Barrier* all, Barrier* barrier) {
    const InputProduct<T, G>& input = dir_[d].input;
    const int64_t chunks = input.chunks();
    Step step{};
    for (int64_t i = 0; i < chunks; ++i) {
      step.chunk = input.chunk(i);
      if (i == 0 || !place.helped) {
        input.run(step.chunk, place.share);
        if (all) all->wait();
      }
      if (!place.helps) {
        run_chunk(d, step, place, barrier);
      } else if (i + 1 < chunks) {
        input.run(input.chunk(i + 1), kAlone);
      }
      if (all && i + 1 < chunks) all->wait();  // this chunk has been read, the helper's written
    }
  }

  void run_chunk(int d, Step& step, const Place& place, Barrier* barrier) {
    const bool reverse = p_.dir[d].reverse;
    const int64_t T_ = p_.seq.T, steps = step.chunk.end - step.chunk.begin;
    for (int64_t s = 0; s < steps; ++s) {
      step.t = reverse ? step.chunk.end - 1 - s : step.chunk.begin + s;
      step.t_next = reverse ? step.t - 1 : step.t + 1;
      step.rows = p_.seq.rows_at(step.t);
      const bool is_last = step.t_next < 0 || step.t_next == T_;
      step.rows_next = is_last ? 0 : p_.seq.rows_at(step.t_next);
      if (step.rows == 0) continue;
      if constexpr (F == 1) {
        if (!projects_ && one_row_runs_on(p_.seq) && !is_last) {
          const bool ends = reverse ? step.chunk.begin == 0 : step.chunk.end == T_;
          const int64_t count = steps - s - (ends ? 1 : 0);
          run_row(d, step, count, place, barrier);
          step.slot ^= count & 1;
          s += count - 1;
          continue;
        }
      }
      phase<0>(d, step, place);
      if (barrier) barrier->wait();
      if constexpr (F == 2) {
        phase<1>(d, step, place);
        if (barrier) barrier->wait();
      }
      if (projects_) {
        project(d, step, place);
        if (barrier) barrier->wait();
      }
      step.slot ^= 1;
    }
  }

  View view(int d, const Step& step) const {
    const Direction& s = dir_[d];
    const ForwardDirection<T>& io = p_.dir[d];
    View v{};
    v.rows = {p_.seq, p_.x_rows, step.t};
    v.x = s.input.rows(step.chunk, step.t);
    v.c = s.c;
    v.h = s.h[step.slot];
    v.next_h = s.h[step.slot ^ 1];
    v.operand = s.operand;
    if constexpr (!kInPlace) v.gates = v.rows.of(io.x, p_.D * G * p_.H);
    v.saved = v.rows.of(io.saved, K * p_.H);
    v.y = StepRows(p_.seq, p_.y_rows, step.t).of(io.y, p_.D * p_.P);
    if (step.rows_next > 0) {
      v.next_h_prev = StepRows(p_.seq, p_.x_rows, step.t_next).of(io.h_prev, p_.P);
    }
    v.H = p_.H;
    v.t_boundary = maximum(step.t, step.t_next);
    v.rows_next = step.rows_next;
    v.training = p_.training;
    v.projects = projects_;
    v.resets = p_.seq.resets;
    return v;
  }

  template <int phase_index>
  void phase(int d, const Step& step, const Place& place) {
    const Direction& s = dir_[d];
    const View v = view(d, step);
    const auto emit = [&](int64_t j, int64_t u, int n, const A* r) RNNKERN_LAMBDA {
      run_units<phase_index>(d, v, j, v.rows.index(j), u, n, r);
    };
    const auto fetch = [&](int64_t j, int64_t u, int64_t count) RNNKERN_LAMBDA {
      fetch_x<phase_index>(v, v.rows.index(j), u, count);
    };
    if constexpr (phase_index == 0) {
      run_stage(s.first, v.h, place, step.rows, step.rows, step.slot, emit, fetch);
    } else {
      run_stage(s.second, v.operand, place, step.rows, step.rows, step.slot, emit, fetch);
    }
  }

  // `count` steps from `step` on of a call of one row, each of which another one follows. In small
  // layers the way from step to step would otherwise take as long as the products.
  void run_row(int d, const Step& step, int64_t count, const Place& place, Barrier* barrier) {
    const auto& w = dir_[d].first;
    const Range mine = part(w.blocks(w.N), place.unit_group, place.unit_groups);
    const int64_t by = step.t_next - step.t;
    View v = view(d, step);
    for (int64_t i = 0; i < count; ++i) {
      const auto emit = [&](int64_t u, int n, const A* r) RNNKERN_LAMBDA {
        run_units<0>(d, v, 0, i * by, u, n, r);
      };
      const auto fetch = [&](int64_t u, int64_t count)
                             RNNKERN_LAMBDA { fetch_x<0>(v, i * by, u, count); };
      run_row_product(w, v.h.data, mine, emit, fetch, (step.slot + i) % 2 != 0);
      if (barrier) barrier->wait();
      const Matrix<T> h = v.h;
      v.h = v.next_h;
      v.next_h = h;
    }
  }

  // Asks for what a phase will read of a row, units [u, u + count).
  template <int phase_index>
  static RNNKERN_INLINE void fetch_x(const View& v, int64_t row, int64_t u, int64_t count) {
    const A* x = v.x.row(row) + u;
    for (int g = Cell::first[phase_index]; g < Cell::first[phase_index + 1]; ++g) {
      prefetch(x + g * v.H, count);
    }
  }

  // A pack of units at sorted position j, row `row` of the step's data, from their products r on.
  template <int phase_index>
  RNNKERN_INLINE void run_units(int d, const View& v, int64_t j, int64_t row, int64_t u, int n,
                                const A* r) {
    constexpr int g0 = Cell::first[phase_index], g1 = Cell::first[phase_index + 1];
    constexpr bool is_last = phase_index == F - 1;
    const int64_t H = v.H;
    ForwardUnit<Cell, P> unit;
    A* x = v.x.row(row) + u;
    for (int g = 0; g < g1; ++g) unit.gate[g] = load(x + g * H, n);
    for (int g = g0; g < g1; ++g) unit.r[g] = P::load(r + (g - g0) * L);
    if (!Cell::projects) unit.prev[0] = load(v.h.row(j) + u, n);
    if (S == 2) unit.prev[S - 1] = load(v.c.row(j) + u, n);
    Cell::template forward<phase_index>(unit);
    if (!is_last || (kInPlace && v.training)) {
      for (int g = g0; g < g1; ++g) store(x + g * H, unit.gate[g], n);
    }
    if (!kInPlace && v.training) {
      for (int g = g0; g < g1; ++g) store(v.gates.row(row) + g * H + u, unit.gate[g], n);
    }
    if constexpr (!is_last) {
      store(v.operand.row(j) + u, unit.q, n);
    } else {
      if (v.training) {
        for (int k = 0; k < K; ++k) store(v.saved.row(row) + k * H + u, unit.saved[k], n);
      }
      if (S == 2) put_state(d, S - 1, v, j, row, u, n, unit.next[S - 1]);
      if (v.projects) {
        store(v.operand.row(j) + u, unit.next[0], n);
      } else {
        put_state(d, 0, v, j, row, u, n, unit.next[0]);
      }
    }
  }

  void project(int d, const Step& step, const Place& place) {
    const View v = view(d, step);
    run_stage(dir_[d].projection, v.operand, place, step.rows, step.rows, step.slot,
              [&](int64_t j, int64_t u, int n, const A* r)
                  RNNKERN_LAMBDA {
                put_state(d, 0, v, j, v.rows.index(j), u, n, P::load(r));
              });
  }

  // Writes state k (0: h, 1: c) after the step to wherever it is needed next.
  RNNKERN_INLINE void put_state(int d, int k, const View& v, int64_t j, int64_t row, int64_t u,
                                int n, P value) {
    if (k == 0) store(v.y.row(row) + u, value, n);
    if (j >= v.rows_next) {
      store(p_.dir[d].final[k] + p_.seq.batch_row(j) * state_width(k) + u, value, n);
      return;
    }
    if (v.resets && p_.seq.reset_at(v.t_boundary, j)) {
      const T* reset = p_.dir[d].reset[k];
      value = reset ? load(reset + p_.seq.batch_row(j) * state_width(k) + u, n) : P(A(0));
    }
    if (k == 0) {
      store(v.next_h.row(j) + u, value, n);
      if (v.next_h_prev.data) store(v.next_h_prev.row(row) + u, value, n);
    } else {
      store(v.c.row(j) + u, value, n);
    }
  }

  const ForwardProblem<T>& p_;
  const bool projects_;
  int64_t scratch_bytes_ = 0;
  Direction dir_[kMaxDirections];
};

}  // namespace
}  // namespace rnnkern

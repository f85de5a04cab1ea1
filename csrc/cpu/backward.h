// The backward time loop of one layer (backpropagation through time; Werbos 1990).
//
// It visits the steps in the opposite order of forward. One step: the product of the dr that the
// step before left, dh' = Rᵀ dr, completes the gradient of the state between the two steps; that
// gradient enters this step, or leaves the recurrence where the state was a row's initial or reset
// state; dy is added; and the phases run in reverse. One visit more than there are steps hands out
// the gradients of the initial states.
//
// A product reads dr, or dh before a projection, where it lies in the chunk (cpu/gradients.h). Both
// are copied where the chunk has the rows in another order, and dr of a chunk's last step; dr into
// one of two slots, because a group reads the one while it writes the other.
#pragma once

#include "cpu/views.h"

namespace rnnkern {
namespace {

template <class Cell, class T>
class BackwardLoop {
  static constexpr int G = Cell::gates, S = Cell::states, K = Cell::saved, F = Cell::phases;
  static constexpr bool kRecovers = Gradients<Cell, T>::kRecovers;
  static_assert(F == 1 || h_enters_gates<Cell>, "phase 0 adds to dprev[0] of the last phase");
  using A = Accumulator<T>;
  using P = Pack<A>;
  using View = BackwardView<Cell, T>;

 public:
  // Lays the scratch out in `base`; null only measures it (see scratch_bytes).
  BackwardLoop(const CpuBackwardProblem<T>& problem, const Plan& plan, unsigned char* base)
      : p_(problem), projects_(problem.dir[0].W_hr) {
    Carver carver{base};
    const int64_t H = p_.H, B = p_.seq.B;
    for (int d = 0; d < p_.D; ++d) {
      Direction& s = dir_[d];
      const auto transposed = [&](int64_t operand, int64_t units) -> Weights<T, 1> {
        Weights<T, 1> w{operand, units, transposed_data<T>(carver, p_.seq, operand, units)};
        w.one_row = p_.seq.B == 1;
        return w;
      };
      s.first = transposed(phase_gates<Cell, 0> * H, p_.P);
      if (F == 2) s.second = transposed(phase_gates<Cell, F - 1> * H, H);
      if (projects_) s.projection = transposed(p_.P, H);
      s.dr[0] = Matrix<T>::carve(carver, B, phase_gates<Cell, 0> * H);
      s.dr[1] = Matrix<T>::carve(carver, B, phase_gates<Cell, 0> * H);
      s.gradients = {p_, d, plan, carver};
      if (h_enters_gates<Cell>) s.dh_direct = Matrix<A>::carve(carver, B, H);
      if (S == 2) s.dc = Matrix<A>::carve(carver, B, H);
      if (F == 2) s.dh = Matrix<A>::carve(carver, B, H);
      if (s.gradients.in_order()) continue;
      if (F == 2) s.dr_second = Matrix<T>::carve(carver, B, phase_gates<Cell, F - 1> * H);
      if (projects_) s.dh_projected = Matrix<T>::carve(carver, B, p_.P);
    }
    thread_elements_ = dir_[0].gradients.scratch_elements();
    threads_scratch_ = carver.take<A>(plan.threads() * thread_elements_);
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
    w.outputs = 2 * G * p_.H + (projects_ ? p_.P : 0);
    w.inputs = G * p_.H * ((p_.dinput ? 2 : 1) * p_.I + p_.P);
    w.sums = G * p_.H * (p_.I + p_.P);
    w.packs = !few_rows(p_.seq);
    w.blocks = s.first.blocks(p_.P);
    if (F == 2) w.blocks = minimum(w.blocks, s.second.blocks(p_.H));
    if (projects_) w.blocks = minimum(w.blocks, s.projection.blocks(p_.H));
    w.chunks = p_.seq.B == 1 && !p_.seq.active ? s.gradients.chunks() : 1;  // see plan.h
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
    A* scratch = threads_scratch_ + rank * thread_elements_;
    for (int64_t d = mine.begin; d < mine.end; ++d) {
      time_loop(static_cast<int>(d), place, scratch,
                place.share.count > 1 ? &barriers[place.direction_barrier()] : nullptr,
                place.unit_groups > 1 && !place.helps ? &barriers[place.barrier()] : nullptr);
    }
    if (p_.D == 2 && p_.dinput) {
      if (plan.threads() > 1) barriers[0].wait();
      dir_[1].gradients.add_input(rank, plan.threads());
    }
  }

 private:
  struct Direction {
    Gradients<Cell, T> gradients;
    Weights<T, 1> first, second, projection;  // transposed
    Matrix<T> dr[2];                          // [B, gates of phase 0, H] copies
    Matrix<T> dr_second;                      // [B, gates of phase 1, H] copy
    Matrix<T> dh_projected;                   // [B,P] gradient of h before the projection, copy
    Matrix<A> dh_direct;  // [B,H] gradient of h' that does not come through a product
    Matrix<A> dh;         // [B,H] gradient of h, for phase 0 of a two-phase cell
    Matrix<A> dc;         // [B,H]
  };

  struct Step {
    int64_t t, rows;            // this step; rows = 0 in the visit after the last
    int64_t t_prev, rows_prev;  // the step visited before it; rows_prev = 0 in the first visit
    bool copied, copies;        // whether its dr is a copy; whether one is made of this step's
    int slot;                   // where the former is
    typename Gradients<Cell, T>::Chunk chunk;
  };

  void prepare(int d, const Place& place) {
    Direction& s = dir_[d];
    const BackwardDirection<T, A>& io = p_.dir[d];
    const auto pack = [&](Weights<T, 1>& w, const T* R, int64_t ldr) {
      w.set_columns(R, ldr, place.share.of(w.blocks(w.N)));
    };
    if (p_.seq.T > 1 || hands_out(d)) pack(s.first, io.R, p_.P);
    if (F == 2) pack(s.second, io.R + Cell::first[F - 1] * p_.H * p_.P, p_.P);
    if (projects_) pack(s.projection, io.W_hr, p_.H);
    s.gradients.prepare(place.share);
    // A row of length zero hands its final state's gradient through.
    const Range rows = place.share.of(p_.seq.B);
    for (int64_t j = maximum(rows.begin, p_.seq.rows_at(0)); j < rows.end; ++j) {
      for (int k = 0; k < S; ++k) {
        if (!io.dfinal[k] || !io.dinitial[k]) continue;
        const int64_t width = state_width(k), at = p_.seq.batch_row(j) * width;
        std::memcpy(io.dinitial[k] + at, io.dfinal[k] + at, static_cast<size_t>(width) * sizeof(T));
      }
    }
  }

  int64_t state_width(int k) const { return k == 0 ? p_.P : p_.H; }

  // Chunks of steps, each followed by its products, which a helper makes while the next chunk's
  // steps run. `all`: of the threads that share the direction; `barrier`: of those that share its
  // rows.
  void time_loop(int d, const Place& place, A* scratch, Barrier* all, Barrier* barrier) {
    Gradients<Cell, T>& gradients = dir_[d].gradients;
    const auto close = [&](int64_t index, Share share, Barrier* sharers) {
      gradients.close(gradients.chunk(index), share, scratch);
      if (!gradients.ends_piece(index)) return;
      if (sharers) sharers->wait();
      gradients.add_piece(index, share);
    };
    const int64_t chunks = gradients.chunks();
    Step step{};
    step.t = -1;
    for (int64_t i = 0; i < chunks; ++i) {
      if (all && i > 0) all->wait();  // the buffers that this chunk takes have been read
      step.chunk = gradients.chunk(i);
      if (gradients.clears()) {
        gradients.clear(step.chunk, place.share);
        if (all) all->wait();
      }
      if (!place.helps) {
        visit(d, step.chunk.begin, step.chunk.end, step, place, barrier);
      } else if (i > 0) {
        close(i - 1, kAlone, nullptr);
      }
      if (place.helped && i + 1 < chunks) continue;
      if (all) all->wait();
      close(i, place.share, all);
    }
    if (hands_out(d) && !place.helps) visit(d, p_.seq.T, p_.seq.T + 1, step, place, barrier);
  }

  // Whether the state before the first step has a gradient to hand out.
  bool hands_out(int d) const {
    const BackwardDirection<T, A>& io = p_.dir[d];
    return io.dinitial[0] || io.dinitial[1] || io.dreset[0] || io.dreset[1];
  }

  // Visits [begin, end).
  void visit(int d, int64_t begin, int64_t end, Step& step, const Place& place, Barrier* barrier) {
    const bool reverse = p_.dir[d].reverse;
    for (int64_t s = begin; s < end; ++s) {
      step.t_prev = step.t;
      step.rows_prev = step.rows;
      step.copied = step.copies;
      step.copies = s + 1 == end || !dir_[d].gradients.in_order();
      step.t = reverse ? s : p_.seq.T - 1 - s;
      step.rows = s < p_.seq.T ? p_.seq.rows_at(step.t) : 0;
      if (step.rows == 0 && step.rows_prev == 0) continue;
      if constexpr (F == 1) {
        if (!projects_ && one_row_runs_on(p_.seq) && s > begin && s + 1 < end) {
          const int64_t count = end - 1 - s;
          run_row(d, step, count, place, barrier);
          step.t += (count - 1) * (step.t - step.t_prev);
          step.slot ^= count & 1;
          s += count - 1;
          continue;
        }
      }
      if (projects_) {
        enter_projected(d, step, place);
        if (barrier) barrier->wait();
        unproject(d, step, place);
      } else {
        enter(d, step, place);
      }
      if (barrier) barrier->wait();
      if constexpr (F == 2) {
        if (step.rows > 0) {
          first_phase(d, step, place);
          if (barrier) barrier->wait();
        }
      }
      step.slot ^= 1;
    }
  }

  View view(int d, const Step& step) const {
    const Direction& s = dir_[d];
    const BackwardDirection<T, A>& io = p_.dir[d];
    const Sequence& seq = p_.seq;
    View v{};
    v.dh_direct = s.dh_direct;
    v.dh = s.dh;
    v.dc = s.dc;
    v.now = step.rows;
    v.prev = step.rows_prev;
    v.t_prev = maximum(step.t, step.t_prev);
    v.H = p_.H;
    v.resets = seq.resets;
    v.reverse = io.reverse;
    v.projects = projects_;
    if (step.rows == 0) return v;
    v.rows = {seq, p_.x_rows, step.t};
    v.gates = v.rows.of(io.gates, p_.D * G * p_.H);
    v.saved = v.rows.of(io.saved, K * p_.H);
    v.h_prev = v.rows.of(io.h_prev, p_.P);
    v.dy = StepRows(seq, p_.y_rows, step.t).of(io.dy, p_.D * p_.P);
    v.chunk = s.gradients.step(step.chunk, step.t);
    if (step.copies) v.dr = s.dr[step.slot ^ 1];
    v.dr_second = s.dr_second;
    v.dh_projected = s.dh_projected;
    const int64_t before = io.reverse ? step.t + 1 : step.t - 1;
    v.t_before = maximum(step.t, before);
    if (before < 0 || before == seq.T) return v;
    v.before = seq.rows_at(before);
    v.gates_before = StepRows(seq, p_.x_rows, before).of(io.gates, p_.D * G * p_.H);
    return v;
  }

  // dr of phase 0 of the step visited before.
  Matrix<T> dr_before(int d, const Step& step) const {
    const Direction& s = dir_[d];
    if (step.copied || step.rows_prev == 0) return s.dr[step.slot];
    return s.gradients.dr_of(s.gradients.step(step.chunk, step.t_prev).dx, 0);
  }

  // The state gradient that comes out of the step visited before, and this step's last phase.
  void enter(int d, const Step& step, const Place& place) {
    const View v = view(d, step);
    run_stage(
        dir_[d].first, dr_before(d, step), place, v.prev, maximum(v.now, v.prev), step.slot,
        [&](int64_t j, int64_t u, int n, const A* r) RNNKERN_LAMBDA {
          enter_units(d, v, j, v.rows.index(j), u, n, r);
        },
        [&](int64_t j, int64_t u, int64_t count) RNNKERN_LAMBDA {
          if (j < v.now) fetch(v, v.rows.index(j), u, count);
        });
  }

  // `count` visits from `step` on of a call of one row, each of which has another before and after
  // it in its chunk (as ForwardLoop::run_row).
  void run_row(int d, const Step& step, int64_t count, const Place& place, Barrier* barrier) {
    const auto& w = dir_[d].first;
    const Range mine = part(w.blocks(w.N), place.unit_group, place.unit_groups);
    const int64_t by = step.t - step.t_prev;
    const View v = view(d, step);
    const Matrix<T> dr = dir_[d].gradients.dr_of(v.chunk.dx, 0);
    for (int64_t i = 0; i < count; ++i) {
      const auto emit = [&](int64_t u, int n, const A* r) RNNKERN_LAMBDA {
        enter_units(d, v, 0, i * by, u, n, r);
      };
      const auto fetch_row = [&](int64_t u, int64_t count)
                                 RNNKERN_LAMBDA { fetch(v, i * by, u, count); };
      run_row_product(w, dr.row((i - 1) * by), mine, emit, fetch_row, (step.slot + i) % 2 != 0);
      if (barrier) barrier->wait();
    }
  }

  RNNKERN_INLINE void enter_units(int d, const View& v, int64_t j, int64_t row, int64_t u, int n,
                                  const A* r) {
    P dh = P::load(r);
    if (h_enters_gates<Cell> && j < v.prev) dh = dh + load(v.dh_direct.row(j) + u, n);
    dh = flow(d, 0, v, j, u, n, dh);
    const P dc = flow_c(d, v, j, u, n);
    if (j < v.now) last_phase(d, v, j, row, u, n, dh + load_dy(v, row, u, n), dc);
  }

  // Asks for what the last phase will read of a row, units [u, u + count).
  RNNKERN_INLINE void fetch(const View& v, int64_t row, int64_t u, int64_t count) {
    for (int g = 0; g < G; ++g) prefetch(v.gates.row(row) + g * v.H + u, count);
    for (int k = 0; k < K; ++k) prefetch(v.saved.row(row) + k * v.H + u, count);
    if (h_enters_gates<Cell>) prefetch(v.h_prev.row(row) + u, count);
    if (v.dy.data) prefetch(v.dy.row(row) + u, count);
  }

  void enter_projected(int d, const Step& step, const Place& place) {
    const View v = view(d, step);
    run_stage(dir_[d].first, dr_before(d, step), place, v.prev, maximum(v.now, v.prev), step.slot,
              [&](int64_t j, int64_t u, int n, const A* r) RNNKERN_LAMBDA {
                P dh = flow(d, 0, v, j, u, n, P::load(r));
                if (j >= v.now) return;
                const int64_t row = v.rows.index(j);
                dh = dh + load_dy(v, row, u, n);
                store(v.chunk.dh.row(row) + u, dh, n);
                if (v.dh_projected.data) store(v.dh_projected.row(j) + u, dh, n);
              });
  }

  void unproject(int d, const Step& step, const Place& place) {
    const View v = view(d, step);
    const Matrix<T> dh = v.dh_projected.data || step.rows == 0 ? v.dh_projected : v.chunk.dh;
    run_stage(dir_[d].projection, dh, place, v.now, maximum(v.now, v.prev), step.slot,
              [&](int64_t j, int64_t u, int n, const A* r) RNNKERN_LAMBDA {
                const P dc = flow_c(d, v, j, u, n);
                if (j < v.now) last_phase(d, v, j, v.rows.index(j), u, n, P::load(r), dc);
              });
  }

  static RNNKERN_INLINE P load_dy(const View& v, int64_t row, int64_t u, int n) {
    return v.dy.data ? load(v.dy.row(row) + u, n) : P(A(0));
  }

  RNNKERN_INLINE P flow_c(int d, const View& v, int64_t j, int64_t u, int n) {
    if (S < 2) return P(A(0));
    return flow(d, S - 1, v, j, u, n, j < v.prev ? load(v.dc.row(j) + u, n) : P(A(0)));
  }

  // Where the gradient of the state before step t_prev goes; returns what enters step t.
  RNNKERN_INLINE P flow(int d, int k, const View& v, int64_t j, int64_t u, int n, P value) {
    const bool row_begins = j >= v.now;  // the step visited before was its first in forward's order
    if (j < v.prev && !row_begins && !v.resets) return value;
    const BackwardDirection<T, A>& io = p_.dir[d];
    const int64_t at = p_.seq.batch_row(j) * state_width(k) + u;
    if (j >= v.prev) return io.dfinal[k] ? load(io.dfinal[k] + at, n) : P(A(0));
    const int64_t boundary = row_begins ? 0 : v.t_prev;
    if (!(row_begins && v.reverse) && p_.seq.reset_at(boundary, j)) {
      A* dreset = io.dreset[k];
      if (dreset) store(dreset + at, load(dreset + at, n) + value, n);
      return P(A(0));
    }
    if (!row_begins) return value;
    if (io.dinitial[k]) store(io.dinitial[k] + at, value, n);
    return P(A(0));
  }

  RNNKERN_INLINE void last_phase(int d, const View& v, int64_t j, int64_t row, int64_t u, int n,
                                 P dh, P dc) {
    BackwardUnit<Cell, P> unit = load_unit(v, row, u, n);
    unit.dnext[0] = dh;
    if (S == 2) unit.dnext[S - 1] = dc;
    Cell::template backward<F - 1>(unit);
    if (v.chunk.extra.data) store(v.chunk.extra.row(row) + u, unit.extra, n);
    if constexpr (kRecovers) {
      if (!v.projects) {
        store(v.chunk.h_prev.row(row) + u, recover(d, v, j, row, u, n, unit.saved), n);
      }
    }
    if (F == 2) store(v.dh.row(j) + u, dh, n);
    store_gradients<F - 1>(v, j, row, u, n, unit);
  }

  // h' of a step: what forward's put_state, or set_initial, let it start from.
  RNNKERN_INLINE P recover(int d, const View& v, int64_t j, int64_t row, int64_t u, int n,
                           const P* saved) {
    const bool begins = j >= v.before;
    const bool reset = v.resets && !(begins && v.reverse) && p_.seq.reset_at(v.t_before, j);
    if (begins || reset) {
      const T* from = reset ? p_.dir[d].reset_h : p_.dir[d].h0;
      return from ? load(from + p_.seq.batch_row(j) * p_.P + u, n) : P(A(0));
    }
    P gate[G];
    for (int g = 0; g < G; ++g) gate[g] = load(v.gates_before.row(row) + g * v.H + u, n);
    return Cell::recover(gate, saved);
  }

  // Phase 0 of a two-phase cell.
  void first_phase(int d, const Step& step, const Place& place) {
    const Direction& s = dir_[d];
    const View v = view(d, step);
    const Matrix<T> dr = v.dr_second.data ? v.dr_second : s.gradients.dr_of(v.chunk.dx, F - 1);
    run_stage(s.second, dr, place, v.now, v.now, step.slot,
              [&](int64_t j, int64_t u, int n, const A* r) RNNKERN_LAMBDA {
                const int64_t row = v.rows.index(j);
                BackwardUnit<Cell, P> unit = load_unit(v, row, u, n);
                unit.dnext[0] = load(v.dh.row(j) + u, n);
                unit.dprev[0] = load(v.dh_direct.row(j) + u, n);
                if (S == 2) unit.dprev[S - 1] = load(v.dc.row(j) + u, n);
                unit.dq = P::load(r);
                Cell::template backward<0>(unit);
                store_gradients<0>(v, j, row, u, n, unit);
              });
  }

  static RNNKERN_INLINE BackwardUnit<Cell, P> load_unit(const View& v, int64_t row, int64_t u,
                                                        int n) {
    BackwardUnit<Cell, P> unit;
    for (int g = 0; g < G; ++g) unit.gate[g] = load(v.gates.row(row) + g * v.H + u, n);
    for (int k = 0; k < K; ++k) unit.saved[k] = load(v.saved.row(row) + k * v.H + u, n);
    if (h_enters_gates<Cell>) unit.h_prev = load(v.h_prev.row(row) + u, n);
    return unit;
  }

  template <int phase>
  static RNNKERN_INLINE void store_gradients(const View& v, int64_t j, int64_t row, int64_t u,
                                             int n, const BackwardUnit<Cell, P>& unit) {
    constexpr int g0 = Cell::first[phase], g1 = Cell::first[phase + 1];
    using Chunk = Gradients<Cell, T>;
    const int64_t H = v.H;
    T* dx = v.chunk.dx.row(row) + u;
    for (int g = g0; g < g1; ++g) store(dx + Chunk::dx_column(g) * H, unit.dx[g], n);
    if (Chunk::kOwnDr) store(dx + G * H, unit.extra, n);
    const Matrix<T>& copy = phase == 0 ? v.dr : v.dr_second;
    if (copy.data) {
      for (int g = g0; g < g1; ++g) store(copy.row(j) + (g - g0) * H + u, unit.dr[g], n);
    }
    if constexpr (h_enters_gates<Cell>) store(v.dh_direct.row(j) + u, unit.dprev[0], n);
    if (S == 2) store(v.dc.row(j) + u, unit.dprev[S - 1], n);
  }

  const CpuBackwardProblem<T>& p_;
  const bool projects_;
  int64_t scratch_bytes_ = 0, thread_elements_ = 0;
  A* threads_scratch_ = nullptr;
  Direction dir_[kMaxDirections];
};

}  // namespace
}  // namespace rnnkern

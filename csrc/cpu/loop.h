// What the forward and the backward time loop share: scratch memory, and a thread's place in the
// plan.
#pragma once

#include "core/cell.h"
#include "core/problem.h"
#include "cpu/plan.h"
#include "cpu/team.h"
#include "cpu/weights.h"

namespace rnnkern {
namespace {

// n elements, rounded up to whole cache lines.
template <class T>
int64_t whole_lines(int64_t n) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  return (n + line - 1) / line * line;
}

// Cuts one allocation into arrays. Without memory it only counts, so that the same code first
// measures and then places.
struct Carver {
  unsigned char* base;
  int64_t used = 0;  // bytes

  template <class T>
  T* take(int64_t n) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += whole_lines<T>(n) * static_cast<int64_t>(sizeof(T));
    return p;
  }
};

// Rows of `ld` elements in a run's scratch: of a state or a chunk, or some that lie in one.
template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t ld = 0;

  static Matrix carve(Carver& carver, int64_t rows, int64_t width) {
    Matrix m;
    m.ld = whole_lines<T>(width);
    m.data = carver.take<T>(rows * m.ld);
    return m;
  }
  T* row(int64_t j) const { return data + j * ld; }
};

// The rows of one step in data, for the inner loops: a store of a vector there may change whatever
// is not a local variable, as the compiler sees it, so the way to a row must not lead through the
// problem each time. Of a single row the neighbours are its other steps.
struct StepRows {
  const int64_t* order = nullptr;  // row at a sorted position; null: the identity
  int64_t first = 0, distance = 0;

  StepRows() = default;
  StepRows(const Sequence& seq, const Rows& rows, int64_t t)
      : order(seq.offset ? nullptr : seq.order),
        first(seq.offset ? seq.offset[t] : t * rows.stride_t),
        distance(seq.offset   ? 1
                 : seq.B == 1 ? rows.stride_t
                              : rows.stride_b) {}

  RNNKERN_INLINE int64_t index(int64_t j) const { return order ? order[j] : j; }
  // Those of a buffer of `width` elements a row, to be asked for by index; of null: null.
  template <class T>
  Matrix<T> of(T* data, int64_t width) const {
    return {data ? data + first * width : nullptr, distance * width};
  }
};

// Whether every step runs the same one row, and nothing happens between two steps.
inline bool one_row_runs_on(const Sequence& seq) {
  return seq.B == 1 && !seq.active && !seq.offset && !seq.order && !seq.resets;
}

// A call of no more rows, all steps together, is one chunk, and so reads its input weights once.
// Where each thread has blocks of them, it packs them in pieces, just before it multiplies by them.
constexpr int64_t kOneChunkRows = 128;
inline bool is_one_chunk(const Sequence& seq) {
  return !few_rows(seq) && seq.T * seq.B <= kOneChunkRows;
}

// Where a transposed matrix is packed; null where the products read it as it is.
template <class T>
Accumulator<T>* transposed_data(Carver& carver, const Sequence& seq, int64_t operand,
                                int64_t units) {
  if (few_rows(seq)) return nullptr;
  return carver.take<Accumulator<T>>(Weights<T, 1>::size(operand, units));
}

// A thread's share of what several do together.
struct Share {
  int index, count;
  RNNKERN_INLINE Range of(int64_t n) const { return part(n, index, count); }
};
constexpr Share kAlone{0, 1};

// A thread's place: its group of directions, and unless it is a helper, every row_groups-th row and
// its part of every product's blocks of units. Rows are dealt out in turn because the sorted order
// puts the long ones first.
struct Place {
  int direction_group, direction_groups, row_group, row_groups, unit_group, unit_groups;
  Share share;  // among all threads of the direction group
  bool helped;  // the group has a helper
  bool helps;   // this is it

  Place(const Plan& plan, int rank)
      : direction_groups(plan.direction_groups),
        row_groups(plan.row_groups),
        unit_groups(plan.unit_groups),
        helped(plan.helpers > 0) {
    share = {rank % plan.group_threads(), plan.group_threads()};
    direction_group = rank / share.count;
    row_group = share.index / unit_groups;
    unit_group = share.index % unit_groups;
    helps = row_group == row_groups;
  }
  int64_t rows(int64_t n) const {
    if (row_groups == 1) return n;
    return n > row_group ? (n - row_group + row_groups - 1) / row_groups : 0;
  }
  int64_t sorted_row(int64_t m) const { return m * row_groups + row_group; }
  // Barrier 0 is the whole team's; then come those of the direction groups, and then one for every
  // group of threads that exchange states.
  int direction_barrier() const { return 1 + direction_group; }
  int barrier() const { return 1 + direction_groups + direction_group * row_groups + row_group; }
};

// One product over this thread's rows and units; emit and fetch get the sorted row.
template <class T, int NG, class Emit, class Fetch = FetchNothing>
RNNKERN_INLINE void run_stage(const Weights<T, NG>& w, const Matrix<T>& operand, const Place& place,
                              int64_t product_rows, int64_t rows, bool downwards, Emit&& emit,
                              Fetch&& fetch = {}) {
  const Range mine = part(w.blocks(w.N), place.unit_group, place.unit_groups);
  run_product(
      w, operand.row(place.row_group), operand.ld * place.row_groups, place.rows(product_rows),
      place.rows(rows), mine,
      [&](int64_t m, int64_t u, int lanes, const Accumulator<T>* r) RNNKERN_LAMBDA {
        emit(place.sorted_row(m), u, lanes, r);
      },
      [&](int64_t m, int64_t u, int64_t count)
          RNNKERN_LAMBDA { fetch(place.sorted_row(m), u, count); },
      downwards);
}

// The product of the single row `a`, without what only more rows need; emit and fetch get no row.
template <class T, int NG, class Emit, class Fetch>
RNNKERN_INLINE void run_row_product(const Weights<T, NG>& w, const T* a, Range mine, Emit&& emit,
                                    Fetch&& fetch, bool downwards) {
  using W = Weights<T, NG>;
  using A = Accumulator<T>;
  alignas(64) A out[W::NU * NG * W::L];
  const int64_t N = w.N, by = downwards ? -W::NU : W::NU;
  const int64_t groups = (mine.end - mine.begin + W::NU - 1) / W::NU;
  int64_t first = mine.begin + (downwards ? (groups - 1) * W::NU : 0);
  for (int64_t g = 0; g < groups; ++g, first += by) {
    const int64_t count = minimum(W::NU, mine.end - first);
    fetch(first * W::L, minimum(count * W::L, N - first * W::L));
    w.multiply(a, 0, 1, first, count, out, nullptr);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t u = (first + i) * W::L;
      const A* r = out + i * NG * W::L;
      if (N - u >= W::L) {
        emit(u, W::L, r);
      } else {
        emit(u, static_cast<int>(N - u), r);
      }
    }
  }
}

}  // namespace
}  // namespace rnnkern

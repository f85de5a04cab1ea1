// The gradients of one direction's input and weights, a chunk of steps at a time:
//
//   dinput = dx·W,  dW = Σ dxᵀ·input,  dR = Σ drᵀ·h',  db = Σ dx and Σ dr,  dW_hr = Σ dhᵀ·m
//
// The time loop writes dx of a chunk (and what else its cell hands out, see Extra; and h' if it is
// recovered) into small buffers, and these products read them while they are in cache; nothing of
// them grows with T. The sums run over the chunks in the order of the loop, and chunks depend on
// the sizes alone, so the results do not depend on the number of threads.
//
// dr is dx, but for the last gate of a cell that hands out a dr of its own for it. Such a cell has
// the columns  dx_last dx_0 .. dr_last,  so that both dx and dr stand side by side.
#pragma once

#include "cpu/loop.h"
#include "cpu/outer.h"

namespace rnnkern {
namespace {

template <class Cell, class T>
class Gradients {
  using A = Accumulator<T>;
  using Factor = OuterFactor<T>;
  using Part = OuterPart<T, A>;
  static constexpr int G = Cell::gates, L = Pack<A>::lanes;
  // A chunk: rows enough to pay for going through the sums, few enough for the cache.
  // A call of one row takes the fewest, so that a helper can work one chunk behind.
  static constexpr int64_t kChunkBytes = 512 << 10, kLeastRows = 128, kMostRows = 256;
  // More chunks than this are summed in pieces, so that the rounding error does not grow with their
  // number.
  static constexpr int64_t kPiece = 64;

 public:
  static constexpr bool kRecovers = Cell::recovers && std::is_same_v<T, A>;  // h', unprojected
  static constexpr bool kOwnDr = Cell::extra == Extra::recurrent_gradient;
  static_assert(!kOwnDr || Cell::phases == 1, "dr of all gates stands side by side");
  // In units of H: where in a row of the chunk dx of a gate is, and where dr of a phase begins.
  static constexpr int dx_column(int gate) { return kOwnDr ? (gate + 1) % G : gate; }
  static constexpr int dr_column(int phase) { return kOwnDr ? 1 : Cell::first[phase]; }

  Gradients() = default;
  Gradients(const CpuBackwardProblem<T>& p, int d, const Plan& plan, Carver& carver)
      : p_(&p), io_(&p.dir[d]) {
    const int64_t B = p.seq.B, bytes = G * p.H * static_cast<int64_t>(sizeof(T));
    const int64_t most_rows = B == 1 ? kLeastRows : kMostRows;
    steps_ = clamp(clamp(kChunkBytes / bytes, kLeastRows, most_rows) / B, 1, p.seq.T);
    buffers_ = 1 + plan.helpers;
    const int64_t rows = buffers_ * steps_ * B;
    dx_ = Matrix<T>::carve(carver, rows, (G + kOwnDr) * p.H);
    if (has_extra()) extra_ = Matrix<T>::carve(carver, rows, p.H);
    if (kRecovers && !io_->W_hr) h_prev_ = Matrix<T>::carve(carver, rows, p.H);
    if (io_->W_hr) dh_ = Matrix<T>::carve(carver, rows, p.P);
    if (p.dinput) {
      W_ = {G * p.H, p.I};
      if (kOwnDr) W_.first_row = (G - 1) * p.H;
      in_pieces_ = is_one_chunk(p.seq) && W_.blocks(p.I) >= plan.threads();
      if (!in_pieces_) W_.data = transposed_data<T>(carver, p.seq, G * p.H, p.I);
      dinput_ = d == 0 ? p.dinput : carver.take<T>(p.seq.data_rows() * p.I);
    }
    sums_ = io_->sums;
    if (p.seq.T > kPiece * steps_) {
      for_each_sum([&](A*& piece, A*, int64_t count) { piece = carver.take<A>(count); });
    }
  }

  // Each thread's scratch: for a piece of W, and after it for the sums.
  int64_t scratch_elements() const {
    const bool extra = Cell::extra == Extra::operand || io_->W_hr;
    const auto panels = [](int64_t I) { return Outer<T>::panels(I); };
    const int64_t sums = Outer<T>::scratch_elements(
        steps_ * p_->seq.B, panels(p_->I) + panels(p_->P) + (extra ? panels(p_->H) : 0));
    return whole_lines<A>(maximum(sums, in_pieces_ ? W_.piece_size(G * p_->H, p_->I) : 0));
  }

  RNNKERN_INLINE bool has_extra() const {
    return Cell::extra == Extra::operand || (Cell::extra == Extra::output && io_->W_hr);
  }

  // This thread's part of what comes before the first chunk.
  void prepare(Share share) {
    if (p_->dinput && !in_pieces_) {
      W_.set_columns(io_->W, p_->I, share.of(W_.blocks(p_->I)));
    }
  }

  // Whether a chunk has steps that no row runs, and so must be cleared before it is written.
  bool clears() const { return p_->seq.active && !p_->seq.offset; }

  // `count` rows of steps from the loop's step `begin` to before `end`, and the buffers for them.
  struct Chunk {
    int64_t index, begin, end, count;
    Rows local;  // rows of the buffers, from `first` on
    int64_t first;
    RowMap rows;  // where the chunk's rows are among all data
    Matrix<T> dx, extra, h_prev, dh;
  };
  int64_t chunks() const { return (p_->seq.T + steps_ - 1) / steps_; }
  // In the order of the time loop; two neighbours exist at once only with a helper.
  Chunk chunk(int64_t index) const {
    const Sequence& seq = p_->seq;
    Chunk c{};
    c.index = index;
    c.begin = index * steps_;
    c.end = minimum(seq.T, c.begin + steps_);
    const int64_t steps = c.end - c.begin, t = io_->reverse ? c.begin : seq.T - c.end;
    c.local = p_->x_rows;
    if (seq.offset) {
      const int64_t last = t + steps - 1;
      c.rows = {seq.offset[t], 1, 1, 0};
      c.count = seq.offset[last] + seq.rows_at(last) - c.rows.first;
    } else {
      c.count = steps * seq.B;
      if (p_->x_rows.stride_b == 1) {
        c.rows = {t * seq.B, 1, 1, 0};
      } else {  // batch-major
        c.local.stride_b = steps;
        c.rows = {t, steps, p_->x_rows.stride_b, 1};
      }
    }
    c.first = seq.offset ? c.rows.first : t * c.local.stride_t;
    const int64_t row = index % buffers_ * steps_ * seq.B;
    const auto from = [&](const Matrix<T>& m) {
      return Matrix<T>{m.data ? m.row(row) : nullptr, m.ld};
    };
    c.dx = from(dx_);
    c.extra = from(extra_);
    c.h_prev = from(h_prev_);
    c.dh = from(dh_);
    return c;
  }

  // Clears this thread's part of a chunk.
  void clear(const Chunk& c, Share share) const {
    const Range mine = share.of(c.count);
    const auto clear = [&](const Matrix<T>& m) {
      const int64_t elements = (mine.end - mine.begin) * m.ld;
      if (m.data) std::memset(m.row(mine.begin), 0, static_cast<size_t>(elements) * sizeof(T));
    };
    clear(c.dx);
    clear(c.extra);
    clear(c.h_prev);
    clear(c.dh);
  }

  // The rows of a step of a chunk.
  struct StepOfChunk {
    Matrix<T> dx, extra, h_prev, dh;
  };
  StepOfChunk step(const Chunk& c, int64_t t) const {
    StepRows rows(p_->seq, c.local, t);
    rows.first -= c.first;
    const auto of = [&](const Matrix<T>& m) { return rows.of(m.data, m.ld); };
    return {of(c.dx), of(c.extra), of(c.h_prev), of(c.dh)};
  }
  // dr of a phase among the columns of dx.
  Matrix<T> dr_of(const Matrix<T>& dx, int phase) const {
    return {dx.data + dr_column(phase) * p_->H, dx.ld};
  }

  // Whether the chunk has the rows of a step in sorted order.
  bool in_order() const { return p_->seq.offset || !p_->seq.order; }

  // This thread's part of the products of a chunk.
  void close(const Chunk& c, Share share, A* scratch) const {
    if (p_->dinput) multiply(c, share, scratch);
    const int64_t H = p_->H, gates = G * H;
    const WeightGradients<A>& s = sums_;
    const RowMap of_chunk{0, 1, 1, 0};
    const Factor h_prev = c.h_prev.data ? Factor{p_->H, c.h_prev.data, c.h_prev.ld, of_chunk}
                                        : Factor{p_->P, io_->h_prev, p_->P, c.rows};
    OuterProblem<T, A> sums{
        c.count, c.index % kPiece != 0, {{p_->I, p_->input, p_->I, c.rows}, h_prev}, {}};
    // What belongs to the last gates, from `last` on, may have a factor of its own.
    const int64_t last = kOwnDr                          ? gates - H
                         : Cell::extra == Extra::operand ? Cell::first[Cell::phases - 1] * H
                                                         : gates;
    const auto from = [&](A* p, int64_t columns) { return p ? p + last * columns : nullptr; };
    A *last_dW = from(s.dW, p_->I), *last_dR = from(s.dR, p_->P);
    A *last_db_ih = from(s.db_ih, 1), *last_db_hh = from(s.db_hh, 1);
    const T *dx = c.dx.data + dx_column(0) * H, *dx_last = kOwnDr ? c.dx.data : c.dx.data + last;
    sums.part[0] = {last, dx, c.dx.ld, {s.dW, s.dR}, {s.db_ih, s.db_hh}};
    Part dx_of_last{gates - last, dx_last, c.dx.ld, {last_dW}, {last_db_ih}};
    const Factor extra{H, c.extra.data, c.extra.ld, of_chunk};
    if (kOwnDr) {
      sums.part[1] = dx_of_last;
      sums.part[2] = {H, c.dx.data + gates, c.dx.ld, {nullptr, last_dR}, {last_db_hh}};
    } else if (Cell::extra == Extra::operand) {
      sums.b[2] = extra;
      dx_of_last.out[2] = last_dR;
      dx_of_last.sum[1] = last_db_hh;
      sums.part[1] = dx_of_last;
    } else if (Cell::extra == Extra::output && io_->W_hr) {
      sums.b[2] = extra;
      sums.part[1] = {p_->P, c.dh.data, c.dh.ld, {nullptr, nullptr, s.dW_hr}, {}};
    }
    Outer<T>::run(sums, scratch, share.index, share.count);
  }

  // Whether the sums of a piece are complete after chunk `index`; then add_piece adds them up.
  bool ends_piece(int64_t index) const {
    return chunks() > kPiece && ((index + 1) % kPiece == 0 || index + 1 == chunks());
  }
  void add_piece(int64_t index, Share share) {
    for_each_sum([&](A* piece, A* out, int64_t count) {
      const Range mine = share.of(count);
      for (int64_t i = mine.begin; i < mine.end; ++i)
        out[i] = index < kPiece ? piece[i] : out[i] + piece[i];
    });
  }

  // Adds what the second direction gave for the input; by every thread of the team.
  void add_input(int rank, int size) const {
    const Range mine = part(p_->seq.data_rows() * p_->I, rank, size);
    for (int64_t i = mine.begin; i < mine.end; i += L) {
      const int n = static_cast<int>(minimum(mine.end - i, L));
      store(p_->dinput + i, load(p_->dinput + i, n) + load(dinput_ + i, n), n);
    }
  }

 private:
  void multiply(const Chunk& c, Share share, A* scratch) const {
    const int64_t blocks = W_.blocks(p_->I);
    const bool split_rows = !in_pieces_ && (c.count >= 8 * share.count || blocks < share.count);
    const Range all{0, blocks};
    const Range mine = split_rows ? all : share.of(blocks);
    const Range rows = split_rows ? share.of(c.count) : Range{0, c.count};
    const int64_t n = rows.end - rows.begin, at_once = in_pieces_ ? decltype(W_)::NU : blocks;
    for (int64_t block = mine.begin; block < mine.end; block += at_once) {
      const Range units{block, minimum(block + at_once, mine.end)};
      Weights<T, 1> w = W_;
      if (in_pieces_) {
        w = W_.piece(scratch, block);
        w.set_columns(io_->W, p_->I, units);
      }
      run_product(
          w, c.dx.row(rows.begin), c.dx.ld, n, n, units,
          [&](int64_t m, int64_t u, int lanes, const A* r) RNNKERN_LAMBDA {
            T* to = dinput_ + c.rows.at(rows.begin + m) * p_->I + u;
            store(to, Pack<A>::load(r), lanes);
          },
          FetchNothing{});
    }
  }

  // Calls visit(sum of the present piece, its place in the results, elements) for each sum that is
  // asked for.
  template <class Visit>
  void for_each_sum(Visit&& visit) {
    const int64_t gates = G * p_->H;
    const WeightGradients<A>& out = io_->sums;
    if (out.dW) visit(sums_.dW, out.dW, gates * p_->I);
    if (out.dR) visit(sums_.dR, out.dR, gates * p_->P);
    if (out.db_ih) visit(sums_.db_ih, out.db_ih, gates);
    if (out.db_hh) visit(sums_.db_hh, out.db_hh, gates);
    if (out.dW_hr) visit(sums_.dW_hr, out.dW_hr, p_->P * p_->H);
  }

  const CpuBackwardProblem<T>* p_ = nullptr;
  const BackwardDirection<T, A>* io_ = nullptr;
  Weights<T, 1> W_;         // transposed
  bool in_pieces_ = false;  // see is_one_chunk
  // [rows of all buffers, G·H or (see above) (G + 1)·H], [.., H], [.., H], [.., P]
  Matrix<T> dx_, extra_, h_prev_, dh_;
  T* dinput_ = nullptr;
  WeightGradients<A> sums_{};  // of the present piece
  int64_t steps_ = 0, buffers_ = 1;
};

}  // namespace
}  // namespace rnnkern

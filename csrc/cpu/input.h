// The input product of one direction, x = W·input + b, a chunk of steps at a time: the time loop
// reads a chunk while it is still in cache, and a helper, if the plan has one, makes the next one
// meanwhile. Training overwrites x with the activated gates, which it keeps; otherwise, and where
// gates are kept in a narrower type, nothing of x outlives its chunk. In a call of few rows W is
// packed in pieces (see is_one_chunk).
#pragma once

#include <type_traits>

#include "cpu/loop.h"

namespace rnnkern {
namespace {

template <class T, int G>
class InputProduct {
  using A = Accumulator<T>;
  using W = Weights<T, G>;
  // A chunk of x: what stays in cache beside the weights, but rows enough to pay for reading W
  // again; more of them where W does not stay in L2 and they do, or W is larger by far.
  static constexpr int64_t kChunkBytes = 256 << 10, kLeastRows = 48, kLeastRowsFar = 256;
  static constexpr int64_t kFarBytes = 8 << 20;
  static constexpr int64_t kRowsOfOne = 64;  // of a call of one row, which may have a helper

 public:
  InputProduct() = default;
  InputProduct(const ForwardProblem<T>& p, int d, const Plan& plan, Carver& carver)
      : p_(&p),
        io_(&p.dir[d]),
        in_pieces_(is_one_chunk(p.seq) && W::blocks(p.H) >= plan.threads()),
        piece_size_(whole_lines<A>(W::piece_size(p.I, p.H))) {
    const int64_t bytes = G * p.H * static_cast<int64_t>(sizeof(A));
    const int64_t W_bytes = G * p.H * p.I * static_cast<int64_t>(sizeof(T));
    const bool far =
        W_bytes > kFarBytes || (W_bytes > l2_bytes() && kLeastRowsFar * bytes <= l2_bytes());
    const int64_t least = far ? kLeastRowsFar : kLeastRows;
    const int64_t rows = is_one_chunk(p.seq)    ? kOneChunkRows
                         : p.seq.B == 1 && !far ? kRowsOfOne
                                                : maximum(kChunkBytes / bytes, least);
    steps_ = clamp(rows / p.seq.B, 1, p.seq.T);
    w_ = {p.I, p.H};
    if (!few_rows(p.seq)) {
      w_.data = carver.take<A>(in_pieces_ ? plan.threads() * piece_size_ : W::size(p.I, p.H));
    }
    rows_ = p.x_rows;
    if constexpr (std::is_same_v<T, A>) in_place_ = p.training;
    if (in_place_) {
      ld_ = p.D * G * p.H;
      if constexpr (std::is_same_v<T, A>) x_ = io_->x;
    } else {
      if (batch_major()) rows_.stride_b = steps_;
      ld_ = whole_lines<A>(G * p.H);
      buffers_ = 1 + plan.helpers;
      x_ = carver.take<A>(buffers_ * steps_ * p.seq.B * ld_);
    }
  }

  // Steps [begin, end), and where x of them is: its rows from `first` on.
  struct Chunk {
    int64_t begin = 0, end = 0, first = 0;
    A* x = nullptr;
  };
  int64_t chunks() const { return (p_->seq.T + steps_ - 1) / steps_; }
  // In the order of the time loop; two neighbours exist at once only with a helper.
  Chunk chunk(int64_t index) const {
    const int64_t T_ = p_->seq.T, s = index * steps_, e = minimum(T_, s + steps_);
    Chunk c{io_->reverse ? T_ - e : s, io_->reverse ? T_ - s : e, 0, x_};
    if (in_place_) return c;
    c.first = first_row(c.begin);
    c.x += index % buffers_ * steps_ * p_->seq.B * ld_;
    return c;
  }

  // The rows of x at step t of a chunk: G gates, H elements apart.
  Matrix<A> rows(const Chunk& chunk, int64_t t) const {
    StepRows rows(p_->seq, rows_, t);
    rows.first -= chunk.first;
    return rows.of(chunk.x, ld_);
  }

  // Packs this thread's part of W, unless that is done in pieces.
  void prepare(Share share) {
    if (!in_pieces_) pack(w_, share.of(W::blocks(p_->H)));
  }

  // Computes this thread's part of a chunk: its units, or its rows if threads outnumber the blocks.
  void run(const Chunk& chunk, Share share) const {
    const Sequence& seq = p_->seq;
    const int64_t begin = chunk.begin, end = chunk.end, start = first_row(begin);
    const int64_t blocks = W::blocks(p_->H);
    const bool split_units = blocks >= share.count;
    const Range mine = split_units ? share.of(blocks) : Range{0, blocks};
    const auto multiply = [&](const W& w, Range units, int64_t row, int64_t count, A* x) {
      const Range rows = split_units ? Range{0, count} : share.of(count);
      const int64_t n = rows.end - rows.begin;
      x += rows.begin * ld_;
      run_product(
          w, p_->input + (row + rows.begin) * p_->I, p_->I, n, n, units,
          [&](int64_t m, int64_t u, int lanes, const A* r) RNNKERN_LAMBDA {
            A* to = x + m * ld_ + u;
            for (int g = 0; g < G; ++g)
              store(to + g * p_->H, Pack<A>::load(r + g * Pack<A>::lanes), lanes);
          },
          FetchNothing{});
    };
    const int64_t last = end - 1;
    const int64_t stop = seq.offset ? seq.offset[last] + seq.rows_at(last) : end * seq.B;
    const int64_t at_once = in_pieces_ || batch_major() ? W::NU : blocks;
    for (int64_t block = mine.begin; block < mine.end; block += at_once) {
      const Range units{block, minimum(block + at_once, mine.end)};
      W w = w_;
      if (in_pieces_) {
        w = w_.piece(w_.data + share.index * piece_size_, block);
        pack(w, units);
      }
      if (!batch_major()) {
        multiply(w, units, start, stop - start, chunk.x + (start - chunk.first) * ld_);
        continue;
      }
      for (int64_t b = 0; b < seq.B; ++b) {
        A* x = chunk.x + (b * rows_.stride_b + begin - chunk.first) * ld_;
        multiply(w, units, b * p_->x_rows.stride_b + begin, end - begin, x);
      }
    }
  }

 private:
  // Steps of a row are neighbours, not rows of a step.
  bool batch_major() const { return !p_->seq.offset && p_->x_rows.stride_b != 1; }
  int64_t first_row(int64_t t) const {
    return p_->seq.offset ? p_->seq.offset[t] : t * rows_.stride_t;
  }
  void pack(W& w, Range blocks) const { w.set_rows(io_->W, p_->I, io_->b_ih, blocks); }

  const ForwardProblem<T>* p_ = nullptr;
  const ForwardDirection<T>* io_ = nullptr;
  bool in_pieces_ = false;  // see is_one_chunk
  int64_t piece_size_ = 0;
  W w_;          // its data: all of W, or a piece for each thread
  Rows rows_{};  // of x, as stored
  A* x_ = nullptr;
  bool in_place_ = false;  // x_ is the problem's x
  int64_t ld_ = 0, steps_ = 0, buffers_ = 1;
};

}  // namespace
}  // namespace rnnkern

// The input product of one direction, x = W·input + b, a chunk of steps at a time: the time loop
// reads a chunk while it is still in cache. Training overwrites x with the activated gates, which
// it keeps; otherwise, and where gates are kept in a narrower type, nothing of x outlives its
// chunk. In a call of few rows W is packed in pieces (see is_one_chunk).
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

 public:
  InputProduct() = default;
  InputProduct(const ForwardProblem<T>& p, int d, int threads, Carver& carver)
      : p_(&p),
        io_(&p.dir[d]),
        in_pieces_(is_one_chunk(p.seq) && W::blocks(p.H) >= threads),
        piece_size_(whole_lines<A>(W::piece_size(p.I, p.H))) {
    const int64_t bytes = G * p.H * static_cast<int64_t>(sizeof(A));
    const int64_t W_bytes = G * p.H * p.I * static_cast<int64_t>(sizeof(T));
    const bool far =
        W_bytes > kFarBytes || (W_bytes > l2_bytes() && kLeastRowsFar * bytes <= l2_bytes());
    const int64_t least = far ? kLeastRowsFar : kLeastRows;
    const int64_t rows = is_one_chunk(p.seq) ? kOneChunkRows : maximum(kChunkBytes / bytes, least);
    steps_ = clamp(rows / p.seq.B, 1, p.seq.T);
    w_ = {p.I, p.H};
    if (!few_rows(p.seq)) {
      w_.data = carver.take<A>(in_pieces_ ? threads * piece_size_ : W::size(p.I, p.H));
    }
    rows_ = p.x_rows;
    if constexpr (std::is_same_v<T, A>) in_place_ = p.training;
    if (in_place_) {
      ld_ = p.D * G * p.H;
      if constexpr (std::is_same_v<T, A>) x_ = io_->x;
    } else {
      if (batch_major()) rows_.stride_b = steps_;
      ld_ = whole_lines<A>(G * p.H);
      x_ = carver.take<A>(steps_ * p.seq.B * ld_);
    }
  }

  int64_t steps() const { return steps_; }  // of a chunk

  // The rows of x at step t of the chunk that was computed last: G gates, H elements apart.
  Matrix<A> rows(int64_t t) const {
    StepRows rows(p_->seq, rows_, t);
    rows.first -= first_;
    return rows.of(x_, ld_);
  }

  // Packs this thread's part of W, unless that is done in pieces.
  void prepare(const Place& place) {
    if (!in_pieces_) pack(w_, part(W::blocks(p_->H), place.index, place.count));
  }

  // Computes this thread's part of steps [begin, end): its units, or its rows if threads outnumber
  // the blocks.
  void run(int64_t begin, int64_t end, const Place& place) {
    const Sequence& seq = p_->seq;
    const int64_t start = seq.offset ? seq.offset[begin] : begin * rows_.stride_t;
    if (!in_place_) first_ = start;
    const int64_t blocks = W::blocks(p_->H);
    const bool split_units = blocks >= place.count;
    const Range mine = split_units ? part(blocks, place.index, place.count) : Range{0, blocks};
    const auto multiply = [&](const W& w, Range units, int64_t row, int64_t count, A* x) {
      const Range rows = split_units ? Range{0, count} : part(count, place.index, place.count);
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
        w = w_.piece(w_.data + place.index * piece_size_, block);
        pack(w, units);
      }
      if (!batch_major()) {
        multiply(w, units, start, stop - start, x_ + (start - first_) * ld_);
        continue;
      }
      for (int64_t b = 0; b < seq.B; ++b) {
        A* x = x_ + (b * rows_.stride_b + begin - first_) * ld_;
        multiply(w, units, b * p_->x_rows.stride_b + begin, end - begin, x);
      }
    }
  }

 private:
  // Steps of a row are neighbours, not rows of a step.
  bool batch_major() const { return !p_->seq.offset && p_->x_rows.stride_b != 1; }
  void pack(W& w, Range blocks) const { w.set_rows(io_->W, p_->I, io_->b_ih, blocks); }

  const ForwardProblem<T>* p_ = nullptr;
  const ForwardDirection<T>* io_ = nullptr;
  bool in_pieces_ = false;  // see is_one_chunk
  int64_t piece_size_ = 0;
  W w_;          // its data: all of W, or a piece for each thread
  Rows rows_{};  // of x, as stored
  A* x_ = nullptr;
  bool in_place_ = false;  // x_ is the problem's x
  int64_t ld_ = 0, first_ = 0, steps_ = 0;
};

}  // namespace
}  // namespace rnnkern

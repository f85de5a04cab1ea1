// The problem structs: everything a driver needs to run one recurrent layer over a whole sequence.
//
// Sizes: T steps, B batch rows, I input features, H hidden units, P state width (H, or the
// projected size), D directions, G gates, S states, K saved values per unit, N data rows (T·B
// padded, or the packed total).
//
// Rows. Every per-step buffer is two-dimensional, [rows, width]. A step t runs the `active[t]`
// first rows of the batch in sorted order (longest first), so lengths and packed sequences need no
// masks:
//   sorted position j  ->  batch row b = order[j]
//   padded data        ->  data row t * stride_t + b * stride_b   (batch_first: strides 1, T)
//   packed data        ->  data row offset[t] + j
// The CUDA backend may not look at lengths that lie on the device, so it cannot sort by them. There
// padded rows keep the batch's order, and row j runs the steps t < lengths[j].
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace rnnkern {

constexpr int kMaxDirections = 2;
constexpr int kMaxStates = 2;

struct Rows {
  int64_t stride_t;
  int64_t stride_b;
};

struct Sequence {
  int64_t T;
  int64_t B;
  const int64_t* active;   // [T], never increasing; null: all B rows run at every step
  const int64_t* order;    // [B], batch row at a sorted position; null: the identity
  const int64_t* offset;   // [T], first row of step t in packed data; null: padded data
  const uint8_t* resets;   // bool, step t starts a new segment of row b; or null
  Rows resets_rows;        // element (t, b) of resets is at t * stride_t + b * stride_b
  const int64_t* lengths;  // [B], steps of each padded row (CUDA only); null: see active

  RNNKERN_HD int64_t rows_at(int64_t t) const { return active ? active[t] : B; }
  // Rows of all data. The host reads active and offset.
  int64_t data_rows() const { return offset ? offset[T - 1] + active[T - 1] : T * B; }
  RNNKERN_HD int64_t batch_row(int64_t j) const { return order ? order[j] : j; }
  int64_t data_row(const Rows& rows, int64_t t, int64_t j) const {
    return offset ? offset[t] + j : t * rows.stride_t + batch_row(j) * rows.stride_b;
  }
  RNNKERN_HD bool reset_at(int64_t t, int64_t j) const {
    return resets && resets[t * resets_rows.stride_t + batch_row(j) * resets_rows.stride_b];
  }
};

template <class T>
struct ForwardDirection {
  bool reverse;                  // runs t = T-1 .. 0
  const T* W;                    // [G,H,I] input weights
  const T* b_ih;                 // [G,H] input bias, or null
  const T* R;                    // [G,H,P] recurrent weights
  const T* b;                    // [G,H] recurrent bias, or null
  const T* W_hr;                 // [P,H] projection, or null
  T* x;                          // this direction's part of [N,D,G,H]; in (CUDA): W·input + b_ih;
                                 // out, in training: activated gates
  const T* initial[kMaxStates];  // h0 [B,P], c0 [B,H]
  const T* reset[kMaxStates];    // state before a reset step: [B,P], [B,H], or null: zero
  T* final[kMaxStates];          // hn [B,P], cn [B,H]
  T* y;                          // this direction's part of [N,D,P]
  T* h_prev;                     // [N,P] out, in training: h' of every step; null: not kept
  T* saved;                      // [N,K,H] out, in training; else null
};

template <class T>
struct ForwardProblem {
  using Data = T;
  Sequence seq;
  int64_t H, P, D, I;
  Rows x_rows, y_rows;  // rows of input, x, h_prev and saved; rows of y
  const T* input;       // [N,I] (CPU)
  bool training;
  ForwardDirection<T> dir[kMaxDirections];
};

// Where the weights' gradients go; null: not asked for.
template <class T>
struct WeightGradients {
  T* dW;     // [G,H,I]
  T* dR;     // [G,H,P]
  T* db_ih;  // [G,H]
  T* db_hh;  // [G,H]
  T* dW_hr;  // [P,H]
};

// A is the type that sums over steps are kept in: T, or float for 16-bit data.
template <class T, class A = T>
struct BackwardDirection {
  bool reverse;
  const T* R;                   // [G,H,P]
  const T* W_hr;                // [P,H], or null
  const T* gates;               // this direction's part of [N,D,G,H], activated
  const T* h_prev;              // [N,P]; on the CPU null where it is recovered (keeps_h_prev)
  const T* saved;               // [N,K,H]
  const T *h0, *reset_h;        // [B,P], forward's; null: zero (CPU, to recover h')
  const T* dy;                  // this direction's part of [N,D,P]; null: zero
  const T* dfinal[kMaxStates];  // dhn [B,P], dcn [B,H]; null: zero
  A* dreset[kMaxStates];        // [B,P], [B,H], added to; or null: dropped
  T* dinitial[kMaxStates];      // dh0 [B,P], dc0 [B,H] out; on the CPU null: not asked for
  // On the CPU, which multiplies by the weights and sums over steps itself:
  const T* W;               // [G,H,I]
  WeightGradients<A> sums;  // out
  // On CUDA, where the caller does that:
  T* dx;     // [N,G,H] out
  T* extra;  // [N,H] out (see Extra), or null
  T* dh;     // [N,P] out with a projection: the whole gradient of h; else null
};

template <class T, class A = T>
struct BackwardProblem {
  using Data = T;
  Sequence seq;
  int64_t H, P, D, I;
  Rows x_rows, y_rows;  // rows of input, gates, h_prev, saved and every output; rows of dy
  const T* input;       // [N,I] (CPU)
  T* dinput;            // [N,I] out (CPU), or null: not asked for
  BackwardDirection<T, A> dir[kMaxDirections];
};

// Whether the sizes of a forward or backward problem can be run, by a cell that may have a
// projection or not.
template <class Problem>
bool valid_sizes(const Problem& p, bool may_project) {
  const bool sizes =
      p.seq.T >= 1 && p.seq.B >= 1 && p.H >= 1 && p.P >= 1 && p.D >= 1 && p.D <= kMaxDirections;
  return sizes && (p.dir[0].W_hr ? may_project : p.P == p.H);
}

// Which rows of all data the rows of a chunk are: row n is
// first + n / group · outer + n % group · inner.
struct RowMap {
  int64_t first, group, outer, inner;
  int64_t at(int64_t n) const { return first + n / group * outer + n % group * inner; }
};

// Sums of outer products over N rows: of every a with up to three factors b.
//   out = aᵀ·b, sum = Σ a, or with `adds` added to what is there
constexpr int kOuterFactors = 3;

template <class T>
struct OuterFactor {
  int64_t I;      // 0: none
  const T* data;  // [..,I], rows ld apart
  int64_t ld;
  RowMap rows;  // those that belong to the rows of a
};

template <class T, class A>
struct OuterPart {
  int64_t O;   // 0: none
  const T* a;  // [N,O], rows lda apart
  int64_t lda;
  A* out[kOuterFactors];  // [O,I] of each factor, or null
  A* sum[2];              // [O], or null
};

template <class T, class A>
struct OuterProblem {
  int64_t N;
  bool adds;
  OuterFactor<T> b[kOuterFactors];
  OuterPart<T, A> part[kOuterFactors];
};

}  // namespace rnnkern

// Layers on padded data with whole rows, for callers to whom the way to the kernels counts: sizes
// and one address for each tensor, from which the parts of every layer and direction follow.
// Inference goes through a whole stack in one call, training through one layer.
//
// A stack of float or double that runs forward in time goes through it in pieces of some thousand
// rows, each through all layers, so that what lies between two layers does not grow with T. In two
// directions a layer needs the whole output of the one before; of bfloat16, c would be rounded.
#pragma once

#include "core/problem.h"
#include "core/status.h"
#include "cpu/bfloat16.h"

namespace rnnkern {

struct PaddedSizes {
  int64_t T, B, I, H, P, D, layers;
  bool bias, batch_first;

  // Weights stand layer by layer, in a layer direction by direction, and there in torch's order:
  // W [G,H,I], R [G,H,P], b_ih [G,H] and b_hh [G,H] with `bias`, W_hr [P,H] if P != H. I is D·P
  // from the second layer on.
  int64_t weights_of_direction() const { return 2 + (bias ? 2 : 0) + (P != H ? 1 : 0); }
  int64_t weight_count() const { return layers * D * weights_of_direction(); }
};

template <class T>
struct PaddedForward {
  PaddedSizes sizes;
  const T* input;  // [T,B,I]; [B,T,I] with batch_first
  const T* const* weights;
  const T* initial[kMaxStates];  // h0 [layers·D,B,P], c0 [layers·D,B,H]; null: zero
  T* y;                          // [T,B,D·P]
  T* final[kMaxStates];          // hn, cn
  // In training, which runs one layer; else null. The first two indices in the input's order.
  T* gates;   // [T,B,D,G,H]
  T* h_prev;  // [D] of [T,B,P], or null (CellInfo::keeps_h_prev)
  T* saved;   // [D] of [T,B,K,H]
};

// Of one layer. What is not asked for is null.
template <class T>
struct PaddedBackward {
  PaddedSizes sizes;
  const T* input;
  const T* const* weights;
  const T *gates, *h_prev, *saved;
  const T* h0;  // [D,B,P]; null: zero
  const T* dy;  // [T,B,D·P], [B,T,D·P] with dy_batch_first; null: zero
  bool dy_batch_first;
  const T* dfinal[kMaxStates];      // dhn, dcn; null: zero
  T* dinput;                        // out, like input
  T* dinitial[kMaxStates];          // dh0, dc0 out
  Accumulator<T>* const* dweights;  // out, like weights
};

template <class T>
Status run_padded_forward(int cell, const PaddedForward<T>& padded, int threads);
template <class T>
Status run_padded_backward(int cell, const PaddedBackward<T>& padded, int threads);

}  // namespace rnnkern

// Inference through a stack of layers in one call, for callers to whom the way to the kernel
// counts: padded data, whole rows, nothing kept for backward.
//
// A stack of float or double that runs forward in time goes through it in pieces of some thousand
// rows, each through all layers, so that what lies between two layers does not grow with T. In two
// directions a layer needs the whole output of the one before; of bfloat16, c would be rounded.
#pragma once

#include "core/problem.h"
#include "core/status.h"

namespace rnnkern {

// Weights stand layer by layer, in a layer direction by direction, and there in torch's order:
// W [G,H,I], R [G,H,P], b_ih [G,H] and b_hh [G,H] with `bias`, W_hr [P,H] if P != H. I is D·P from
// the second layer on.
template <class T>
struct StackProblem {
  int64_t T_, B, I, H, P, D, layers;
  bool bias, batch_first;
  const T* input;                // [T,B,I]; [B,T,I] with batch_first
  T* y;                          // [T,B,D·P]
  const T* initial[kMaxStates];  // h0 [layers·D,B,P], c0 [layers·D,B,H]; null: zero
  T* final[kMaxStates];          // hn, cn
  const T* const* weights;

  int64_t weights_of_direction() const { return 2 + (bias ? 2 : 0) + (P != H ? 1 : 0); }
  int64_t weight_count() const { return layers * D * weights_of_direction(); }
};

template <class T>
Status run_stack(int cell, const StackProblem<T>& problem, int threads);

}  // namespace rnnkern

// GRU, both forms; gate order r z n.
//
// Reset after the product (torch, cuDNN; "variant v3" of the 2014 paper's arXiv v1):
//   r = σ(x_r + r_r)   z = σ(x_z + r_z)   n = tanh(x_n + r ⊙ r_n)          h = (1 - z) n + z h'
// Reset before the product (Cho et al. 2014, eq. 5-8), in two phases with q = r ⊙ h' between:
//   r = σ(x_r + r_r)   z = σ(x_z + r_z)   n = tanh(x_n + R_n q + b_n)      h = (1 - z) n + z h'
#pragma once

#include "core/cell.h"
#include "core/host_device.h"

namespace rnnkern {

struct Gru {
  static constexpr const char* name = "gru";
  static constexpr int gates = 3, states = 1, saved = 1, phases = 1;
  static constexpr int first[] = {0, 3};
  static constexpr Extra extra = Extra::recurrent_gradient;
  static constexpr bool projects = false;
  static constexpr bool recovers = false;

  template <int phase, class V>
  RNNKERN_HD static void forward(ForwardUnit<Gru, V>& u) {
    const V r = u.gate[0] = sigmoid(u.gate[0] + u.r[0]);
    const V z = u.gate[1] = sigmoid(u.gate[1] + u.r[1]);
    const V r_n = u.saved[0] = u.r[2];
    const V n = u.gate[2] = tanh(fma(r, r_n, u.gate[2]));
    u.next[0] = fma(z, u.prev[0] - n, n);
  }

  template <int phase, class V>
  RNNKERN_HD static void backward(BackwardUnit<Gru, V>& u) {
    const V r = u.gate[0], z = u.gate[1], n = u.gate[2], r_n = u.saved[0];
    const V dh = u.dnext[0];
    const V dn = dh * (V(1) - z) * (V(1) - n * n);
    u.dx[0] = u.dr[0] = dn * r_n * r * (V(1) - r);
    u.dx[1] = u.dr[1] = dh * (u.h_prev - n) * z * (V(1) - z);
    u.dx[2] = dn;
    u.extra = u.dr[2] = dn * r;
    u.dprev[0] = dh * z;
  }
};

struct GruResetBefore {
  static constexpr const char* name = "gru_reset_before";
  static constexpr int gates = 3, states = 1, saved = 0, phases = 2;
  static constexpr int first[] = {0, 2, 3};
  static constexpr Extra extra = Extra::operand;
  static constexpr bool projects = false;
  static constexpr bool recovers = false;

  template <int phase, class V>
  RNNKERN_HD static void forward(ForwardUnit<GruResetBefore, V>& u) {
    if constexpr (phase == 0) {
      const V r = u.gate[0] = sigmoid(u.gate[0] + u.r[0]);
      u.gate[1] = sigmoid(u.gate[1] + u.r[1]);
      u.q = r * u.prev[0];
    } else {
      const V z = u.gate[1];
      const V n = u.gate[2] = tanh(u.gate[2] + u.r[2]);
      u.next[0] = fma(z, u.prev[0] - n, n);
    }
  }

  template <int phase, class V>
  RNNKERN_HD static void backward(BackwardUnit<GruResetBefore, V>& u) {
    const V r = u.gate[0], z = u.gate[1], n = u.gate[2];
    if constexpr (phase == 1) {
      const V dh = u.dnext[0];
      u.dx[2] = u.dr[2] = dh * (V(1) - z) * (V(1) - n * n);
      u.dprev[0] = dh * z;
      u.extra = r * u.h_prev;
    } else {
      const V dh = u.dnext[0];
      u.dx[0] = u.dr[0] = u.dq * u.h_prev * r * (V(1) - r);
      u.dx[1] = u.dr[1] = dh * (u.h_prev - n) * z * (V(1) - z);
      u.dprev[0] = fma(u.dq, r, u.dprev[0]);
    }
  }
};

}  // namespace rnnkern

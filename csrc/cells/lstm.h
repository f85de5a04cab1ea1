// LSTM (Hochreiter & Schmidhuber 1997) with the forget gate of Gers et al. 2000; gates i f g o.
//   i = σ(x_i + r_i)   f = σ(x_f + r_f)   g = tanh(x_g + r_g)   o = σ(x_o + r_o)
//   c = f c' + i g     h = o tanh(c)
#pragma once

#include "core/cell.h"
#include "core/host_device.h"

namespace rnnkern {

struct Lstm {
  static constexpr const char* name = "lstm";
  static constexpr int gates = 4, states = 2, saved = 1, phases = 1;
  static constexpr int first[] = {0, 4};
  static constexpr Extra extra = Extra::output;
  static constexpr bool projects = true;
  static constexpr bool recovers = true;

  template <int phase, class V>
  RNNKERN_HD static void forward(ForwardUnit<Lstm, V>& u) {
    const V i = u.gate[0] = sigmoid(u.gate[0] + u.r[0]);
    const V f = u.gate[1] = sigmoid(u.gate[1] + u.r[1]);
    const V g = u.gate[2] = tanh(u.gate[2] + u.r[2]);
    const V o = u.gate[3] = sigmoid(u.gate[3] + u.r[3]);
    const V c_prev = u.saved[0] = u.prev[1];
    const V c = fma(f, c_prev, i * g);
    u.next[0] = o * tanh(c);
    u.next[1] = c;
  }

  template <int phase, class V>
  RNNKERN_HD static void backward(BackwardUnit<Lstm, V>& u) {
    const V i = u.gate[0], f = u.gate[1], g = u.gate[2], o = u.gate[3];
    const V c_prev = u.saved[0];
    const V tanh_c = tanh(fma(f, c_prev, i * g));
    const V dh = u.dnext[0];
    const V dc = fma(dh * o, V(1) - tanh_c * tanh_c, u.dnext[1]);
    u.dx[0] = u.dr[0] = dc * g * i * (V(1) - i);
    u.dx[1] = u.dr[1] = dc * c_prev * f * (V(1) - f);
    u.dx[2] = u.dr[2] = dc * i * (V(1) - g * g);
    u.dx[3] = u.dr[3] = dh * tanh_c * o * (V(1) - o);
    u.dprev[1] = dc * f;
    u.extra = o * tanh_c;
  }

  template <class V>
  RNNKERN_HD static V recover(const V* gate_before, const V* saved) {
    return gate_before[3] * tanh(saved[0]);
  }
};

}  // namespace rnnkern

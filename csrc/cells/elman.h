// Elman RNN (Elman 1990), with tanh or relu.
//   h = φ(x + r)
#pragma once

#include "core/cell.h"
#include "core/host_device.h"

namespace rnnkern {

struct ElmanBase {
  static constexpr int gates = 1, states = 1, saved = 0, phases = 1;
  static constexpr int first[] = {0, 1};
  static constexpr Extra extra = Extra::none;
  static constexpr bool projects = false;
  static constexpr bool recovers = true;

  template <class V>
  RNNKERN_HD static V recover(const V* gate_before, const V*) {
    return gate_before[0];
  }
};

struct ElmanTanh : ElmanBase {
  static constexpr const char* name = "rnn_tanh";

  template <int phase, class V>
  RNNKERN_HD static void forward(ForwardUnit<ElmanTanh, V>& u) {
    u.gate[0] = u.next[0] = tanh(u.gate[0] + u.r[0]);
  }

  template <int phase, class V>
  RNNKERN_HD static void backward(BackwardUnit<ElmanTanh, V>& u) {
    const V h = u.gate[0];
    u.dx[0] = u.dr[0] = u.dnext[0] * (V(1) - h * h);
  }
};

struct ElmanRelu : ElmanBase {
  static constexpr const char* name = "rnn_relu";

  template <int phase, class V>
  RNNKERN_HD static void forward(ForwardUnit<ElmanRelu, V>& u) {
    u.gate[0] = u.next[0] = relu(u.gate[0] + u.r[0]);
  }

  template <int phase, class V>
  RNNKERN_HD static void backward(BackwardUnit<ElmanRelu, V>& u) {
    u.dx[0] = u.dr[0] = where_positive(u.gate[0], u.dnext[0]);
  }
};

}  // namespace rnnkern

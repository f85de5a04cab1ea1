// The cell contract: what a recurrent cell is to every driver (CPU, each SIMD ISA, CUDA).
//
// A cell is a struct with the constants below and static templates over a value type V. V holds
// the values of one hidden unit (CUDA: one scalar) or of several neighbouring units (CPU: one SIMD
// pack); it has + - * / and the functions fma, tanh, sigmoid, relu and where_positive (see
// cpu/vmath.h), found by argument-dependent lookup. A cell sees values only: no pointers, strides,
// threads, dtypes.
//
//   name      its name in Python
//   gates     G, the number of pre-activations per unit, in torch's gate order
//   states    S, 1: h, or 2: h and c
//   saved     K, the values per unit and step kept for backward besides the activated gates (and
//             h', where it is kept)
//   phases    F, the number of recurrent products in one step
//   first     F+1 gate indices: phase p owns the gates [first[p], first[p+1])
//   extra     what else backward hands out per unit and step (see Extra). dr must be dx, but for
//             the last gate of a one-phase cell that hands out Extra::recurrent_gradient
//   projects  whether h may be projected (Sak et al. 2014): h' must enter by products alone
//   recovers  whether h', unprojected, follows from what is kept anyway. Then backward must use h'
//             in products alone, and the cell has V recover(const V* gate_before, const V* saved),
//             which makes h' of the G activated gates of the step before and of the K values that
//             this step saved. The CPU then keeps no h' in float and double; of values rounded to a
//             narrower type h' would come out less exact than it is kept
//
// One step runs its phases in order. Phase p multiplies its operand by the recurrent rows of its
// own gates, r = R·operand + b, and then calls forward<p> on every unit. The operand of phase 0 is
// h', that of a later phase is the q which the phase before it set. Backward runs the phases in
// reverse: the call backward<p> is given dq, the gradient of the q that forward<p> had set, which
// the driver gets by multiplying the dr of phase p+1 by the transposed recurrent rows.
//
// To add a cell: one header here in cells/, one row in cells/registry.h, one reference in Python.
#pragma once

namespace rnnkern {

// What the driver must know to turn one more output of backward into weight gradients.
enum class Extra {
  none,
  recurrent_gradient,  // dr of the last gate, where it differs from dx of that gate
  operand,             // q, the operand of the last phase's product
  output,              // h before its projection; asked for only when there is a projection
};

// Whether h' enters the gate math, and not products alone: then backward is given h' and sets
// dprev[0].
template <class Cell>
constexpr bool h_enters_gates = !Cell::projects && !Cell::recovers;

template <class Cell, int phase>
constexpr int phase_gates = Cell::first[phase + 1] - Cell::first[phase];

// The values of one unit in forward. Arrays of length S, K may be of length 0 in the contract; they
// are given one unused element, since C++ has no empty arrays.
template <class Cell, class V>
struct ForwardUnit {
  V gate[Cell::gates];  // in: x = W·input + b of this phase's gates, and the activated gates of the
                        // phases before; out: this phase's gates, activated
  V r[Cell::gates];     // in: R·operand + b of this phase's gates
  V prev[Cell::states];  // in: the states h' (and c')
  V next[Cell::states];  // out of the last phase: the states h (and c)
  V q;                   // out of the other phases: operand of the next product
  V saved[Cell::saved > 0 ? Cell::saved : 1];  // out of the last phase
};

// The values of one unit in backward; a gradient takes d in front.
template <class Cell, class V>
struct BackwardUnit {
  V gate[Cell::gates];                         // in: the activated gates
  V saved[Cell::saved > 0 ? Cell::saved : 1];  // in: what forward saved
  V h_prev;                                    // in, if h_enters_gates: h'
  V dnext[Cell::states];                       // in: dh (and dc)
  V dq;                                        // in, phases before the last: gradient of q
  V dx[Cell::gates];                           // out: gradient of x, this phase's gates
  V dr[Cell::gates];                           // out: gradient of r, this phase's gates
  // In and out: gradient of h' (if h_enters_gates) and c' besides the share that comes through the
  // products; the last phase sets it, the phases before add to it.
  V dprev[Cell::states];
  V extra;  // out: see Extra
};

}  // namespace rnnkern

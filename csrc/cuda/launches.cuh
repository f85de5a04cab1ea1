// What the launches of both passes share: the exchange's part of the workspace, a packed sequence's
// steps on the device, the grid of a persistent kernel.
#pragma once

#include "cuda/persistent.cuh"
#include "cuda/queue.cuh"

namespace rnnkern {

// For a call that may run a persistent kernel, what that needs in any plan. Call is ForwardCall or
// BackwardCall.
template <class Call>
void lay_out_exchange(Carver& carver, const CudaCall& call, Call& s) {
  s.exchange = {nullptr, 0};
  s.packed = {nullptr, nullptr};
  if (!call.persistent) return;
  s.exchange.words = s.p.D * ((s.p.seq.B + 7) / 8) * kCounterWords;
  carver.take(s.exchange.arrived, s.exchange.words);
  if (!s.p.seq.offset) return;
  carver.take(s.packed.active, s.p.seq.T);
  carver.take(s.packed.offset, s.p.seq.T);
}

// Packed data: the host's table of steps, into the workspace, where the kernel reads it.
template <class Call>
void queue_steps(Queue& queue, Call& s) {
  Sequence& seq = s.p.seq;
  if (!seq.offset) return;
  for (int64_t first = 0; first < seq.T; first += SomeSteps::kMost) {
    SomeSteps some{
        first, seq.T - first < SomeSteps::kMost ? seq.T - first : SomeSteps::kMost, {}, {}};
    for (int64_t i = 0; i < some.count; ++i) {
      const Step step = step_at(seq, first + i);
      some.active[i] = step.rows;
      some.offset[i] = step.offset;
    }
    queue.launch(put_steps<SomeSteps>, dim3(Queue::blocks(some.count, kThreads)), {}, some,
                 s.packed.active, s.packed.offset);
  }
  seq.active = s.packed.active;
  seq.offset = s.packed.offset;
}

// The one launch of all steps.
template <class Call>
void queue_sequence(Queue& queue, void (*kernel)(Call), const CudaPlan& plan, Call& s) {
  s.resident = plan.resident;
  const dim3 grid(static_cast<unsigned>(plan.blocks_of_group), static_cast<unsigned>(plan.groups),
                  static_cast<unsigned>(s.p.D));
  queue.launch(kernel, grid, {static_cast<int>(plan.memory), true}, s);
}

}  // namespace rnnkern

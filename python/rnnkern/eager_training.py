"""The short way of :mod:`rnnkern.eager` for calls that are differentiated.

One autograd function a layer, whose forward and backward each are one native call. What backward
meets that is unusual (a graph of its own, other kinds of tensors) goes to the operator
``rnnkern::layer_backward``, which computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern._cpu import Stack
from rnnkern.arguments import DIFFERENTIABLE, recovers_h_prev
from rnnkern.cells import CELLS


def run(
    stack: Stack, input: Tensor, states: tuple[Tensor, ...] | None, weights: Sequence[Tensor]
) -> tuple[Tensor, ...] | None:
    """Do what :func:`rnnkern.eager.run` does, differentiably."""
    if stack.layers == 1:
        return _layer(stack, input, states, weights)
    if not stack.fits(input, states, weights):
        return None
    count, D = len(weights) // stack.layers, stack.directions
    y, finals = input, []
    for i in range(stack.layers):
        own = None if states is None else tuple([s[i * D : (i + 1) * D] for s in states])
        results = _layer(stack.layer(i), y, own, weights[i * count : (i + 1) * count])
        if results is None:
            return None
        y, *final = results
        finals.append(final)
    return (y, *(torch.cat(parts) for parts in zip(*finals, strict=True)))


def _layer(
    stack: Stack, input: Tensor, states: tuple[Tensor, ...] | None, weights: Sequence[Tensor]
) -> tuple[Tensor, ...] | None:
    done = stack.forward(input, states, weights)
    if done is None:
        return None
    results, kept = done
    if kept is not None:  # something has a gradient
        h0, c0 = (*(states or ()), None, None)[:2]
        results = _apply(stack, results, kept, input, h0, c0, *weights)
    return results


class _Layer(torch.autograd.Function):
    """One layer, all its directions: its results and what is kept of it, and their derivative."""

    @staticmethod
    def forward(
        ctx: Any, stack: Stack, results: tuple[Tensor, ...], kept: Any, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *kept)
        ctx.stack = stack
        return results

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        if not torch.is_grad_enabled():
            grads = ctx.stack.backward(saved, dy, dhn, dcn, needs)
            if grads is not None:
                return None, None, None, *grads
        if dy is None and dhn is None and dcn is None:
            return None, None, None, *(None for _ in needs)
        return None, None, None, *_general(ctx.stack, saved, (dy, dhn, dcn), needs)


# Function.apply would also unwrap tensors that have left a transform of torch.func behind; those
# have no address and so do not come here.
_apply: Any = super(torch.autograd.Function, _Layer).apply


def _general(
    stack: Stack,
    saved_tensors: Sequence[Any],
    incoming: tuple[Tensor | None, Tensor | None, Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of (input, h0, c0, *weights) that `needs` asks for, by the operator."""
    cell = list(CELLS.values())[stack.cell]
    H, P, D, bias, projection = stack.H, stack.P, stack.directions, stack.bias, stack.P != stack.H
    input, h0, c0 = saved_tensors[:3]
    weights, kept = saved_tensors[3 : len(needs)], saved_tensors[len(needs) :]
    B, T = input.shape[:2] if stack.batch_first else input.shape[1::-1]
    h0 = input.new_zeros(D, B, P) if h0 is None else h0
    if cell.states == 2 and c0 is None:
        c0 = input.new_zeros(D, B, H)
    rows = T * B * D
    width = 0 if recovers_h_prev(cell, projection, input.dtype) else P  # of h_prev
    sizes = [rows * cell.gates * H, rows * width, rows * cell.saved * H]
    parts = kept[0].split(sizes) if len(kept) == 1 else kept
    gates, h_prev, saved = (input.new_empty(0) if t is None else t for t in parts)
    count = len(weights) // D

    def named(values: Sequence[Any]) -> list[Any]:
        """Return the operator's (w_ih, w_hh, b_ih, b_hh, w_hr) of both directions, or None."""
        both: list[Any] = []
        for d in range(D):
            w_ih, w_hh, *others = values[d * count : (d + 1) * count]
            b_ih, b_hh = others[:2] if bias else (None, None)
            both += [w_ih, w_hh, b_ih, b_hh, others[-1] if projection else None]
        return both + [None] * (10 - len(both))

    mask = [bool(on) for on in (*needs[:3], *named(needs[3:]), False, False)]
    found = torch.ops.rnnkern.layer_backward(
        *(cell.name, input, h0, c0, *named(weights)),
        *(None, None, None, None, None, None, stack.batch_first),
        gates.view(T * B, -1),
        h_prev.view(D, T * B, width),
        saved.view(D, T * B, cell.saved * H),
        *incoming,
        mask,
    )
    values = dict(zip(DIFFERENTIABLE, found, strict=True))
    names = ["w_ih", "w_hh", *(("b_ih", "b_hh") if bias else ())]
    names += ["w_hr"] if projection else []
    order = ["input", "h0", "c0", *names, *(f"{name}_reverse" for name in names)]
    return [values[name] if on else None for name, on in zip(order, needs, strict=False)]

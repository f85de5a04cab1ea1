"""The short way of :mod:`rnnkern.eager` for calls that are differentiated.

One autograd function a layer, whose forward and backward each are one native call. What backward
meets that is unusual (a graph of its own, other kinds of tensors) goes to the operator
``rnnkern::layer_backward``, which computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern._native import _cpu
from rnnkern.arguments import DIFFERENTIABLE
from rnnkern.cells import Cell
from rnnkern.plain import dense, is_plain

_CPU = torch.device("cpu")


class Form(NamedTuple):
    """What one layer is, besides its tensors."""

    cell: Cell
    H: int
    P: int
    directions: int
    bias: bool
    projection: bool
    batch_first: bool

    @property
    def weights(self) -> int:
        """Weights of a direction."""
        return 2 + 2 * self.bias + self.projection

    def named(self, weights: Sequence[Any]) -> list[Any]:
        """Return a direction's (w_ih, w_hh, b_ih, b_hh, w_hr), None where there is none."""
        w_ih, w_hh, *others = weights
        b_ih, b_hh = others[:2] if self.bias else (None, None)
        return [w_ih, w_hh, b_ih, b_hh, others[-1] if self.projection else None]


def run(
    form: Form,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    layers: int,
) -> tuple[Tensor, ...]:
    """Run a stack of layers whose tensors :func:`rnnkern.eager.run` has looked at.

    Returns
    -------
    tuple of Tensor
        y [T,B,D·P] and the final states.
    """
    count, D = form.weights * form.directions, form.directions
    both = (None, None) if states is None else (states[0], states[1] if len(states) == 2 else None)
    y, finals = input, []
    for layer in range(layers):
        h0, c0 = both
        if layers > 1:
            rows = slice(layer * D, (layer + 1) * D)
            h0, c0 = (None if s is None else s[rows] for s in both)
        y, *final = _Layer.apply(  # type: ignore[no-untyped-call]
            form, y, h0, c0, *weights[layer * count : (layer + 1) * count]
        )
        finals.append(final)
        form = form._replace(batch_first=False)
    if layers == 1:
        return (y, *finals[0])
    return (y, *(torch.cat(parts) for parts in zip(*finals, strict=True)))


def _address(t: Tensor | None, offset: int = 0) -> int:
    return 0 if t is None else t.data_ptr() + offset


class _Layer(torch.autograd.Function):
    """One layer, all its directions."""

    @staticmethod
    def forward(
        ctx: Any, form: Form, input: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        cell, H, P, D, *_ = form
        G, K, dtype = cell.gates, cell.saved, input.dtype
        T, B, I = input.shape
        if form.batch_first:
            T, B = B, T
        N, size = T * B, dtype.itemsize
        y = torch.empty(T, B, D * P, dtype=dtype, device=_CPU)
        hn = torch.empty(D, B, P, dtype=dtype, device=_CPU)
        cn = torch.empty(D, B, H, dtype=dtype, device=_CPU) if cell.states == 2 else None
        kept = torch.empty(N * D * (G * H + P + K * H), dtype=dtype, device=_CPU)
        at = kept.data_ptr()
        h_prev, saved = at + N * D * G * H * size, at + N * D * (G * H + P) * size
        directions = []
        for d in range(D):
            own = form.named(weights[d * form.weights : (d + 1) * form.weights])
            w_ih, w_hh, b_ih, b_hh, w_hr = (_address(w) for w in own)
            h, c = d * B * P * size, d * B * H * size
            directions.append(
                (
                    *(d == 1, w_ih, b_ih, w_hh, b_hh, w_hr, at + d * G * H * size),
                    *(_address(h0, h), _address(c0, c), 0, 0),
                    *(_address(hn, h), _address(cn, c), y.data_ptr() + d * P * size),
                    *(h_prev + d * N * P * size, saved + d * N * K * H * size),
                )
            )
        rows = (1, T) if form.batch_first else (B, 1)
        forward = _cpu.forward_float32 if dtype is torch.float32 else _cpu.forward_float64
        forward(
            cell.index,
            torch.get_num_threads(),
            (T, B, 0, 0, 0, 0, 0, 0, 0),
            (H, P, rows, (B, 1), I, input.data_ptr()),
            True,
            tuple(directions),
        )
        ctx.set_materialize_grads(False)
        tensors = (input, h0, c0, kept, *weights)
        ctx.form = form
        ctx.dtype = dtype
        ctx.shapes = [None if t is None else t.shape for t in tensors]
        ctx.save_for_backward(*tensors)
        return (y, hn) if cn is None else (y, hn, cn)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dhn: Tensor | None, *rest: Tensor | None) -> Any:
        form: Form = ctx.form
        dcn = rest[0] if rest else None
        saved = ctx.saved_tensors
        input, h0, c0, kept, *weights = saved
        needs = ctx.needs_input_grad[1:]
        if dy is None and dhn is None and dcn is None:
            return (None,) * (1 + len(needs))
        # Hooks on saved tensors may have put others in their place.
        same = all(
            t is None or dense(t, ctx.dtype, shape)
            for t, shape in zip(saved, ctx.shapes, strict=True)
        )
        plain = same and is_plain() and all(map(_readable, (dy, dhn, dcn)))
        if torch.is_grad_enabled() or not plain:
            return None, *_general(form, input, h0, c0, kept, weights, (dy, dhn, dcn), needs)
        return None, *_native(form, input, h0, c0, kept, weights, (dy, dhn, dcn), needs)


def _readable(t: Tensor | None) -> bool:
    """Return whether the kernel can read a gradient: torch also hands out batches, and zeros."""
    return t is None or (
        type(t) is Tensor
        and not t.is_neg()
        and not torch._C._functorch.is_legacy_batchedtensor(t)
        and t.layout is torch.strided
        and t.data_ptr() != 0
    )


Incoming = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


def _native(
    form: Form,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    kept: Tensor,
    weights: Sequence[Tensor],
    incoming: Incoming,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of (input, h0, c0, *weights) that `needs` asks for."""
    cell, H, P, D, *_ = form
    G, K, dtype = cell.gates, cell.saved, input.dtype
    T, B, I = input.shape
    if form.batch_first:
        T, B = B, T
    N, size = T * B, dtype.itemsize
    dy, dhn, dcn = incoming
    y_rows = (B, 1)
    if dy is not None and not dy.is_contiguous():
        dy = dy.transpose(0, 1)
        y_rows = (1, T)
        if not dy.is_contiguous():
            dy, y_rows = dy.transpose(0, 1).contiguous(), (B, 1)
    dhn, dcn = (None if t is None else t.contiguous() for t in (dhn, dcn))
    tensors = (input, h0, c0, *weights)
    grads = [
        torch.empty_like(t) if on and t is not None else None
        for t, on in zip(tensors, needs, strict=True)
    ]
    at = kept.data_ptr()
    h_prev, saved = at + N * D * G * H * size, at + N * D * (G * H + P) * size
    directions = []
    for d in range(D):
        first = d * form.weights
        w_ih, w_hh, _, _, w_hr = form.named(weights[first : first + form.weights])
        own = form.named(grads[3 + first : 3 + first + form.weights])
        h, c = d * B * P * size, d * B * H * size
        directions.append(
            (
                *(d == 1, w_hh.data_ptr(), _address(w_hr), at + d * G * H * size),
                *(h_prev + d * N * P * size, saved + d * N * K * H * size),
                *(_address(dy, d * P * size), _address(dhn, h), _address(dcn, c)),
                *(_address(grads[1], h), _address(grads[2], c), 0, 0),
                *(w_ih.data_ptr(), *(_address(t) for t in own), 0, 0, 0),
            )
        )
    rows = (1, T) if form.batch_first else (B, 1)
    backward = _cpu.backward_float32 if dtype is torch.float32 else _cpu.backward_float64
    backward(
        cell.index,
        torch.get_num_threads(),
        (T, B, 0, 0, 0, 0, 0, 0, 0),
        (H, P, rows, y_rows, I, input.data_ptr(), _address(grads[0])),
        tuple(directions),
    )
    return grads


def _general(
    form: Form,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    kept: Tensor,
    weights: Sequence[Tensor],
    incoming: Incoming,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Do the same by the operator."""
    cell, H, P, D, *_ = form
    T, B = input.shape[:2]
    if form.batch_first:
        T, B = B, T
    h0 = input.new_zeros(D, B, P) if h0 is None else h0
    if cell.states == 2 and c0 is None:
        c0 = input.new_zeros(D, B, H)
    own = [form.named(weights[d * form.weights : (d + 1) * form.weights]) for d in range(D)]
    own += [[None] * 5] * (2 - D)
    widths = (D * cell.gates * H, D * P, D * cell.saved * H)
    gates, h_prev, saved = kept.split([T * B * width for width in widths])
    asked = [form.named(needs[3:][d * form.weights : (d + 1) * form.weights]) for d in range(D)]
    asked += [[None] * 5] * (2 - D)
    mask = [bool(on) for on in (*needs[:3], *asked[0], *asked[1], False, False)]
    found = torch.ops.rnnkern.layer_backward(
        *(cell.name, input, h0, c0, *own[0], *own[1]),
        *(None, None, None, None, None, None, form.batch_first),
        gates.view(T * B, -1),
        h_prev.view(D, T * B, P),
        saved.view(D, T * B, cell.saved * H),
        *incoming,
        mask,
    )
    values = dict(zip(DIFFERENTIABLE, found, strict=True))
    names = ["w_ih", "w_hh", *(("b_ih", "b_hh") if form.bias else ())]
    names += ["w_hr"] if form.projection else []
    order = ["input", "h0", "c0", *names, *(f"{name}_reverse" for name in names)]
    return [values[name] if on else None for name, on in zip(order, needs, strict=False)]

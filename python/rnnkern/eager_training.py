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

from rnnkern.arguments import DIFFERENTIABLE
from rnnkern.cells import Cell
from rnnkern.cpu import KERNELS, summed
from rnnkern.kernels import address
from rnnkern.plain import dense, is_plain


class Form(NamedTuple):
    """What one layer is, besides its tensors."""

    cell: Cell
    H: int
    P: int
    directions: int
    bias: bool
    batch_first: bool

    @property
    def projection(self) -> bool:
        """Whether h is projected."""
        return self.P != self.H

    @property
    def weights(self) -> int:
        """Weights of a direction."""
        return 2 + 2 * self.bias + self.projection

    def named(self, weights: Sequence[Any], d: int) -> list[Any]:
        """Return direction d's (w_ih, w_hh, b_ih, b_hh, w_hr), None where there is none."""
        w_ih, w_hh, *others = weights[d * self.weights : (d + 1) * self.weights]
        b_ih, b_hh = others[:2] if self.bias else (None, None)
        return [w_ih, w_hh, b_ih, b_hh, others[-1] if self.projection else None]


class _Call:
    """The sizes of one call, and where a direction's parts are in what it keeps and hands over."""

    def __init__(self, form: Form, input: Tensor) -> None:
        self.form, self.bytes = form, input.element_size()
        self.T, self.B, self.I = input.shape
        if form.batch_first:
            self.T, self.B = self.B, self.T
        self.N = self.T * self.B
        G, H, P, K = form.cell.gates, form.H, form.P, form.cell.saved
        self.widths = (form.directions * G * H, form.directions * P, form.directions * K * H)

    @property
    def native(self) -> tuple[int, ...]:
        """All rows run at every step."""
        return self.T, self.B, 0, 0, 0, 0, 0, 0, 0

    @property
    def rows(self) -> tuple[int, int]:
        """Strides of the input's steps and rows."""
        return (1, self.T) if self.form.batch_first else (self.B, 1)

    def kept(self, kept: Sequence[Tensor], d: int) -> tuple[int, int, int]:
        """Return the addresses of direction d's part of (gates, h', saved)."""
        form, row = self.form, self.N * self.bytes
        gates, h_prev, saved = kept
        return (
            gates.data_ptr() + d * form.cell.gates * form.H * self.bytes,
            h_prev.data_ptr() + d * row * form.P,
            saved.data_ptr() + d * row * form.cell.saved * form.H,
        )

    def offsets(self, d: int) -> tuple[int, int, int]:
        """Return where direction d begins in a row of y, in h and in c; bytes."""
        H, P, size = self.form.H, self.form.P, self.bytes
        return d * P * size, d * self.B * P * size, d * self.B * H * size


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
        y, *final = _apply(form, y, h0, c0, *weights[layer * count : (layer + 1) * count])
        finals.append(final)
        form = form._replace(batch_first=False)
    if layers == 1:
        return (y, *finals[0])
    return (y, *(torch.cat(parts) for parts in zip(*finals, strict=True)))


class _Layer(torch.autograd.Function):
    """One layer, all its directions."""

    @staticmethod
    def forward(
        ctx: Any, form: Form, input: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        cell, H, P, D, *_ = form
        call, dtype = _Call(form, input), input.dtype
        T, B = call.T, call.B
        new = input.new_empty
        y, hn = new(T, B, D * P), new(D, B, P)
        cn = new(D, B, H) if cell.states == 2 else None
        kept = [new(call.N * width) for width in call.widths]
        directions = []
        for d in range(D):
            w_ih, w_hh, b_ih, b_hh, w_hr = map(address, form.named(weights, d))
            gates, h_prev, saved = call.kept(kept, d)
            row, h, c = call.offsets(d)
            directions.append(
                (
                    *(d == 1, w_ih, b_ih, w_hh, b_hh, w_hr, gates),
                    *(address(h0, h), address(c0, c), 0, 0),
                    *(address(hn, h), address(cn, c), address(y, row), h_prev, saved),
                )
            )
        KERNELS[dtype].forward(
            cell.index,
            torch.get_num_threads(),
            call.native,
            (H, P, call.rows, (B, 1), call.I, input.data_ptr()),
            True,
            tuple(directions),
        )
        ctx.set_materialize_grads(False)
        tensors = (input, h0, c0, *kept, *weights)
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
        (input, h0, c0), kept, weights = saved[:3], saved[3:6], saved[6:]
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


# Function.apply would also unwrap tensors that have left a transform of torch.func behind; those
# have no address and so do not come here.
_apply: Any = super(torch.autograd.Function, _Layer).apply

Incoming = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


def _native(
    form: Form,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    kept: Sequence[Tensor],
    weights: Sequence[Tensor],
    incoming: Incoming,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of (input, h0, c0, *weights) that `needs` asks for."""
    cell, H, P, D, *_ = form
    call, dtype = _Call(form, input), input.dtype
    T, B = call.T, call.B
    dy, dhn, dcn = incoming
    y_rows = (B, 1)
    if dy is not None and not dy.is_contiguous():
        dy = dy.transpose(0, 1)
        y_rows = (1, T)
        if not dy.is_contiguous():
            dy, y_rows = dy.transpose(0, 1).contiguous(), (B, 1)
    dhn, dcn = (None if t is None else t.contiguous() for t in (dhn, dcn))
    grads = [
        torch.empty_like(t) if on and t is not None else None
        for t, on in zip((input, h0, c0), needs, strict=False)
    ]
    sums = [
        torch.empty_like(t, dtype=summed(dtype)) if on else None
        for t, on in zip(weights, needs[3:], strict=True)
    ]
    directions = []
    for d in range(D):
        w_ih, w_hh, _, _, w_hr = form.named(weights, d)
        row, h, c = call.offsets(d)
        directions.append(
            (
                *(d == 1, w_hh.data_ptr(), address(w_hr), *call.kept(kept, d)),
                *(address(dy, row), address(dhn, h), address(dcn, c)),
                *(address(grads[1], h), address(grads[2], c), 0, 0),
                *(w_ih.data_ptr(), *map(address, form.named(sums, d)), 0, 0, 0),
            )
        )
    KERNELS[dtype].backward(
        cell.index,
        torch.get_num_threads(),
        call.native,
        (H, P, call.rows, y_rows, call.I, input.data_ptr(), address(grads[0])),
        tuple(directions),
    )
    if dtype is torch.bfloat16:
        sums = [None if t is None else t.to(dtype) for t in sums]
    return grads + sums


def _general(
    form: Form,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    kept: Sequence[Tensor],
    weights: Sequence[Tensor],
    incoming: Incoming,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Do the same by the operator."""
    cell, H, P, D, *_ = form
    call = _Call(form, input)
    h0 = input.new_zeros(D, call.B, P) if h0 is None else h0
    if cell.states == 2 and c0 is None:
        c0 = input.new_zeros(D, call.B, H)
    own = [form.named(weights, d) if d < D else [None] * 5 for d in range(2)]
    asked = [form.named(needs[3:], d) if d < D else [None] * 5 for d in range(2)]
    mask = [bool(on) for on in (*needs[:3], *asked[0], *asked[1], False, False)]
    gates, h_prev, saved = kept
    found = torch.ops.rnnkern.layer_backward(
        *(cell.name, input, h0, c0, *own[0], *own[1]),
        *(None, None, None, None, None, None, form.batch_first),
        gates.view(call.N, -1),
        h_prev.view(D, call.N, P),
        saved.view(D, call.N, cell.saved * H),
        *incoming,
        mask,
    )
    values = dict(zip(DIFFERENTIABLE, found, strict=True))
    names = ["w_ih", "w_hh", *(("b_ih", "b_hh") if form.bias else ())]
    names += ["w_hr"] if form.projection else []
    order = ["input", "h0", "c0", *names, *(f"{name}_reverse" for name in names)]
    return [values[name] if on else None for name, on in zip(order, needs, strict=False)]

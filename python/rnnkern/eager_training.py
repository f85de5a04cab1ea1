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
from rnnkern.plain import addresses, is_plain


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

    def sizes(self, input: Tensor) -> tuple[int, int, int]:
        """Return (T, B, I)."""
        a, b, I = input.shape
        return (b, a, I) if self.batch_first else (a, b, I)

    def named(self, weights: Sequence[Any], d: int) -> list[Any]:
        """Return direction d's (w_ih, w_hh, b_ih, b_hh, w_hr), None where there is none."""
        w_ih, w_hh, *others = weights[d * self.weights : (d + 1) * self.weights]
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
    h0, c0 = (*(states or ()), None, None)[:2]
    if layers == 1:
        results: tuple[Tensor, ...] = _apply(form, input, h0, c0, *weights)
        return results
    count, D = form.weights * form.directions, form.directions
    y, finals = input, []
    for layer in range(layers):
        rows = slice(layer * D, (layer + 1) * D)
        both = (None if s is None else s[rows] for s in (h0, c0))
        y, *final = _apply(form, y, *both, *weights[layer * count : (layer + 1) * count])
        finals.append(final)
        form = form._replace(batch_first=False)
    return (y, *(torch.cat(parts) for parts in zip(*finals, strict=True)))


class _Layer(torch.autograd.Function):
    """One layer, all its directions."""

    @staticmethod
    def forward(
        ctx: Any, form: Form, input: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        cell, H, P, D, bias, batch_first = form
        T, B, I = form.sizes(input)
        new = input.new_empty
        y, hn = new(T, B, D * P), new(D, B, P)
        cn = new(D, B, H) if cell.states == 2 else None
        gates, h_prev = new(T * B * D * cell.gates * H), new(T * B * D * P)
        saved = new(T * B * D * cell.saved * H) if cell.saved else None
        KERNELS[input.dtype].padded_forward(
            cell.index,
            torch.get_num_threads(),
            T,
            B,
            I,
            H,
            P,
            D,
            1,
            bias,
            batch_first,
            _at(input, h0, c0, *weights),
            _at(y, hn, cn, gates, h_prev, saved),
        )
        kept = (input, h0, c0, gates, h_prev, saved, *weights)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        ctx.call = form, input.dtype, tuple([t.shape for t in kept if t is not None])
        return (y, hn) if cn is None else (y, hn, cn)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dhn: Tensor | None, *rest: Tensor | None) -> Any:
        form, dtype, shapes = ctx.call
        dcn = rest[0] if rest else None
        kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if dy is None and dhn is None and dcn is None:
            return (None,) * (1 + len(needs))
        # Hooks on saved tensors may have put others in their place.
        read = addresses([t for t in kept if t is not None], dtype, shapes)
        plain = read is not None and is_plain() and all(map(_readable, (dy, dhn, dcn)))
        if torch.is_grad_enabled() or not plain:
            return None, *_general(form, kept, (dy, dhn, dcn), needs)
        return None, *_native(form, kept, (dy, dhn, dcn), needs)


def _at(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple([0 if t is None else t.data_ptr() for t in tensors])


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

# What forward keeps: input, h0, c0, gates, h_prev, saved, the weights; None where there is none.
Kept = Sequence[Any]
Incoming = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


def _native(
    form: Form, kept: Kept, incoming: Incoming, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of (input, h0, c0, *weights) that `needs` asks for."""
    cell, H, P, D, bias, batch_first = form
    input, h0, c0, gates, h_prev, saved, *weights = kept
    dy, dhn, dcn = incoming
    dy_batch_first = False
    if dy is not None and not dy.is_contiguous():
        dy_batch_first = dy.transpose(0, 1).is_contiguous()
        dy = dy if dy_batch_first else dy.contiguous()
    if dhn is not None:
        dhn = dhn.contiguous()
    if dcn is not None:
        dcn = dcn.contiguous()
    sums, new = summed(input.dtype), torch.empty_like
    grads = [new(t) if on else None for t, on in zip((input, h0, c0), needs, strict=False)]
    if sums is input.dtype:
        grads += [new(t) if on else None for t, on in zip(weights, needs[3:], strict=True)]
    else:
        grads += [
            new(t, dtype=sums) if on else None for t, on in zip(weights, needs[3:], strict=True)
        ]
    T, B, I = form.sizes(input)
    KERNELS[input.dtype].padded_backward(
        cell.index,
        torch.get_num_threads(),
        T,
        B,
        I,
        H,
        P,
        D,
        bias,
        batch_first,
        dy_batch_first,
        _at(input, gates, h_prev, saved, dy, dhn, dcn, *weights),
        _at(*grads),
    )
    if sums is not input.dtype:
        grads[3:] = [None if t is None else t.to(input.dtype) for t in grads[3:]]
    return grads


def _general(
    form: Form, kept: Kept, incoming: Incoming, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Do the same by the operator."""
    cell, H, P, D, *_ = form
    input, h0, c0, gates, h_prev, saved, *weights = kept
    T, B, _ = form.sizes(input)
    h0 = input.new_zeros(D, B, P) if h0 is None else h0
    if cell.states == 2 and c0 is None:
        c0 = input.new_zeros(D, B, H)
    saved = input.new_empty(0) if saved is None else saved
    own = [form.named(weights, d) if d < D else [None] * 5 for d in range(2)]
    asked = [form.named(needs[3:], d) if d < D else [None] * 5 for d in range(2)]
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

"""The torch operators: ``rnnkern::layer`` runs one layer, ``rnnkern::layer_backward`` its gradient.

One call is one layer: the input product of all directions (one GEMM), the recurrence over the
whole sequence in the native core, and in backward the recurrence again and then one GEMM for every
weight gradient. Rows of data are time-major, or batch-major (`batch_first`), or packed; the native
core addresses all three in place.

Both are registered with a schema, a CPU kernel, a fake kernel and an autograd formula, so they work
under ``torch.compile``, ``torch.export`` and ``opcheck``. The gradient of ``layer_backward``
differentiates the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnkern import cpu, cuda
from rnnkern.arguments import (
    DIFFERENTIABLE,
    LAYER_FIELDS,
    POSITIONS,
    BackwardInputs,
    LayerInputs,
    kept_shapes,
    sizes_of,
    split,
)
from rnnkern.cells import get_cell
from rnnkern.checks import check_devices
from rnnkern.fallback import reference_gradients

_SCHEMA_TYPES = {"cell": "str", "batch_first": "bool"}
_REQUIRED = ("input", "h0", "w_ih", "w_hh")
_SCHEMA = ", ".join(
    f"{_SCHEMA_TYPES.get(name, 'Tensor' if name in _REQUIRED else 'Tensor?')} {name}"
    for name in LayerInputs._fields
)

_LIBRARY = torch.library.Library("rnnkern", "DEF")
_LIBRARY.define(
    f"layer({_SCHEMA}, bool save)"
    " -> (Tensor y, Tensor hn, Tensor cn, Tensor gates, Tensor h_prev, Tensor saved)"
)
_LIBRARY.define(
    f"layer_backward({_SCHEMA}, Tensor gates, Tensor h_prev, Tensor saved,"
    " Tensor? dy, Tensor? dhn, Tensor? dcn, bool[] output_mask)"
    f" -> ({', '.join(f'Tensor d{name}' for name in DIFFERENTIABLE)})"
)


def _layer_fake(*args: Any) -> tuple[Tensor, ...]:
    a, save = LayerInputs(*args[:-1]), args[-1]
    cell = get_cell(a.cell)
    check_devices(a)
    s = sizes_of(a, cell)
    new = a.input.new_empty
    y = new((s.N, s.D * s.P) if a.batch_sizes is not None else (s.T, s.B, s.D * s.P))
    hn = new((s.D, s.B, s.P))
    cn = new(0) if a.c0 is None else new((s.D, s.B, s.H))
    on_gpu, dtype = a.input.device.type == "cuda", a.input.dtype
    dtype = dtype if on_gpu else cpu.BACKEND.computed(dtype)
    kept = [new(shape if save else 0, dtype=dtype) for shape in kept_shapes(a, s, cell, dtype)]
    return y, hn, cn, *kept


def _layer_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    a, g = split(args)
    check_devices(a, g)
    return tuple(
        a.input.new_empty(getattr(a, name).shape if on and getattr(a, name) is not None else 0)
        for name, on in zip(DIFFERENTIABLE, g.output_mask, strict=True)
    )


def _layer_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.fixed = (inputs[0], inputs[LAYER_FIELDS - 1])
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*inputs[1 : LAYER_FIELDS - 1], *output[3:])


def _layer_gradients(
    ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    cell, batch_first = ctx.fixed
    *tensors, gates, h_prev, saved = ctx.saved_tensors
    a = LayerInputs._make((cell, *tensors, batch_first))
    mask = [ctx.needs_input_grad[i + 1] for i in POSITIONS]  # the first is the keyset
    grads: list[Tensor | None] = [None] * (LAYER_FIELDS + 1)
    if all(t is None for t in (dy, dhn, dcn)):
        return tuple(grads)
    if gates.numel() == 0:  # the forward pass was asked to save nothing: repeat it
        gates, h_prev, saved = torch.ops.rnnkern.layer(*a, True)[3:]
    if a.c0 is None:
        dcn = None
    values = torch.ops.rnnkern.layer_backward(*a, gates, h_prev, saved, dy, dhn, dcn, mask)
    for i, value, on in zip(POSITIONS, values, mask, strict=True):
        grads[i] = value if on else None
    return tuple(grads)


class _LayerFunction(torch.autograd.Function):
    """What ``torch.library.register_autograd`` would make of the two functions above.

    That wrapper goes through the schema's arguments in every call, which for the 22 of a layer
    takes over 100 µs: more than the rest of a short call.
    """

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        output = _below_autograd(torch.ops.rnnkern.layer.default, keyset, args)
        _layer_setup(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return None, *_layer_gradients(ctx, *gradients)


def _below_autograd(op: Any, keyset: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        output: tuple[Tensor, ...] = op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
    return output


def _refuse_tangents(op: str, args: tuple[Any, ...]) -> None:
    """Raise NotImplementedError for an input of forward-mode AD, whose tangent would be lost."""
    if forward_ad._current_level < 0:
        return
    for t in args:
        if isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                f"rnnkern::{op} has no forward-mode derivative; call the module or rnnkern.ops "
                "inside of the dual level or torch.func transform, where plain operations run"
            )


def _layer_autograd(keyset: Any, *args: Any) -> tuple[Tensor, ...]:
    _refuse_tangents("layer", args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        outputs: tuple[Tensor, ...] = _LayerFunction.apply(keyset, *args)  # type: ignore[no-untyped-call]
        return outputs
    return _below_autograd(torch.ops.rnnkern.layer.default, keyset, args)


def _layer_backward_setup(ctx: Any, inputs: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.fixed = (inputs[0], inputs[LAYER_FIELDS - 1], list(inputs[-1]))
    ctx.save_for_backward(*inputs[1 : LAYER_FIELDS - 1], *inputs[-4:-1])


def _layer_backward_gradients(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the gradient of the reference (double backward)."""
    cell, batch_first, mask = ctx.fixed
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = [
            t.view_as(t) if t is not None and t.requires_grad else t for t in ctx.saved_tensors
        ]
        *layer_tensors, dy, dhn, dcn = tensors
        a = LayerInputs._make((cell, *layer_tensors, batch_first))
        leaves = {
            name: getattr(a, name)
            if getattr(a, name).requires_grad
            else getattr(a, name).detach().requires_grad_()
            for name, on in zip(DIFFERENTIABLE, mask, strict=True)
            if on
        }
        first = reference_gradients(a, leaves, (dy, dhn, dcn), create_graph=True)
        a = a._replace(**leaves)
        asked = dict(zip(DIFFERENTIABLE, gradients, strict=True))
        second = [
            (value, asked[name])
            for name, value in zip(leaves, first, strict=True)
            if value is not None and value.requires_grad and asked[name] is not None
        ]
        sources = [
            (i, t)
            for i, t in enumerate([*a, None, None, None, dy, dhn, dcn])
            if isinstance(t, Tensor) and t.requires_grad and ctx.needs_input_grad[i + 1]
        ]
        values: Sequence[Tensor | None] = [None] * len(sources)
        if second and sources:
            values = torch.autograd.grad(
                [value for value, _ in second],
                [t for _, t in sources],
                [gg for _, gg in second],
                create_graph=create_graph,
                allow_unused=True,
            )
    grads: list[Tensor | None] = [None] * (LAYER_FIELDS + len(BackwardInputs._fields))
    for (i, _), value in zip(sources, values, strict=True):
        grads[i] = value
    return tuple(grads)


class _LayerBackwardFunction(torch.autograd.Function):
    """The like of :class:`_LayerFunction` for the two functions above."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        output = _below_autograd(torch.ops.rnnkern.layer_backward.default, keyset, args)
        _layer_backward_setup(ctx, args)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return None, *_layer_backward_gradients(ctx, *gradients)


def _layer_backward_autograd(keyset: Any, *args: Any) -> tuple[Tensor, ...]:
    _refuse_tangents("layer_backward", args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        outputs: tuple[Tensor, ...] = _LayerBackwardFunction.apply(keyset, *args)  # type: ignore[no-untyped-call]
        return outputs
    return _below_autograd(torch.ops.rnnkern.layer_backward.default, keyset, args)


_LIBRARY.impl("layer", cpu.layer, "CPU")
_LIBRARY.impl("layer_backward", cpu.layer_backward, "CPU")
_LIBRARY.impl("layer", cuda.layer, "CUDA")
_LIBRARY.impl("layer_backward", cuda.layer_backward, "CUDA")
torch.library.register_fake("rnnkern::layer", _layer_fake, lib=_LIBRARY)
torch.library.register_fake("rnnkern::layer_backward", _layer_backward_fake, lib=_LIBRARY)
_LIBRARY.impl("layer", _layer_autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("layer_backward", _layer_backward_autograd, "Autograd", with_keyset=True)

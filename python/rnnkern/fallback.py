"""The operators by plain torch operations: what CUDA tensors get where no kernel runs for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rnnkern import reference
from rnnkern.arguments import DIFFERENTIABLE, LayerInputs, Sizes, kept_shapes, split
from rnnkern.cells import Cell, get_cell
from rnnkern.checks import (
    check_backward,
    check_batch_sizes,
    check_layer,
    check_lengths,
    check_order,
    check_resets,
)


def reference_layer(a: LayerInputs) -> tuple[Tensor, ...]:
    """Run the reference on the operator's own arguments; returns (y, hn) or (y, hn, cn)."""
    initial = (a.h0,) if a.c0 is None else (a.h0, a.c0)
    resets = tuple(t for t in (a.reset_h, a.reset_c) if t is not None)
    y, states = reference.layer(
        a.cell,
        a.input,
        initial,
        a.directions,
        batch_sizes=a.batch_sizes,
        order=a.order,
        lengths=a.lengths,
        resets=a.resets,
        reset=resets or None,
        batch_first=a.batch_first,
    )
    return y, *states


def reference_gradients(
    a: LayerInputs,
    leaves: dict[str, Any],
    incoming: tuple[Tensor | None, ...],
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return the gradient of every leaf, given those of the outputs: dy, dhn and dcn.

    `leaves` take the place of the arguments of their names.
    """
    outputs = reference_layer(a._replace(**leaves))
    pairs = [(y, d) for y, d in zip(outputs, incoming, strict=False) if d is not None]
    if not pairs or not leaves:
        return (None,) * len(leaves)
    return torch.autograd.grad(
        [y for y, _ in pairs],
        list(leaves.values()),
        [d for _, d in pairs],
        create_graph=create_graph,
        allow_unused=True,
    )


def layer(*args: Any) -> tuple[Tensor, ...]:
    """Run ``rnnkern::layer``; with `save`, what is kept has its shapes and no values."""
    a, save = LayerInputs(*args[:-1]), args[-1]
    cell = get_cell(a.cell)
    s = _checked(a, cell)
    with torch.no_grad():
        y, hn, *cn = (t.contiguous() for t in reference_layer(a))
    new = a.input.new_zeros
    kept = (new(shape if save else 0) for shape in kept_shapes(a, s, cell, a.input.dtype))
    return y, hn, cn[0] if cn else new(0), *kept


def layer_backward(*args: Any) -> tuple[Tensor, ...]:
    """Run ``rnnkern::layer_backward``, by differentiating the reference; repeats forward."""
    a, g = split(args)
    cell = get_cell(a.cell)
    s = _checked(a, cell)
    dtype = a.input.dtype
    check_backward(s, a, g, kept_shapes(a, s, cell, dtype), dtype)
    wanted = [
        name
        for name, on in zip(DIFFERENTIABLE, g.output_mask, strict=True)
        if on and getattr(a, name) is not None
    ]
    with torch.inference_mode(False), _recording():
        a = LayerInputs._make(_recordable(t) for t in a)
        leaves = {name: getattr(a, name).detach().clone().requires_grad_() for name in wanted}
        found = reference_gradients(a, leaves, (g.dy, g.dhn, g.dcn))
    gradients = {
        name: torch.zeros_like(leaf) if d is None else d.contiguous()
        for (name, leaf), d in zip(leaves.items(), found, strict=True)
    }
    return tuple(gradients.get(name, a.input.new_empty(0)) for name in DIFFERENTIABLE)


def _checked(a: LayerInputs, cell: Cell) -> Sizes:
    """Check the arguments as the kernels' backends do, and return the sizes."""
    s = check_layer(a, cell)
    if a.batch_sizes is not None:
        check_batch_sizes(a.batch_sizes, s)
    check_order(a.order, s)
    check_lengths(a, s)
    check_resets(a, s)
    return s


def _recordable(value: Any) -> Any:
    """Return what a graph may keep: no tensor of inference mode."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


@contextmanager
def _recording() -> Iterator[None]:
    """Record a graph, though the dispatcher keeps autograd out of the kernels of an operator."""
    key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
    excluded = torch._C._dispatch_tls_local_exclude_set()
    excluded = excluded - keys(key.AutogradFunctionality) - keys(key.ADInplaceOrView)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield

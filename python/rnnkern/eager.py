"""The short way from a module to the CPU's kernels.

One step of a small layer takes the kernel two or three microseconds, and the way through checks,
operator and dispatcher thirty times as long, in training forty times. What most calls need, padded
dense data of one type and whole rows, goes straight to the kernel here; whatever is unusual in a
call, in its tensors or in torch's state at the time makes :func:`run` return None, and the call
takes the general way, which knows all forms and all errors. The kernels and so the results are the
same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnnkern import eager_training
from rnnkern.cells import Cell
from rnnkern.cpu import KERNELS, computed
from rnnkern.plain import dense, is_plain

_AUTOGRAD = torch._C.DispatchKey.AutogradCPU


def run(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    *,
    sizes: tuple[int, int, int],
    layers: int,
    directions: int,
    bias: bool,
    batch_first: bool,
) -> tuple[Tensor, ...] | None:
    """Run a stack of layers on padded data.

    Parameters
    ----------
    input : Tensor
        [T,B,I], or [B,T,I] with `batch_first`.
    states : sequence of Tensor or None
        h [L·D,B,P] (and c [L·D,B,H]); None: zero.
    weights : sequence of Tensor
        As in :func:`rnnkern.layers.run`.
    sizes : (I, H, P)
        Input features, hidden units, and the projected size, H without a projection.

    Returns
    -------
    tuple of Tensor or None
        y [T,B,D·P] and the final states; None if the general way must be taken.
    """
    I, H, P = sizes
    dtype = input.dtype
    if computed(dtype) is not dtype or input.dim() != 3 or not is_plain():
        return None
    T, B = input.shape[:2]
    if batch_first:
        T, B = B, T
    if 0 in (T, B, H) or not dense(input, dtype, (B, T, I) if batch_first else (T, B, I)):
        return None
    widths = (P, H)[: cell.states]
    initial = [0, 0]
    if states is not None:
        if type(states) is not tuple or len(states) != cell.states:
            return None
        for k, state in enumerate(states):
            if not dense(state, dtype, (layers * directions, B, widths[k])):
                return None
            initial[k] = state.data_ptr()
    addresses = _addresses(weights, dtype, cell.gates * H, sizes, directions, bias)
    if addresses is None or 0 in addresses or input.data_ptr() == 0:  # no storage
        return None
    if torch.is_grad_enabled() and torch._C._any_requires_grad(input, *(states or ()), *weights):
        if torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD):
            return None  # inside an operator
        form = eager_training.Form(cell, H, P, directions, bias, batch_first)
        return eager_training.run(form, input, states, weights, layers)
    new = input.new_empty
    y, hn = new(T, B, directions * P), new(layers * directions, B, P)
    cn = new(layers * directions, B, H) if cell.states == 2 else None
    KERNELS[dtype].infer(
        cell.index,
        torch.get_num_threads(),
        T,
        B,
        I,
        H,
        P,
        directions,
        layers,
        bias,
        batch_first,
        input.data_ptr(),
        y.data_ptr(),
        initial[0],
        initial[1],
        hn.data_ptr(),
        0 if cn is None else cn.data_ptr(),
        addresses,
    )
    return (y, hn) if cn is None else (y, hn, cn)


def _addresses(
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    gates: int,
    sizes: tuple[int, int, int],
    directions: int,
    bias: bool,
) -> tuple[int, ...] | None:
    """Return where the weights are, or None if one of them is not what the kernel reads."""
    I, H, P = sizes
    others = (((gates,), (gates,)) if bias else ()) + (((P, H),) if P != H else ())
    shapes = ((gates, I), (gates, P), *others) * directions
    for t, shape in zip(weights, shapes, strict=False):
        if not dense(t, dtype, shape):
            return None
    if len(weights) > len(shapes):
        shapes = ((gates, directions * P), (gates, P), *others)
        for i in range(len(shapes) * directions, len(weights)):
            if not dense(weights[i], dtype, shapes[i % len(shapes)]):
                return None
    return tuple([t.data_ptr() for t in weights])

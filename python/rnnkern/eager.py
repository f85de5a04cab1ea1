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
from functools import lru_cache

import torch
from torch import Tensor

from rnnkern import eager_training
from rnnkern.cells import Cell
from rnnkern.cpu import KERNELS, computed
from rnnkern.plain import addresses, is_plain

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
    dtype, shape = input.dtype, input.shape
    if computed(dtype) is not dtype or len(shape) != 3 or not is_plain():
        return None
    T, B, _ = (shape[1], shape[0], I) if batch_first else shape
    if 0 in (T, B, I, H):
        return None
    shapes = _weight_shapes(cell.gates * H, sizes, layers, directions, bias)
    if states is None:
        tensors = [input, *weights]
    elif type(states) is tuple and len(states) == cell.states:
        tensors = [input, *states, *weights]
        rows = layers * directions
        shapes = ((rows, B, P), (rows, B, H))[: cell.states] + shapes
    else:
        return None
    read = addresses(tensors, dtype, ((B, T, I) if batch_first else (T, B, I), *shapes))
    if read is None:
        return None
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
        if torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD):
            return None  # inside an operator
        form = eager_training.Form(cell, H, P, directions, bias, batch_first)
        return eager_training.run(form, input, states, weights, layers)
    new = input.new_empty
    y, hn = new(T, B, directions * P), new(layers * directions, B, P)
    cn = new(layers * directions, B, H) if cell.states == 2 else None
    if states is None:
        read = (read[0], 0, 0, *read[1:])
    elif cell.states == 1:
        read = (*read[:2], 0, *read[2:])
    KERNELS[dtype].padded_forward(
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
        read,
        (y.data_ptr(), hn.data_ptr(), 0 if cn is None else cn.data_ptr(), 0, 0, 0),
    )
    return (y, hn) if cn is None else (y, hn, cn)


@lru_cache(maxsize=256)
def _weight_shapes(
    gates: int, sizes: tuple[int, int, int], layers: int, directions: int, bias: bool
) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the weights of all layers, in torch's order."""
    I, H, P = sizes
    others = (((gates,), (gates,)) if bias else ()) + (((P, H),) if P != H else ())
    shapes = ((gates, I), (gates, P), *others) * directions
    if layers > 1:
        shapes += ((gates, directions * P), (gates, P), *others) * (directions * (layers - 1))
    return shapes

"""The short way from a module to the CPU's kernels.

One step of a small layer takes the kernel two or three microseconds, and the way through checks,
operator and dispatcher thirty times as long, in training forty times. What most calls need, padded
dense data of one type and whole rows, goes straight to the kernel here, in one native call that
looks at the tensors and makes those of the results; whatever is unusual in a call, in its tensors
or in torch's state at the time makes :func:`run` return None, and the call takes the general way,
which knows all forms and all errors. The kernels and so the results are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnnkern import eager_training
from rnnkern._cpu import Stack

_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality  # what operators and inference mode exclude


def run(
    stack: Stack, input: Tensor, states: tuple[Tensor, ...] | None, weights: Sequence[Tensor]
) -> tuple[Tensor, ...] | None:
    """Run a stack of layers on padded data. Not while torch.compile traces, which cannot follow.

    Parameters
    ----------
    stack : Stack
        From :func:`rnnkern.cpu.stack`.
    input : Tensor
        [T,B,I], or [B,T,I] if the stack is batch_first.
    states : tuple of Tensor or None
        h [L·D,B,P] (and c [L·D,B,H]); None: zero.
    weights : list or tuple of Tensor
        As in :func:`rnnkern.layers.run`.

    Returns
    -------
    tuple of Tensor or None
        y [T,B,D·P] and the final states; None if the general way must be taken.
    """
    if torch.is_grad_enabled():
        if torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD):
            return None  # inside an operator
        return eager_training.run(stack, input, states, weights)
    return stack.infer(input, states, weights)

"""What tensors are: plain ones may go the short way of `rnnkern.eager` if nobody watches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, unwrap_if_dead
from torch.autograd import forward_ad
from torch.nn import Parameter


def is_plain() -> bool:
    """Return whether nothing traces, transforms or watches what torch's operators do now."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )


def dense(t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is what the kernel reads: elements of one type side by side."""
    return (
        (type(t) is Parameter or (type(t) is Tensor and not is_functorch_wrapped_tensor(t)))
        and t.shape == shape
        and t.dtype is dtype
        and t.is_cpu
        and t.is_contiguous()
        and not t.is_neg()
    )


def alive(t: Tensor) -> Tensor:
    """Return what a tensor that has left its transform of ``torch.func`` is worth by itself.

    torch's own operators look through such wrappers; they have no address.
    """
    if torch.compiler.is_compiling():
        return t
    found: Tensor = unwrap_if_dead(t)
    return found

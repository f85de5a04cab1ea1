"""What tensors are: plain ones may go the short way of `rnnkern.eager` if nobody watches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, unwrap_if_dead
from torch.autograd import forward_ad
from torch.nn import Parameter

from rnnkern._native import _cpu

_TYPES = (Parameter, Tensor)
# What DLPack calls the types that have kernels: its code, and bits.
_DLPACK_TYPES = {torch.float32: (2, 32), torch.float64: (2, 64), torch.bfloat16: (4, 16)}
# From torch 2.10 on; None where there is none, or one that cannot be used.
_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
if _EXCHANGE is not None and not _cpu.reads_exchange_api(_EXCHANGE):
    _EXCHANGE = None


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


def addresses(
    tensors: list[Tensor], dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]
) -> tuple[int, ...] | None:
    """Return where tensors are if the kernels can read them as they are, None otherwise.

    That is: on the CPU, of `dtype`, of their shapes in `shapes` with the elements side by side, and
    of no type that torch's operators treat otherwise.
    """
    if _EXCHANGE is not None:
        return _cpu.addresses(_EXCHANGE, tensors, _TYPES, *_DLPACK_TYPES[dtype], shapes)
    if not all(_dense(t, dtype, shape) for t, shape in zip(tensors, shapes, strict=True)):
        return None
    return tuple([t.data_ptr() for t in tensors])


def _dense(t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return (
        (type(t) is Parameter or (type(t) is Tensor and not is_functorch_wrapped_tensor(t)))
        and t.shape == shape
        and t.dtype is dtype
        and t.is_cpu
        and t.is_contiguous()
        and not t.is_neg()
        and (t.data_ptr() != 0 or 0 in shape)
    )


def alive(t: Tensor) -> Tensor:
    """Return what a tensor that has left its transform of ``torch.func`` is worth by itself.

    torch's own operators look through such wrappers; they have no address.
    """
    if torch.compiler.is_compiling():
        return t
    found: Tensor = unwrap_if_dead(t)
    return found

"""What the native calls of :mod:`rnnkern.eager` use of torch, and what makes tensors plain.

Only plain tensors may go the short way, and only if nobody watches.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    unwrap_if_dead,
)
from torch.autograd import forward_ad
from torch.nn import Parameter

from rnnkern._native import _cpu

# What DLPack calls the types that have kernels: its code, and bits.
_DLPACK_TYPES = {torch.float32: (2, 32), torch.float64: (2, 64), torch.bfloat16: (4, 16)}
_WATCHERS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._get_tracing_state,
    functools.partial(torch.is_autocast_enabled, "cpu"),
    lambda: forward_ad._current_level >= 0,
)


def connect(*, exchange: bool = True) -> None:
    """Hand the native calls what they use of torch.

    DLPack's table of functions, which torch has from 2.10 on, is left out if not `exchange`, and
    tensors are asked attribute by attribute.
    """
    functions = {
        "tensor": Tensor,
        "parameter": Parameter,
        "describe": _describe,
        "is_neg": Tensor.is_neg,
        "any_requires_grad": torch._C._any_requires_grad,
        "contiguous": Tensor.contiguous,
        "converted": Tensor.to,
        "empty": _empty(),
        "get_threads": torch.get_num_threads,
    }
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None) if exchange else None
    _cpu.use_torch(table, functions, tuple(_DLPACK_TYPES), _WATCHERS)


def _empty() -> Any:
    """Return what makes a tensor on the CPU from (shape, strides, dtype).

    What torch.compile's generated code calls takes half as long as torch.empty, since it does not
    go through the dispatcher, where nobody waits for it here.
    """
    fast = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)
    return _empty_strided if fast is None else fast


def _empty_strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


def _describe(t: Tensor) -> tuple[int, ...] | None:
    """Return (address, DLPack's type code, its bits, *shape, *strides); None without an address."""
    if (
        is_functorch_wrapped_tensor(t)
        or is_legacy_batchedtensor(t)
        or t.layout is not torch.strided
        or not t.is_cpu
        or t.dtype not in _DLPACK_TYPES
    ):
        return None
    return (t.data_ptr(), *_DLPACK_TYPES[t.dtype], *t.shape, *t.stride())


def alive(t: Tensor) -> Tensor:
    """Return what a tensor that has left its transform of ``torch.func`` is worth by itself.

    torch's own operators look through such wrappers; they have no address.
    """
    if torch.compiler.is_compiling():
        return t
    found: Tensor = unwrap_if_dead(t)
    return found


connect()

"""The backend of the CPU; see ``csrc/cpu``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern import kernels
from rnnkern._native import _cpu
from rnnkern.arguments import LayerInputs, Sizes
from rnnkern.cells import Cell
from rnnkern.checks import check_batch_sizes, check_lengths, check_order, check_resets
from rnnkern.kernels import Backend, Steps, address


class Kernels(NamedTuple):
    """The native functions for one type of data."""

    forward: Callable[..., None]
    backward: Callable[..., None]
    infer: Callable[..., None]
    plan: Callable[..., dict[str, Any]]


def _kernels(type: str) -> Kernels:
    return Kernels(*(getattr(_cpu, f"{function}_{type}") for function in Kernels._fields))


KERNELS = {
    torch.float32: _kernels("float32"),
    torch.float64: _kernels("float64"),
    torch.bfloat16: _kernels("bfloat16"),
}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _computes_bfloat16() -> bool:
    found: bool = _cpu.computes_bfloat16()
    return found


def computed(dtype: torch.dtype) -> torch.dtype:
    """Return the type that data of `dtype` is kept and multiplied in.

    bfloat16 needs an ISA with bfloat16 products; otherwise it is converted to float32 and back, and
    so is float16 always.
    """
    native = dtype == torch.bfloat16 and _computes_bfloat16()
    return dtype if dtype in (torch.float32, torch.float64) or native else torch.float32


def summed(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which data of a computed type is summed."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


class _Cpu(Backend):
    """float32, float64, bfloat16; what cannot be computed as it is is converted and back."""

    def computed(self, dtype: torch.dtype) -> torch.dtype:
        return computed(dtype)

    def summed(self, dtype: torch.dtype) -> torch.dtype:
        return summed(dtype)

    @property
    def multiplies(self) -> bool:
        return True

    def forward(self, cell: Cell, like: Tensor, *problem: Any) -> None:
        KERNELS[like.dtype].forward(cell.index, torch.get_num_threads(), *problem)

    def backward(self, cell: Cell, like: Tensor, *problem: Any) -> None:
        KERNELS[like.dtype].backward(cell.index, torch.get_num_threads(), *problem)

    def steps(self, a: LayerInputs, s: Sizes) -> Steps:
        """Return the rows longest first, so that those of a step are the first ones."""
        active = order = offset = padding = None
        if a.batch_sizes is not None:
            active, offset = check_batch_sizes(a.batch_sizes, s)
            order = check_order(a.order, s)
        else:
            lengths = check_lengths(a, s)
            if lengths is not None:
                order = lengths.argsort(descending=True, stable=True)
                steps = torch.arange(s.T)
                active = s.B - torch.searchsorted(lengths.sort().values, steps, right=True)
                padding = steps.unsqueeze(1) >= lengths
        check_resets(a, s)
        resets = None if a.resets is None else a.resets.cpu()
        strides = kernels.time_major_strides(resets, a.batch_first)
        native = (s.T, s.B, *map(address, (active, order, offset, resets)), *strides, 0)
        return Steps(native, (active, order, offset, resets), padding)


BACKEND = _Cpu()
layer = partial(kernels.layer, BACKEND)
layer_backward = partial(kernels.layer_backward, BACKEND)

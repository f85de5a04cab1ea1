"""The backend of the CPU; see ``csrc/cpu``."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern import kernels
from rnnkern._cpu import Stack
from rnnkern._native import _cpu
from rnnkern.arguments import LayerInputs, Sizes
from rnnkern.cells import Cell, get_cell
from rnnkern.checks import check_batch_sizes, check_lengths, check_order, check_resets
from rnnkern.kernels import Backend, Backward, Steps, address

_WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


class Kernels(NamedTuple):
    """The native functions for one type of data."""

    forward: Callable[..., None]
    backward: Callable[..., None]
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
    if dtype is torch.float32 or dtype is torch.float64:
        return dtype
    return dtype if dtype is torch.bfloat16 and _computes_bfloat16() else torch.float32


def summed(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which data of a computed type is summed."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


@lru_cache(maxsize=256)
def stack(
    cell: str,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    bias: bool,
    batch_first: bool,
) -> Stack:
    """Return what runs calls of the module with these attributes; see ``csrc/bind/stack.h``."""
    return Stack(
        get_cell(cell).index,
        input_size,
        hidden_size,
        proj_size or hidden_size,
        num_layers,
        2 if bidirectional else 1,
        bias,
        batch_first,
    )


class _Cpu(Backend):
    """float32, float64, bfloat16; what cannot be computed as it is is converted and back."""

    def computed(self, dtype: torch.dtype) -> torch.dtype:
        return computed(dtype)

    def summed(self, dtype: torch.dtype) -> torch.dtype:
        return summed(dtype)

    def project(self, a: LayerInputs, s: Sizes, steps: Steps, save: bool) -> Tensor:
        # The kernels of bfloat16 write the gates of the steps that run, the others x of every step.
        partly = steps.ragged and a.input.dtype == torch.bfloat16
        new = a.input.new_zeros if partly else a.input.new_empty
        return new((s.N, s.D * s.G * s.H) if save else 0)

    def differentiate(self, run: Backward) -> None:
        """Let the kernels compute every gradient."""
        a, s, wanted, out = run.a, run.s, run.wanted, run.out
        run.add_states(every=False)
        new = torch.zeros_like if s.B == 0 or s.H == 0 else torch.empty_like
        for name in ("input", *_WEIGHTS, *(f"{name}_reverse" for name in _WEIGHTS)):
            t = getattr(a, name)
            kind = a.input.dtype if name == "input" else summed(a.input.dtype)
            out[name] = new(t, dtype=kind) if wanted[name] and t is not None else None
        others = [
            (w_ih, *(out[name + suffix] for name in _WEIGHTS), None, None, None)
            for (w_ih, *_), suffix in zip(a.directions, ("", "_reverse"), strict=False)
        ]
        run.recurrence(run.input_without_padding(), others)

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
                steps = torch.arange(s.T, device=lengths.device)
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

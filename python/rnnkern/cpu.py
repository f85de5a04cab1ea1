"""The backend of the CPU; see ``csrc/cpu``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnnkern import kernels
from rnnkern._native import _cpu
from rnnkern.arguments import LayerInputs, Sizes
from rnnkern.cells import Cell
from rnnkern.checks import check_batch_sizes, check_lengths, check_order, check_resets
from rnnkern.kernels import Backend, Steps, address


class _Cpu(Backend):
    """float32 and float64; 16-bit data is converted to float32 and back."""

    def computed(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def summed(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    @property
    def multiplies(self) -> bool:
        return True

    def forward(self, cell: Cell, like: Tensor, *problem: Any) -> None:
        run = _cpu.forward_float64 if like.dtype == torch.float64 else _cpu.forward_float32
        run(cell.index, torch.get_num_threads(), *problem)

    def backward(self, cell: Cell, like: Tensor, *problem: Any) -> None:
        run = _cpu.backward_float64 if like.dtype == torch.float64 else _cpu.backward_float32
        run(cell.index, torch.get_num_threads(), *problem)

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

"""The arguments and the sizes of the two operators, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern.cells import Cell


class LayerInputs(NamedTuple):
    """The arguments that both operators share, in the order of their schema."""

    cell: str
    input: Tensor  # [T,B,I]; [B,T,I] with batch_first; [N,I] with batch_sizes
    h0: Tensor  # [D,B,P]
    c0: Tensor | None  # [D,B,H]
    w_ih: Tensor  # [G·H,I]
    w_hh: Tensor  # [G·H,P]
    b_ih: Tensor | None  # [G·H]
    b_hh: Tensor | None  # [G·H]
    w_hr: Tensor | None  # [P,H]
    w_ih_reverse: Tensor | None
    w_hh_reverse: Tensor | None
    b_ih_reverse: Tensor | None
    b_hh_reverse: Tensor | None
    w_hr_reverse: Tensor | None
    batch_sizes: Tensor | None  # int64 [T], on the CPU
    order: Tensor | None  # int64 [B], the batch row at each sorted position of packed data
    lengths: Tensor | None  # int64 [B]
    resets: Tensor | None  # bool [T,B]; [B,T] with batch_first
    reset_h: Tensor | None  # [D,B,P]
    reset_c: Tensor | None  # [D,B,H]
    batch_first: bool

    @property
    def directions(
        self,
    ) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]]:
        """The weights (w_ih, w_hh, b_ih, b_hh, w_hr) of each direction."""
        one = [(self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr)]
        if self.w_ih_reverse is None or self.w_hh_reverse is None:
            return one
        reverse = (self.w_ih_reverse, self.w_hh_reverse, self.b_ih_reverse, self.b_hh_reverse)
        return [*one, (*reverse, self.w_hr_reverse)]


DIFFERENTIABLE = (
    *("input", "h0", "c0"),
    *("w_ih", "w_hh", "b_ih", "b_hh", "w_hr"),
    *("w_ih_reverse", "w_hh_reverse", "b_ih_reverse", "b_hh_reverse", "w_hr_reverse"),
    *("reset_h", "reset_c"),
)
POSITIONS = tuple(LayerInputs._fields.index(name) for name in DIFFERENTIABLE)


class BackwardInputs(NamedTuple):
    """The arguments of ``layer_backward`` beyond those of the layer."""

    gates: Tensor  # [N,D·G·H], activated
    h_prev: Tensor  # [D,N,P], or [D,N,0] where backward recovers it
    saved: Tensor  # [D,N,K·H]
    dy: Tensor | None  # like y
    dhn: Tensor | None  # [D,B,P]
    dcn: Tensor | None  # [D,B,H]
    output_mask: Sequence[bool]  # one entry for each of DIFFERENTIABLE


LAYER_FIELDS = len(LayerInputs._fields)


def split(args: Sequence[Any]) -> tuple[LayerInputs, BackwardInputs]:
    """Return the arguments of ``layer_backward`` by name."""
    return LayerInputs(*args[:LAYER_FIELDS]), BackwardInputs(*args[LAYER_FIELDS:])


class Sizes(NamedTuple):
    """The sizes of one call, in the notation of ``csrc/core/problem.h``."""

    T: int
    B: int
    N: int  # data rows
    I: int
    H: int
    P: int
    D: int
    G: int


def sizes_of(a: LayerInputs, cell: Cell) -> Sizes:
    """Return the sizes that the shapes of the arguments imply; nothing is checked."""
    D, B, P = a.h0.shape
    H = P if a.w_hr is None else a.w_hr.shape[1]
    if a.batch_sizes is not None:
        N, I = a.input.shape
        T = a.batch_sizes.shape[0]
    else:
        T, _, I = a.input.shape
        if a.batch_first:
            T = a.input.shape[1]
        N = T * B
    return Sizes(T, B, N, I, H, P, D, cell.gates)


class Kept(NamedTuple):
    """The shapes of what forward keeps for backward."""

    gates: tuple[int, int]
    h_prev: tuple[int, int, int]
    saved: tuple[int, int, int]


# Where the kernels of backward recover h' if the cell can; on CUDA dR is one GEMM over all of it.
RECOVERING = frozenset({"cpu", "meta"})


def recovers_h_prev(cell: Cell, projects: bool, kept: torch.dtype) -> bool:
    """Return whether those kernels do, where what is kept has that type."""
    return cell.recovers and not projects and kept in (torch.float32, torch.float64)


def kept_shapes(a: LayerInputs, s: Sizes, cell: Cell, dtype: torch.dtype) -> Kept:
    """Return the shapes of what a call keeps, in that type, on the input's device."""
    recovers = a.input.device.type in RECOVERING
    recovered = recovers and recovers_h_prev(cell, a.w_hr is not None, dtype)
    return Kept(
        (s.N, s.D * s.G * s.H),
        (s.D, s.N, 0 if recovered else s.P),
        (s.D, s.N, cell.saved * s.H),
    )

"""The operators on a native backend: addresses for the kernels, and the products around them.

What differs between devices is a :class:`Backend`; ``cpu`` and ``cuda`` have one each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern.arguments import (
    DIFFERENTIABLE,
    POSITIONS,
    BackwardInputs,
    LayerInputs,
    Sizes,
    kept_shapes,
    split,
)
from rnnkern.cells import Cell, get_cell
from rnnkern.checks import check_backward, check_layer


class Steps(NamedTuple):
    """Which rows run at which step: the native core's Sequence, and the tensors it points into."""

    native: tuple[int, ...]
    keep: tuple[Tensor | None, ...]
    padding: Tensor | None  # bool [T,B], the steps beyond their row's length

    @property
    def ragged(self) -> bool:
        """Whether there are steps that no row runs."""
        return self.padding is not None


class Backend(ABC):
    """What one kind of device does in its own way."""

    @abstractmethod
    def computed(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type of the kernels' data, which is also kept for backward."""

    @abstractmethod
    def summed(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type in which gradients are summed over steps, for data of `dtype`."""

    @abstractmethod
    def steps(self, a: LayerInputs, s: Sizes) -> Steps:
        """Check what steers the steps, and return it as the kernels read it."""

    @abstractmethod
    def project(self, a: LayerInputs, s: Sizes, steps: Steps, save: bool) -> Tensor:
        """Return x [N,D·G·H], or only its place (with `save`) where the kernels compute it."""

    @abstractmethod
    def differentiate(self, run: Backward) -> None:
        """Compute every gradient that is wanted into ``run.out``."""

    @abstractmethod
    def forward(self, cell: Cell, like: Tensor, *problem: Any) -> None:
        """Run the recurrence; `problem`: sequence, sizes, training, directions."""

    @abstractmethod
    def backward(self, cell: Cell, like: Tensor, *problem: Any) -> None:
        """Run it backward; `problem`: sequence, sizes, directions."""


def time_major_strides(t: Tensor | None, batch_first: bool) -> tuple[int, int]:
    """Return the strides of steps and rows in a [T,B] tensor, [B,T] with `batch_first`."""
    if t is None:
        return 0, 0
    a, b = t.stride()
    return (b, a) if batch_first else (a, b)


def address(t: Tensor | None, offset: int = 0) -> int:
    """Return the address `offset` bytes after the first element's; 0 for None."""
    return 0 if t is None else t.data_ptr() + offset


def _converted(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``t.to(dtype)``, without its overhead where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def _computed(a: LayerInputs, dtype: torch.dtype) -> LayerInputs:
    """Return the inputs contiguous and in the type the kernel computes in."""
    values: list[Any] = list(a)
    for i in POSITIONS:
        if values[i] is not None:
            values[i] = _converted(values[i], dtype).contiguous()
    return LayerInputs._make(values)


def _rows(t: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return time-major data [T,B,...] as rows, uncopied where possible, and row strides."""
    T, B = t.shape[:2]
    if not t.is_contiguous() and t.transpose(0, 1).is_contiguous():
        return t.transpose(0, 1), (1, T)
    return t.contiguous(), (B, 1)


def _input_rows(a: LayerInputs, s: Sizes) -> tuple[int, int]:
    return (1, s.T) if a.batch_first else (s.B, 1)


def layer(backend: Backend, *args: Any) -> tuple[Tensor, ...]:
    """Run ``rnnkern::layer``."""
    a, save = LayerInputs(*args[:-1]), args[-1]
    cell, dtype = get_cell(a.cell), a.input.dtype
    s = check_layer(a, cell)
    steps = backend.steps(a, s)
    a = _computed(a, backend.computed(dtype))
    new = a.input.new_zeros if steps.ragged else a.input.new_empty
    x = backend.project(a, s, steps, save)
    y = new((s.N, s.D * s.P) if a.batch_sizes is not None else (s.T, s.B, s.D * s.P))
    kept = kept_shapes(a, s, cell, a.input.dtype)
    h_prev, saved = (new(shape if save else 0) for shape in (kept.h_prev, kept.saved))
    hn = torch.empty_like(a.h0)
    cn = a.input.new_empty(0) if a.c0 is None else torch.empty_like(a.c0)
    if s.B > 0 and s.H > 0:
        directions = tuple(
            (
                d == 1,
                *map(address, (w_ih, b_ih, w_hh, b_hh, w_hr)),
                x.data_ptr() + d * s.G * s.H * x.element_size(),
                *(address(None if t is None else t[d]) for t in (a.h0, a.c0, a.reset_h, a.reset_c)),
                hn[d].data_ptr(),
                address(None if a.c0 is None else cn[d]),
                y.data_ptr() + d * s.P * y.element_size(),
                *((h_prev[d].data_ptr(), saved[d].data_ptr()) if save else (0, 0)),
            )
            for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(a.directions)
        )
        sizes = (s.H, s.P, _input_rows(a, s), (s.B, 1), s.I, a.input.data_ptr())
        backend.forward(cell, x, steps.native, sizes, save, directions)
    gates = x if save else x.new_empty(0)
    y, hn, cn = (_converted(t, dtype) for t in (y, hn, cn))
    return y, hn, cn, gates, h_prev, saved


def layer_backward(backend: Backend, *args: Any) -> tuple[Tensor, ...]:
    """Run ``rnnkern::layer_backward``."""
    a, g = split(args)
    cell, dtype = get_cell(a.cell), a.input.dtype
    s = check_layer(a, cell)
    computed = backend.computed(dtype)
    check_backward(s, a, g, kept_shapes(a, s, cell, computed), computed)
    steps = backend.steps(a, s)
    a = _computed(a, computed)
    wanted = dict(zip(DIFFERENTIABLE, g.output_mask, strict=True))
    dy, dhn, dcn = (
        None if t is None else _converted(t, a.input.dtype) for t in (g.dy, g.dhn, g.dcn)
    )
    y_rows = (s.B, 1)
    if dy is not None:
        dy, y_rows = (dy.contiguous(), y_rows) if a.batch_sizes is not None else _rows(dy)
    dhn, dcn = (None if t is None else t.contiguous() for t in (dhn, dcn))
    run = Backward(backend, a, g, cell, s, steps, wanted, {}, (dy, dhn, dcn), y_rows)
    backend.differentiate(run)
    results = (run.out.get(name) if on else None for name, on in wanted.items())
    return tuple(
        a.input.new_empty(0, dtype=dtype) if t is None else _converted(t, dtype) for t in results
    )


class Backward(NamedTuple):
    """One call of ``layer_backward``."""

    backend: Backend
    a: LayerInputs
    g: BackwardInputs
    cell: Cell
    s: Sizes
    steps: Steps
    wanted: dict[str, bool]
    out: dict[str, Tensor | None]
    incoming: tuple[Tensor | None, Tensor | None, Tensor | None]  # dy, dhn, dcn
    y_rows: tuple[int, int]

    def add_states(self, every: bool) -> None:
        """Make room for the gradients of the states that are wanted, or of `every` initial one."""
        for name in ("h0", "c0", "reset_h", "reset_c"):
            t, initial = getattr(self.a, name), not name.startswith("reset")
            kind = self.a.input.dtype if initial else self.backend.summed(self.a.input.dtype)
            needed = t is not None and (self.wanted[name] or (every and initial))
            self.out[name] = torch.zeros_like(t, dtype=kind) if needed else None

    def input_without_padding(self) -> Tensor:
        """Return the input with zeros in the padding, where 0·NaN would make a NaN gradient."""
        if self.steps.padding is None:
            return self.a.input
        padding = self.steps.padding.t() if self.a.batch_first else self.steps.padding
        return self.a.input.masked_fill(padding.unsqueeze(-1), 0)

    def recurrence(self, input: Tensor | None, others: Sequence[Sequence[Tensor | None]]) -> None:
        """Run the kernels; `others`: what each direction has besides."""
        a, g, s = self.a, self.g, self.s
        if s.B == 0 or s.H == 0:
            return

        def at(t: Tensor | None, d: int) -> int:
            return 0 if t is None else t[d].data_ptr()

        dy, dhn, dcn = self.incoming
        directions = tuple(
            (
                d == 1,
                *map(address, (w_hh, w_hr)),
                g.gates.data_ptr() + d * s.G * s.H * g.gates.element_size(),
                *(at(t, d) for t in (g.h_prev, g.saved, a.h0, a.reset_h)),
                0 if dy is None else dy.data_ptr() + d * s.P * dy.element_size(),
                *(at(t, d) for t in (dhn, dcn)),
                *(at(self.out[name], d) for name in ("h0", "c0", "reset_h", "reset_c")),
                *map(address, others[d]),
            )
            for d, (_, w_hh, _, _, w_hr) in enumerate(a.directions)
        )
        rows, dinput = _input_rows(a, s), self.out.get("input")
        sizes = (s.H, s.P, rows, self.y_rows, s.I, address(input), address(dinput))
        self.backend.backward(self.cell, a.input, self.steps.native, sizes, directions)

"""The list of cases, for ``rnnkern bench`` and for ``bench/test_layers.py`` alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
"""Cells by the names of their modules, in ``torch.nn`` and here."""
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
MODES = ("inference", "training")
SHORTEST, LONGEST = 10, 200
"""Lengths of packed sequences lie between these, evenly spread."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes
    ----------
    cell, mode : str
        A key of `CELLS`, and one of `MODES`: forward under a ``no_grad`` around all calls, or
        forward and backward with the gradients of the input and of all weights.
    T, B, H : int
        Steps, rows of the batch, hidden units; a packed case has up to T steps.
    layers : int
        Layers.
    bidirectional, packed : bool
        Both directions; a PackedSequence of different lengths.
    proj : int
        Width of LSTM's projection, or 0.
    dtype : str
        ``"float32"`` or ``"bfloat16"``: of input and weights.
    base : bool
        Whether it is of the list of plain sizes, which the targets are about.
    """

    cell: str
    mode: str
    T: int
    B: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    proj: int = 0
    dtype: str = "float32"
    base: bool = False

    @property
    def name(self) -> str:
        """Its name, e.g. ``"lstm-training-100x32x256-layers2"``."""
        return f"{self.cell}-{self.mode}-{self.shape}"

    @property
    def shape(self) -> str:
        """Its sizes and what is special, e.g. ``"100x32x256-layers2"``."""
        special = (
            (self.layers > 1, f"layers{self.layers}"),
            (self.bidirectional, "bidirectional"),
            (self.packed, "packed"),
            (self.proj > 0, f"proj{self.proj}"),
            (self.dtype == "bfloat16", "bf16"),
        )
        words = [f"{self.T}x{self.B}x{self.H}", *(word for there, word in special if there)]
        return "-".join(words)

    @property
    def directions(self) -> int:
        """The number of directions."""
        return 1 + self.bidirectional

    @property
    def features(self) -> int:
        """The features of the input: those of the cell's state, so I = H (or the projection)."""
        return self.H

    @property
    def state_width(self) -> int:
        """The width of h: H, or that of the projection."""
        return self.proj or self.H

    @property
    def lengths(self) -> list[int]:
        """The length of each row, longest first."""
        if not self.packed:
            return [self.T] * self.B
        spread = max(1, self.B - 1)
        low = min(SHORTEST, self.T)
        return [self.T - round(row * (self.T - low) / spread) for row in range(self.B)]

    @property
    def rows(self) -> list[int]:
        """The number of rows that are active in each step, [T]."""
        return [sum(length > t for length in self.lengths) for t in range(self.T)]


BASE_SHAPES = (
    (1, 1, 64),
    (1, 1, 256),
    (1000, 1, 32),
    (100, 1, 128),
    (100, 1, 256),
    (100, 1, 512),
    (500, 16, 64),
    (100, 8, 256),
    (100, 32, 128),
    (100, 32, 256),
    (100, 32, 512),
    (50, 64, 512),
    (50, 64, 1024),
)
"""T, B, H of the plain cases."""
BFLOAT16_SHAPES = ((100, 1, 256), (100, 32, 256), (50, 64, 1024))
QUICK_SHAPES = ("1x1x64", "100x1x256", "100x8x256", "100x32x256", "100x32x256-bf16")


def all_cases() -> list[Case]:
    """Return every case, shape by shape."""
    plain = Case("lstm", "inference", 1, 1, 1)
    shapes = [replace(plain, T=T, B=B, H=H, base=True) for T, B, H in BASE_SHAPES]
    shapes += [
        replace(plain, T=100, B=32, H=256, layers=2),
        replace(plain, T=100, B=16, H=128, bidirectional=True),
        replace(plain, T=LONGEST, B=32, H=256, packed=True),
        replace(plain, T=100, B=16, H=512, proj=256),
        replace(plain, T=100, B=8, H=100),
        replace(plain, T=100, B=8, H=333),
    ]
    shapes += [replace(plain, T=T, B=B, H=H, dtype="bfloat16") for T, B, H in BFLOAT16_SHAPES]
    return [
        replace(shape, cell=cell, mode=mode)
        for cell in CELLS
        for mode in MODES
        for shape in shapes
        if cell == "lstm" or not shape.proj
    ]


def select(
    cases: Sequence[Case],
    *,
    quick: bool = False,
    cells: Sequence[str] = (),
    modes: Sequence[str] = (),
    substrings: Sequence[str] = (),
) -> list[Case]:
    """Choose among cases; an empty filter lets everything through.

    Parameters
    ----------
    cases : sequence of Case
        To choose from.
    quick : bool
        Only the few shapes of ``--quick``.
    cells, modes : sequence of str
        Only these.
    substrings : sequence of str
        Only cases whose names contain one of these.

    Returns
    -------
    list of Case
        Those that pass all filters, in their order.
    """
    return [
        case
        for case in cases
        if (not quick or case.shape in QUICK_SHAPES)
        and (not cells or case.cell in cells)
        and (not modes or case.mode in modes)
        and (not substrings or any(part in case.name for part in substrings))
    ]

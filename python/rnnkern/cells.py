"""The cells the native core registers, by name.

The table is read from the extension (``csrc/cells/registry.h``), so that it exists once.
"""

from __future__ import annotations

from dataclasses import dataclass

from rnnkern._native import _cpu


@dataclass(frozen=True)
class Cell:
    """What Python must know of a cell; the fields are those of the contract, ``core/cell.h``."""

    index: int
    name: str
    gates: int
    states: int
    saved: int
    phases: int
    last_phase: int
    extra: str
    projects: bool
    recovers: bool


CELLS: dict[str, Cell] = {
    fields["name"]: Cell(index, **fields) for index, fields in enumerate(_cpu.cells())
}


def get_cell(name: str) -> Cell:
    """Return the cell called `name`.

    Raises
    ------
    ValueError
        If there is none; the message lists those there are.
    """
    try:
        return CELLS[name]
    except KeyError:
        known = ", ".join(CELLS)
        raise ValueError(f"cell: expected one of {known}, got {name!r}") from None

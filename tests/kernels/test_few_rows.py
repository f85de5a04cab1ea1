"""Calls of at most four rows read every matrix as it is, unpacked; the next larger one packs it."""

from __future__ import annotations

import pytest
import torch
from cases import KERNELS, Case, assert_matches, build, clear_of_kink, evaluate, expected, use_isa
from rnnkern.cells import CELLS


# More than a tile's 64 units with a tail, more than a chain of 128 elements with an odd one; tails
# in the last of four chains.
@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 3), (2, 2), (4, 1), (5, 1)])
@pytest.mark.parametrize(("I", "H"), [(1, 7), (7, 1), (67, 131), (60, 120)])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("isa", "dtype"), KERNELS, ids=str)
def test_few_rows(isa: str, dtype: torch.dtype, cell: str, I: int, H: int, T: int, B: int) -> None:
    P = 33 if CELLS[cell].projects and H > 33 else 0
    args = build(Case(cell, T=T, B=B, I=I, H=H, P=P, D=2), dtype)
    if dtype == torch.bfloat16:
        args = clear_of_kink(args)
    wanted = expected(args)
    with use_isa(isa):
        assert_matches(evaluate(args), wanted, dtype=dtype)

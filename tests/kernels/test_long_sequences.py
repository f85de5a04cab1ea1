"""Sequences of a million steps, and training over a hundred thousand."""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_matches, build, evaluate, run_op
from rnnkern.cells import CELLS
from rnnkern.ops import LayerInputs
from torch import Tensor

DTYPE = torch.float64
cells = pytest.mark.parametrize("cell", CELLS)


@cells
def test_a_million_steps(cell: str) -> None:
    T = 1_000_000
    args = build(Case(cell, T=T, B=1, I=2, H=4), torch.float32)
    with torch.no_grad():
        y, *finals = run_op(args, save=False)
        assert y.shape == (T, 1, 4)
        assert bool(y.isfinite().all())
        # The end is what a run gives that only sees the end: these cells forget in 2000 steps.
        late, *late_finals = run_op(args._replace(input=args.input[-2500:]), save=False)
    assert_matches({"y": late[-500:]}, {"y": y[-500:].double()}, dtype=torch.float32)
    for a, e in zip(late_finals, finals, strict=True):
        assert_matches({"hn": a}, {"hn": e.double()}, dtype=torch.float32)


@cells
def test_training_over_a_hundred_thousand_steps(cell: str) -> None:
    T, cut = 100_000, 99_000
    resets = torch.zeros(T, 1, dtype=torch.bool)
    resets[cut] = True
    args = build(Case(cell, T=T, B=1, I=2, H=4, D=2), DTYPE)._replace(resets=resets)

    def last_segment(own: LayerInputs) -> tuple[Tensor, ...]:
        return (run_op(own)[0][cut:],)

    found = evaluate(args, last_segment)
    short = args._replace(input=args.input[cut:], resets=resets[cut:])
    wanted = evaluate(short, lambda own: (run_op(own)[0],))
    assert bool((found["dinput"][:cut] == 0).all())
    assert torch.equal(found["dinput"][cut:], wanted["dinput"])
    for name in ("y", "dw_ih", "dw_hh"):
        assert_matches({name: found[name]}, {name: wanted[name]}, dtype=DTYPE)

"""The states that a step started from, where the CPU's backward makes them of what else is kept."""

from __future__ import annotations

import pytest
import torch
from cases import ISAS, Case, build, leaves, run_op, use_isa
from rnnkern.cells import CELLS
from torch import Tensor

RECOVERING = [name for name, cell in CELLS.items() if cell.recovers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize(("B", "H"), [(1, 7), (2, 33), (7, 96)])
@pytest.mark.parametrize("cell", RECOVERING)
def test_to_the_last_bit(
    cell: str, B: int, H: int, direction: int, isa: str, dtype: torch.dtype
) -> None:
    """One row has a gradient, its state after two steps; dW of a unit input is dr of the second."""
    args = build(Case(cell, T=2, B=B, I=3, H=H, D=2), dtype)
    first, second = (1, 0) if direction else (0, 1)
    input = torch.zeros_like(args.input)
    input[second, :, 0] = 1
    input[first, :, 1] = 3  # of another feature
    suffix = "_reverse" if direction else ""
    args = leaves(args._replace(input=input, h0=torch.zeros_like(args.h0)))
    names = ("w_ih" + suffix, "w_hh" + suffix)
    half = slice(direction * H, (direction + 1) * H)
    with use_isa(isa):
        y = run_op(args)[0]
        dy = torch.zeros_like(y)
        dy[second, B - 1, half] = torch.linspace(1, 2, H, dtype=dtype)
        dW, dR = torch.autograd.grad(y, [getattr(args, name) for name in names], dy)
    assert dW[:, 0].count_nonzero() > 0
    assert torch.equal(dR, torch.outer(dW[:, 0], y[first, B - 1, half].detach()))


def doubled(t: Tensor) -> None:
    with torch.no_grad():
        t.mul_(2)


@pytest.mark.parametrize("changed", ["h0", "reset_h"])
@pytest.mark.parametrize("cell", RECOVERING)
def test_states_changed_before_backward_are_noticed(cell: str, changed: str) -> None:
    args = leaves(build(Case(cell, resets=True, reset_state=True)))
    y = run_op(args)[0]
    doubled(getattr(args, changed))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("cell", RECOVERING)
def test_results_may_be_changed(cell: str) -> None:
    args = leaves(build(Case(cell, D=2, resets=True)))
    wanted = torch.autograd.grad(run_op(args)[0].sum(), args.w_hh)[0]
    y = run_op(args)[0]
    loss = y.sum()
    doubled(y)
    assert torch.equal(torch.autograd.grad(loss, args.w_hh)[0], wanted)

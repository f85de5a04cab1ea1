"""First and second derivatives against finite differences, for every cell and feature."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Case, build, feature_cases, leaves, run_op
from rnnkern.cells import CELLS
from rnnkern.ops import DIFFERENTIABLE, LayerInputs
from torch import Tensor

CASES = feature_cases(T=3, B=3, I=2, H=3)
cases = pytest.mark.parametrize("case", CASES, ids=str)


def as_function(
    args: LayerInputs, save: bool = True
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return the operator as a function of its differentiable arguments, and those."""
    own = leaves(args)
    names = [name for name in DIFFERENTIABLE if getattr(own, name) is not None]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return run_op(own._replace(**dict(zip(names, tensors, strict=True))), save)

    return function, tuple(getattr(own, name) for name in names)


def smooth(args: LayerInputs) -> LayerInputs:
    """Keep the relu cell off its kink, where finite differences say nothing.

    Positive weights and a positive bias keep every unit active; a last unit is always inactive.
    """
    if args.cell != "rnn_relu":
        return args

    def change(name: str) -> Tensor | None:
        tensor: Tensor | None = getattr(args, name)
        if tensor is None or not name.startswith(("w_", "b_")):
            return None if tensor is None else tensor.abs() + 0.1
        shifted = tensor.abs() + 0.1
        shifted[-1] *= -1
        return shifted

    return args._replace(**{name: change(name) for name in DIFFERENTIABLE})


@cases
def test_first_derivatives(case: Case) -> None:
    function, tensors = as_function(smooth(build(case)))
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("P", [0, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_first_derivatives_entry_by_entry(cell: str, P: int) -> None:
    if P and not CELLS[cell].projects:
        P = 0
    case = Case(cell, T=3, B=2, I=2, H=3, P=P, D=2, lengths=True, resets=True, reset_state=True)
    function, tensors = as_function(smooth(build(case)))
    assert torch.autograd.gradcheck(function, tensors)


@cases
def test_second_derivatives(case: Case) -> None:
    function, tensors = as_function(smooth(build(case)))
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_saved(cell: str) -> None:
    """A call that saved nothing repeats the forward pass when a gradient is asked for after all."""
    function, tensors = as_function(smooth(build(Case(cell, T=3, B=2, H=3, D=2))), save=False)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("used", ["y", "hn", "cn"])
def test_one_output_alone(cell: str, used: str) -> None:
    """A loss that reads one output only: the other output gradients are absent, not zero."""
    if used == "cn" and CELLS[cell].states == 1:
        used = "hn"
    index = ("y", "hn", "cn").index(used)
    case = Case(cell, T=3, B=2, I=2, H=3, D=2, lengths=True, resets=True, reset_state=True)
    function, tensors = as_function(smooth(build(case)))

    def one(*inputs: Tensor) -> Tensor:
        return function(*inputs)[index]

    assert torch.autograd.gradcheck(one, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(one, tensors, fast_mode=True)


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_third_derivatives(cell: str) -> None:
    args = build(Case(cell, T=2, B=1, I=1, H=2))
    function, tensors = as_function(args)

    def gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
        total = sum(output.square().sum() for output in function(*inputs))
        return torch.autograd.grad(total, inputs, create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, tensors, fast_mode=True)

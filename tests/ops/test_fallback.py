"""The operators on CUDA tensors where no kernel runs: the reference, with one warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from cases import (
    Case,
    assert_matches,
    build,
    cuda_operators,
    evaluate,
    expected,
    feature_cases,
    leaves,
    run_op,
)
from ops.test_gradcheck import as_function, smooth
from ops.test_opcheck import QUICK, backward_arguments
from rnnkern.cells import CELLS
from rnnkern.ops import DIFFERENTIABLE
from torch import Tensor

OP = torch.ops.rnnkern.layer.default
BACKWARD = torch.ops.rnnkern.layer_backward.default
cases = pytest.mark.parametrize("case", feature_cases(T=4, B=3, I=2, H=5), ids=str)
cells = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(autouse=True)
def _without_kernels() -> Iterator[None]:
    with cuda_operators(None, "a build without CUDA kernels"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rnnkern: a build without CUDA kernels")
        yield


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    args = build(case, dtype)
    needs = () if case.cell == "rnn_relu" and dtype == torch.bfloat16 else DIFFERENTIABLE
    assert_matches(evaluate(args, needs=needs), expected(args, needs=needs), dtype=dtype)


def test_it_is_told_once() -> None:
    args = build(Case("lstm"))
    with pytest.warns(UserWarning, match="a build without CUDA kernels; the reference runs"):
        run_op(args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(args)


@cases
def test_the_operators_are_whole(case: Case) -> None:
    args = leaves(build(case))
    torch.library.opcheck(OP, (*args, True), test_utils=QUICK)
    torch.library.opcheck(OP, (*args, False), test_utils=QUICK)
    torch.library.opcheck(BACKWARD, backward_arguments(args), test_utils=QUICK)


@cells
def test_derivatives(cell: str) -> None:
    case = Case(cell, T=3, B=2, H=3, D=2, lengths=True, resets=True, reset_state=True)
    function, tensors = as_function(smooth(build(case)))
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@cells
def test_backward_called_directly(cell: str, mode: type[torch.no_grad]) -> None:
    args = build(Case(cell, D=2))
    wanted = torch.autograd.grad(run_op(leaf := leaves(args))[0].sum(), leaf.w_hh)[0]
    with mode():
        args = args._replace(input=args.input.clone())  # a tensor of this mode
        y, _, _, *kept = OP(*args, True)
        mask = [name == "w_hh" for name in DIFFERENTIABLE]
        found = BACKWARD(*args, *kept, torch.ones_like(y), None, None, mask)
        nothing = BACKWARD(*args, *kept, None, None, None, mask)
    asked: dict[str, Tensor] = dict(zip(DIFFERENTIABLE, found, strict=True))
    assert torch.equal(asked.pop("w_hh"), wanted)
    assert not wanted.equal(torch.zeros_like(wanted))
    assert all(t.numel() == 0 for t in asked.values())
    assert torch.equal(nothing[DIFFERENTIABLE.index("w_hh")], torch.zeros_like(wanted))


def test_what_the_kernels_refuse_is_refused() -> None:
    args = build(Case("lstm", lengths=True))
    for change in ({"lengths": torch.tensor([1, 2, 9])}, {"w_hh": args.w_hh[1:]}):
        with pytest.raises(ValueError, match=next(iter(change))):
            run_op(args._replace(**change))

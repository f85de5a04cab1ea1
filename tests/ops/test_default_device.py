"""Calls with data on the CPU while torch's default device is another one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import rnnkern
import torch
from cases import Case, assert_identical, build, evaluate, feature_cases, leaves, run_op
from rnnkern.fallback import reference_layer
from rnnkern.ops import LayerInputs
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

RUNS: dict[str, Callable[[LayerInputs], tuple[Tensor, ...]]] = {
    "kernels": run_op,
    "reference": reference_layer,
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("case", feature_cases(T=4, B=3, I=2, H=5), ids=str)
def test_operators(case: Case, run: str) -> None:
    args = build(case)
    wanted = evaluate(args, RUNS[run])
    own = leaves(args)
    with torch.device("meta"):
        found = evaluate(own, RUNS[run])
    assert_identical(found, wanted)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_modules(name: str, packed: bool) -> None:
    """Inference, training, two layers, and a derivative of a derivative, all without a state."""
    module = getattr(rnnkern, name)(3, 4, num_layers=2, bidirectional=True)
    rows = pack_sequence([torch.randn(T, 3) for T in (5, 2, 4)], enforce_sorted=False)
    data = (rows.data if packed else torch.randn(5, 2, 3)).requires_grad_()
    x = rows._replace(data=data) if packed else data

    def call() -> list[Tensor]:
        y = module(x)[0]
        y = y.data if packed else y
        (dx,) = torch.autograd.grad(y.square().sum(), data, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), data)
        with torch.no_grad():
            z = module(x)[0]
        return [y, dx, ddx, z.data if packed else z]

    wanted = call()
    with torch.device("meta"):
        found = call()
    for f, w in zip(found, wanted, strict=True):
        assert f.device == w.device
        assert torch.equal(f, w)

"""Modules on a GPU against torch's own there, which are cuDNN's, and exactly by float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import rnnkern
import torch
from gpu.flags import tf32
from gpu.kinks import smooth_pair
from pairs import on_cpu, pair, run
from parity.test_inputs import KINDS
from rnnkern.cuda_precision import uses_tf32
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("kernels"),
]
DEVICE = "cuda"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
kinds = pytest.mark.parametrize(("name", "extra"), KINDS, ids=str)
plans = pytest.mark.usefixtures("each_plan")


def gradients(module: nn.Module, x: Any, leaf: Tensor) -> list[Tensor]:
    y, states = module(x)
    y = y.data if hasattr(y, "data") and not isinstance(y, Tensor) else y
    states = states if isinstance(states, tuple) else (states,)
    grads = torch.autograd.grad(y.float().square().mean(), [leaf, *module.parameters()])
    return [y, *states, *grads]


def made(
    name: str, extra: dict[str, Any], dtype: torch.dtype, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """Return torch's module and ours; those of relu have no pre-activation near its kink."""
    theirs, ours = smooth_pair(name, 24, 48, **options, **extra)
    return theirs.to(DEVICE, dtype), ours.to(DEVICE, dtype)


def assert_like_cudnn(
    theirs: nn.Module, ours: nn.Module, dtype: torch.dtype, packed: bool = False
) -> None:
    """Compare outputs, states and gradients on batch-first data."""
    x = torch.randn(5, 30, 24, device=DEVICE, dtype=dtype, requires_grad=True)
    lengths = torch.tensor([30, 7, 1, 22, 30])
    results = []
    for module in (ours, theirs):
        data: Any = x
        if packed:  # each with a graph of its own, which the first backward frees
            data = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        results.append([t.detach() for t in gradients(module, data, x)])
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-3}.get(dtype, 5e-2)
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        limit = tolerance * max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=limit)


@kinds
@plans
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("both", [False, True], ids=["one_direction", "both"])
def test_modules_against_cudnn(
    name: str,
    extra: dict[str, Any],
    dtype: torch.dtype,
    packed: bool,
    both: bool,
) -> None:
    modules = made(name, extra, dtype, num_layers=2, bidirectional=both, batch_first=True)
    assert_like_cudnn(*modules, dtype, packed)


# ---- TF32 ---------------------------------------------------------------------------------------
@kinds
@plans
@pytest.mark.parametrize("products", [False, True])
def test_tf32_against_cudnn(name: str, extra: dict[str, Any], products: bool) -> None:
    """As cuDNN's flag has it, whatever that of the products says: exact, as torch starts."""
    modules = made(name, extra, torch.float32, batch_first=True)
    with tf32(products=products, layers=True):
        assert uses_tf32(30)
        assert_like_cudnn(*modules, torch.float32)


@kinds
@plans
@pytest.mark.parametrize("products", [False, True])
def test_without_tf32_against_float64(name: str, extra: dict[str, Any], products: bool) -> None:
    """Exact by cuDNN's flag, as torch's layers are, whatever that of the products says."""
    theirs, ours = made(name, extra, torch.float32)
    x = torch.randn(30, 5, 24)
    wanted = run(copy.deepcopy(theirs).cpu().double(), x.double())
    with tf32(products=products, layers=False):
        assert not uses_tf32(30)
        found = on_cpu(run(ours, x.to(DEVICE)))
    for key, value in wanted.outputs.items():
        y = found.outputs[key].double()
        assert_close(y, value, kind="output", dtype=torch.float32, name=key)
    for key, gradient in wanted.grads.items():
        own = found.grads[key]
        assert own is not None
        assert gradient is not None
        assert_close(own.double(), gradient, kind="gradient", dtype=torch.float32, name=key)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_the_flag_decides_on_tensor_cores(name: str) -> None:
    module = getattr(rnnkern, name)(24, 48).to(DEVICE)
    x = torch.randn(30, 5, 24, device=DEVICE)
    able = torch.cuda.get_device_capability() >= (8, 0)
    for allowed in (False, True):
        with tf32(products=allowed, layers=allowed):
            told = rnnkern.explain(module, x)
        for which in ("forward", "backward"):
            assert told.plan[which]["tensor_cores"] == (allowed and able)


# ---- autocast -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(name: str, narrow: torch.dtype) -> None:
    theirs, ours = (m.to(DEVICE) for m in pair(name, 16, 32))
    x = torch.randn(9, 4, 16, device=DEVICE)
    with torch.autocast(DEVICE, narrow):
        wanted, found = theirs(x), ours(x)
    for a, b in zip(flat(found), flat(wanted), strict=True):
        # torch casts to float16 for cuDNN's RNN, whatever type autocast is for.
        assert a.dtype == narrow
        assert b.dtype in (narrow, torch.float16)
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=5e-2)


def flat(result: Any) -> list[Tensor]:
    y, states = result
    return [y, *(states if isinstance(states, tuple) else (states,))]

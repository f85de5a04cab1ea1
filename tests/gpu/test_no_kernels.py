"""A GPU and a build without kernels for it: the reference runs on the device, with one warning.

Runs where the rest of this folder does not: on a machine with a GPU, with a build for CPUs alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import rnnkern
import torch
from cases import (
    Case,
    assert_matches,
    build,
    cuda_extension,
    evaluate,
    expected,
    feature_cases,
    on_device,
)
from gpu.flags import tf32
from pairs import CELLS, LAYERS, assert_device_parity, pair, random_packed, random_state
from rnnkern import cuda
from rnnkern._native import cuda_module, load_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or cuda_module() is not None,
        reason="not a GPU with a build without CUDA kernels",
    ),
]
DEVICE = "cuda"
everything = Case("lstm", T=4, B=3, D=2, lengths=True, resets=True, reset_state=True)


@pytest.fixture(autouse=True)
def _nothing_is_known() -> Iterator[None]:
    """Let every test get the warning; the reference's float32 is exact."""
    with tf32(products=False), cuda_extension(*load_cuda()):
        yield


@contextmanager
def told_once() -> Iterator[None]:
    """Fail unless exactly one warning says why the reference runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(w.message) for w in caught if str(w.message).startswith("rnnkern: ")]
    assert len(said) == 1, said
    assert "this build has no CUDA kernels" in said[0]
    assert said[0].endswith("the reference runs instead")


@pytest.mark.parametrize("case", feature_cases(T=4, B=3, I=2, H=5), ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_operators(case: Case, dtype: torch.dtype) -> None:
    args = build(case, dtype)
    with told_once():
        for _ in range(2):
            found = evaluate(on_device(args, DEVICE))
    assert {t.device.type for t in found.values()} == {DEVICE}
    assert_matches({key: t.cpu() for key, t in found.items()}, expected(args), dtype=dtype)


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_modules(name: str, dtype: torch.dtype) -> None:
    made = pair(name, 5, 7, dtype=dtype)
    x = torch.randn((3, 5) if name in CELLS else (6, 3, 5), dtype=dtype)
    with told_once():
        assert_device_parity(made, DEVICE, x)
        assert_device_parity(made, DEVICE, x, random_state(made[0], 3))
        if name in LAYERS:
            assert_device_parity(made, DEVICE, random_packed([3, 6, 1], 5, dtype=dtype))


def test_all_forms_are_told_once_together() -> None:
    layer, cell = rnnkern.GRU(5, 7).to(DEVICE), rnnkern.LSTMCell(5, 7).to(DEVICE)
    with told_once():
        layer(torch.randn(4, 3, 5, device=DEVICE))[0].sum().backward()
        cell(torch.randn(3, 5, device=DEVICE))[0].sum().backward()
        evaluate(on_device(build(everything), DEVICE))
        rnnkern.explain(layer, torch.randn(4, 3, 5, device=DEVICE))


def test_what_is_told() -> None:
    module, x = rnnkern.LSTM(5, 7).to(DEVICE), torch.randn(4, 3, 5, device=DEVICE)
    with told_once():
        told: Any = rnnkern.explain(module, x)
    assert told.backend == "reference"
    assert "this build has no CUDA kernels" in told.reason
    assert str(told) == f"lstm: reference (torch operations), because {told.reason}"
    assert "no kernels: this build has no CUDA kernels" in cuda.summary()
    assert "the reference runs (no kernels)" in cuda.summary()


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(narrow: torch.dtype) -> None:
    module, x = rnnkern.LSTM(5, 7).to(DEVICE), torch.randn(4, 3, 5, device=DEVICE)
    with told_once(), torch.autocast(DEVICE, narrow):
        y, states = module(x)
    assert {t.dtype for t in (y, *states)} == {narrow}

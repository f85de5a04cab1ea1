"""The device of a test that runs on the CPU everywhere, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu.flags import exact
from rnnkern import cuda
from rnnkern._native import cuda_module

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
WHERE = ["cpu", *(pytest.param(f"cuda-{p}", marks=[pytest.mark.gpu, NO_GPU]) for p in cuda.PLANS)]


@pytest.fixture
def kernels() -> Iterator[None]:
    """Have kernels for the GPU, and none that still runs after the test."""
    if cuda_module() is None:
        pytest.skip("a build without CUDA kernels")
    assert cuda.missing(torch.cuda.current_device()) is None
    yield
    torch.cuda.synchronize()


@pytest.fixture(params=cuda.PLANS)
def each_plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run by each plan."""
    monkeypatch.setenv("RNNKERN_CUDA_PLAN", str(request.param))


@pytest.fixture(params=WHERE)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where to run, on a GPU by each plan; float32 is multiplied exactly there, as on the CPU."""
    name, _, plan = str(request.param).partition("-")
    if name != "cuda":
        yield name
        return
    request.getfixturevalue("kernels")
    monkeypatch.setenv("RNNKERN_CUDA_PLAN", plan)
    with exact():
        yield name

"""The device of a test that runs on the CPU everywhere, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from rnnkern import cuda
from rnnkern._native import cuda_module

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where to run; float32 is multiplied exactly there, as float64 on the CPU is the measure."""
    name: str = request.param
    if name == "cuda":
        if cuda_module() is None:
            pytest.skip("a build without CUDA kernels")
        assert cuda.missing(torch.cuda.current_device()) is None
        monkeypatch.setattr(cuda, "uses_tf32", lambda T: False)
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    yield name
    if name == "cuda":
        torch.cuda.synchronize()

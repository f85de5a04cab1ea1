"""Shared fixtures: each test starts from its own fixed random state and leaves torch as it was.

A module with ``pytestmark = pytest.mark.usefixtures("every_device")`` runs on the CPU, and again on
a GPU, where there is one and the build has kernels.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator

# Before torch loads OpenMP: a waiting thread sleeps instead of spinning. With more busy processes
# than cores, spinning makes torch's own small recurrent layers several hundred times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch
from gpu.flags import exact, without_cudnn
from rnnkern import cuda
from rnnkern._native import cuda_module

pytest.register_assert_rewrite("pairs", "tolerances")


def pytest_configure(config: pytest.Config) -> None:
    """Silence what torch's own modules say about themselves; everything else stays visible."""
    config.addinivalue_line("filterwarnings", "ignore:LSTM with projections is not supported")
    config.addinivalue_line("filterwarnings", "ignore:Warning only once for all operators")


@pytest.fixture(autouse=True)
def fixed_seed(request: pytest.FixtureRequest) -> int:
    """Seed every generator from the test's name, so that a failing test fails alone too."""
    seed = zlib.crc32(request.node.name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


@pytest.fixture(autouse=True)
def torch_as_found() -> Iterator[None]:
    """Undo what a test may have left switched on: default dtype, grad mode, thread count."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Add a run on the GPU; that on the CPU, and its seed with its name, are as without a GPU."""
    if (
        "every_device" in metafunc.fixturenames
        and metafunc.definition.get_closest_marker("cpu_only") is None
        and torch.cuda.is_available()
        and cuda_module() is not None
    ):
        runs = [
            pytest.param("cpu", id=pytest.HIDDEN_PARAM),
            pytest.param("cuda", marks=pytest.mark.gpu),
        ]
        metafunc.parametrize("every_device", runs, indirect=True)


@pytest.fixture
def every_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make each tensor for which a test names no device on the one in turn.

    On a GPU float32 is exact, and torch's own modules do without cuDNN, which ``tests/gpu`` has.
    """
    device = getattr(request, "param", "cpu")
    if device == "cpu":
        yield
        return
    assert cuda.missing(torch.cuda.current_device()) is None
    with exact(), without_cudnn(), torch.device(device):
        yield

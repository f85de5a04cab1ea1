"""The CUDA kernels on the host, in place of the CPU's behind the operators."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import Case, cuda_operators, leaves, run_op
from cuda_host.build import NAME, build, build_cublas, build_probe
from filelock import FileLock
from rnnkern import cuda
from rnnkern.arguments import LayerInputs
from rnnkern.cells import get_cell
from torch import Tensor


class Launches(NamedTuple):
    """Numbers of grids."""

    plain: int
    cooperative: int


@dataclass
class Host:
    """The shim: its kernels as ``rnnkern._cuda`` has them, and its knobs."""

    native: Any
    library: ctypes.CDLL

    def seed(self, value: int) -> None:
        """Fix the order of all threads from here on."""
        self.library.cuda_host_seed(ctypes.c_uint64(value))

    @contextmanager
    def operators(self, device: int = 0) -> Iterator[None]:
        """Run the operators on CPU tensors by the CUDA backend, on a device: 0 has tensor cores."""
        with cuda_operators(self.native, device=device):
            yield

    def drop_barrier(self, index: int) -> None:
        """Make one barrier of every thread not wait; -1: none."""
        self.library.cuda_host_drop_barrier(ctypes.c_long(index))

    def drop_grid_barrier(self, index: int) -> None:
        """Make one barrier of the grid not wait; -1: none."""
        self.library.cuda_host_drop_grid_barrier(ctypes.c_long(index))

    def drop_release(self, index: int) -> None:
        """Leave out what every thread releases for the n-th time; -1: nothing."""
        self.library.cuda_host_drop_release(ctypes.c_long(index))

    def drop_wait(self, index: int) -> None:
        """Let nobody wait between its n-th release and the next; -1: all do."""
        self.library.cuda_host_drop_wait(ctypes.c_long(index))

    def device_size(
        self,
        multiprocessors: int = 4,
        threads: int = 1024,
        claimed: int | None = None,
        memory: int | None = None,
    ) -> None:
        """Let every device have so many multiprocessors of so many threads each.

        It claims to have `claimed` of them, as in a context that has not all of the device. A
        multiprocessor has `memory` bytes for a block, or as many as the device has.
        """
        self.library.cuda_host_block_memory(ctypes.c_size_t(-1 if memory is None else memory))
        self.library.cuda_host_multiprocessors(multiprocessors, claimed or multiprocessors)
        self.library.cuda_host_threads_of_multiprocessor(threads)

    def pending_error(self) -> int:
        """Return the error that ``cudaGetLastError`` would tell this thread; 0: none."""
        found: int = self.library.cuda_host_pending_error()
        return found

    def fail_launch(self, index: int, error: int) -> None:
        """Let so many launches succeed and the next fail with an error, once; -1: none."""
        self.library.cuda_host_fail_launch(ctypes.c_long(index), error)

    def fail_attributes(self, error: int) -> None:
        """Let the next question about a kernel's attributes fail with an error; 0: it does not."""
        self.library.cuda_host_fail_attributes(error)

    def current_device(self) -> int:
        """Return the device that is current on this thread."""
        found: int = self.library.cuda_host_current_device()
        return found

    def make_current(self, device: int) -> None:
        """Make a device current on this thread."""
        self.library.cuda_host_make_current(device)

    def launches_on(self, device: int, stream: int) -> int:
        """Return how many grids have been launched so far on one stream of a device."""
        found: int = self.library.cuda_host_launches_on(device, ctypes.c_void_p(stream))
        return found

    def launches(self) -> Launches:
        """Return how many grids have been launched so far."""
        return Launches(*map(self.library.cuda_host_launches, (0, 1)))


def plan_of(host: Host, case: Case, dtype: torch.dtype, device: int = 0) -> cuda.Plan:
    """Return how forward and backward of a case run, as ``rnnkern.explain`` tells it."""
    backend, like = cuda.Cuda(host.native, device), torch.empty(0, dtype=dtype)
    return backend.plan(get_cell(case.cell), like, dtype, case.T, case.B, case.H, case.D, case.P)


@contextmanager
def planned(name: str) -> Iterator[None]:
    """Pin the plan of all calls inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RNNKERN_CUDA_PLAN", name)
        yield


@pytest.fixture
def persistently() -> Iterator[None]:
    """Ask for the persistent kernels."""
    with planned("persistent"):
        yield


FLAGS = os.environ.get("RNNKERN_HOST_FLAGS", "").split()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where both libraries are built, once for all processes that run tests."""
    if sys.platform != "linux":
        pytest.skip("the fibers of the shim are glibc's")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_host"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def probe_library(folder: Path) -> ctypes.CDLL:
    """Load the kernels of probe.cu, on the host."""
    with FileLock(folder / "lock"):
        path = build_probe(folder, *FLAGS)
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="session")
def cublas_library(folder: Path) -> ctypes.CDLL:
    """Load what stands for cuBLAS."""
    with FileLock(folder / "lock"):
        path = build_cublas(folder, *FLAGS)
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="session")
def built(folder: Path) -> Host:
    with FileLock(folder / "lock"):
        path = build(folder, *FLAGS)
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(path))
    spec = importlib.util.spec_from_loader(NAME, loader)
    assert spec is not None
    native = importlib.util.module_from_spec(spec)
    loader.exec_module(native)
    return Host(native, ctypes.CDLL(str(path)))


@pytest.fixture
def host(built: Host, fixed_seed: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Run the operators on CPU tensors by the CUDA backend, with exact float32 products."""
    monkeypatch.setattr(cuda, "uses_tf32", lambda T: False)
    built.seed(fixed_seed)
    with built.operators(), poisoned_memory():
        yield built
    assert built.pending_error() == 0  # torch would take it for one of its own
    built.drop_barrier(-1)
    built.drop_grid_barrier(-1)
    built.drop_release(-1)
    built.drop_wait(-1)
    built.fail_launch(-1, 0)
    built.fail_attributes(0)
    built.make_current(0)
    built.device_size()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let torch fill what it allocates with NaN, as shared memory is: outputs and workspaces."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def shows(args: LayerInputs, backward: bool, drop: Callable[[], None]) -> bool:
    """Whether forward's or backward's results are others once `drop` has been called."""
    own = leaves(args)
    loss = run_op(own)[0].sum()

    def run() -> tuple[Tensor, ...]:
        if backward:
            return torch.autograd.grad(loss, [own.input, own.h0], retain_graph=True)
        return run_op(args)

    wanted = run()
    drop()
    try:
        return not all(map(torch.equal, run(), wanted))
    except RuntimeError as error:
        return "cudaErrorLaunchFailure" in str(error)  # the shim itself saw that threads parted

"""The host shim itself: what it gives kernels whose warps and blocks talk, and what it finds wrong.

A persistent kernel rests on these: shuffles, cooperative launches, barriers of the grid, and flags
in global memory, each with the mistake that the shim must show.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cuda_host.build import HERE, ROOT
from cuda_host.conftest import Host
from torch import Tensor

WAYS = ["grid_barrier", "counter", "atomics", "epoch"]
SEEDS = range(4)
MULTIPROCESSORS = 4
TOO_LARGE = "cudaErrorCooperativeLaunchTooLarge"


class Exchange(ctypes.Structure):
    """probe::Exchange."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("phases", ctypes.c_int),
        ("buffers", ctypes.c_int),
        ("waits", ctypes.c_int),
        ("most_polls", ctypes.c_uint),
    )


class Probe:
    """The functions of probe.cu; those that launch return the error, "" if there is none."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name in ("exchange", "shuffles", "turn", "parted", "gap"):
            getattr(library, f"probe_{name}").restype = ctypes.c_char_p

    def seed(self, value: int) -> None:
        self.library.cuda_host_seed(ctypes.c_uint64(value))

    def multiprocessors(self, count: int) -> None:
        self.library.cuda_host_multiprocessors(count, count)

    def drop_grid_barrier(self, index: int) -> None:
        self.library.cuda_host_drop_grid_barrier(ctypes.c_long(index))

    def launch(self, name: str, *arguments: object) -> str:
        text: bytes = getattr(self.library, f"probe_{name}")(*map(_argument, arguments))
        return text.decode()

    def exchange(
        self,
        way: str,
        *,
        blocks: int = 5,
        threads: int = 32,
        phases: int = 4,
        memory: int = 0,
        cooperative: bool = True,
        buffers: int = 2,
        waits: bool = True,
        most_polls: int = 0,
    ) -> tuple[str, Tensor]:
        """Run all phases; return the error and the last values."""
        values = torch.zeros(2, blocks * threads, dtype=torch.int32)
        words = torch.zeros(2, blocks * threads, dtype=torch.int64)
        arrived = torch.zeros(1, dtype=torch.int64)
        addresses = (t.data_ptr() for t in (values, words, arrived))
        problem = Exchange(*addresses, phases, buffers, waits, most_polls)
        size = ctypes.c_size_t(memory)
        error = self.launch(
            "exchange", WAYS.index(way), blocks, threads, size, cooperative, problem
        )
        return error, values[phases % buffers]


def _argument(value: object) -> object:
    return ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else value


def wanted(threads: int, phases: int) -> Tensor:
    """Return what the phases compute, modulo 2^32."""
    i = torch.arange(threads)
    v = i
    for _ in range(phases):
        v = (i + ((2 * i + 1) * v).sum()) % 2**32
    return v.to(torch.int32)  # wraps around


@pytest.fixture
def probe(probe_library: ctypes.CDLL) -> Iterator[Probe]:
    probe = Probe(probe_library)
    probe.seed(1)
    yield probe
    probe.library.probe_last_error()
    probe.multiprocessors(MULTIPROCESSORS)
    probe.drop_grid_barrier(-1)


def some_seed_shows(probe: Probe, run: Callable[[], tuple[str, Tensor]], right: Tensor) -> bool:
    """Whether under one of the seeds a run fails or is wrong."""
    for seed in SEEDS:
        probe.seed(seed)
        error, found = run()
        if error or not torch.equal(found, right):
            return True
    return False


# ---- warps --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", range(4), ids=["float", "double", "uint32", "uint64"])
@pytest.mark.parametrize(("argument", "width"), [(0, 32), (1, 32), (5, 8), (13, 16), (31, 32)])
def test_shuffles(probe: Probe, kind: int, argument: int, width: int) -> None:
    dtype = (torch.float32, torch.float64, torch.int32, torch.int64)[kind]
    x = torch.randint(-1000, 1000, (32,)).to(dtype)
    out = torch.zeros(5, 32, dtype=dtype)
    assert probe.launch("shuffles", kind, x, out, argument, width) == ""
    own = torch.arange(32)
    start, end = own // width * width, own // width * width + width
    crossed, up, down = own ^ argument, own - argument, own + argument
    sources = [
        start + argument % width,
        torch.where(crossed < end, crossed, own),
        torch.where(up >= start, up, own),
        torch.where(down < end, down, own),
    ]
    assert torch.equal(out[:4], x[torch.stack(sources)])
    assert torch.equal(out[4], x.sum().to(dtype).expand(32))


def test_a_warp_s_barrier(probe: Probe) -> None:
    x, out = torch.randn(32), torch.zeros(32)
    for seed in SEEDS:
        probe.seed(seed)
        assert probe.launch("turn", x, out) == ""
        assert torch.equal(out, x.roll(-1))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (0, "lanes of a warp part: .*__s"),
        (1, "lanes of a warp part: __shfl_sync and __shfl_sync"),
        (2, r"a partial mask.* in block \(0, 0, 0\), thread \(\d+, 0, 0\)"),
        (3, "deadlock: threads wait for each other"),
        (4, "deadlock: threads poll"),
    ],
    ids=["kinds", "types", "mask", "missing", "endless"],
)
def test_lanes_that_part_are_reported(probe: Probe, how: int, reason: str) -> None:
    error = probe.launch("parted", how, torch.zeros(32))
    assert error.startswith("cudaErrorLaunchFailure")
    assert re.search(reason, error)


# ---- blocks that wait for each other ------------------------------------------------------------
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("blocks", "threads"), [(1, 32), (2, 64), (5, 32), (16, 8)])
def test_phases(probe: Probe, way: str, blocks: int, threads: int) -> None:
    for seed in SEEDS:
        probe.seed(seed)
        error, found = probe.exchange(way, blocks=blocks, threads=threads)
        assert error == ""
        assert torch.equal(found, wanted(blocks * threads, 4))


@pytest.mark.parametrize("way", WAYS)
def test_a_missing_wait_shows(probe: Probe, way: str) -> None:
    if way == "grid_barrier":
        probe.drop_grid_barrier(2)
    assert some_seed_shows(probe, lambda: probe.exchange(way, waits=False), wanted(160, 4))


@pytest.mark.parametrize("way", WAYS)
def test_a_missing_second_buffer_shows(probe: Probe, way: str) -> None:
    assert some_seed_shows(
        probe, lambda: probe.exchange(way, buffers=1, most_polls=100_000), wanted(160, 4)
    )


@pytest.mark.parametrize("way", WAYS[1:])
def test_waiting_for_blocks_that_are_not_there_is_a_deadlock(probe: Probe, way: str) -> None:
    for seed in SEEDS:
        probe.seed(seed)
        error, _ = probe.exchange(way, cooperative=False)
        assert error == "cudaErrorLaunchFailure: deadlock: threads poll for what nobody writes"


def test_a_barrier_of_the_grid_needs_a_cooperative_launch(probe: Probe) -> None:
    error, _ = probe.exchange("grid_barrier", cooperative=False)
    assert "a launch that is not cooperative" in error


def test_a_bounded_wait_ends_in_a_trap(probe: Probe) -> None:
    error, _ = probe.exchange("counter", cooperative=False, most_polls=50)
    assert error.startswith("cudaErrorLaunchFailure: __trap() in block (")
    assert probe.exchange("counter")[0] == ""


# ---- how much the device holds ------------------------------------------------------------------
@pytest.mark.parametrize(("threads", "memory"), [(32, 0), (256, 0), (64, 40 << 10)])
def test_the_largest_grid(probe: Probe, threads: int, memory: int) -> None:
    largest = []
    for count in (1, 2):
        probe.multiprocessors(count)
        blocks = probe.library.probe_largest_grid(threads, memory)
        sizes = {"threads": threads, "memory": memory, "phases": 1}
        error, found = probe.exchange("grid_barrier", blocks=blocks, **sizes)
        assert error == ""
        assert torch.equal(found, wanted(blocks * threads, 1))
        error, _ = probe.exchange("grid_barrier", blocks=blocks + 1, **sizes)
        assert error == f"{TOO_LARGE}: {TOO_LARGE}"
        largest.append(blocks)
    assert largest[1] == 2 * largest[0] > 0


def test_much_shared_memory_must_be_asked_for(probe: Probe) -> None:
    much, all_of_it = 100 << 10, 227 << 10
    assert probe.library.probe_largest_grid(32, much) == 0
    assert "cudaErrorInvalidValue" in probe.exchange("grid_barrier", blocks=1, memory=much)[0]
    assert probe.library.probe_allow_memory(all_of_it + 1) == 1  # cudaErrorInvalidValue
    try:
        assert probe.library.probe_allow_memory(much) == 0
        assert probe.library.probe_largest_grid(32, much) == 2 * MULTIPROCESSORS
        assert probe.exchange("grid_barrier", blocks=8, memory=much)[0] == ""
        assert TOO_LARGE in probe.exchange("grid_barrier", blocks=9, memory=much)[0]
    finally:
        probe.library.probe_allow_memory(48 << 10)


def test_memory_is_poisoned(host: Host) -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.uint8).eq(255).all()
    assert torch.empty_like(torch.zeros(3, dtype=torch.bfloat16)).isnan().all()


def test_a_gap_between_arrays_is_watched_until_the_next_call(probe: Probe) -> None:
    memory = torch.zeros(4)
    for at, refused in ((0, False), (1, True), (2, True), (3, False)):
        error = probe.launch("gap", memory, at)
        assert ("wrote between arrays" in error) is refused
        assert memory[at] == 1
    assert probe.launch("gap", memory, 0) == ""
    assert memory[1:3].isnan().all()


def test_an_error_is_kept_until_it_is_asked_for(probe: Probe) -> None:
    refuse, ask = probe.library.probe_allow_memory, probe.library.probe_last_error
    assert ask() == 0
    assert refuse(-1) == 1  # cudaErrorInvalidValue
    assert refuse(48 << 10) == 0
    assert ask() == 1
    assert ask() == 0


def test_the_probe_is_cuda(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [nvcc, "-std=c++17", "-arch=sm_80", f"-I{ROOT / 'csrc'}", "-Werror=all-warnings"]
    command += ["-c", str(HERE / "probe.cu"), "-o", str(tmp_path / "probe.o")]
    # A sanitizer's runtime, preloaded for Python, is none of the compiler's business.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr

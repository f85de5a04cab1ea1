"""What ``rnnkern bench`` measures with: turns, memory, the roofline."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from rnnkern._native import _cpu
from rnnkern.bench import measure, memory, result
from rnnkern.bench.cases import Case
from rnnkern.bench.measure import Plan, Spread
from rnnkern.bench.roofline import caches, team_sizes


def test_contenders_take_turns_in_rotation() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = measure.interleave(calls, Plan(rounds=2, pause=0))
    turns = [name for k, name in enumerate(order) if k == 0 or order[k - 1] != name]
    assert turns == ["a", "b", "a", "b", "a"]  # the first two calls find the size of a batch
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"a": 2, "b": 2}
    assert all(count > 100 for count in times.calls.values())
    assert measure.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert measure.spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.5, 2.5)
    assert measure.spread([4.0]) == Spread(4.0, 4.0, 4.0)


def test_a_short_call_that_is_held_up_once_is_still_timed_in_batches() -> None:
    delays = iter([0.0, 0.005])  # of the untimed and the first timed call
    calls = {"a": lambda: time.sleep(next(delays, 0.0))}
    assert measure.interleave(calls, Plan(rounds=1, pause=0)).calls["a"] > 10


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_memory_of_a_call() -> None:
    lines = (
        "import torch",
        "from rnnkern.bench import memory",
        "found = memory.measure(lambda: torch.ones(4_000_000), given=4_000_000)",
        "print(*((found.peak_mb, found.beyond_mb) if found else ()))",
    )  # in a new process: what earlier tests left free could serve the call
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    if not done.stdout.strip():
        pytest.skip("this system does not tell")
    assert [float(v) for v in done.stdout.split()] == pytest.approx([16, 12], abs=1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_memory_of_a_contender(mode: str) -> None:
    """In a process of its own, which a later case finds as it was, also after one that ended it."""
    case = Case("gru", mode, 200, 32, 64)
    y = 200 * 32 * 64 * 4 / 1e6
    with memory.Process() as process:
        first = process.measure(case, "rnnkern", 1)
        if first is None:
            pytest.skip("this system does not tell")
        assert process._pool is not None
        process.measure(Case("lstm", mode, 400, 32, 128), "torch", 1)
        later = process.measure(case, "rnnkern", 1)
        ended = process._pool.submit(os._exit, 1)
        with pytest.raises(BrokenProcessPool):
            ended.result()
        assert process.measure(case, "rnnkern", 1) is None
        again = process.measure(case, "rnnkern", 1)
    for found in (later, again):
        assert found is not None
        # Linux counts pages in batches of 32 a CPU: two readings on two CPUs may be 0.5 MB apart.
        assert first.beyond_mb == pytest.approx(found.beyond_mb, rel=0.1, abs=0.5)
    kept = 6 * y if mode == "training" else 0  # three gates, what they save, h' and y
    assert kept < first.peak_mb < kept + 6
    assert first.peak_mb - first.beyond_mb == pytest.approx(
        y if mode == "inference" else 2 * y, abs=0.3
    )


@pytest.mark.parametrize("error", [OSError, ImportError, NotImplementedError])
def test_times_are_measured_where_no_process_can_be_started(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> ProcessPoolExecutor:
        raise error("no semaphores")

    monkeypatch.setattr(memory, "ProcessPoolExecutor", refuse)
    case = Case("rnn", "inference", 3, 2, 8)
    with memory.Process() as process:
        plan = Plan(rounds=1, pause=0)
        found = result.run(case, plan=plan, names=("torch", "rnnkern"), memory=process.measure)
    assert found.errors == {}
    assert found.memory == {"torch": None, "rnnkern": None}
    assert set(found.seconds) == {"torch", "rnnkern"}


@pytest.mark.parametrize("quantity", ["fma", "bf16", "read", "barrier"])
@pytest.mark.parametrize("threads", [1, 2])
def test_roofline_measurements(quantity: str, threads: int) -> None:
    found = _cpu.roofline(quantity, threads, 10_000, 20)
    if found is None:
        assert quantity == "bf16"
        return
    seconds, amount, team = found
    assert 0 <= seconds < 10
    assert amount > 0
    assert 1 <= team <= threads


def test_roofline_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="expected fma, bf16, read or barrier, got 'x'"):
        _cpu.roofline("x", 1, 0, 1)
    for threads, size, repeats in ((0, 8, 1), (1, -1, 1), (1, 8, 0), (1, 2**60, 1)):
        with pytest.raises(ValueError, match="out of range"):
            _cpu.roofline("read", threads, size, repeats)


def test_every_isa_has_its_loops() -> None:
    before = _cpu.isa()
    try:
        for isa in _cpu.supported_isas():
            _cpu.select_isa(isa)
            assert _cpu.roofline("fma", 1, 0, 1)
    finally:
        _cpu.select_isa(before)


def test_caches_as_linux_tells_them(tmp_path: Path) -> None:
    rows = [
        ("1", "Data", "32K", "0"),
        ("1", "Instruction", "32K", "0"),
        ("2", "Unified", "1024K", "0"),
    ]
    rows.append(("3", "Unified", "32M", "0-3,8"))
    for index, row in enumerate(rows):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in zip(("level", "type", "size", "shared_cpu_list"), row, strict=True):
            (folder / name).write_text(text + "\n", encoding="ascii")
    assert caches(tmp_path) == {"L1": (2**15, 1), "L2": (2**20, 1), "L3": (2**25, 5)}
    assert set(caches(tmp_path / "none")) == {"L1", "L2", "L3"}


def test_team_sizes() -> None:
    assert [team_sizes(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]

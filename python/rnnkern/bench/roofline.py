"""What this machine can do: peaks, bandwidths of the levels of memory, the barrier.

All is measured natively (``csrc/cpu/roofline.h``) in the run that it is compared with, with the
selected ISA, for 1, 2, 4, ... threads and for as many as the run uses; each rate is the best of
several measurements, before the cases and after them, and the sum of all threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rnnkern._native import _cpu
from rnnkern.console.machine import available_memory

_TRIES = 5
_LONG_ENOUGH = 2e-3  # seconds of a measurement, against the clock's and the team's start
_CACHES = {"L1": 32 * 2**10, "L2": 2**20, "L3": 16 * 2**20}  # where the system does not tell


@dataclass(frozen=True)
class Level:
    """A level of memory, as one thread of a team sees it.

    Attributes
    ----------
    name : str
        ``"L1"``, ``"L2"``, ``"L3"`` or ``"DRAM"``.
    capacity : float
        Bytes that it holds for each thread.
    bandwidth : float
        Bytes per second that all threads read together.
    """

    name: str
    capacity: float
    bandwidth: float


@dataclass(frozen=True)
class Team:
    """The limits of a number of threads.

    Attributes
    ----------
    threads : int
        Their number.
    fp32 : float
        float32 flops per second.
    bf16 : float or None
        bfloat16 dot-product flops per second; None where there is no such instruction.
    levels : tuple of Level
        The levels of memory, nearest first.
    barrier : float
        Seconds of a barrier; 0 for one thread.
    """

    threads: int
    fp32: float
    bf16: float | None
    levels: tuple[Level, ...]
    barrier: float

    def bandwidth(self, share: float) -> float:
        """Return the bandwidth of the level that holds `share` bytes for each thread."""
        return next(level.bandwidth for level in self.levels if share <= level.capacity)

    def best(self, other: Team) -> Team:
        """Return the better of each limit, of this and of another measurement."""
        pairs = zip(self.levels, other.levels, strict=True)
        return Team(
            self.threads,
            max(self.fp32, other.fp32),
            None if self.bf16 is None or other.bf16 is None else max(self.bf16, other.bf16),
            tuple(max(pair, key=lambda level: level.bandwidth) for pair in pairs),
            min(self.barrier, other.barrier),
        )


@dataclass(frozen=True)
class Roofline:
    """The limits of all measured teams, fewest threads first."""

    teams: tuple[Team, ...]

    @property
    def whole(self) -> Team:
        """The limits with all threads of the run."""
        return self.teams[-1]

    def best(self, other: Roofline) -> Roofline:
        """Return the better of each limit, of this and of another measurement."""
        pairs = zip(self.teams, other.teams, strict=True)
        return Roofline(tuple(one.best(another) for one, another in pairs))


def measure(threads: int) -> Roofline:
    """Measure this machine; it takes some seconds.

    Parameters
    ----------
    threads : int
        The most threads that a team shall have. At most as many as there are CPUs are used.

    Returns
    -------
    Roofline
        The limits.
    """
    most = _cpu.roofline("barrier", threads, 0, 1)
    assert most is not None
    return Roofline(tuple(_measure_team(count) for count in team_sizes(most[2])))


def team_sizes(most: int) -> list[int]:
    """Return 1, 2, 4, ... and the most."""
    return sorted({most, *(2**k for k in range(most.bit_length()) if 2**k <= most)})


def _measure_team(threads: int) -> Team:
    fp32 = _rate("fma", threads)
    assert fp32 is not None
    barriers = _rate("barrier", threads) if threads > 1 else None
    return Team(
        threads,
        fp32,
        _rate("bf16", threads),
        tuple(_measure_levels(threads)),
        1 / barriers if barriers else 0.0,
    )


def _measure_levels(threads: int) -> Iterator[Level]:
    """Measure each cache on half of what it holds for a thread, and memory on 4 times the last.

    Of the third level no more than 8 MiB are used: other machines may share it unseen.
    """
    last = 0
    for name, (size, sharers) in caches().items():
        capacity = size // min(threads, sharers)
        if (
            capacity < 2 * last
        ):  # shared by so many threads that it holds no more than the one below
            continue
        rate = _rate("read", threads, min(capacity // 2, 8 * 2**20))
        assert rate is not None
        yield Level(name, capacity, rate)
        last = capacity
    size = min(max(4 * last, 64 * 2**20), 256 * 2**20)
    free = available_memory()
    if free is not None:
        size = max(2**20, min(size, free // (4 * threads)))
    rate = _rate("read", threads, size)
    assert rate is not None
    yield Level("DRAM", float("inf"), rate)


def _rate(quantity: str, threads: int, size: int = 0) -> float | None:
    """Return the best rate of several measurements, each long enough for the clock."""
    repeats, best = 1, 0.0
    for _ in range(_TRIES):
        while True:
            found = _cpu.roofline(quantity, threads, size, repeats)
            if found is None:
                return None
            elapsed, amount, _ = found
            if elapsed >= _LONG_ENOUGH or repeats >= 2**30:
                break
            repeats *= 2
        best = max(best, amount / max(elapsed, 1e-9))
    return best


def caches(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, tuple[int, int]]:
    """Return the data caches as {name: (bytes, CPUs that share it)}.

    Parameters
    ----------
    root : Path
        Where Linux describes the caches of a CPU.

    Returns
    -------
    dict
        Levels 1 to 3, smallest first; common sizes where the system does not tell.
    """
    found = {}
    for index in sorted(root.glob("index*")):
        try:
            level, kind, size, cpus = (
                (index / name).read_text(encoding="ascii").strip()
                for name in ("level", "type", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        amount = re.fullmatch(r"(\d+)([KM]?)", size)
        if kind in ("Data", "Unified") and amount and level in "123":
            unit = {"": 1, "K": 2**10, "M": 2**20}[amount.group(2)]
            found[f"L{level}"] = (int(amount.group(1)) * unit, _count(cpus))
    return dict(sorted(found.items())) or {name: (size, 1) for name, size in _CACHES.items()}


def _count(cpus: str) -> int:
    """Count the CPUs of a list such as ``"0-3,8"``."""
    ranges = [[int(end) for end in part.split("-")] for part in cpus.split(",")]
    return sum(ends[-1] - ends[0] + 1 for ends in ranges)

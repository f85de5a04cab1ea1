"""Times of several contenders, round by round in turn.

Each turn is a pause, in which the idle pool threads of the one before stop spinning, an untimed
call, and a timed one. The order of the turns rotates from round to round. Calls far below a
millisecond are timed several at once, hot, so that a turn is long against the clock and the waking
of the threads.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Call = Callable[[], Any]
_SHORT, _TURN = 1e-3, 2e-3  # seconds: calls below this are timed in batches that last that long


@dataclass(frozen=True)
class Plan:
    """How long a case is measured.

    Attributes
    ----------
    rounds : int or None
        The number of rounds; by default as many as take `budget`, within `least` and `most`.
    pause : float
        Seconds before each turn.
    budget : float
        Seconds for all rounds of a case.
    least, most : int
        Bounds of the number of rounds.
    """

    rounds: int | None = None
    pause: float = 0.01
    budget: float = 4.0
    least: int = 5
    most: int = 40


@dataclass(frozen=True)
class Spread:
    """The median of some values and their quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Times:
    """What was measured.

    Attributes
    ----------
    seconds : dict
        Of one call, by contender, a value for each round.
    calls : dict
        Calls timed at once, by contender.
    """

    seconds: dict[str, list[float]]
    calls: dict[str, int]


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high)


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Return their time over ours for each round: above 1 ours is faster."""
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def interleave(calls: Mapping[str, Call], plan: Plan) -> Times:
    """Time contenders in turns.

    Parameters
    ----------
    calls : mapping
        By name; each was called before.
    plan : Plan
        How long.

    Returns
    -------
    Times
        One value for each contender and round.
    """
    first = {name: _first(call, plan.pause) for name, call in calls.items()}
    batch = {name: _batch(seconds) for name, seconds in first.items()}
    turn = sum(plan.pause + (1 + batch[name]) * seconds for name, seconds in first.items())
    rounds = plan.rounds or max(plan.least, min(plan.most, math.floor(plan.budget / turn)))
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collects = gc.isenabled()
    gc.disable()
    try:
        for turns in range(rounds):
            start = turns % len(names)
            for name in names[start:] + names[:start]:
                seconds[name].append(_time(calls[name], batch[name], plan.pause))
    finally:
        if collects:
            gc.enable()
    return Times(seconds, batch)


def hot_microseconds(call: Call, *, calls: int = 1000, tries: int = 7) -> float:
    """Return the time of a call in a loop of its own, the best of several loops, in µs."""
    return 1e6 * min(_time(call, calls, 0.0) for _ in range(tries))


def _first(call: Call, pause: float) -> float:
    """Return about the time of a call; a short one that was held up once is not taken for long."""
    seconds = _time(call, 1, pause)
    if seconds > 50 * _SHORT:
        return seconds
    return min(seconds, *(_time(call, 1, pause) for _ in range(2)))


def _batch(seconds: float) -> int:
    return 1 if seconds >= _SHORT else math.ceil(_TURN / max(seconds, 1e-7))


def _time(call: Call, calls: int, pause: float) -> float:
    """Return the time of one of some calls, after a pause and an untimed one."""
    time.sleep(pause)
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls

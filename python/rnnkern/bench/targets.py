"""What is wanted of the kernels, and what was reached.

Times of others over ours, for two threads, unless a row says otherwise: the geometric mean of a
group of cases, and the worst of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rnnkern.bench.cases import Case
from rnnkern.bench.contenders import OURS, THEIRS
from rnnkern.bench.result import Result

LATENCY = 15.0
"""Microseconds wanted for one step of one row at H = 64, at most."""
MEASURABLE_MB = 4.0
"""Less memory than this is not compared."""
RESOLUTION_MB = 0.1
"""Less than this counts as this much."""


@dataclass(frozen=True)
class Target:
    """A row of what is wanted.

    Attributes
    ----------
    group : str
        What it is about.
    mean, worst : float or None
        At least this geometric mean; no case under this.
    chosen : callable
        Whether a case belongs to it.
    value : callable
        What counts: a number of a result, or None if it has none.
    """

    group: str
    mean: float | None
    worst: float | None
    chosen: Callable[[Case], bool]
    value: Callable[[Result], float | None]


@dataclass(frozen=True)
class Outcome:
    """What was reached of a target.

    Attributes
    ----------
    group : str
        What it is about.
    cases : int
        Cases that count in it.
    wanted_mean, wanted_worst : float or None
        What was wanted.
    mean, worst : float or None
        What was reached; None without cases.
    worst_case : str or None
        The case that is worst.
    met : bool or None
        Whether all was reached; None without cases.
    """

    group: str
    cases: int
    wanted_mean: float | None
    wanted_worst: float | None
    mean: float | None
    worst: float | None
    worst_case: str | None
    met: bool | None


def outcomes(
    results: Sequence[Result], latency: Mapping[str, float] | None, *, has_bf16: bool = True
) -> list[Outcome]:
    """Compare results with all targets.

    Parameters
    ----------
    results : sequence of Result
        What was measured.
    latency : mapping, optional
        Microseconds of one step with ours, by cell.
    has_bf16 : bool
        Whether the CPU has bfloat16 dot products; nothing is wanted of bfloat16 without them.

    Returns
    -------
    list of Outcome
        One for each target; the last one, of latency, is a time: there less is better.
    """
    wanted = [target for target in TARGETS if has_bf16 or "bfloat16" not in target.group]
    return [_outcome(target, results) for target in wanted] + [_latency_outcome(latency or {})]


def _outcome(target: Target, results: Sequence[Result]) -> Outcome:
    found = {
        result.case.name: value
        for result in results
        if target.chosen(result.case) and (value := target.value(result)) is not None
    }
    wanted = (target.mean, target.worst)
    if not found:
        return Outcome(target.group, 0, *wanted, None, None, None, None)
    # A value of 0 (nothing reached, nothing needed) has no logarithm.
    mean = statistics.geometric_mean([max(value, 1e-9) for value in found.values()])
    worst_case = min(found, key=lambda name: found[name])
    worst = found[worst_case]
    met = mean >= (target.mean or 0) and worst >= (target.worst or 0)
    return Outcome(target.group, len(found), *wanted, mean, worst, worst_case, met)


def _latency_outcome(latency: Mapping[str, float]) -> Outcome:
    group = "one step, T = B = 1, H = 64, µs (at most)"
    if not latency:
        return Outcome(group, 0, None, LATENCY, None, None, None, None)
    worst = max(latency, key=lambda cell: latency[cell])
    mean = statistics.geometric_mean(latency.values())
    met = latency[worst] <= LATENCY
    return Outcome(group, len(latency), None, LATENCY, mean, latency[worst], worst, met)


def _against(name: str) -> Callable[[Result], float | None]:
    def value(result: Result) -> float | None:
        found = result.ratios.get(name)
        return found.median if found else None

    return value


def _memory(result: Result) -> float | None:
    """Return what torch needs over what ours needs, beyond inputs, outputs and gradients."""
    theirs, ours = result.memory.get(THEIRS), result.memory.get(OURS)
    if not theirs or not ours or theirs.beyond_mb < MEASURABLE_MB:
        return None
    return theirs.beyond_mb / max(ours.beyond_mb, RESOLUTION_MB)


def _plain(cell: str, mode: str, rows: str = "any") -> Callable[[Case], bool]:
    """Choose among the plain sizes; `rows` is "any", "one" (B = 1) or "many" (B >= 8)."""

    def chosen(case: Case) -> bool:
        right = {"any": True, "one": case.B == 1, "many": case.B >= 8}[rows]
        return case.base and right and case.cell == cell and case.mode == mode

    return chosen


def _bfloat16(*cells: str) -> Callable[[Case], bool]:
    return lambda case: case.dtype == "bfloat16" and case.mode == "training" and case.cell in cells


_TORCH = _against(THEIRS)
TARGETS = (
    Target("LSTM inference, B = 1", 2.5, 1.3, _plain("lstm", "inference", "one"), _TORCH),
    Target("LSTM inference, B >= 8", 1.1, 1.0, _plain("lstm", "inference", "many"), _TORCH),
    Target("LSTM training", 1.8, 1.05, _plain("lstm", "training"), _TORCH),
    Target("GRU inference, B = 1", 6.0, 2.5, _plain("gru", "inference", "one"), _TORCH),
    Target("GRU inference, B >= 8", 1.6, 1.2, _plain("gru", "inference", "many"), _TORCH),
    Target("GRU training", 5.0, 1.4, _plain("gru", "training"), _TORCH),
    Target("RNN inference, B = 1", 6.0, 2.5, _plain("rnn", "inference", "one"), _TORCH),
    Target("RNN inference, B >= 8", 1.8, 1.2, _plain("rnn", "inference", "many"), _TORCH),
    Target("RNN training", 5.0, 1.4, _plain("rnn", "training"), _TORCH),
    Target(
        "against onnxruntime, inference",
        1.3,
        0.95,
        lambda case: case.mode == "inference",
        _against("onnxruntime"),
    ),
    Target(
        "packed, LSTM and GRU",
        3.0,
        1.5,
        lambda case: case.packed and case.cell in ("lstm", "gru"),
        _TORCH,
    ),
    Target("bfloat16 training, LSTM", 1.5, 1.0, _bfloat16("lstm"), _TORCH),
    Target("bfloat16 training, GRU and RNN", 2.0, 1.0, _bfloat16("gru", "rnn"), _TORCH),
    Target(
        "share of the limit, B >= 8, H >= 128",
        None,
        0.85,
        lambda case: case.base and case.B >= 8 and case.H >= 128,
        lambda result: result.fraction,
    ),
    Target(
        "share of the limit, B = 1, T >= 100",
        None,
        0.60,
        lambda case: case.base and case.B == 1 and case.T >= 100,
        lambda result: result.fraction,
    ),
    Target("training memory, LSTM, torch's / ours", None, 2.0, _plain("lstm", "training"), _memory),
)
"""Rows of what is wanted, in the order of the report."""

"""What was found about a case, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rnnkern.bench import limit, measure
from rnnkern.bench.cases import Case
from rnnkern.bench.contenders import (
    NAMES,
    OURS,
    AbsentError,
    Contender,
    Problem,
    check,
    grad_mode,
)
from rnnkern.bench.measure import Plan, Spread
from rnnkern.bench.memory import Memory


@dataclass
class Result:
    """What was found about a case.

    Attributes
    ----------
    case : Case
        The case.
    rounds : int
        Rounds measured.
    seconds : dict
        `Spread` of the time of a call, by contender.
    calls : dict
        Calls timed at once, hot, by contender.
    ratios : dict
        `Spread` of the rounds' ratios, a contender's time over ours, by contender.
    memory : dict
        `Memory` of a call, or None where the system does not tell, by contender.
    limit : float or None
        The least possible time in seconds; None if the roofline was not measured.
    absent, errors : dict
        Why a contender did not take part; what went wrong with it.
    """

    case: Case
    rounds: int = 0
    seconds: dict[str, Spread] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    memory: dict[str, Memory | None] = field(default_factory=dict)
    limit: float | None = None
    absent: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def fraction(self) -> float | None:
        """The fraction of the limit that ours reaches."""
        ours = self.seconds.get(OURS)
        return self.limit / ours.median if ours and self.limit is not None else None

    @property
    def flops(self) -> float | None:
        """The flops per second that ours reaches, of the products alone."""
        ours = self.seconds.get(OURS)
        return limit.work_of(self.case).flops / ours.median if ours else None

    @property
    def intensity(self) -> float:
        """Flops for each byte of recurrent weights."""
        work = limit.work_of(self.case)
        return work.flops / work.bytes

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON; times in ms, amounts of memory in MB."""

        def scaled(spreads: dict[str, Spread], factor: float) -> dict[str, Any]:
            return {
                name: {part: value * factor for part, value in vars(found).items()}
                for name, found in spreads.items()
            }

        flops = self.flops
        return {
            "name": self.case.name,
            **vars(self.case),
            "rounds": self.rounds,
            "milliseconds": scaled(self.seconds, 1e3),
            "calls_at_once": self.calls,
            "ratios": scaled(self.ratios, 1.0),
            "memory": {
                name: None if found is None else vars(found) for name, found in self.memory.items()
            },
            "limit_milliseconds": None if self.limit is None else self.limit * 1e3,
            "fraction_of_limit": self.fraction,
            "gflops": None if flops is None else flops / 1e9,
            "flops_per_byte": self.intensity,
            "absent": self.absent,
            "errors": self.errors,
        }


def run(
    case: Case,
    *,
    plan: Plan,
    names: Sequence[str] = NAMES,
    contender: Callable[..., Contender] = Problem.contender,
    memory: Callable[[Case, str, int], Memory | None] | None = None,
) -> Result:
    """Check and measure a case.

    A contender that fails is reported in the result, whatever it raises, and the others go on.

    Parameters
    ----------
    case : Case
        The case.
    plan : Plan
        How long.
    names : sequence of str
        The contenders.
    contender : callable
        Makes one, given the problem, its name and the threads.
    memory : callable, optional
        Measures the memory of one, given the case, its name and the threads.

    Returns
    -------
    Result
        What was found.
    """
    result = Result(case)
    try:
        with grad_mode(case):
            _time(result, _ready(result, names, contender, memory), plan)
    except Exception as error:  # of no contender alone: no memory for the data, for example
        result.errors["all"] = _message(error)
    torch.compiler.reset()  # what was compiled for this case serves no other
    return result


def _ready(
    result: Result,
    names: Sequence[str],
    contender: Callable[..., Contender],
    memory: Callable[[Case, str, int], Memory | None] | None,
) -> dict[str, Contender]:
    """Make and check the contenders, measure their memory, and return those that can be timed."""
    case, threads = result.case, torch.get_num_threads()
    problem = Problem(case)
    reference = problem.reference()
    ready: dict[str, Contender] = {}
    for name in names:
        try:
            made = contender(problem, name, threads)
            check(made, made.call(), reference, case.dtype)
            ready[name] = made
            if memory is not None:
                result.memory[name] = memory(case, name, threads)
        except AbsentError as reason:
            result.absent[name] = str(reason)
        except Exception as error:
            ready.pop(name, None)
            result.errors[name] = _message(error)
    return ready


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _time(result: Result, ready: dict[str, Contender], plan: Plan) -> None:
    if not ready:
        return
    times = measure.interleave({name: made.call for name, made in ready.items()}, plan)
    result.rounds = len(next(iter(times.seconds.values())))
    result.calls = times.calls
    result.seconds = {name: measure.spread(seconds) for name, seconds in times.seconds.items()}
    if OURS in ready:
        ours = times.seconds[OURS]
        result.ratios = {
            name: measure.spread(measure.ratios(seconds, ours))
            for name, seconds in times.seconds.items()
            if name != OURS
        }

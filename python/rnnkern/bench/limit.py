"""The limit: the least time that a case can take on this machine.

A forward pass is bound from below by

    input product at the peak + sum over steps of step(rows)
    step(rows) = max(flops / peak, bytes of the recurrent weights / bandwidth) + barrier

where the bandwidth is that of the level of cache that holds each thread's share of the weights, and
the barrier is paid where several threads share the units of one step (twice with a projection).
The limit takes the cheapest way to share the work among the measured numbers of threads: over
directions, over rows (every group of threads reads all weights, without a barrier) and over units.

Training adds the same recurrence once more, for the transposed product, and at the peak the input's
gradient and the gradients of W, R and the projection. bfloat16 cases have bfloat16's peak, if the
CPU has one, and weights of two bytes. A packed case has the rows of each step that are active.

Gate math, reading and writing of activations, packing of weights and Python are not in it, so not
every case can come close to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rnnkern.bench.cases import GATES, Case
from rnnkern.bench.roofline import Roofline, Team


@dataclass(frozen=True)
class _Recurrence:
    """The recurrent product of one direction of one layer.

    Attributes
    ----------
    weights : int
        Recurrent weights, with the projection's.
    size : int
        Bytes of a weight.
    barriers : int
        Meetings of the team in a step.
    """

    weights: int
    size: int
    barriers: int


@dataclass(frozen=True)
class Work:
    """What a case has to do.

    Attributes
    ----------
    flops : float
        All multiplications and additions of its products.
    bytes : float
        Recurrent weights read, once in every step of every pass.
    """

    flops: float
    bytes: float


def work_of(case: Case) -> Work:
    """Count the flops of a case's products, and the bytes of recurrent weights that they read."""
    N, passes = sum(case.rows), _passes(case)
    weights = _recurrence(case).weights
    recurrent = 2.0 * N * weights * (passes + (case.mode == "training"))
    dense = sum(_input_weights(case)) * 2.0 * N * (3 if case.mode == "training" else 1)
    streams = case.directions * case.layers
    read = float(weights * _recurrence(case).size * case.T * passes * streams)
    return Work(dense + recurrent * streams, read)


def seconds(case: Case, machine: Roofline) -> float:
    """Return the least time of a case, as the module's docstring describes.

    Parameters
    ----------
    case : Case
        The case.
    machine : Roofline
        What the machine can do.

    Returns
    -------
    float
        Seconds.
    """
    return min(
        _dense_seconds(case, machine) + _recurrence_seconds(case, team, ways)
        for team in machine.teams
        for ways in _ways(case, machine, team)
    )


def _dense_seconds(case: Case, machine: Roofline) -> float:
    """Time the products over all steps at once: by all threads, whatever the recurrence does."""
    N, training = sum(case.rows), case.mode == "training"
    weights = sum(_input_weights(case)) * (3 if training else 1)
    if training:
        weights += _recurrence(case).weights * case.directions * case.layers
    return 2.0 * N * weights / max(_peak(case, team) for team in machine.teams)


@dataclass(frozen=True)
class _Ways:
    """How a team shares a step: groups over directions, rows and units, and the units' barrier."""

    directions: int
    rows: int
    units: int
    barrier: float


def _ways(case: Case, machine: Roofline, team: Team) -> Iterator[_Ways]:
    barriers = {other.threads: other.barrier for other in machine.teams}
    for directions in range(1, case.directions + 1):
        for units, barrier in barriers.items():
            if team.threads % (directions * units) == 0:
                rows = team.threads // (directions * units)
                if rows <= case.B:
                    yield _Ways(directions, rows, units, barrier if units > 1 else 0.0)


def _recurrence_seconds(case: Case, team: Team, ways: _Ways) -> float:
    recurrence = _recurrence(case)
    size = float(recurrence.weights * recurrence.size)
    read = ways.directions * ways.rows * size / team.bandwidth(size / ways.units)
    per_row = 2.0 * recurrence.weights * ways.directions / _peak(case, team)
    steps = math.fsum(max(per_row * rows, read) for rows in case.rows)
    steps += case.T * recurrence.barriers * ways.barrier
    return steps * _passes(case) * case.layers * case.directions / ways.directions


def _recurrence(case: Case) -> _Recurrence:
    weights = GATES[case.cell] * case.H * case.state_width + case.H * case.proj
    return _Recurrence(weights, 2 if case.dtype == "bfloat16" else 4, 2 if case.proj else 1)


def _input_weights(case: Case) -> list[int]:
    """Count each layer's input weights, of all directions."""
    inner = case.state_width * case.directions
    inputs = [case.features] + [inner] * (case.layers - 1)
    return [GATES[case.cell] * case.H * I * case.directions for I in inputs]


def _passes(case: Case) -> int:
    return 2 if case.mode == "training" else 1


def _peak(case: Case, team: Team) -> float:
    return team.bf16 if case.dtype == "bfloat16" and team.bf16 else team.fp32

"""One launch a step: stages of one grid that wait for each other, on devices of any size.

A step of one stage is an ordinary launch; of several, a cooperative one, which may have no more
blocks than the device holds at once, so that a block computes several tiles.
"""

from __future__ import annotations

import dataclasses
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import (
    Case,
    Layout,
    assert_identical,
    assert_matches,
    build,
    evaluate,
    expected,
    feature_cases,
    leaves,
    run_op,
)
from cuda_host.conftest import Host, Launches, shows
from rnnkern import cuda
from rnnkern.cells import CELLS
from rnnkern.layers import missing_kernel

EXACT, NARROW = torch.float32, torch.bfloat16
THREADS = 128  # of a block
STAGED = ["gru_reset_before", "lstm"]  # the second with a projection
T = 3
FORMS = [
    Case(cell, T=T, B=2, P=P, D=D, layout=layout)
    for cell, info in CELLS.items()
    for P in ((0, 3) if info.projects else (0,))
    for D in (1, 2)
    for layout in ("padded", "packed")
]


def staged(case: Case) -> bool:
    return case.cell == "gru_reset_before" or case.P > 0


def of_stages(cell: str, **sizes: Any) -> Case:
    """Return a case whose steps have two stages."""
    case = Case(cell, I=3, D=2, **sizes)
    return dataclasses.replace(case, P=case.H // 2 + 1) if cell == "lstm" else case


def sized(B: int, H: int) -> list[Case]:
    cases = [c for c in feature_cases(T=T, B=B, I=3, H=H) if staged(c)]
    return [dataclasses.replace(c, P=H // 2 + 1) if c.P else c for c in cases]


# ---- launches -----------------------------------------------------------------------------------
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_one_launch_a_step(host: Host, case: Case) -> None:
    assert (cuda.stages(CELLS[case.cell], case.P > 0) > 1) is staged(case)
    args = leaves(build(case, EXACT))
    before = host.launches()
    y = run_op(args)[0]
    between = host.launches()
    y.sum().backward()
    after = host.launches()
    # The initial states, and for backward each direction's weights, transposed.
    phases = 2 if case.cell == "gru_reset_before" else 1
    turned = case.D * (phases + bool(case.P))
    assert launched(before, between) == wanted_launches(case, fixed=1, visits=T)
    assert launched(between, after) == wanted_launches(case, fixed=1 + turned, visits=T + 1)


def launched(before: Launches, after: Launches) -> Launches:
    return Launches(after.plain - before.plain, after.cooperative - before.cooperative)


def wanted_launches(case: Case, fixed: int, visits: int) -> Launches:
    return Launches(fixed, visits) if staged(case) else Launches(fixed + visits, 0)


# ---- devices smaller than the grid --------------------------------------------------------------
@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize(
    "case", [c for size in ((1, 1), (3, 7), (17, 33), (3, 96)) for c in sized(*size)], ids=str
)
def test_blocks_take_several_tiles(host: Host, case: Case, blocks: int) -> None:
    args = build(case, EXACT)
    host.device_size(blocks, THREADS)
    assert_matches(evaluate(args), expected(args), dtype=EXACT)


@pytest.mark.parametrize("cell", STAGED)
@pytest.mark.parametrize("dtype", [EXACT, NARROW], ids=str)
def test_the_size_of_the_device_does_not_matter(host: Host, cell: str, dtype: torch.dtype) -> None:
    """Two tiles of rows, three of units, two directions."""
    args = build(of_stages(cell, T=2, B=33, H=33, resets=True, reset_state=True), dtype)
    host.device_size(12, THREADS)
    wanted = evaluate(args)
    for blocks in (1, 7):
        host.device_size(blocks, THREADS)
        assert_identical(evaluate(args), wanted, f"{blocks} blocks")


@pytest.mark.parametrize("cell", STAGED)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_context_that_has_less_of_the_device(host: Host, cell: str, layout: Layout) -> None:
    """In packed data backward and the reverse direction begin with the smallest grids."""
    args = build(of_stages(cell, T=T, B=33, H=33, layout=layout), EXACT)
    wanted = evaluate(args)
    before = host.launches()
    for multiprocessors, claimed in ((2, 8), (1, 8), (3, 4)):
        host.device_size(multiprocessors, THREADS, claimed=claimed)
        assert_identical(evaluate(args), wanted, f"{multiprocessors} of {claimed}")
    after = host.launches()
    assert after.cooperative - before.cooperative == 3 * (T + T + 1)


@pytest.mark.parametrize("threads", [THREADS - 1, THREADS])
def test_a_device_on_which_no_block_fits(host: Host, threads: int) -> None:
    host.device_size(1, threads)
    args = build(of_stages("lstm", T=T), EXACT)
    if threads < THREADS:
        with pytest.raises(RuntimeError, match="cudaErrorCooperativeLaunchTooLarge"):
            run_op(args)
        host.device_size()
    assert_matches(evaluate(args), expected(args), dtype=EXACT)


def test_a_device_without_cooperative_launches(host: Host) -> None:
    """Steps of one stage run there; of several the reference, in the operator and the modules."""
    plain, several = build(Case("lstm"), EXACT), [build(of_stages(cell), EXACT) for cell in STAGED]
    with host.operators(device=2):
        before = host.launches()
        assert_matches(evaluate(plain), expected(plain), dtype=EXACT)
        assert host.launches().plain > before.plain
        before = host.launches()
        with pytest.warns(UserWarning, match="device 2 has no cooperative launches"):
            run_op(several[0])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for args in several:
                assert_matches(evaluate(args), expected(args), dtype=EXACT)
        assert host.launches() == before
        there: Any = SimpleNamespace(device=torch.device("cuda", 2), dtype=EXACT)
        for cell, projects in (("gru_reset_before", False), ("lstm", True)):
            reason = missing_kernel(there, CELLS[cell], projects)
            assert reason is not None
            assert "cudaErrorNotSupported" in reason
        assert missing_kernel(there, CELLS["lstm"], False) is None


# ---- the test of these tests --------------------------------------------------------------------
@pytest.mark.parametrize("cell", STAGED)
@pytest.mark.parametrize("H", [7, 33])
@pytest.mark.parametrize("dtype", [EXACT, NARROW], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_missing_barrier_of_the_grid_shows(
    host: Host, cell: str, H: int, dtype: torch.dtype, backward: bool
) -> None:
    args = build(of_stages(cell, T=T, H=H), dtype)
    assert shows(args, backward, drop=lambda: host.drop_grid_barrier(0))


@pytest.mark.parametrize(
    ("cell", "backward", "barrier"),
    [
        ("gru_reset_before", False, 1),
        ("lstm", False, 1),
        ("gru_reset_before", True, 8),
        ("lstm", True, 4),
    ],
)
def test_a_missing_barrier_between_two_tiles_shows(
    host: Host, cell: str, backward: bool, barrier: int
) -> None:
    """On tensor cores, where a product has one barrier, and one block that computes all tiles.

    The first stage of backward has 4 tiles or, of P, 2. Its first visit multiplies nothing in them,
    so that the barriers of the second stage count from 3 or 1 there, and from 7 or 3 later: every
    second one is between two tiles, and the one that is dropped is in all visits.
    """
    host.device_size(1, THREADS)
    args = build(of_stages(cell, T=30, B=8, H=17), NARROW)
    assert shows(args, backward, drop=lambda: host.drop_barrier(barrier))

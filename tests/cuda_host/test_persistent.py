"""The persistent kernels: the step-wise kernels' bits, and what shows if a part is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from cases import Case, assert_identical, build, evaluate, leaves, run_op, same_bits
from cuda_host.conftest import Host, plan_of, shows
from cuda_host.persistent import (
    EXACT,
    NARROW,
    THREADS,
    assert_same_as_stepwise,
    cases_of,
    with_room_for,
)
from rnnkern import cuda
from rnnkern.cells import CELLS

pytestmark = pytest.mark.usefixtures("persistently")

TYPES = [*EXACT, *NARROW]
SIZES = [(B, H) for B in (1, 3, 17) for H in (1, 7, 33, 80)]
GROUPS = (1, 2, 3)


def spread() -> list[tuple[Case, int, torch.dtype]]:
    """Return a third of all cases of every size, each with a number of groups, in half the types.

    Three sizes have all cases between them, and the next three have them in the other types.
    """
    return [
        (case, GROUPS[i // 3 % 3], dtype)
        for first, size in enumerate([*SIZES, (70, 33)])
        for i, case in enumerate(cases_of(size, T=3))
        if i % 3 == first % 3 and case.P < case.H
        for dtype in TYPES[(i // 3 + first // 3) % 2 :: 2]
    ]


# ---- values -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("case", "groups", "dtype"), spread(), ids=str)
def test_the_bits_of_the_stepwise_kernels(
    host: Host, case: Case, groups: int, dtype: torch.dtype
) -> None:
    with_room_for(host, case, groups)
    assert_same_as_stepwise(host, build(case, dtype), dtype)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("B", "P"), [(3, 33), (70, 5), (70, 33)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_projections_to_fewer_and_more_units(
    host: Host, B: int, P: int, groups: int, dtype: torch.dtype
) -> None:
    """Seven units, so that some blocks have no unit of H."""
    case = Case("lstm", T=3, B=B, I=3, H=7, P=P, D=2, resets=True, reset_state=True)
    host.device_size(groups * case.D * -(-max(case.H, P) // 16), THREADS)
    assert_same_as_stepwise(host, build(case, dtype), dtype)


def test_the_cases_meet_every_kind_of_plan(host: Host) -> None:
    """Both kernels, one group or more, rows that share registers and rows that do not."""
    met: dict[str, set[tuple[int, int, bool]]] = {"forward": set(), "backward": set()}
    features: dict[torch.dtype, set[Case]] = {dtype: set() for dtype in TYPES}
    for case, groups, dtype in spread():
        with_room_for(host, case, groups)
        for name, plan in plan_of(host, case, dtype).items():
            assert plan["kind"] == "persistent"
            rows = plan["groups"] * plan["rows_of_a_block"]
            met[name].add((plan["rows_of_a_block"], plan["groups"], rows < case.B))
        features[dtype].add(dataclasses.replace(case, B=1, H=1, P=min(case.P, 1)))
    wanted = {(8, 1, False), (8, 3, False), (32, 1, False), (32, 1, True), (32, 2, True)}
    assert all(found >= wanted for found in met.values())
    for dtype in TYPES:
        assert features[dtype] == set(cases_of((1, 1), T=3))


@pytest.mark.parametrize("case", cases_of((3, 33), (17, 7))[::3], ids=str)
def test_tf32(host: Host, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "uses_tf32", lambda T: True)
    assert_same_as_stepwise(host, build(case, torch.float32), torch.float16)  # as many bits


@pytest.mark.parametrize("case", cases_of((3, 33))[::3], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_without_tensor_cores_for_bfloat16(host: Host, case: Case, dtype: torch.dtype) -> None:
    with host.operators(device=1):
        assert_same_as_stepwise(host, build(case, dtype), dtype)


@pytest.mark.parametrize("case", cases_of((17, 33))[::2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_order_does_not_matter(host: Host, case: Case, dtype: torch.dtype) -> None:
    args = build(case, dtype)
    with_room_for(host, case, 3)
    first = evaluate(args)
    for seed in (1, 2):
        host.seed(seed)
        assert_identical(evaluate(args), first)


@pytest.mark.parametrize(("cell", "P"), [*((cell, 0) for cell in CELLS), ("lstm", 17)])
def test_the_size_of_the_device_does_not_matter(host: Host, cell: str, P: int) -> None:
    case = Case(cell, T=3, B=70, I=3, H=33, D=2, P=P, resets=True, reset_state=True)
    args, found = build(case, torch.bfloat16), []
    for groups in (1, 2, 9):
        with_room_for(host, case, groups)
        found.append(evaluate(args))
    assert_identical(found[1], found[0])
    assert_identical(found[2], found[0])


@pytest.mark.parametrize("length", [-1, 6])
def test_wrong_lengths_on_the_device_make_their_row_nan(
    host: Host, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "check_lengths", lambda a, _: a.lengths)  # nobody on the host looks
    case = Case("lstm", T=5, B=3, D=2, resets=True, reset_state=True)
    good = build(case, torch.float32)._replace(lengths=torch.tensor([5, 3, 2]))
    bad = good._replace(lengths=torch.tensor([5, length, 2]))
    for found, wanted in zip(run_op(bad), run_op(good), strict=True):
        assert found[:, 1].isnan().all()
        assert same_bits(found[:, 0::2], wanted[:, 0::2])


# ---- weights that do not fit ---------------------------------------------------------------------
STREAMED = cases_of((3, 50), (17, 33), (70, 33), T=2)[::7]


def streaming(host: Host, case: Case, dtype: torch.dtype) -> list[int]:
    """Return the least and most bytes of shared memory with which both passes stream weights."""
    found = []
    for memory in range(1 << 10, 1 << 16, 1 << 9):
        host.device_size(-(-case.H // 16) * case.D, THREADS, memory=memory)
        plans = plan_of(host, case, dtype).values()
        if all(p["kind"] == "persistent" and p["streamed_bytes"] for p in plans):
            found.append(memory)
    return [found[0], found[-1]]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, dtype) for i, c in enumerate(STREAMED) for dtype in [*TYPES, "tf32"][i % 2 :: 2]],
    ids=str,
)
def test_streamed_weights_give_the_same_bits(
    host: Host, case: Case, dtype: torch.dtype | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights from global memory, and most, or as few as there can be."""
    if isinstance(dtype, str):
        monkeypatch.setattr(cuda, "uses_tf32", lambda T: True)
    data = torch.float32 if isinstance(dtype, str) else dtype
    args = build(case, data)
    for memory in streaming(host, case, data):
        host.device_size(-(-case.H // 16) * case.D, THREADS, memory=memory)
        assert_same_as_stepwise(host, args, torch.float16 if isinstance(dtype, str) else dtype)


def test_the_streamed_cases_keep_nothing_or_some(host: Host) -> None:
    met = set()
    for case in STREAMED:
        for dtype in TYPES:
            for memory in streaming(host, case, dtype):
                host.device_size(-(-case.H // 16) * case.D, THREADS, memory=memory)
                for name, plan in plan_of(host, case, dtype).items():
                    met.add((name, plan["rows_of_a_block"], plan["resident_bytes"] > 0))
    assert met == {(n, r, s) for n in ("forward", "backward") for r in (8, 32) for s in (0, 1)}


# ---- the test of these tests --------------------------------------------------------------------
BROKEN = {cell: Case(cell, T=6, B=3, H=33) for cell in ("lstm", "gru_reset_before")}
BROKEN["projected"] = Case("lstm", T=6, B=3, H=33, P=17)
both_passes = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def some_order_shows(
    host: Host, case: Case, dtype: torch.dtype, backward: bool, drop: Callable[[], None]
) -> bool:
    """Whether a pass's results are others once `drop` has been called, for one of some seeds."""
    args = build(case, dtype)
    for seed in range(50):
        host.seed(seed)
        if shows(args, backward, drop):
            return True
        host.drop_barrier(-1)
        host.drop_wait(-1)
    return False


@both_passes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("cell", "wait"),
    [("lstm", 0), ("lstm", 2)]
    + [(cell, wait) for cell in ("gru_reset_before", "projected") for wait in (0, 3)],
)
def test_a_missing_wait_shows(
    host: Host, cell: str, dtype: torch.dtype, wait: int, backward: bool
) -> None:
    """The reset-before GRU waits twice a step, as does the projection."""
    assert some_order_shows(host, BROKEN[cell], dtype, backward, lambda: host.drop_wait(wait))


@both_passes
@pytest.mark.parametrize("cell", BROKEN)
def test_a_missing_release_ends_in_an_error(host: Host, cell: str, backward: bool) -> None:
    args = leaves(build(BROKEN[cell], torch.bfloat16))
    y = run_op(args)[0] if backward else None
    host.drop_release(1)
    with pytest.raises(RuntimeError, match="deadlock: threads poll for what nobody writes"):
        y.sum().backward() if y is not None else run_op(args)


# A thread's barriers: one ahead of each exchange, in it one of the product on tensor cores or, of
# the exact one at this size, four in forward and ten in backward, and one behind it. The first
# visit of backward has no product of dr of a step before.
@pytest.mark.parametrize(
    ("cell", "backward", "dtype", "barrier"),
    [("lstm", False, torch.bfloat16, i) for i in (1, 2, 3)]
    + [("lstm", False, torch.float32, i) for i in (1, 2, 5, 6)]
    + [("lstm", True, torch.bfloat16, i) for i in (1, 2, 3, 4)]
    + [("lstm", True, torch.float32, i) for i in (1, 2, 3, 4, 13)]
    + [("gru_reset_before", False, torch.bfloat16, i) for i in (2, 3, 4, 5, 6)]
    + [("gru_reset_before", True, torch.bfloat16, i) for i in (1, 2, 3, 4, 5, 6)]
    + [("projected", False, torch.bfloat16, i) for i in (2, 3, 4, 5, 6)]
    + [("projected", True, torch.bfloat16, i) for i in (1, 2, 3, 4, 5, 6)],
    ids=str,
)
def test_a_missing_barrier_shows(
    host: Host, cell: str, backward: bool, dtype: torch.dtype, barrier: int
) -> None:
    case = BROKEN[cell]
    assert some_order_shows(host, case, dtype, backward, lambda: host.drop_barrier(barrier))


@pytest.mark.parametrize(
    ("cell", "backward", "barrier"),
    [
        ("lstm", False, 2),
        ("lstm", True, 6),
        ("gru_reset_before", False, 9),
        ("projected", False, 9),
    ],
)
def test_a_missing_barrier_between_two_tiles_of_rows_shows(
    host: Host, cell: str, backward: bool, barrier: int
) -> None:
    """Of three tiles, the barrier between the first two.

    Three products have one each, and there is one ahead of them and one behind. In the first visit
    of backward there are none.
    """
    case = dataclasses.replace(BROKEN[cell], B=70, T=3)
    with_room_for(host, case, 1)
    assert some_order_shows(
        host, case, torch.bfloat16, backward, lambda: host.drop_barrier(barrier)
    )

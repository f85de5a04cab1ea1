"""The persistent kernels: all steps of a pass in one launch, and the step-wise kernels' bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import (
    Case,
    assert_identical,
    assert_matches,
    build,
    evaluate,
    expected,
    feature_cases,
    leaves,
    run_op,
    same_bits,
)
from cuda_host.conftest import Host, Launches, plan_of, shows
from rnnkern import cuda
from rnnkern.arguments import LayerInputs
from rnnkern.cells import CELLS
from rnnkern.explain import Explanation

EXACT, NARROW = (torch.float32, torch.float64), (torch.float16, torch.bfloat16)
TYPES = [*EXACT, *NARROW]
SIZES = [(B, H) for B in (1, 3, 17) for H in (1, 7, 33, 96)]
GROUPS = (1, 2, 3)
THREADS = 128  # of a block
STEPS_OF_AN_ARGUMENT = 224  # of a packed sequence


def cases_of(*sizes: tuple[int, int], T: int = 4) -> list[Case]:
    """Return cells without projections, with every feature, for each (B,H)."""
    return [c for B, H in sizes for c in feature_cases(T=T, B=B, I=3, H=H) if not c.P]


def spread() -> list[tuple[Case, int, torch.dtype]]:
    """Return a third of all cases of every size, each with a number of groups, in half the types.

    Three sizes have all cases between them, and the next three have them in the other types.
    """
    return [
        (case, GROUPS[i // 3 % 3], dtype)
        for first, size in enumerate([*SIZES, (70, 33)])
        for i, case in enumerate(cases_of(size, T=3))
        if i % 3 == first % 3
        for dtype in TYPES[(i // 3 + first // 3) % 2 :: 2]
    ]


@contextmanager
def planned(name: str) -> Iterator[None]:
    """Pin the plan of all calls inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RNNKERN_CUDA_PLAN", name)
        yield


@pytest.fixture(autouse=True)
def _persistent() -> Iterator[None]:
    with planned("persistent"):
        yield


def with_room_for(host: Host, case: Case, groups: int) -> None:
    """Let the device hold so many groups of each direction, one block a multiprocessor."""
    host.device_size(groups * case.D * -(-case.H // 16), THREADS)


def inference(args: LayerInputs) -> dict[str, torch.Tensor]:
    return dict(enumerate(run_op(args, save=False)))  # type: ignore[arg-type]


def assert_same_as_stepwise(host: Host, args: LayerInputs, dtype: torch.dtype) -> None:
    """Compare both passes and inference bit by bit, and with the reference."""
    before = host.launches()
    found, infers = evaluate(args), inference(args)
    assert host.launches().cooperative == before.cooperative + 3, "not one launch for a pass"
    with planned("stepwise"):
        assert_identical(found, evaluate(args))
        assert_identical(infers, inference(args))
    if args.cell != "rnn_relu" or dtype in EXACT:  # one rounded sign decides on whole gradients
        assert_matches(found, expected(args), dtype=dtype)


# ---- values -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("case", "groups", "dtype"), spread(), ids=str)
def test_the_bits_of_the_stepwise_kernels(
    host: Host, case: Case, groups: int, dtype: torch.dtype
) -> None:
    with_room_for(host, case, groups)
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
        features[dtype].add(dataclasses.replace(case, B=1, H=1))
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
    for seed in (1, 2, 3):
        host.seed(seed)
        assert_identical(evaluate(args), first)


@pytest.mark.parametrize("cell", CELLS)
def test_the_size_of_the_device_does_not_matter(host: Host, cell: str) -> None:
    case = Case(cell, T=3, B=70, I=3, H=33, D=2, resets=True, reset_state=True)
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


# ---- plans and launches -------------------------------------------------------------------------
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("layout", "T"),
    [("padded", 2), *(("packed", T) for T in (1, STEPS_OF_AN_ARGUMENT, STEPS_OF_AN_ARGUMENT + 1))],
)
def test_one_launch_for_all_steps(host: Host, cell: str, layout: Any, T: int) -> None:
    """Before it one for the states and, if packed, one for each so many steps.

    In backward also one for each direction's weights, by phases.
    """
    args = build(Case(cell, T=T, B=2, I=1, H=2, D=2, layout=layout), torch.float64)
    before, found = host.launches(), evaluate(args)
    steps = -(-T // STEPS_OF_AN_ARGUMENT) if layout == "packed" else 0
    turned = 4 if cell == "gru_reset_before" else 2
    plain = 1 + steps + 1 + turned + steps
    assert host.launches() == Launches(before.plain + plain, before.cooperative + 2)
    with planned("stepwise"):
        assert_identical(found, evaluate(args))


def test_stepwise_is_the_default(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RNNKERN_CUDA_PLAN")
    plan = plan_of(host, Case("lstm"), torch.float32)
    assert {p["kind"] for p in plan.values()} == {"stepwise"}
    before = host.launches()
    evaluate(build(Case("lstm", T=3), torch.float32))
    assert host.launches() == Launches(before.plain + 4 + 6, before.cooperative)


def test_an_unknown_plan_is_an_error(host: Host) -> None:
    with (
        planned("fast"),
        pytest.raises(ValueError, match=r"RNNKERN_CUDA_PLAN: expected stepwise or .*'fast'"),
    ):
        run_op(build(Case("gru"), torch.float32))


@pytest.mark.parametrize(
    ("case", "device"),
    [
        (Case("lstm", P=2), 0),  # a projection
        (Case("lstm"), 2),  # no cooperative launches
        (Case("lstm", H=33, D=2), 0),  # six blocks on a device of five
        (Case("gru", H=80), 0),
    ],
    ids=str,
)
def test_what_does_not_fit_runs_step_by_step(host: Host, case: Case, device: int) -> None:
    host.device_size(4 if case.cell == "gru" else 5, THREADS)
    plan = plan_of(host, case, torch.float32, device)
    assert {p["kind"] for p in plan.values()} == {"stepwise"}
    args = build(case, torch.float32)
    with host.operators(device):
        assert_matches(evaluate(args), expected(args), dtype=torch.float32)


def test_a_refused_launch_is_made_up_for_step_by_step(host: Host) -> None:
    case = Case("lstm", T=3, B=3, H=33, D=2, lengths=True)
    args = build(case, torch.float32)
    host.device_size(5, THREADS, claimed=6)
    assert {p["kind"] for p in plan_of(host, case, torch.float32).values()} == {"persistent"}
    before, found = host.launches(), evaluate(args)
    forward, backward = 2 + case.T, 2 * 3 + case.T + 1
    assert host.launches() == Launches(before.plain + forward + backward, before.cooperative)
    with planned("stepwise"):
        assert_identical(found, evaluate(args))


def test_weights_that_do_not_fit_a_block(host: Host) -> None:
    """float64 LSTM: (H + 31) / 32 · 32 rows of 65 numbers, and for the product 32 of 9.

    In backward (4·H + 31) / 32 · 32 rows of 17 numbers.
    """
    host.device_size(64)
    for name in ("forward", "backward"):
        plans = (plan_of(host, Case("lstm", H=H), torch.float64) for H in (416, 417))
        assert [plan[name]["kind"] for plan in plans] == ["persistent", "stepwise"]


def test_the_plan_tells_the_grid(host: Host) -> None:
    case = Case("lstm", B=17, H=96, D=2)
    with_room_for(host, case, 3)
    plan = plan_of(host, case, torch.bfloat16)
    assert plan["forward"] == {
        "kind": "persistent",
        "tensor_cores": True,
        "rows_of_a_block": 8,
        "blocks_of_a_group": 6,
        "groups": 3,
        "resident_bytes": 4 * 16 * 96 * 2,
        "shared_memory_bytes": 4 * 16 * 96 * 2 + 4 * 64 * 9 * 4,
    }
    assert plan["backward"] == plan["forward"] | {
        "shared_memory_bytes": 4 * 16 * 96 * 2 + 4 * 16 * 9 * 4
    }
    told = str(Explanation("lstm", "cuda", "", torch.bfloat16, torch.bfloat16, plan=plan))
    words = (
        "one launch for all steps, tensor cores, 8 rows a block at a time;"
        " 3 group(s) a direction of 6 block(s), 12288 bytes of weights in each"
    )
    assert told.splitlines()[1:] == [f"  forward: {words}", f"  backward: {words}"]


# ---- the test of these tests --------------------------------------------------------------------
BROKEN = {cell: Case(cell, T=6, B=3, H=33) for cell in ("lstm", "gru_reset_before")}
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
    ("cell", "wait"), [("lstm", 0), ("lstm", 2), ("gru_reset_before", 0), ("gru_reset_before", 3)]
)
def test_a_missing_wait_shows(
    host: Host, cell: str, dtype: torch.dtype, wait: int, backward: bool
) -> None:
    """The reset-before GRU waits twice a step."""
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
    + [("gru_reset_before", True, torch.bfloat16, i) for i in (1, 2, 3, 4, 5, 6)],
    ids=str,
)
def test_a_missing_barrier_shows(
    host: Host, cell: str, backward: bool, dtype: torch.dtype, barrier: int
) -> None:
    case = BROKEN[cell]
    assert some_order_shows(host, case, dtype, backward, lambda: host.drop_barrier(barrier))


@pytest.mark.parametrize(
    ("cell", "backward", "barrier"),
    [("lstm", False, 2), ("lstm", True, 6), ("gru_reset_before", False, 9)],
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

"""When the persistent kernels run, in how many launches, and what is told of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, assert_identical, assert_matches, build, evaluate, expected, run_op
from cuda_host.conftest import Host, Launches, plan_of, planned
from cuda_host.persistent import THREADS, with_room_for
from rnnkern.cells import CELLS
from rnnkern.explain import Explanation

pytestmark = pytest.mark.usefixtures("persistently")

STEPS_OF_AN_ARGUMENT = 224  # of a packed sequence


@pytest.mark.parametrize(("cell", "P"), [*((cell, 0) for cell in CELLS), ("lstm", 1)])
@pytest.mark.parametrize(
    ("layout", "T"),
    [("padded", 2), *(("packed", T) for T in (1, STEPS_OF_AN_ARGUMENT, STEPS_OF_AN_ARGUMENT + 1))],
)
def test_one_launch_for_all_steps(host: Host, cell: str, P: int, layout: Any, T: int) -> None:
    """Before it one for the states and, if packed, one for each so many steps.

    In backward also one for each direction's weights, by phases, and for its projection.
    """
    args = build(Case(cell, T=T, B=2, I=1, H=2, D=2, P=P, layout=layout), torch.float64)
    before, found = host.launches(), evaluate(args)
    steps = -(-T // STEPS_OF_AN_ARGUMENT) if layout == "packed" else 0
    plain = 1 + steps + 1 + 2 * (CELLS[cell].phases + P) + steps
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


def test_weights_that_do_not_fit_a_block_are_streamed(host: Host) -> None:
    """float64 LSTM: (H + 31) / 32 · 32 rows of 65 numbers, and for the product 32 of 9.

    In backward (4·H + 31) / 32 · 32 rows of 17 numbers. What is streamed also needs 32 rows.
    """
    host.device_size(64)
    for name, row in (("forward", 65 * 8), ("backward", 17 * 8)):
        fits, streams = (plan_of(host, Case("lstm", H=H), torch.float64)[name] for H in (416, 417))
        room = 227 * 1024 - 32 * 9 * 8 - 32 * row
        assert (fits["kind"], fits["streamed_bytes"]) == ("persistent", 0)
        assert streams["kind"] == "persistent"
        assert streams["resident_bytes"] == room // (32 * row) * 32 * row
        rows = 448 if name == "forward" else 1696
        assert streams["resident_bytes"] + streams["streamed_bytes"] == rows * row


def test_blocks_of_a_multiprocessor_share_its_memory(host: Host) -> None:
    """Sixteen blocks of 130 KiB of R each, on eight multiprocessors of 227 KiB."""
    host.device_size(8, 2 * THREADS)
    for plan in plan_of(host, Case("lstm", H=256), torch.float64).values():
        assert (plan["kind"], plan["blocks_of_a_group"]) == ("persistent", 16)
        assert plan["streamed_bytes"] > 0
        assert plan["shared_memory_bytes"] <= 113 * 1024


def test_a_block_without_room_for_its_products_runs_step_by_step(host: Host) -> None:
    """float32 LSTM: 32 rows of 9 numbers, and 32 of 65 or, in backward, 17."""
    for short in (0, 1):
        for name, least in (("forward", 32 * (9 + 65) * 4), ("backward", 32 * (9 + 17) * 4)):
            host.device_size(64, memory=least - short)
            plan = plan_of(host, Case("lstm", H=512), torch.float32)[name]
            assert plan["kind"] == ("stepwise" if short else "persistent")
            assert plan["resident_bytes"] == 0


def test_the_plan_tells_the_grid(host: Host) -> None:
    case = Case("lstm", B=17, H=96, D=2)
    with_room_for(host, case, 3)
    plan = plan_of(host, case, torch.bfloat16)
    assert plan["forward"] == {
        "kind": "persistent",
        "tensor_cores": True,
        "rows_of_a_block": 8,
        "wide_blocks": False,
        "blocks_of_a_group": 6,
        "groups": 3,
        "resident_bytes": 4 * 16 * 96 * 2,
        "streamed_bytes": 0,
        "shared_memory_bytes": 4 * 16 * 96 * 2 + 4 * 64 * 9 * 4,
    }
    assert plan["backward"] == plan["forward"] | {
        "shared_memory_bytes": 4 * 16 * 96 * 2 + 4 * 16 * 9 * 4
    }
    told = str(Explanation("lstm", "cuda", "", torch.bfloat16, torch.bfloat16, plan=plan))
    words = (
        "one launch for all steps, tensor cores, 8 rows of 16 units a block at a time;"
        " 3 group(s) a direction of 6 block(s), 12288 bytes of weights in each"
    )
    assert told.splitlines()[1:] == [f"  forward: {words}", f"  backward: {words}"]


def test_the_plan_tells_what_is_streamed(host: Host) -> None:
    """16-bit: 2048 bytes for each 32 of k and 16 units of 4 gates, or 4 · 16 of 1 in backward."""
    case = Case("lstm", B=3, H=64)
    host.device_size(4, THREADS, memory=4 * 64 * 9 * 4 + 5000)
    plan = plan_of(host, case, torch.float16)
    told = str(Explanation("lstm", "cuda", "", torch.float16, torch.float16, plan=plan))
    assert told.splitlines()[1].endswith(
        ", 4096 bytes of weights in each, 4096 streamed at every step"
    )
    assert plan["backward"]["resident_bytes"] == 8192

"""What the tests of the persistent kernels share: cases, and the comparison with step-wise."""

from __future__ import annotations

import dataclasses

import torch
from cases import (
    Case,
    assert_identical,
    assert_matches,
    clear_of_kink,
    evaluate,
    expected,
    feature_cases,
    run_op,
)
from cuda_host.conftest import Host, planned
from rnnkern.arguments import LayerInputs

EXACT, NARROW = (torch.float32, torch.float64), (torch.float16, torch.bfloat16)
THREADS = 128  # of a block


def cases_of(*sizes: tuple[int, int], T: int = 4) -> list[Case]:
    """Return every cell with every feature, for each (B,H); projections to about half the units."""
    cases = [c for B, H in sizes for c in feature_cases(T=T, B=B, I=3, H=H)]
    return [dataclasses.replace(c, P=c.H // 2 + 1) if c.P else c for c in cases]


def with_room_for(host: Host, case: Case, groups: int) -> None:
    """Let the device hold so many groups of each direction, one block a multiprocessor."""
    host.device_size(groups * case.D * -(-case.H // 16), THREADS)


def inference(args: LayerInputs) -> dict[str, torch.Tensor]:
    return dict(enumerate(run_op(args, save=False)))  # type: ignore[arg-type]


def assert_same_as_stepwise(host: Host, args: LayerInputs, dtype: torch.dtype) -> None:
    """Compare both passes and inference bit by bit, and with the reference."""
    args = clear_of_kink(args)
    before = host.launches()
    found, infers = evaluate(args), inference(args)
    assert host.launches().cooperative == before.cooperative + 3, "not one launch for a pass"
    host.device_size()  # which may have been too small for these
    with planned("stepwise"):
        assert_identical(found, evaluate(args))
        assert_identical(infers, inference(args))
    assert_matches(found, expected(args), dtype=dtype)

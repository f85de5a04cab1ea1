"""What a call does on the host: its stream, the current device, errors and what they leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Case, Results, assert_identical, assert_matches, build, evaluate, expected, run_op
from cuda_host.conftest import Host, plan_of, planned
from rnnkern import cuda, kernels
from rnnkern.arguments import LayerInputs
from rnnkern.cells import get_cell

MEMORY, RESOURCES, INVALID_DEVICE = 2, 701, 101  # cudaError_t
STREAM = 0xABC0
FORGOTTEN = 64  # a device of which the driver remembers nothing
CASES = [
    Case("gru", T=2, D=2),
    Case("gru_reset_before", T=2, lengths=True, resets=True),
    Case("lstm", T=2, D=2, P=3, layout="packed_unsorted"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(params=cuda.PLANS)
def plan(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run by each plan."""
    name: str = request.param
    with planned(name):
        yield name


class OnStream:
    """The kernels, which the operators on CPU tensors call with no stream, on one."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._native, name)
        if not name.startswith(("forward", "backward")):
            return function

        def call(cell: int, where: tuple[Any, ...], *problem: Any) -> int:
            device, _, *rest = where
            size: int = function(cell, (device, STREAM, *rest), *problem)
            return size

        return call


def all_launches(host: Host) -> int:
    return sum(host.launches())


# ---- streams and devices ------------------------------------------------------------------------
@every_case
@pytest.mark.usefixtures("plan")
@pytest.mark.parametrize(("device", "current"), [(0, 0), (1, 0), (0, 2)])
def test_every_launch_goes_to_the_call_s_stream_and_device(
    host: Host, case: Case, device: int, current: int
) -> None:
    args = build(case, torch.float32)
    host.make_current(current)
    before, there = all_launches(host), host.launches_on(device, STREAM)
    with dataclasses.replace(host, native=OnStream(host.native)).operators(device):
        found = evaluate(args)
    assert host.launches_on(device, STREAM) - there == all_launches(host) - before > 0
    assert host.current_device() == current
    assert_matches(found, expected(args), dtype=torch.float32)


def test_questions_leave_the_current_device(host: Host) -> None:
    host.make_current(2)
    for device in (0, 1, 7):
        host.native.device_problem(device)
        host.native.cooperation_problem(device)
    with planned("persistent"):
        plan_of(host, Case("lstm"), torch.bfloat16, device=1)
    assert host.current_device() == 2


def test_the_stream_is_torch_s_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the data's device, which is current while kernels are queued."""
    device, calls = torch.device("cuda", 1), []
    streams = {device: SimpleNamespace(cuda_stream=STREAM)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    data: Any = SimpleNamespace(
        is_cuda=True, device=device, dtype=torch.float32, new_empty=torch.empty
    )

    def queue(_: int, where: tuple[Any, ...], *problem: Any) -> int:
        calls.append(where)
        return 16

    native = SimpleNamespace(forward_float32=queue, backward_float32=queue)
    cuda.Cuda(native).forward(get_cell("gru"), data, (3,))
    cuda.Cuda(native).backward(get_cell("gru"), data, (3,))
    assert [where[:2] for where in calls] == 4 * [(1, STREAM)]
    # Asked for the size first, then called with a workspace.
    assert [where[2] != 0 for where in calls] == 2 * [False, True]


# ---- errors -------------------------------------------------------------------------------------
def fails_then_works(
    args: LayerInputs, wanted: Results, kind: type[Exception], message: str
) -> None:
    """Check that a call raises, and that the next one computes the same bits as ever."""
    with pytest.raises(kind, match=message):
        evaluate(args)
    assert_identical(evaluate(args), wanted)


@every_case
@pytest.mark.usefixtures("plan")
@pytest.mark.parametrize("current", [0, 2])
def test_a_launch_that_fails(host: Host, case: Case, current: int) -> None:
    """Each one of both passes in turn: the error says which pass failed, where and how."""
    args = build(case, torch.float32)
    before, y = all_launches(host), run_op(args)
    forward = all_launches(host) - before
    before, wanted = all_launches(host), evaluate(args)
    every = all_launches(host) - before
    assert y[0].equal(wanted["y"])
    assert 1 < forward < every
    host.make_current(current)
    for index in range(every):
        which = "forward" if index < forward else "backward"
        host.fail_launch(index, RESOURCES)
        said = f"rnnkern: {which} on device 0: cudaErrorLaunchOutOfResources: "
        fails_then_works(args, wanted, RuntimeError, said)
        assert host.pending_error() == 0
        assert host.current_device() == current


@pytest.mark.usefixtures("plan")
@pytest.mark.parametrize("index", [0, 5])
def test_a_launch_without_memory_is_torch_s_error(host: Host, index: int) -> None:
    args = build(Case("gru", T=2, layout="packed"), torch.float32)
    wanted = evaluate(args)
    host.fail_launch(index, MEMORY)
    said = f"{'backward' if index else 'forward'} on device 0: cudaErrorMemoryAllocation: "
    fails_then_works(args, wanted, torch.OutOfMemoryError, said)


@pytest.mark.usefixtures("plan")
def test_memory_that_torch_cannot_allocate(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor of a call in turn, workspaces among them."""
    args = build(CASES[2], torch.float32)
    wanted, allocated = evaluate(args), counted_allocations(monkeypatch, fails=-1)
    evaluate(args)
    monkeypatch.undo()
    assert allocated.count(torch.uint8) == 2
    for index in range(len(allocated)):
        with monkeypatch.context() as patch:
            counted_allocations(patch, fails=index)
            with pytest.raises(torch.OutOfMemoryError, match="out of memory, says torch"):
                evaluate(args)
        assert_identical(evaluate(args), wanted)


def counted_allocations(patch: pytest.MonkeyPatch, fails: int) -> list[torch.dtype]:
    """Let one of the calls of ``new_empty`` fail; return the types of all, as they are made."""
    allocate: Callable[..., torch.Tensor] = torch.Tensor.new_empty
    made: list[torch.dtype] = []

    def new_empty(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        made.append(options.get("dtype", self.dtype))
        if len(made) == fails + 1:
            raise torch.OutOfMemoryError("out of memory, says torch")
        return allocate(self, *size, **options)

    patch.setattr(torch.Tensor, "new_empty", new_empty)
    return made


def test_a_device_that_is_not_there(host: Host) -> None:
    args = build(Case("gru"), torch.float32)
    with pytest.raises(RuntimeError, match="forward on device 7: cudaErrorInvalidDevice"):
        kernels.layer(cuda.Cuda(host.native, device=7), *args, True)
    with pytest.raises(RuntimeError, match="plan on device 7: cudaErrorInvalidDevice"):
        plan_of(host, Case("gru"), torch.bfloat16, device=7)
    assert host.pending_error() == 0
    assert host.native.device_problem(7) != ""
    assert host.native.device_problem(0) == ""
    assert_matches(evaluate(args), expected(args), dtype=torch.float32)


@pytest.mark.parametrize(
    ("error", "kind", "name"),
    [
        (MEMORY, torch.OutOfMemoryError, "MemoryAllocation"),
        (INVALID_DEVICE, RuntimeError, "InvalidDevice"),
    ],
)
def test_a_device_that_does_not_tell_its_architecture(
    host: Host, error: int, kind: type[Exception], name: str
) -> None:
    """It would decide the results' bits, so nothing is taken for it."""
    args = build(Case("gru"), torch.bfloat16)
    assert evaluate(args)
    with host.operators(FORGOTTEN):
        wanted = evaluate(args)
        host.fail_attributes(error)
        fails_then_works(args, wanted, kind, f"forward on device {FORGOTTEN}: cudaError{name}")
        host.fail_attributes(error)
        with pytest.raises(kind, match=f"plan on device {FORGOTTEN}: cudaError{name}"):
            plan_of(host, Case("gru"), torch.bfloat16, FORGOTTEN)
    assert host.pending_error() == 0

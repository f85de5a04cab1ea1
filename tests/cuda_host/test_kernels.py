"""Every CUDA kernel, run on the host: each cell, type, size and feature, in random thread order."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import rnnkern
import torch
from cases import (
    Case,
    assert_identical,
    assert_matches,
    build,
    clear_of_kink,
    cuda_extension,
    evaluate,
    expected,
    feature_cases,
    first_rows,
    leaves,
    run_op,
    same_bits,
)
from cuda_host.conftest import Host, plan_of, planned, shows
from ops.test_opcheck import backward_arguments
from rnnkern import cuda
from rnnkern.cells import CELLS, get_cell
from rnnkern.explain import Explanation
from tolerances import assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

EXACT = (torch.float32, torch.float64)
NARROW = (torch.float16, torch.bfloat16)
BATCHES, WIDTHS = (1, 3, 17), (1, 7, 33, 96)


def sized(B: int, H: int) -> list[Case]:
    cases = feature_cases(T=4, B=B, I=3, H=H)
    return [dataclasses.replace(c, P=H // 2 + 1) if c.P else c for c in cases]


def spread(third: int) -> list[Case]:
    """Return a third of the cases of every size; every cell meets every (B,H) in each third."""
    return [
        case
        for h, H in enumerate(WIDTHS)
        for b, B in enumerate(BATCHES)
        for i, case in enumerate(sized(B, H))
        if (i + b + h + third) % 3 == 0 and case.P < H
    ]


# Both products, exact and on tensor cores, meet all thirds: bfloat16 has both.
EXACT_CASES = [(dtype, case) for third, dtype in enumerate(EXACT) for case in spread(third)]
NARROW_CASES = [
    (dtype, device, case)
    for dtype, device, third in (
        (torch.float16, "sm_90", 0),
        (torch.float16, "sm_75", 1),
        (torch.bfloat16, "sm_90", 2),
        (torch.bfloat16, "sm_75", 2),
    )
    for case in spread(third)
]
DEVICES = {"sm_90": 0, "sm_75": 1}
BY_MULTIPLY_ADDS = (torch.bfloat16, "sm_75")  # the others of these run on tensor cores


def cases_of(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=str)


def test_every_cell_and_feature_meets_every_size() -> None:
    for cell in CELLS:
        for third in range(3):
            met = {(c.B, c.H) for c in spread(third) if c.cell == cell}
            assert met == {(B, H) for B in BATCHES for H in WIDTHS}
    every = {c for B in BATCHES for H in WIDTHS for c in sized(B, H) if c.P < H}
    on_sm_75 = {c for dtype, device, c in NARROW_CASES if (dtype, device) == BY_MULTIPLY_ADDS}
    assert {c for _, c in EXACT_CASES} | on_sm_75 == every
    assert {c for dtype, device, c in NARROW_CASES if (dtype, device) != BY_MULTIPLY_ADDS} == every


@pytest.mark.parametrize(("dtype", "case"), EXACT_CASES, ids=str)
def test_exact(host: Host, case: Case, dtype: torch.dtype) -> None:
    args = build(case, dtype)
    assert_matches(evaluate(args), expected(args), dtype=dtype)


@pytest.mark.parametrize(("dtype", "device", "case"), NARROW_CASES, ids=str)
def test_narrow(host: Host, case: Case, dtype: torch.dtype, device: str) -> None:
    args = clear_of_kink(build(case, dtype))
    for plan in plan_of(host, case, dtype, DEVICES[device]).values():
        assert plan["tensor_cores"] is ((dtype, device) != BY_MULTIPLY_ADDS)
    with host.operators(DEVICES[device]):
        found = evaluate(args)
    assert_matches(found, expected(args), dtype=dtype)


@cases_of(spread(0))
def test_tf32(host: Host, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "uses_tf32", lambda T: True)
    for name, device in DEVICES.items():
        for plan in plan_of(host, case, torch.float32, device).values():
            assert plan["tensor_cores"] is (name == "sm_90")
    args = clear_of_kink(build(case, torch.float32))
    # float16 has as many bits of mantissa
    assert_matches(evaluate(args), expected(args), dtype=torch.float16)


@cases_of(
    [
        Case("rnn_tanh", T=2, B=3, I=3, H=161),
        Case("gru_reset_before", T=2, B=3, I=3, H=160),
        Case("lstm", T=2, B=3, I=3, H=160, P=130),
    ]
)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_warp_s_second_turn(host: Host, case: Case, dtype: torch.dtype) -> None:
    """Four warps take 32 of k each on tensor cores: all 128 of them, and then again."""
    args = build(case, dtype)
    assert_matches(evaluate(args), expected(args), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_the_relu_cell_is_compared_far_from_its_kink(dtype: torch.dtype) -> None:
    for case in {c for third in range(3) for c in spread(third) if c.cell == "rnn_relu"}:
        y = expected(clear_of_kink(build(case, dtype)), needs=())["y"]
        assert bool(((y == 0) | (y > 4)).all()), case


@cases_of(sized(3, 7))
@pytest.mark.parametrize("dtype", [*EXACT, *NARROW], ids=str)
def test_inference_equals_training(host: Host, case: Case, dtype: torch.dtype) -> None:
    args = build(case, dtype)
    trained = run_op(args, save=True)
    assert all(map(torch.equal, run_op(args, save=False), trained))


@cases_of([c for B, H in ((9, 65), (33, 20)) for c in sized(B, H)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_blocks_change_no_bit(host: Host, case: Case, dtype: torch.dtype) -> None:
    args, found = build(case, dtype), {}
    for wide, multiprocessors in ((True, 1), (False, 64)):
        host.device_size(multiprocessors)
        plans = plan_of(host, case, dtype)
        assert plans["backward"]["wide_blocks"] is wide
        only_gates = case.cell in ("lstm", "gru") and not case.P  # 3 or 4 products in forward
        assert plans["forward"]["wide_blocks"] is (wide and not only_gates)
        found[wide] = evaluate(args)
    assert_identical(found[True], found[False])


def test_blocks_are_wide_where_they_fill_the_device(host: Host) -> None:
    """Tiles of 64 units and 32 rows, against multiprocessors."""
    for multiprocessors in (8, 9):
        host.device_size(multiprocessors)
        plan = plan_of(host, Case("rnn_tanh", B=33, H=65, D=2), torch.float32)["forward"]
        assert plan["wide_blocks"] is (multiprocessors == 8)
    host.device_size(2)  # a projection has a single tile
    assert not plan_of(host, Case("lstm", B=9, H=128, P=64), EXACT[0])["forward"]["wide_blocks"]
    host.device_size(1)
    for dtype, device in ((torch.float64, 0), (torch.bfloat16, 1)):  # which are not worth it
        assert not plan_of(host, Case("gru", B=33), dtype, device)["backward"]["wide_blocks"]
    plans = plan_of(host, Case("lstm", B=8, H=1000), torch.float32)
    told = str(Explanation("lstm", "cuda", "", EXACT[0], EXACT[0], plan=plans))
    assert told.endswith("one launch a step, fused multiply-adds, 8 rows of 16 units a block")
    plans = plan_of(host, Case("lstm", B=9, H=1000), torch.float32)
    told = str(Explanation("lstm", "cuda", "", EXACT[0], EXACT[0], plan=plans))
    assert told.splitlines()[1].endswith("32 rows of 16 units a block")
    assert told.splitlines()[2].endswith("32 rows of up to 64 units a block")


@cases_of(sized(17, 33))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_order_does_not_matter(host: Host, case: Case, dtype: torch.dtype) -> None:
    args = build(case, dtype)
    first = evaluate(args)
    for seed in (1, 2):
        host.seed(seed)
        assert_identical(evaluate(args), first)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [*EXACT, *NARROW], ids=str)
def test_a_row_does_not_depend_on_the_rows_of_its_block(
    host: Host, cell: str, dtype: torch.dtype
) -> None:
    """One input feature and no bias: the product in front of the kernels is exact."""
    case = Case(cell, B=17, I=1, H=33, D=2, resets=True, reset_state=True, bias=False)
    args = build(case, dtype)
    for found, wanted in zip(run_op(first_rows(args, 8)), run_op(args), strict=True):
        assert same_bits(found, wanted[:, :8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("B", [33, 70])
def test_more_rows_than_a_block_takes(host: Host, cell: str, dtype: torch.dtype, B: int) -> None:
    args = build(Case(cell, T=3, B=B, H=17, D=2, lengths=True, resets=True), dtype)
    assert_matches(evaluate(args), expected(args), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("barrier", [0, 1, 2])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_missing_barrier_shows(
    host: Host, cell: str, dtype: torch.dtype, barrier: int, backward: bool
) -> None:
    """The test of these tests: without a barrier that the kernels need, results are wrong."""
    if dtype == torch.bfloat16 and barrier > 0:
        pytest.skip("the product on tensor cores has one barrier")
    args = build(Case(cell, T=3, B=3, I=3, H=96), dtype)
    assert shows(args, backward, drop=lambda: host.drop_barrier(barrier))


@pytest.mark.parametrize("cell", CELLS)
def test_calls_from_several_threads(host: Host, cell: str) -> None:
    cases = [Case(cell, T=5, B=B, H=9, D=2, lengths=True, resets=True) for B in (1, 3, 8, 17)]
    args = [build(case, torch.float32) for case in cases]
    wanted = [evaluate(a) for a in args]
    with ThreadPoolExecutor(len(args)) as pool:
        for i, found in enumerate(pool.map(evaluate, args * 2)):
            assert_identical(found, wanted[i % len(args)])


class InputGradients(TorchDispatchMode):
    """What is multiplied into the second direction's part of dinput, and what comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.Tensor, ...]] = []

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), options: Any = None) -> Any:
        before = args[0].clone() if function.overloadpacket.__name__ == "addmm_" else None
        result = function(*args, **(options or {}))
        if before is not None:
            self.found.append((before, *args[1:], result.clone()))
        return result


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_dinput_of_both_directions_is_rounded_once(host: Host, dtype: torch.dtype) -> None:
    args = backward_arguments(leaves(build(Case("gru", T=9, B=5, D=2), dtype)))
    with InputGradients() as seen, torch.no_grad():
        dinput = cuda.run("layer_backward", 0, args)[0]
    ((first, dx, w, both),) = seen.found
    assert torch.equal(dinput.flatten(), both.flatten())
    assert torch.equal(both, (first.double() + dx.double() @ w.double()).to(dtype))


# ---- what only this backend does ----------------------------------------------------------------
@pytest.mark.parametrize("length", [-1, 6, 2**40])
def test_wrong_lengths_on_the_device_make_their_row_nan(
    host: Host, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "check_lengths", lambda a, _: a.lengths)  # nobody on the host looks
    case = Case("lstm", T=5, B=3, D=2, resets=True, reset_state=True)
    good = build(case, torch.float32)._replace(lengths=torch.tensor([5, 3, 2]))
    bad = good._replace(lengths=torch.tensor([5, length, 2]))
    for found, wanted in zip(run_op(bad), run_op(good), strict=True):
        assert found[:, 1].isnan().all()
        assert torch.equal(found[:, 0::2], wanted[:, 0::2])


@pytest.mark.parametrize("plan", cuda.PLANS)
def test_a_row_that_an_order_on_the_device_leaves_out(
    host: Host, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Final states are NaN, whatever memory they get, and gradients of initial ones zero."""
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, 7))
    monkeypatch.setattr(cuda, "check_order", lambda order, _: order)  # nobody on the host looks
    good = build(Case("lstm", T=5, B=3, D=2, layout="packed_unsorted"), torch.float32)
    assert good.order is not None
    bad = good._replace(order=torch.stack([good.order[0], good.order[0], good.order[2]]))
    out, left = int(good.order[1]), [int(good.order[2])]
    with planned(plan):
        found, wanted = evaluate(bad), evaluate(good)
    for name in ("hn", "cn"):
        assert found[name][:, out].isnan().all()
        assert same_bits(found[name][:, left], wanted[name][:, left])
        assert not found[name][:, int(good.order[0])].isnan().any()
    for name in ("dh0", "dc0"):
        assert (found[name][:, out] == 0).all()
        assert same_bits(found[name][:, left], wanted[name][:, left])


def test_more_steps_than_a_grid_has_rows(host: Host) -> None:
    args = build(Case("rnn_tanh", T=66_000, B=1, I=1, H=1), torch.float64)
    assert_matches(evaluate(args), expected(args), dtype=torch.float64)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_modules(host: Host, name: str, dtype: torch.dtype) -> None:
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dtype": dtype}
    theirs: nn.Module = getattr(nn, name)(5, 9, **options)
    ours: nn.Module = getattr(rnnkern, name)(5, 9, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 6, 5, dtype=dtype)
    for found, wanted in zip(outputs(ours, x), outputs(theirs, x), strict=True):
        assert found.dtype == dtype
        assert_close(found, wanted, kind="gradient")


def outputs(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return output, states and all gradients."""
    leaf = x.clone().requires_grad_()
    y, states = module(leaf)
    states = states if isinstance(states, tuple) else (states,)
    grads = torch.autograd.grad(y.square().mean(), [leaf, *module.parameters()])
    return [y.detach(), *(s.detach() for s in states), *grads]


def test_afterwards_the_operators_are_the_cpu_s_again(built: Host) -> None:
    args = build(Case("lstm"), torch.float16)
    assert torch.ops.rnnkern.layer(*args, True)[3].dtype == torch.float32
    with built.operators():
        assert torch.ops.rnnkern.layer(*args, True)[3].dtype == torch.float16
    assert torch.ops.rnnkern.layer(*args, True)[3].dtype == torch.float32


# ---- where the kernels do not run ---------------------------------------------------------------
def test_without_kernels_the_reason_is_told_once() -> None:
    with cuda_extension(None, "this build has none"):
        with pytest.warns(UserWarning, match="this build has none; the reference runs instead"):
            assert cuda.missing(0) == "this build has none"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cuda.missing(0)


@pytest.mark.parametrize("name", ["MemoryAllocation", "DevicesUnavailable", "IllegalAddress"])
def test_a_device_whose_trouble_may_pass_is_asked_again(name: str) -> None:
    told = [f"cudaError{name}: what it means", ""]
    with cuda_extension(SimpleNamespace(device_problem=lambda _: told.pop(0))):
        with pytest.raises(RuntimeError, match=f"device 0: cudaError{name}"):
            cuda.missing(0)
        assert cuda.missing(0) is None


@pytest.mark.parametrize(
    "name",
    [
        *("NoKernelImageForDevice", "InvalidDeviceFunction", "UnsupportedPtxVersion"),
        *("InsufficientDriver", "InvalidDevice"),
    ],
)
def test_a_device_that_will_never_do_is_asked_once(name: str) -> None:
    told = [f"cudaError{name}: what it means"]
    with cuda_extension(SimpleNamespace(device_problem=lambda _: told.pop())):
        with pytest.warns(UserWarning, match=f"device 0 .cudaError{name}: what it means"):
            reason = cuda.missing(0)
        assert reason is not None
        assert cuda.missing(0) == reason


def test_a_device_that_the_build_does_not_know(built: Host) -> None:
    with cuda_extension(built.native):
        assert cuda.missing(0) is None
        with pytest.warns(UserWarning, match="cudaErrorInvalidDevice"):
            assert "device 9" in (cuda.missing(9) or "")


def test_a_device_is_current_while_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []

    @contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def asked(*_: Any) -> Any:
        assert [d.index for d in current] == [1]
        return {}

    monkeypatch.setattr(cuda, "_current", guard)
    data = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    native = SimpleNamespace(plan_float32=asked, device_problem=lambda _: asked() or "")
    with cuda_extension(native):
        cuda.plan(get_cell("lstm"), data, torch.float32, 1, 1, 1, 1, 0)  # type: ignore[arg-type]
        assert cuda.missing(1) is None

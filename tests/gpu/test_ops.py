"""The operators on a device: values, derivatives, opcheck, torch.func, and arguments elsewhere.

Every test runs on the CPU too, so that it is known to be right where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

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
    on_device,
    run_op,
)
from ops.test_gradcheck import as_function, smooth
from ops.test_opcheck import QUICK, backward_arguments
from ops.test_transforms import outputs, weights_for
from rnnkern.cells import CELLS
from rnnkern.checks import moved
from rnnkern.ops import DIFFERENTIABLE, LayerInputs
from tolerances import assert_close
from torch import Tensor
from torch.func import grad, jacrev, vmap

OP = torch.ops.rnnkern.layer.default
BACKWARD = torch.ops.rnnkern.layer_backward.default
STEERING = ("order", "lengths", "resets")
cases = pytest.mark.parametrize("case", feature_cases(T=3, B=3, I=2, H=3), ids=str)
cells = pytest.mark.parametrize("cell", CELLS)


def everything(cell: str) -> Case:
    return Case(cell, T=4, B=3, I=3, H=4, D=2, lengths=True, resets=True, reset_state=True)


# ---- values and derivatives ---------------------------------------------------------------------
@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values(device: str, case: Case, dtype: torch.dtype) -> None:
    args = build(case, dtype)
    found = evaluate(on_device(args, device))
    assert all(t.device.type == device for t in found.values())
    assert_matches({key: t.cpu() for key, t in found.items()}, expected(args), dtype=dtype)


@cases
def test_what_steers_may_lie_on_the_host(device: str, case: Case) -> None:
    args = build(case)
    there = on_device(args, device)
    mixed = there._replace(**{name: getattr(args, name) for name in STEERING})
    assert_identical(evaluate(mixed), evaluate(there))


def test_a_queued_copy_never_reads_the_callers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, pinned, empty_like = torch.tensor([3, 1, 2]), [], torch.empty_like

    def pinned_like(t: Tensor, *, pin_memory: bool) -> Tensor:
        pinned.append(pin_memory)
        return empty_like(t)

    monkeypatch.setattr(torch, "empty_like", pinned_like)
    monkeypatch.setattr(Tensor, "to", lambda t, *_, **options: options["non_blocking"] and t)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    copied = moved("lengths", lengths, "cuda:0")
    lengths.zero_()
    assert copied.tolist() == [3, 1, 2]
    assert pinned == [True]


def test_a_graph_captures_no_copy_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[str] = []

    @contextmanager
    def device(name: str) -> Iterator[None]:
        current.append(name)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current == ["cuda:1"])
    with pytest.raises(RuntimeError, match="lengths: expected on cuda:1 while a CUDA graph is"):
        moved("lengths", torch.tensor([2, 1]), "cuda:1")


@cases
def test_derivatives(device: str, case: Case) -> None:
    function, tensors = as_function(on_device(smooth(build(case)), device))
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@cells
def test_nothing_saved(device: str, cell: str) -> None:
    args = on_device(smooth(build(Case(cell, T=3, B=2, H=3, D=2))), device)
    function, tensors = as_function(args, save=False)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@cells
def test_empty_batch(device: str, cell: str) -> None:
    args = leaves(on_device(build(Case(cell, B=1, D=2)), device))
    empty = args._replace(
        input=args.input[:, :0].detach(),
        h0=args.h0[:, :0].detach(),
        c0=None if args.c0 is None else args.c0[:, :0].detach(),
    )
    y, hn, *_ = run_op(empty)
    assert y.shape == (5, 0, 10)
    assert hn.shape == (2, 0, 5)
    (gradient,) = torch.autograd.grad(y.sum(), empty.w_hh)
    assert bool((gradient == 0).all())


@cells
def test_any_strides(device: str, cell: str) -> None:
    args = on_device(build(everything(cell)), device)

    def strided(t: Tensor) -> Tensor:
        return torch.stack((t, torch.full_like(t, float("nan"))), -1)[..., 0]

    names = [name for name in DIFFERENTIABLE if getattr(args, name) is not None]
    other = args._replace(**{name: strided(getattr(args, name)) for name in names})
    assert not other.h0.is_contiguous()
    assert_identical(
        dict(zip("yhc", run_op(other), strict=False)), dict(zip("yhc", run_op(args), strict=False))
    )


# ---- opcheck ------------------------------------------------------------------------------------
@cases
def test_opcheck(device: str, case: Case) -> None:
    args = leaves(on_device(build(case), device))
    torch.library.opcheck(OP, (*args, True), test_utils=QUICK)
    torch.library.opcheck(BACKWARD, backward_arguments(args), test_utils=QUICK)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@cells
def test_opcheck_of_narrow_types(device: str, cell: str, dtype: torch.dtype) -> None:
    args = leaves(on_device(build(Case(cell, D=2), dtype), device))
    torch.library.opcheck(OP, (*args, True), test_utils=QUICK)
    torch.library.opcheck(BACKWARD, backward_arguments(args), test_utils=QUICK)


def test_opcheck_under_aot_dispatch(device: str) -> None:
    args = leaves(on_device(build(everything("lstm")), device))
    torch.library.opcheck(OP, (*args, True), test_utils="test_aot_dispatch_dynamic")


# ---- torch.func ---------------------------------------------------------------------------------
def drawn(cell: str, device: str) -> tuple[list[Tensor], Tensor]:
    """Weights, and inputs for five calls."""
    weights = [w.to(device) for w in weights_for(cell, 3, 4)]
    return weights, torch.randn(5, 6, 1, 3, dtype=torch.float64).to(device)


@cells
def test_vmap(device: str, cell: str) -> None:
    weights, xs = drawn(cell, device)
    found = vmap(lambda x: outputs(cell, x, weights))(xs)
    assert_close(found, torch.stack([outputs(cell, x, weights) for x in xs]), kind="output")


@cells
def test_per_sample_gradients(device: str, cell: str) -> None:
    weights, xs = drawn(cell, device)

    def loss(w: Sequence[Tensor], x: Tensor) -> Tensor:
        return outputs(cell, x, w).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(weights, xs)
    own = [w.clone().requires_grad_() for w in weights]
    for k, x in enumerate(xs):
        for f, w in zip(found, torch.autograd.grad(loss(own, x), own), strict=True):
            assert_close(f[k], w, kind="gradient")


@cells
def test_jacobian(device: str, cell: str) -> None:
    weights, xs = drawn(cell, device)
    x = xs[0].requires_grad_()
    found = jacrev(lambda v: outputs(cell, v, weights))(x)
    y = outputs(cell, x, weights)
    rows = [torch.autograd.grad(v, x, retain_graph=True)[0] for v in y.flatten()]
    assert_close(found.reshape(len(rows), *x.shape), torch.stack(rows), kind="gradient")


# ---- wrong devices ------------------------------------------------------------------------------
def elsewhere(args: LayerInputs, name: str, other: str) -> LayerInputs:
    return args._replace(**{name: getattr(args, name).to(other)})


@pytest.mark.parametrize("other", ["meta", "cpu"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_data_elsewhere_is_refused_by_name(device: str, name: str, other: str) -> None:
    args = on_device(build(Case("lstm", P=2, D=2, resets=True, reset_state=True)), device)
    if other == device:
        pytest.skip("the same device")
    with pytest.raises(ValueError, match="expected a tensor on") as caught:
        run_op(elsewhere(args, name, other))
    if name != "input":  # which says where the others should be
        assert str(caught.value).startswith(f"{name}: expected a tensor on {device}")
    else:
        assert f"expected a tensor on {other}" in str(caught.value)


@pytest.mark.parametrize("name", ["lengths", "resets"])
def test_what_steers_must_have_values(device: str, name: str) -> None:
    args = on_device(build(everything("gru")), device)
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor on"):
        run_op(elsewhere(args, name, "meta"))

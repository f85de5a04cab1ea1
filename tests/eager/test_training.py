"""The short way in training: gradients of the long one, whatever is asked for or arrives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import rnnkern
import torch
from cases import assert_identical
from eager.ways import DTYPES, OPTIONS, counted, flat, general_way, made
from rnnkern._native import _cpu
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def gradients(module: nn.Module, x: Tensor, hx: Any) -> dict[str, Tensor]:
    """Return all results, and all gradients of a sum that every result takes part in."""
    states = hx if isinstance(hx, tuple) else (hx,)
    leaves = [t.clone().requires_grad_() for t in (x, *states)]
    results = flat(module(leaves[0], tuple(leaves[1:]) if isinstance(hx, tuple) else leaves[1]))
    loss = sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in results.values())
    wanted = [*leaves, *module.parameters()]
    grads = torch.autograd.grad(loss, wanted, create_graph=False)
    return results | {f"gradient{i}": g for i, g in enumerate(grads)}


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_equal_those_of_the_general_way(
    name: str, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x, hx = made(name, options, dtype)
    with counted(monkeypatch) as taken:
        found = gradients(module, x, hx)
    assert taken == [True]
    with general_way(monkeypatch):
        assert_identical(found, gradients(module, x, hx))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_only_the_gradients_that_are_asked_for(name: str) -> None:
    module, x, hx = made(name, {"bidirectional": True}, torch.float64)
    every = dict(module.named_parameters())
    wanted = torch.autograd.grad(module(x, hx)[0].sum(), list(every.values()))
    for (kept, value), gradient in zip(every.items(), wanted, strict=True):
        for key, parameter in every.items():
            parameter.requires_grad_(key == kept)
        (found,) = torch.autograd.grad(module(x, hx)[0].sum(), value)
        assert torch.equal(found, gradient)


def test_only_a_state_or_the_input_has_a_gradient() -> None:
    module, x, hx = made("LSTM", {}, torch.float64)
    module.requires_grad_(False)
    states = [t.clone().requires_grad_() for t in hx]
    y, (h, c) = module(x, (states[0], hx[1]))
    assert torch.autograd.grad(c.sum(), states[0])[0].abs().sum() > 0
    y, _ = module(x.requires_grad_(), hx)
    assert torch.autograd.grad(y[0, 0, 0], x)[0][1:].abs().sum() == 0
    y, (h, c) = module(x.detach(), tuple(states))
    assert y.requires_grad
    assert h.requires_grad


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("rows", [8, 3000])
def test_what_is_kept_in_one_tensor_or_in_three(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = getattr(rnnkern, name)(16, 128)
    x = torch.randn(rows, 1, 16, requires_grad=True)
    h = torch.randn(1, 1, 128)
    hx = (h, torch.randn(1, 1, 128)) if name == "LSTM" else h
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x, hx)[0].sum(), [x, *module.parameters()])

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = gradients()
    parts = {"LSTM": 2, "GRU": 3, "RNN": 1}[name]  # gates; h' of a GRU; what the cell saves
    given = 7 if name == "LSTM" else 6  # input, states, weights and biases
    assert len(kept) == given + (1 if rows == 8 else parts)
    with general_way(monkeypatch):
        assert all(map(torch.equal, found, gradients()))
    with monkeypatch.context() as patch:
        patch.setattr(_cpu.Stack, "backward", lambda *_: None)  # as for a graph of its own
        assert all(map(torch.equal, found, gradients()))


@pytest.mark.parametrize(("name", "options"), OPTIONS[:5])
def test_double_backward(name: str, options: dict[str, Any]) -> None:
    module, x, hx = made(name, options, torch.float64)
    states = hx if isinstance(hx, tuple) else (hx,)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = tensors[1:] if isinstance(hx, tuple) else tensors[1]
        return tuple(flat(module(tensors[0], given)).values())

    leaves = [t[:2] if i == 0 and not module.batch_first else t for i, t in enumerate((x, *states))]
    leaves = [t.clone().requires_grad_() for t in leaves]
    assert torch.autograd.gradgradcheck(call, leaves, atol=1e-6, fast_mode=True)


def test_changed_inputs_are_refused_in_backward() -> None:
    module, x, _ = made("GRU", {}, torch.float32)
    y = module(x)[0]
    with torch.no_grad():
        module.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_that_arrive_in_odd_shapes() -> None:
    module, x, _ = made("LSTM", {}, torch.float64)
    weights = list(module.parameters())
    dense = torch.randn(5, 3, 9, dtype=torch.float64)
    odd = {
        "dense": lambda y: y,
        "batch-major": lambda y: y.transpose(0, 1).contiguous().transpose(0, 1),
        "with gaps": lambda y: torch.stack((y, y), -1)[..., 0],
    }
    found = [torch.autograd.grad(module(x)[0], weights, make(dense)) for make in odd.values()]
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))
    expanded = torch.autograd.grad(module(x)[0].sum(), weights)
    ones = torch.autograd.grad(module(x)[0], weights, torch.ones_like(dense))
    assert all(map(torch.equal, expanded, ones))


def test_gradients_are_kept_as_they_are() -> None:
    """AccumulateGrad takes a gradient that nobody else has, whole storage, without a copy."""
    module, x, _ = made("LSTM", {}, torch.float32)
    module(x)[0].sum().backward()
    for p in module.parameters():
        assert p.grad is not None
        assert p.grad.untyped_storage().nbytes() == p.numel() * p.element_size()


@pytest.mark.parametrize(
    "unpack",
    [
        lambda t: t.double(),
        lambda t: t.bfloat16(),
        lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
        lambda t: t[:1],
        lambda t: t[..., :1],
    ],
    ids=["wider", "narrower", "in columns", "shorter", "thinner"],
)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("which", ["every", "h0"])
def test_hooks_that_change_saved_tensors(
    name: str, which: str, unpack: Callable[[Tensor], Tensor]
) -> None:
    """Never a wrong number: the same gradients, or an error."""
    module, x, hx = made(name, {}, torch.float32)
    h0 = hx[0] if isinstance(hx, tuple) else hx
    weights = list(module.parameters())
    wanted = torch.autograd.grad(module(x, hx)[0].sum(), weights)

    def unpack_some(t: Tensor) -> Tensor:
        return unpack(t) if which == "every" or t.data_ptr() == h0.data_ptr() else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack_some):
        y = module(x, hx)[0]
        try:
            found = torch.autograd.grad(y.sum(), weights)
        except (RuntimeError, ValueError):
            return
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w)


def test_checkpoint_under_a_profiler() -> None:
    module, x, _ = made("GRU", {}, torch.float32)
    x.requires_grad_()
    with torch.autograd.profiler.profile():
        y = checkpoint(lambda t: module(t)[0], x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad(module(x)[0].sum(), x)[0])


def test_large_batches_are_summed_in_blocks() -> None:
    theirs, ours = (m.GRU(16, 16) for m in (nn, rnnkern))
    ours.load_state_dict(theirs.state_dict())
    x, dy = torch.rand(1, 50_000, 16), torch.rand(1, 50_000, 16)
    exact = copy.deepcopy(theirs).double()
    wanted = torch.autograd.grad(exact(x.double())[0], list(exact.parameters()), dy.double())
    found = torch.autograd.grad(ours(x)[0], list(ours.parameters()), dy)
    for f, w in zip(found, wanted, strict=True):
        assert_close(f.double(), w, kind="gradient", dtype=torch.float32)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_grad_mode_inside_inference_mode_records_nothing(name: str) -> None:
    module, x = getattr(rnnkern, name)(4, 5), torch.randn(3, 2, 4)
    with torch.inference_mode(), torch.enable_grad():
        y = module(x)[0]
    assert y.is_inference()
    assert torch.equal(y, module(x)[0])


def test_a_module_inside_an_operator_records_nothing() -> None:
    module, x = rnnkern.GRU(4, 5), torch.randn(3, 2, 4)

    @torch.library.custom_op("rnnkern_test::gru", mutates_args=())
    def gru(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return module(x)[0]

    y = gru(x)
    assert not y.requires_grad
    assert torch.equal(y, module(x)[0])

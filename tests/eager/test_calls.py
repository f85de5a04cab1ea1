"""The short way to the kernels: taken when it may be, with the results of the long one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_identical, use_isa
from eager.ways import DTYPES, OPTIONS, counted, flat, general_way, made
from rnnkern._native import _cpu
from rnnkern.cells import get_cell
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def assert_both_ways_agree(
    module: nn.Module, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with general_way(monkeypatch):
        general = {k: t.detach() for k, t in flat(module(*args)).items()}
    with torch.no_grad(), counted(monkeypatch) as taken:
        found = flat(module(*args))
    assert taken == [True]
    assert_identical(found, general)
    assert [t.stride() for t in found.values()] == [t.stride() for t in general.values()]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stated", [False, True], ids=["zeros", "hx"])
def test_equal_to_the_general_way(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    stated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, x, hx = made(name, options, dtype)
    assert_both_ways_agree(module, (x, hx) if stated else (x,), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stated", [False, True], ids=["zeros", "hx"])
# Two pieces, of which the second would have few rows if they were not nearly equal; three.
@pytest.mark.parametrize("T", [1366, 3001])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LSTM", {"num_layers": 3, "proj_size": 3}),
        ("GRU", {"num_layers": 2, "batch_first": True}),
        ("RNN", {"num_layers": 2, "bidirectional": True}),  # never cut, and so is no bfloat16
    ],
)
def test_long_stacks_in_pieces(
    name: str,
    options: dict[str, Any],
    T: int,
    stated: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, _, hx = made(name, options, dtype)
    x = torch.randn((3, T, 7) if module.batch_first else (T, 3, 7), dtype=dtype)
    assert_both_ways_agree(module, (x, hx) if stated else (x,), monkeypatch)


def test_without_weights_that_learn_it_is_taken_in_any_grad_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, x, _ = made("LSTM", {}, torch.float32)
    with counted(monkeypatch) as taken:
        assert not module.requires_grad_(False)(x)[0].requires_grad
    assert taken == [True]


class Watching(TorchDispatchMode):
    """A dispatch mode that changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Overriding(TorchFunctionMode):
    """A function mode that changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    """A tensor that torch asks before it works on it."""


def transposed_weight(module: nn.Module, x: Tensor) -> Tensor:
    module.weight_hh_l0.data = module.weight_hh_l0.data.t().contiguous().t()
    return x


UNUSUAL: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "not contiguous": lambda module, x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "a negative view": lambda module, x: torch._neg_view(-x),
    "unbatched": lambda module, x: x[:, 0],
    "a subclass": lambda module, x: x.as_subclass(Subclass),
    "a weight in columns": transposed_weight,
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_tensors_go_the_general_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, _ = made("GRU", {}, torch.float32)
    wanted = module(x[:, :1] if kind == "unbatched" else x)[0].detach()  # of as many rows
    input = UNUSUAL[kind](module, x)
    with torch.no_grad(), counted(monkeypatch) as taken:
        y = module(input)[0]
    assert not any(taken)
    assert torch.equal(torch.as_tensor(y), wanted[:, 0] if y.dim() == 2 else wanted)


@pytest.mark.parametrize(
    "state",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        Watching,
        Overriding,
        lambda: torch.autograd.forward_ad.dual_level(),
    ],
    ids=["autocast", "dispatch mode", "function mode", "forward AD"],
)
def test_what_watches_or_changes_operators_sees_them(
    state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x, _ = made("RNN", {}, torch.float32)
    with torch.no_grad(), counted(monkeypatch) as taken, state():
        module(x)
    assert not any(taken)


@pytest.mark.parametrize("grad", [True, False])
def test_tensors_that_left_a_transform(grad: bool) -> None:
    """Torch's own modules look through their wrappers."""
    module, x, hx = made("GRU", {}, torch.float32)
    left: list[Tensor] = []

    def inside(x: Tensor, hx: Tensor) -> Tensor:
        left.extend((x, hx))
        return x.sum() + hx.sum()

    torch.func.grad(inside, argnums=(0, 1))(x, hx)
    with torch.set_grad_enabled(grad):
        wanted = module(x, hx)[0]
        for given in ((left[0], hx), (x, left[1]), tuple(left)):
            assert torch.equal(module(*given)[0], wanted)


def test_bfloat16_without_kernels_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, _ = made("LSTM", {}, torch.bfloat16)
    with use_isa("baseline"), counted(monkeypatch) as taken:
        module(x)[0].sum().backward()
    assert not any(taken)


def test_changed_weights_are_seen() -> None:
    module, x, _ = made("LSTM", {}, torch.float32)
    with torch.no_grad():
        before = module(x)[0]
        module.weight_hh_l0.data.add_(1.0)  # which no version counter tells
        changed = module(x)[0]
        module.weight_hh_l0.data.sub_(1.0)
        module.weight_ih_l0 = nn.Parameter(module.weight_ih_l0 * 2)
        assigned = module(x)[0]
    assert not torch.equal(before, changed)
    theirs = nn.LSTM(7, 9)
    theirs.load_state_dict(module.state_dict())
    torch.testing.assert_close(assigned, theirs(x)[0].detach())


def test_errors_are_those_of_the_general_way() -> None:
    module, x, hx = made("LSTM", {}, torch.float32)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"must be equal to input_size|Expected 7, got 6"):
            module(x[..., :6].contiguous())
        with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
            module(x, (hx[0][:, :2], hx[1][:, :2]))
        with pytest.raises(ValueError, match="dtype"):
            module(x.double())
        module.weight_hh_l0 = nn.Parameter(torch.zeros(36, 8))
        with pytest.raises((RuntimeError, ValueError)):
            module(x)


def test_the_native_calls_check_their_arguments() -> None:
    x, weights = torch.zeros(2, 1, 3), [torch.zeros(4, 3), torch.zeros(4, 4)]
    with pytest.raises(ValueError, match="cell: no such index"):
        _cpu.Stack(1000, 3, 4, 4, 1, 1, False, False)
    stack = _cpu.Stack(get_cell("rnn_tanh").index, 3, 4, 4, 1, 1, False, False)
    assert stack.fits(x, None, weights)
    for given in (weights[:1], weights * 2, weights[::-1], (None, None), None):
        assert not stack.fits(x, None, given)
        assert stack.infer(x, None, given) is None
        assert stack.forward(x, None, given) is None
    for states in ([x], x, (x, x), (x,), (None,)):
        assert not stack.fits(x, states, weights)
    assert stack.forward(x, None, weights)[1] is None  # nothing requires a gradient
    (kept,) = stack.forward(x, None, [w.requires_grad_() for w in weights])[1]
    saved, dy, needs = (x, None, None, *weights, kept), torch.zeros(2, 1, 4), (True,) * 5
    assert stack.backward(saved, dy, None, None, needs) is not None
    for wrong in ((saved[:-1], needs), (saved, needs[:-1]), ((*saved, kept), needs)):
        with pytest.raises(ValueError, match="one entry for each tensor"):
            stack.backward(wrong[0], dy, None, None, wrong[1])
    for at, other in ((5, x), (5, kept[1:]), (0, x[:1]), (3, weights[1])):
        changed = (*saved[:at], other, *saved[at + 1 :])
        assert stack.backward(changed, dy, None, None, needs) is None
    assert stack.backward(saved, dy[:1], None, None, needs) is None
    assert stack.backward(saved, None, None, None, needs) is None
    directions = _cpu.Stack(get_cell("rnn_tanh").index, 3, 4, 4, 1, 3, False, False)
    many = [torch.zeros(4, 3), torch.zeros(4, 4)] * 3
    with pytest.raises(ValueError, match="problem: sizes out of range"):
        directions.infer(x, None, many)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mode", [torch.inference_mode, contextlib.nullcontext])
def test_results_are_tensors_like_others(
    grad: bool, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the native calls make, against those of the operators."""

    def facts(t: Tensor) -> tuple[Any, ...]:
        storage = t.untyped_storage()
        return (
            *(t.dtype, t.device, t.shape, t.stride(), t.storage_offset(), t.requires_grad),
            *(t.is_leaf, t.is_inference(), t._version if not t.is_inference() else 0, t._base),
            *(storage.nbytes(), storage.resizable(), t.is_pinned(), type(t)),
        )

    module, x, hx = made("LSTM", {}, torch.float32)
    with torch.set_grad_enabled(grad), mode(), counted(monkeypatch) as taken:
        found = flat(module(x, hx))
    assert taken == [True]
    with torch.set_grad_enabled(grad), mode(), general_way(monkeypatch):
        wanted = flat(module(x, hx))
    for name, t in found.items():
        assert facts(t) == facts(wanted[name])
        assert t.untyped_storage().data_ptr() not in {
            other.untyped_storage().data_ptr() for key, other in found.items() if key != name
        }


def test_tensors_without_storage() -> None:
    module, _, _ = made("LSTM", {"bidirectional": True}, torch.float32)
    with torch.no_grad():
        found = module(torch._efficientzerotensor((5, 3, 7)))[0]
        assert torch.equal(found, module(torch.zeros(5, 3, 7))[0])
    y = module(torch.zeros(5, 3, 7))[0]
    torch.autograd.backward(y, torch._efficientzerotensor(y.shape))
    assert not any(p.grad.any() for p in module.parameters())

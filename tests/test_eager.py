"""The short way to the CPU's kernels: it is taken when it may be, and gives what the long one gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import rnnkern
import torch
from cases import assert_identical
from rnnkern import eager
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("GRU", {"reset_after": False}),
    ("RNN", {"nonlinearity": "relu"}),
    ("LSTM", {"proj_size": 3, "bidirectional": True, "num_layers": 2}),
    ("GRU", {"batch_first": True, "num_layers": 3, "bias": False}),
    ("RNN", {"bidirectional": True, "dropout": 0.5, "num_layers": 2}),
]


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Record of every call whether it went the short way."""
    taken: list[bool] = []
    run = eager.run

    def spy(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        taken.append(result is not None)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(eager, "run", spy)
        yield taken


def flat(result: Any) -> dict[str, Tensor]:
    y, states = result
    states = states if isinstance(states, tuple) else (states,)
    return {"y": y, **{f"state{k}": s for k, s in enumerate(states)}}


def made(name: str, options: dict[str, Any], dtype: torch.dtype) -> tuple[nn.Module, Any, Any]:
    module = getattr(rnnkern, name)(7, 9, **options, dtype=dtype).eval()
    rows = module.num_layers * (2 if module.bidirectional else 1)
    shape = (3, 5, 7) if module.batch_first else (5, 3, 7)
    x = torch.randn(shape, dtype=dtype)
    h = torch.randn(rows, 3, module.proj_size or 9, dtype=dtype)
    hx = (h, torch.randn(rows, 3, 9, dtype=dtype)) if name == "LSTM" else h
    return module, x, hx


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("stated", [False, True], ids=["zeros", "hx"])
def test_equal_to_the_general_way(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    stated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, x, hx = made(name, options, dtype)
    args = (x, hx) if stated else (x,)
    general = {k: t.detach() for k, t in flat(module(*args)).items()}  # gradients are wanted there
    with torch.no_grad(), counted(monkeypatch) as taken:
        found = flat(module(*args))
    assert taken == [True]
    assert_identical(found, general)
    assert [t.stride() for t in found.values()] == [t.stride() for t in general.values()]


def test_without_gradients_to_record_it_is_taken_in_any_grad_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, x, hx = made("LSTM", {}, torch.float32)
    with counted(monkeypatch) as taken:
        module(x)
        module.requires_grad_(False)(x)
        module(x, (hx[0].requires_grad_(), hx[1]))
        module(x.requires_grad_())
    assert taken == [False, True, False, False]


class Watching(TorchDispatchMode):
    """A dispatch mode that changes nothing."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class Overriding(TorchFunctionMode):
    """A function mode that changes nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
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
    wanted = module(x)[0].detach()
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
        lambda: torch.autograd.profiler.profile(),
    ],
    ids=["autocast", "dispatch mode", "function mode", "forward AD", "profiler"],
)
def test_what_watches_or_changes_operators_sees_them(
    state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x, _ = made("RNN", {}, torch.float32)
    with torch.no_grad(), counted(monkeypatch) as taken, state():
        module(x)
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


def test_the_native_call_checks_its_sizes() -> None:
    call = eager._RUN[torch.float32]
    with pytest.raises(ValueError, match="weights: expected 4"):
        call(0, 1, 1, 1, 1, 1, 1, 1, 1, True, False, 0, 0, 0, 0, 0, 0, (0, 0))
    with pytest.raises(ValueError, match="problem: sizes out of range"):
        call(0, 1, 1, 1, 1, 1, 1, 3, 1, False, False, 0, 0, 0, 0, 0, 0, (0,) * 6)

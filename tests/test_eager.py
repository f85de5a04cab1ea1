"""The short way to the kernels: taken when it may be, with the results of the long one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import rnnkern
import torch
from cases import KERNELS, assert_identical, use_isa
from rnnkern import eager
from rnnkern._native import _cpu
from rnnkern.cells import get_cell
from tolerances import assert_close
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

DTYPES = sorted({dtype for _, dtype in KERNELS}, key=str)
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


@contextlib.contextmanager
def general_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(eager, "run", lambda *_, **__: None)
        yield


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
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x)[0].sum(), [x, *module.parameters()])

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = gradients()
    assert len(kept) == 5 + (1 if rows == 8 else 2 if name == "RNN" else 3)
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
    ],
    ids=["wider", "narrower", "in columns", "shorter"],
)
def test_hooks_that_change_saved_tensors(unpack: Callable[[Tensor], Tensor]) -> None:
    """Never a wrong number: the same gradients, or an error."""
    module, x, _ = made("LSTM", {}, torch.float32)
    weights = list(module.parameters())
    wanted = torch.autograd.grad(module(x)[0].sum(), weights)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = module(x)[0]
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


def test_tensors_without_storage() -> None:
    module, _, _ = made("LSTM", {"bidirectional": True}, torch.float32)
    with torch.no_grad():
        found = module(torch._efficientzerotensor((5, 3, 7)))[0]
        assert torch.equal(found, module(torch.zeros(5, 3, 7))[0])
    y = module(torch.zeros(5, 3, 7))[0]
    torch.autograd.backward(y, torch._efficientzerotensor(y.shape))
    assert not any(p.grad.any() for p in module.parameters())


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

"""rnnkern.functional: the same results as the modules, for every cell and every form of input."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import rnnkern
import torch
from rnnkern import functional
from rnnkern.cells import CELLS
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

DTYPE = torch.float64
Run = Callable[..., Any]
# What each function is called, with its own options, and the module that does the same.
FORMS: dict[str, tuple[Run, dict[str, Any], type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (functional.lstm, {}, rnnkern.LSTM, {}),
    "gru": (functional.gru, {}, rnnkern.GRU, {}),
    "gru_reset_before": (
        functional.gru,
        {"reset_after": False},
        rnnkern.GRU,
        {"reset_after": False},
    ),
    "rnn_tanh": (functional.rnn, {}, rnnkern.RNN, {}),
    "rnn_relu": (
        functional.rnn,
        {"nonlinearity": "relu"},
        rnnkern.RNN,
        {"nonlinearity": "relu"},
    ),
}
forms = pytest.mark.parametrize("cell", FORMS)


def flat(result: Any) -> list[Tensor]:
    """Output and states as a list."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def assert_same(found: Any, wanted: Any) -> None:
    for f, w in zip(flat(found), flat(wanted), strict=True):
        assert f.shape == w.shape
        assert f.stride() == w.stride()
        assert torch.equal(f, w)


def state_of(cell: str, rows: int, *batch: int) -> Any:
    states = tuple(torch.randn(rows, *batch, 5, dtype=DTYPE) for _ in range(CELLS[cell].states))
    return states if len(states) == 2 else states[0]


def test_there_is_a_form_for_every_cell() -> None:
    assert set(FORMS) == set(CELLS)
    assert set(functional.__all__) == {"gru", "lstm", "recurrent", "rnn"}


@forms
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 3},
        {"bias": False},
        {"bidirectional": True, "num_layers": 2},
        {"batch_first": True},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_like_the_module(cell: str, options: dict[str, Any]) -> None:
    function, own, kind, module_options = FORMS[cell]
    module = kind(3, 5, dtype=DTYPE, **options, **module_options)
    weights = list(module.parameters())
    rows = options.get("num_layers", 1) * (2 if "bidirectional" in options else 1)
    x = torch.randn(4, 4, 3, dtype=DTYPE)
    lengths, resets = torch.tensor([4, 0, 2, 3]), torch.rand(4, 4) < 0.4
    hx, reset = state_of(cell, rows, 4), state_of(cell, rows, 4)
    assert_same(function(x, weights, **own, **options), module(x))
    assert_same(function(x, weights, hx, **own, **options), module(x, hx))
    features = {"lengths": lengths, "resets": resets, "reset_state": reset}
    assert_same(function(x, weights, hx, **own, **options, **features), module(x, hx, **features))
    unbatched_hx = tuple(s[:, 0] for s in hx) if isinstance(hx, tuple) else hx[:, 0]
    assert_same(
        function(x[0], weights, unbatched_hx, resets=resets[0], **own, **options),
        module(x[0], unbatched_hx, resets=resets[0]),
    )
    packed = pack_sequence([x[0], x[1, :1], x[2, :3]], enforce_sorted=False)
    found, wanted = function(packed, weights, **own, **options), module(packed)
    assert_same(found, wanted)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(found[0], name), getattr(wanted[0], name))


@forms
def test_recurrent_is_the_general_form(cell: str) -> None:
    function, own, kind, module_options = FORMS[cell]
    weights = list(kind(3, 5, dtype=DTYPE, **module_options).parameters())
    x, hx = torch.randn(4, 2, 3, dtype=DTYPE), state_of(cell, 1, 2)
    states = hx if isinstance(hx, tuple) else (hx,)
    y, finals = functional.recurrent(cell, x, weights, states)
    assert isinstance(finals, tuple)
    assert len(finals) == CELLS[cell].states
    assert_same((y, *finals), function(x, weights, hx, **own))


def test_projection_is_read_off_the_weights() -> None:
    module = rnnkern.LSTM(3, 5, proj_size=2, bidirectional=True, num_layers=2, dtype=DTYPE)
    x = torch.randn(4, 2, 3, dtype=DTYPE)
    found = functional.lstm(x, list(module.parameters()), bidirectional=True, num_layers=2)
    assert_same(found, module(x))
    assert found[0].shape == (4, 2, 4)


@pytest.mark.parametrize("training", [False, True])
def test_dropout(training: bool) -> None:
    module = rnnkern.GRU(3, 5, num_layers=3, dropout=0.5, dtype=DTYPE).train(training)
    x, weights = torch.randn(4, 2, 3, dtype=DTYPE), list(module.parameters())
    torch.manual_seed(1)
    wanted = module(x)
    torch.manual_seed(1)
    found = functional.gru(x, weights, num_layers=3, dropout=0.5, training=training)
    assert_same(found, wanted)
    plain = functional.gru(x, weights, num_layers=3)
    assert torch.equal(found[0], plain[0]) != training


@forms
def test_gradients_reach_every_argument(cell: str) -> None:
    function, own, kind, module_options = FORMS[cell]
    module = kind(3, 5, dtype=DTYPE, **module_options)
    weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x, hx, reset = (torch.randn(4, 2, 3, dtype=DTYPE), state_of(cell, 1, 2), state_of(cell, 1, 2))
    resets = torch.tensor([[False] * 2, [True] * 2, [False] * 2, [True] * 2])
    leaves = [x, *flat(hx), *flat(reset)]
    for leaf in leaves:
        leaf.requires_grad_()
    y, states = function(x, weights, hx, resets=resets, reset_state=reset, **own)
    loss = y.sin().sum() + sum(s.square().sum() for s in flat(states))
    found = torch.autograd.grad(loss, [*leaves, *weights])
    y, states = module(x, hx, resets=resets, reset_state=reset)
    loss = y.sin().sum() + sum(s.square().sum() for s in flat(states))
    wanted = torch.autograd.grad(loss, [*leaves, *module.parameters()])
    for f, w in zip(found, wanted, strict=True):
        assert bool((f != 0).any())
        assert_close(f, w, kind="gradient")


def test_weights_may_be_computed() -> None:
    """A hypernetwork: the weights are themselves the output of a network."""
    maker = nn.Linear(2, 20 * 3 + 20 * 5, dtype=DTYPE)
    x = torch.randn(4, 2, 3, dtype=DTYPE)
    w = maker(torch.randn(2, dtype=DTYPE))
    y, _ = functional.lstm(x, [w[:60].view(20, 3), w[60:].view(20, 5)], bias=False)
    y.square().sum().backward()
    assert maker.weight.grad is not None
    assert bool((maker.weight.grad != 0).any())


def test_gru_forms_differ() -> None:
    weights = [p.detach() for p in rnnkern.GRU(3, 5, dtype=DTYPE).parameters()]
    x, hx = torch.randn(4, 2, 3, dtype=DTYPE), torch.randn(1, 2, 5, dtype=DTYPE)
    after = functional.gru(x, weights, hx)[0]
    before = functional.gru(x, weights, hx, reset_after=False)[0]
    assert float((after - before).abs().max()) > 1e-3


@pytest.mark.parametrize("name", functional.__all__)
def test_public_functions_are_documented_and_typed(name: str) -> None:
    function = getattr(functional, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
    positional = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert len(positional) <= 4
    text = inspect.getdoc(function) or ""
    assert "Returns" in text
    assert "recurrent" in text or "Parameters" in text

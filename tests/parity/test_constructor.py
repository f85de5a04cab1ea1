"""Constructors: torch.nn's arguments, attributes, initial weights, errors and warnings."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import rnnkern
import torch
from pairs import CELLS, LAYERS, assert_same_error, outcome
from torch import nn

pytestmark = pytest.mark.usefixtures("every_device")
ALL = LAYERS + CELLS

# (positional arguments, keyword arguments) that torch's layers accept.
ACCEPTED: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((3, 4), {}),
    ((), {"input_size": 3, "hidden_size": 4}),
    ((1, 1), {}),
    ((7, 33, 3), {}),
    ((3, 4), {"bias": False}),
    ((3, 4), {"batch_first": True}),
    ((3, 4, 2), {"dropout": 0.25}),
    ((3, 4, 2), {"dropout": 1}),
    ((3, 4, 2), {"dropout": 0}),
    ((3, 4), {"bidirectional": True, "num_layers": 2}),
    ((3, 4), {"bidirectional": 1}),
    ((True, 4), {}),
    ((3, 4), {"dtype": torch.float64}),
    ((3, 4), {"dtype": torch.bfloat16, "device": "cpu"}),
    ((3, 4), {"device": "meta"}),
]
LSTM_ONLY = [
    ((3, 4), {"proj_size": 2}),
    ((3, 4, 2), {"proj_size": 3, "bidirectional": True, "bias": False}),
    ((3, 4, 2, True, True, 0.5, True, 2), {}),
    ((3, 4, 1, True, True, 0.0, False, 2, "cpu", torch.float64), {}),
]
GRU_ONLY = [((3, 4, 2, False, True, 0.5, True), {})]
RNN_ONLY = [
    ((3, 4), {"nonlinearity": "relu"}),
    ((3, 4, 1, "relu"), {}),
    ((3, 4, 2, "tanh", False, True, 0.5, True), {}),
]
CELL_ACCEPTED: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((3, 4), {}),
    ((3, 4, False), {}),
    ((1, 33), {"bias": False}),
    ((3, 4), {"bias": 0}),
    ((3, 4), {"dtype": torch.float64, "device": "cpu"}),
    ((3, 4), {"device": "meta"}),
]


def cases() -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    own = {"LSTM": LSTM_ONLY, "GRU": GRU_ONLY, "RNN": RNN_ONLY}
    listed = [(name, *case) for name in LAYERS for case in ACCEPTED + own[name]]
    listed += [(name, *case) for name in CELLS for case in CELL_ACCEPTED]
    listed += [("RNNCell", (3, 4, True, "relu"), {}), ("RNNCell", (3, 4), {"nonlinearity": "relu"})]
    listed += [("RNNCell", (3, 4), {"nonlinearity": "unknown"})]  # refused by forward only
    return listed


def attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a user may read: plain attributes, without torch's private bookkeeping."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


@pytest.mark.filterwarnings("ignore:dropout option")
@pytest.mark.parametrize(("name", "args", "kwargs"), cases(), ids=str)
def test_accepted_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    theirs, ours = getattr(nn, name)(*args, **kwargs), getattr(rnnkern, name)(*args, **kwargs)
    assert repr(ours) == repr(theirs)
    theirs_attributes, ours_attributes = attributes(theirs), attributes(ours)
    for attribute, value in theirs_attributes.items():
        assert ours_attributes[attribute] == value, attribute
        assert type(ours_attributes[attribute]) is type(value), attribute
    described = [(key, w.shape, w.dtype, w.device) for key, w in theirs.named_parameters()]
    assert [(key, w.shape, w.dtype, w.device) for key, w in ours.named_parameters()] == described
    for weight in ours.parameters():
        assert isinstance(weight, nn.Parameter)
        assert weight.requires_grad
        assert weight.is_contiguous()


def generator_state() -> torch.Tensor:
    """Return the state of the generator that new weights are drawn from."""
    on_gpu = torch.get_default_device().type == "cuda"
    return torch.cuda.get_rng_state() if on_gpu else torch.get_rng_state()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bias", [True, False])
def test_initial_weights_are_equal_under_the_same_seed(name: str, bias: bool) -> None:
    options: dict[str, Any] = {"bias": bias}
    if name in LAYERS:
        options |= {"num_layers": 2, "bidirectional": True}
    if name == "LSTM":
        options["proj_size"] = 3
    made: list[nn.Module] = []
    after: list[torch.Tensor] = []
    for library in (nn, rnnkern):
        torch.manual_seed(5)
        made.append(getattr(library, name)(7, 9, **options))
        after.append(generator_state())
    for (key, wanted), (_, found) in zip(*(m.named_parameters() for m in made), strict=True):
        assert torch.equal(found, wanted), key
    assert torch.equal(*after), "ours drew another number of random values"


@pytest.mark.parametrize("name", ALL)
def test_reset_parameters_draws_as_torch_does(name: str) -> None:
    for library in (nn, rnnkern):
        module = getattr(library, name)(3, 4)
        torch.manual_seed(6)
        module.reset_parameters()
        drawn = torch.cat([weight.flatten() for weight in module.parameters()])
        if library is nn:
            wanted = drawn
    assert torch.equal(drawn, wanted)


@pytest.mark.parametrize("name", ALL)
def test_default_dtype_is_obeyed(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    assert {w.dtype for w in getattr(rnnkern, name)(3, 4).parameters()} == {torch.float64}


@pytest.mark.parametrize("name", ALL)
def test_default_device_is_obeyed(name: str) -> None:
    with torch.device("meta"):
        module = getattr(rnnkern, name)(3, 4)
    assert {w.device.type for w in module.parameters()} == {"meta"}


# ---- refused arguments --------------------------------------------------------------------------
REFUSED: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((3, 4), {"dropout": True}),
    ((3, 4), {"dropout": "0.5"}),
    ((3, 4), {"dropout": "much"}),
    ((3, 4), {"dropout": None}),
    ((3, 4), {"dropout": torch.tensor(0.5)}),
    ((3, 4, 2), {"dropout": 1.5}),
    ((3, 4, 2), {"dropout": -0.1}),
    ((3, 4, 2), {"dropout": float("nan")}),
    ((3, 4), {"bias": 1}),
    ((3, 4), {"batch_first": 1}),
    ((3.0, 4), {}),
    ((np.int64(3), 4), {}),
    ((0, 4), {}),
    ((-1, 4), {}),
    ((3, 4.0), {}),
    ((3, 0), {}),
    ((3, -1), {}),
    ((3, 4, 0), {}),
    ((3, 4, -1), {}),
    ((3, 4, 1.5), {}),
    ((3, 4), {"proj_size": -1}),
    ((3, 4), {"proj_size": 4}),
    ((3, 4), {"proj_size": 5}),
    ((3, 4), {"nonlinearity": "sigmoid"}),
    ((3, 4, 1, "sigmoid"), {}),
    ((3, 4), {"dtype": torch.int64}),
    ((3, 4), {"device": "nowhere"}),
    ((3,), {}),
    ((), {}),
    ((3, 4), {"unknown": 1}),
    ((3, 4), {"input_size": 5}),
]


def test_rnn_and_gru_refuse_a_projection() -> None:
    for name in ("GRU", "RNN"):
        with pytest.raises(ValueError, match="only supported for LSTM, not RNN or GRU"):
            getattr(rnnkern, name)(3, 4, proj_size=2)


def without_owner(message: str) -> str:
    """Drop the class in front of `.__init__()`: Python names whichever class was called."""
    return re.sub(r"^\w+\.__init__\(\)", "__init__()", message)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("args", "kwargs"), REFUSED, ids=str)
def test_refused_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    theirs = outcome(lambda: getattr(nn, name)(*args, **kwargs))
    ours = outcome(lambda: getattr(rnnkern, name)(*args, **kwargs))
    if "__init__()" not in str(theirs.error):
        assert_same_error(ours, theirs)
        return
    assert type(ours.error) is type(theirs.error), f"ours {ours}; torch {theirs}"
    assert without_owner(str(ours.error)) == without_owner(str(theirs.error))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((3.0, 4), {}), ((3, -4), {}), ((3, 4), {"device": "nowhere"}), ((3, 4), {"bad": 1})],
    ids=str,
)
def test_refused_cell_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    theirs = outcome(lambda: getattr(nn, name)(*args, **kwargs))
    assert_same_error(outcome(lambda: getattr(rnnkern, name)(*args, **kwargs)), theirs)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("layers", "dropout", "count"), [(1, 0.5, 1), (1, 1, 1), (1, 0.0, 0), (2, 0.5, 0)]
)
def test_dropout_warning(name: str, layers: int, dropout: float, count: int) -> None:
    theirs = outcome(lambda: getattr(nn, name)(3, 4, layers, dropout=dropout))
    ours = outcome(lambda: getattr(rnnkern, name)(3, 4, layers, dropout=dropout))
    assert len(theirs.warned) == count
    assert ours.warned == theirs.warned


# ---- class surface ------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_torch_rnn_bases(name: str) -> None:
    module = getattr(rnnkern, name)(3, 4)
    assert isinstance(module, nn.RNNBase)
    assert type(module).__name__ == name
    assert module.mode == getattr(nn, name)(3, 4).mode


@pytest.mark.parametrize("name", CELLS)
def test_cells_are_torch_cell_bases(name: str) -> None:
    module = getattr(rnnkern, name)(3, 4)
    assert isinstance(module, nn.RNNCellBase)
    assert type(module).__name__ == name


@pytest.mark.parametrize("name", ALL)
def test_every_public_method_of_torch_exists(name: str) -> None:
    theirs, ours = getattr(nn, name), getattr(rnnkern, name)
    missing = [n for n in dir(theirs) if not n.startswith("_") and not hasattr(ours, n)]
    assert missing == []


@pytest.mark.parametrize("name", LAYERS)
def test_a_subclass_with_its_own_constructor(name: str) -> None:
    base = getattr(rnnkern, name)

    class Named(base):  # type: ignore[misc, valid-type]
        def __init__(self, size: int) -> None:
            super().__init__(size, size, batch_first=True)
            self.scale = 2.0

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input)[0] * self.scale

    module = Named(3)
    x = torch.randn(2, 5, 3)
    assert torch.equal(module(x), base.forward(module, x)[0] * 2.0)
    assert repr(module) == "Named(3, 3, batch_first=True)"


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("both", [False, True])
def test_check_methods_agree(name: str, bias: bool, layers: int, both: bool) -> None:
    options = {"bias": bias, "num_layers": layers, "bidirectional": both}
    theirs = getattr(nn, name)(3, 4, **options)
    ours = getattr(rnnkern, name)(3, 4, **options)
    x, sizes = torch.randn(5, 2, 3), torch.tensor([3, 2], device="cpu")
    assert ours.get_expected_hidden_size(x, None) == theirs.get_expected_hidden_size(x, None)
    assert ours.get_expected_hidden_size(x, sizes) == theirs.get_expected_hidden_size(x, sizes)
    wrong = torch.zeros(9, 9, 9)
    for call in ("check_hidden_size", "check_input"):
        argument = (theirs.get_expected_hidden_size(x, None),) if "hidden" in call else (None,)
        expected = outcome(lambda m=theirs, c=call, a=argument: getattr(m, c)(wrong, *a))
        found = outcome(lambda m=ours, c=call, a=argument: getattr(m, c)(wrong, *a))
        assert_same_error(found, expected)
    order = torch.tensor([1, 0])
    state = torch.randn(layers * (1 + both), 2, 4)
    hx: Any = (state, state * 2) if name == "LSTM" else state
    expected_hx, found_hx = theirs.permute_hidden(hx, order), ours.permute_hidden(hx, order)
    assert ours.permute_hidden(hx, None) is hx
    for wanted, got in zip(expected_hx, found_hx, strict=True):
        assert torch.equal(got, wanted)

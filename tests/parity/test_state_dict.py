"""State dicts, copies and pickles: everything saved by torch.nn loads here, and the other way."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import rnnkern
import torch
from pairs import CELLS, LAYERS, assert_parity, assert_same_error, outcome, pair, random_state
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("every_device")
ALL = LAYERS + CELLS
SHAPES: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 2},
    {"num_layers": 3, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True},
]
VARIANTS = [(name, shape) for name in LAYERS for shape in SHAPES]
VARIANTS += [
    ("LSTM", {"proj_size": 2, "num_layers": 2, "bidirectional": both}) for both in (False, True)
]
VARIANTS += [("LSTM", {"proj_size": 1, "bias": False})]
VARIANTS += [("RNN", {"nonlinearity": "relu"})]
VARIANTS += [(name, {"bias": bias}) for name in CELLS for bias in (True, False)]


def sample(module: nn.Module) -> Tensor:
    """Return an input that `module` takes: [5, 2, 3] for a layer, [2, 3] for a cell."""
    dtype = next(module.parameters()).dtype
    shape = (2, 3) if isinstance(module, nn.RNNCellBase) else (5, 2, 3)
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize(("name", "shape"), VARIANTS, ids=str)
def test_keys_order_shapes_and_loading_both_ways(name: str, shape: dict[str, Any]) -> None:
    theirs = getattr(nn, name)(3, 4, **shape)
    ours = getattr(rnnkern, name)(3, 4, **shape)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert [(k, v.shape, v.dtype) for k, v in found.items()] == [
        (k, v.shape, v.dtype) for k, v in expected.items()
    ]
    assert found._metadata == expected._metadata
    assert [k for k, _ in ours.named_parameters()] == [k for k, _ in theirs.named_parameters()]
    assert list(ours.buffers()) == []

    assert str(ours.load_state_dict(expected, strict=True)) == "<All keys matched successfully>"
    assert_parity((theirs, ours), sample(theirs))
    again = getattr(rnnkern, name)(3, 4, **shape)
    assert str(theirs.load_state_dict(again.state_dict(), strict=True)).startswith("<All keys")
    assert_parity((theirs, again), sample(theirs))


@pytest.mark.parametrize("name", ALL)
def test_loading_errors_read_the_same(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    good = theirs.state_dict()
    first = next(iter(good))
    broken = [
        {key: value for key, value in good.items() if key != first},
        good | {"surplus": torch.zeros(1)},
        good | {first: torch.zeros(2, 2)},
        {},
    ]
    for state in broken:
        expected = outcome(lambda s=state: theirs.load_state_dict(s))
        assert_same_error(outcome(lambda s=state: ours.load_state_dict(s)), expected)
    lenient = [module.load_state_dict(broken[0], strict=False) for module in (theirs, ours)]
    assert lenient[0] == lenient[1]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("assign", [False, True])
def test_loading_takes_effect_at_the_next_call(name: str, assign: bool) -> None:
    theirs, ours = pair(name, 3, 4)
    x = sample(theirs)
    assert_parity((theirs, ours), x)
    other = getattr(nn, name)(3, 4).state_dict()
    for module in (theirs, ours):
        module.load_state_dict({k: v.clone() for k, v in other.items()}, assign=assign)
    expected, _ = assert_parity((theirs, ours), x)
    torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    assert set(expected.grads) >= set(other)


@pytest.mark.parametrize("name", ALL)
def test_loading_converts_or_assigns_another_dtype(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    double = {key: value.double() for key, value in theirs.state_dict().items()}
    for assign, dtype in ((False, torch.float32), (True, torch.float64)):
        for module in (theirs, ours):
            module.load_state_dict(double, assign=assign)
        assert {w.dtype for w in ours.parameters()} == {dtype}
        assert_parity((theirs, ours), sample(theirs))


@pytest.mark.parametrize("name", ALL)
def test_inside_a_larger_model(name: str) -> None:
    def model(library: Any) -> nn.Module:
        return nn.ModuleDict({"embed": nn.Linear(2, 3), "core": getattr(library, name)(3, 4)})

    theirs, ours = model(nn), model(rnnkern)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert_parity((theirs["core"], ours["core"]), sample(theirs["core"]))


@pytest.mark.parametrize("name", ALL)
def test_optimizer_state_of_torch_continues_here(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    x = sample(theirs)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        assert_parity((module, module), x)  # leaves the gradients of a fixed loss
        optimizer.step()

    their_adam = torch.optim.Adam(theirs.parameters(), 0.01)
    step(theirs, their_adam)
    ours.load_state_dict(theirs.state_dict())
    our_adam = torch.optim.Adam(ours.parameters(), 0.01)
    our_adam.load_state_dict(copy.deepcopy(their_adam.state_dict()))
    for _ in range(2):
        step(theirs, their_adam)
        step(ours, our_adam)
    assert_parity((theirs, ours), x)


# ---- copies and pickles -------------------------------------------------------------------------
def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize(("name", "shape"), VARIANTS, ids=str)
def test_copies_are_whole_and_independent(name: str, shape: dict[str, Any], way: str) -> None:
    theirs, ours = pair(name, 3, 4, **shape)
    x = sample(theirs)
    hx = random_state(theirs, 5 if shape.get("batch_first") else 2)
    before, _ = assert_parity((theirs, ours), x, hx)
    made = COPIES[way](ours)
    assert type(made) is type(ours)
    assert repr(made) == repr(ours)
    assert_parity((theirs, made), x, hx)
    with torch.no_grad():
        for weight in made.parameters():
            weight.zero_()
    after, _ = assert_parity((theirs, ours), x, hx)
    assert torch.equal(before.outputs["h_n"], after.outputs["h_n"])
    for flat in getattr(made, "_flat_weights", []):
        assert not flat.any(), "the copy still computes with the original's weights"


@pytest.mark.parametrize("name", ALL)
def test_state_dict_passes_weights_only_loading(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    fresh = getattr(nn, name)(3, 4)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert_parity((theirs, fresh), sample(theirs))


def old_pickle_1_7(state: dict[str, Any]) -> dict[str, Any]:
    """Return what torch wrote before 1.8: no proj_size."""
    del state["proj_size"]
    return state


def old_pickle_1_3(state: dict[str, Any]) -> dict[str, Any]:
    """Return what torch wrote before 1.4: weight names under `all_weights`."""
    state = old_pickle_1_7(state)
    state["all_weights"] = state["_all_weights"]
    return state


def old_pickle_0_1(state: dict[str, Any]) -> dict[str, Any]:
    """Return what the first versions wrote: the parameters themselves under `all_weights`."""
    names = state.pop("_all_weights")
    state["all_weights"] = [[state["_parameters"][n] for n in layer] for layer in names]
    for key in ("proj_size", "_flat_weights", "_flat_weights_names"):
        del state[key]
    return state


OLD = [old_pickle_1_7, old_pickle_1_3, old_pickle_0_1]


@pytest.mark.parametrize("age", OLD, ids=lambda age: age.__name__)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_old_pickles_load(name: str, shape: dict[str, Any], age: Any) -> None:
    theirs, ours = pair(name, 3, 4, **shape)
    x = sample(theirs)
    restored = []
    for module in (theirs, ours):
        state = age(copy.deepcopy(module).__getstate__())
        empty = type(module).__new__(type(module))
        empty.__setstate__(state)
        restored.append(empty)
    assert_parity((restored[0], restored[1]), x)
    assert_parity((theirs, restored[1]), x)
    assert restored[1].proj_size == 0
    assert restored[1]._flat_weights_names == ours._flat_weights_names


def test_old_pickle_with_a_projection() -> None:
    theirs, ours = pair("LSTM", 3, 4, proj_size=2)
    state = copy.deepcopy(ours).__getstate__()
    state["all_weights"] = state["_all_weights"]
    restored = rnnkern.LSTM.__new__(rnnkern.LSTM)
    restored.__setstate__(state)
    assert_parity((theirs, restored), sample(theirs))


# ---- torch's own bookkeeping, which users and tools read ----------------------------------------
@pytest.mark.parametrize(("name", "shape"), [v for v in VARIANTS if v[0] in LAYERS], ids=str)
def test_all_weights_and_flat_weights(name: str, shape: dict[str, Any]) -> None:
    theirs, ours = pair(name, 3, 4, **shape)
    for module in (ours, copy.deepcopy(ours), through_pickle(ours), ours.double()):
        assert module._flat_weights_names == theirs._flat_weights_names
        assert module._all_weights == theirs._all_weights
        named = dict(module.named_parameters())
        flat = list(module._flat_weights)
        assert all(w is named[n] for w, n in zip(flat, module._flat_weights_names, strict=True))
        layers = [[named[n] for n in names] for names in module._all_weights]
        for mine, wanted in zip(module.all_weights, layers, strict=True):
            assert all(a is b for a, b in zip(mine, wanted, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_flatten_parameters_is_silent_and_changes_nothing(name: str) -> None:
    theirs, ours = pair(name, 3, 4, 2)
    x = sample(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.flatten_parameters() is None
        made = copy.deepcopy(ours)
        made.flatten_parameters()
        assert_parity((theirs, made), x)
        assert_parity((theirs, ours), x)

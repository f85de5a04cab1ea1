"""rnnkern.convert: what is swapped, what is shared, what stays and is reported."""

from __future__ import annotations

import copy
import gc
import io
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import rnnkern
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils import parametrizations

KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: rnnkern.LSTM,
    nn.GRU: rnnkern.GRU,
    nn.RNN: rnnkern.RNN,
    nn.LSTMCell: rnnkern.LSTMCell,
    nn.GRUCell: rnnkern.GRUCell,
    nn.RNNCell: rnnkern.RNNCell,
}
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)


class Tagger(nn.Module):
    """A model of the usual form: embedding, stacked recurrent layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.encoder = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.blocks = nn.ModuleList(
            [nn.GRU(10, 7, batch_first=True), nn.RNN(7, 4, batch_first=True)]
        )
        self.head = nn.Sequential(OrderedDict(norm=nn.LayerNorm(4), out=nn.Linear(4, 3)))
        self.cells = nn.ModuleDict({"step": nn.LSTMCell(3, 2), "none": nn.Identity()})

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.encoder(self.embed(tokens))
        for block in self.blocks:
            y, _ = block(y)
        y = self.head(y)
        h, c = self.cells["step"](y[:, -1])
        return torch.cat([h, c], -1)


def example(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    module = kind(3, 4)
    return module, torch.randn((2, 3) if isinstance(module, nn.RNNCellBase) else (5, 2, 3))


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else first(result[0])


@kinds
def test_a_module_by_itself(kind: type[nn.Module]) -> None:
    module, x = example(kind)
    wanted = first(module(x))
    new = rnnkern.convert(module)
    assert type(new) is KINDS[kind]
    for (name, old), (new_name, own) in zip(
        module.named_parameters(), new.named_parameters(), strict=True
    ):
        assert name == new_name
        assert own is old
    assert_close(first(new(x)), wanted, kind="output")
    assert repr(new) == repr(module)


def test_a_whole_model() -> None:
    model = Tagger()
    tokens = torch.randint(20, (3, 7))
    wanted = model(tokens)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rnnkern.convert(model) is model
    recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase)]
    assert [type(m) for m in recurrent] == [
        rnnkern.LSTM,
        rnnkern.GRU,
        rnnkern.RNN,
        rnnkern.LSTMCell,
    ]
    assert type(model.head.out) is nn.Linear
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert_close(model(tokens), wanted, kind="output")


def test_an_optimizer_made_before_goes_on_training() -> None:
    models = [Tagger(), Tagger()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.02) for m in models]
    rnnkern.convert(models[1])
    tokens = torch.randint(20, (3, 7))
    losses: list[list[float]] = [[], []]
    for _ in range(5):
        for k in range(2):
            optimizers[k].zero_grad()
            loss = models[k](tokens).square().sum()
            loss.backward()
            optimizers[k].step()
            losses[k].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[1][-1] < losses[1][0]


def test_a_shared_module_stays_shared() -> None:
    shared = nn.GRU(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.GRU(4, 4)})
    rnnkern.convert(model)
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is rnnkern.GRU
    assert model["c"] is not model["a"]


def test_tied_weights_stay_tied() -> None:
    a, b = nn.LSTM(4, 4), nn.LSTM(4, 4)
    b.weight_hh_l0 = a.weight_hh_l0
    model = rnnkern.convert(nn.ModuleList([a, b]))
    assert model[0].weight_hh_l0 is model[1].weight_hh_l0
    y, _ = model[1](torch.randn(3, 2, 4))
    y.sum().backward()
    assert model[0].weight_hh_l0.grad is not None


@kinds
def test_mode_hooks_and_frozen_parameters_stay(kind: type[nn.Module]) -> None:
    module, x = example(kind)
    module.eval()
    module.weight_hh.requires_grad_(False) if isinstance(
        module, nn.RNNCellBase
    ) else module.weight_hh_l0.requires_grad_(False)
    seen: list[nn.Module] = []
    handle = module.register_forward_hook(lambda m, *_: seen.append(m))
    module.register_buffer("note", torch.ones(1))
    module.label = "mine"
    new = rnnkern.convert(module)
    assert not new.training
    assert [p.requires_grad for p in new.parameters()] == [
        p.requires_grad for p in module.parameters()
    ]
    assert new.label == "mine"
    assert torch.equal(new.note, torch.ones(1))
    new(x)
    assert seen == [new]
    handle.remove()
    new(x)
    assert len(seen) == 1


def test_settings_stay() -> None:
    for options in (
        {"num_layers": 3, "dropout": 0.5, "bidirectional": True},
        {"batch_first": True, "bias": False},
        {"proj_size": 2, "num_layers": 2},
    ):
        old = nn.LSTM(3, 4, **options)
        new = rnnkern.convert(copy.deepcopy(old))
        assert new.extra_repr() == old.extra_repr()
        torch.manual_seed(3)
        wanted = first(old(torch.ones(4, 4, 3)))
        torch.manual_seed(3)
        assert_close(first(new(torch.ones(4, 4, 3))), wanted, kind="output")
    relu = rnnkern.convert(nn.RNN(3, 4, nonlinearity="relu"))
    assert relu.nonlinearity == "relu"
    assert bool((relu(torch.randn(5, 2, 3))[0] >= 0).all())
    assert rnnkern.convert(nn.GRU(3, 4)).reset_after is True


def test_the_result_is_an_ordinary_module() -> None:
    model = rnnkern.convert(nn.Sequential(nn.LSTM(3, 4)))
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    x = torch.randn(5, 2, 3)
    for other in (twin, loaded):
        assert type(other[0]) is rnnkern.LSTM
        assert other[0].weight_hh_l0 is not model[0].weight_hh_l0
        assert torch.equal(first(other(x)), first(model(x)))
    model.double()
    assert first(model(x.double())).dtype == torch.float64
    nn.LSTM(3, 4).load_state_dict(model[0].state_dict())


def test_weight_norm_stays_in_force() -> None:
    plain = nn.LSTM(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old, twin = (nn.utils.weight_norm(copy.deepcopy(plain), "weight_hh_l0") for _ in range(2))
    x = torch.randn(5, 2, 3)
    new = rnnkern.convert(twin)
    assert type(new) is rnnkern.LSTM
    for module in (old, new):
        with torch.no_grad():
            module.weight_hh_l0_g.mul_(2.0)
    assert_close(first(new(x)), first(old(x)), kind="output")
    first(new(x)).sum().backward()
    assert new.weight_hh_l0_v.grad is not None


def test_converting_twice_changes_nothing() -> None:
    model = rnnkern.convert(nn.Sequential(nn.GRU(3, 4), rnnkern.GRU(4, 2, reset_after=False)))
    layers = list(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnnkern.convert(model)
        assert all(a is b for a, b in zip(model, layers, strict=True))
        assert model[1].reset_after is False
        assert rnnkern.convert(layers[0]) is layers[0]


class Custom(nn.LSTM):
    """A subclass, whose own forward a swap would lose."""

    def forward(self, *args: Any) -> Any:
        return super().forward(*args)


class Derived(rnnkern.LSTM):
    """A subclass of ours."""


def test_what_cannot_be_swapped_is_reported() -> None:
    patched = nn.GRU(3, 3)
    patched.forward = lambda x: (x, None)  # type: ignore[method-assign]
    normed = parametrizations.weight_norm(nn.LSTM(3, 3), "weight_hh_l0")
    model = nn.ModuleDict({"deep": nn.ModuleList([Custom(3, 3)]), "patched": patched})
    model["normed"], model["plain"] = normed, nn.LSTM(3, 3)
    with pytest.warns(UserWarning, match="rnnkern.convert") as caught:
        rnnkern.convert(model)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 3
    for name in ("'deep.0'", "'patched'", "'normed'"):
        assert sum(name in m for m in messages) == 1, (name, messages)
    assert any("Custom" in m for m in messages)
    assert all(w.filename == __file__ for w in caught)
    assert type(model["deep"][0]) is Custom
    assert model["patched"] is patched
    assert model["normed"] is normed
    assert type(model["plain"]) is rnnkern.LSTM
    custom = Custom(3, 3)
    with pytest.warns(UserWarning, match="Custom"):
        same = rnnkern.convert(custom)
    assert same is custom


def test_a_module_that_was_compiled_itself() -> None:
    """What it compiled is the old module, which would run on, in the mode it had."""
    theirs, x = nn.LSTM(3, 4, 2, dropout=0.5), torch.randn(5, 2, 3)
    theirs.compile(backend="eager")
    theirs(x)
    with pytest.warns(UserWarning, match="'0' is no longer compiled"):
        ours = rnnkern.convert(nn.Sequential(theirs))[0]
    ours.eval()
    assert torch.equal(ours(x)[0], ours(x)[0])
    ours(x, lengths=torch.tensor([5, 2]))


def test_what_torch_compile_has_already_stays() -> None:
    theirs = nn.LSTM(3, 4)
    model = nn.Sequential(torch.compile(theirs, backend="eager"))
    with pytest.warns(UserWarning, match=r"'0._orig_mod' stays as it is: torch.compile has it"):
        rnnkern.convert(model)
    assert model[0]._orig_mod is theirs


def test_hooks_of_load_state_dict_get_the_new_module() -> None:
    seen, model = [], nn.Sequential(nn.LSTM(3, 4))
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(type(module)))
    state = model.state_dict()
    rnnkern.convert(model)
    gc.collect()
    model.load_state_dict(state)
    assert seen == [rnnkern.LSTM]


def test_our_own_subclasses_need_no_swap() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.Sequential(Derived(3, 4))
        assert type(rnnkern.convert(model)[0]) is Derived


@pytest.mark.parametrize("wrong", [None, nn.LSTM, {"rnn": nn.LSTM(2, 2)}, "model"])
def test_only_modules_convert(wrong: Any) -> None:
    with pytest.raises(TypeError, match="model"):
        rnnkern.convert(wrong)


def test_a_model_without_recurrent_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    layers = list(model)
    assert rnnkern.convert(model) is model
    assert list(model) == layers

"""Changes to a module (weights, dropout, dtype, parametrizations) take effect at the next call."""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairs import (
    CELLS,
    LAYERS,
    assert_parity,
    assert_same_error,
    outcome,
    pair,
    random_packed,
    random_state,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

pytestmark = pytest.mark.usefixtures("every_device")
layers = pytest.mark.parametrize("name", LAYERS)
both_kinds = pytest.mark.parametrize("name", LAYERS + CELLS)
Modules = tuple[nn.Module, nn.Module]


def sample(module: nn.Module, features: int = 3) -> Tensor:
    """Return an input that `module` takes, of the dtype of its weights and where they are."""
    weight = next(iter(module.state_dict().values()))
    cell = isinstance(module, nn.RNNCellBase)
    return torch.randn((2, features) if cell else (5, 2, features)).to(weight)


def weight_names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def recurrent(module: nn.Module) -> str:
    """Name of the (first) recurrent weight."""
    return "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight_hh_l0"


def called_before(name: str, *args: Any, **kwargs: Any) -> Modules:
    """Build a pair that has run once: a cache of the old weights would show."""
    made = pair(name, *args, **kwargs)
    assert_parity(made, sample(made[0], args[0]))
    return made


# ---- replacing weights --------------------------------------------------------------------------
def assign(module: nn.Module, key: str, value: Tensor) -> None:
    setattr(module, key, nn.Parameter(value))


def assign_data(module: nn.Module, key: str, value: Tensor) -> None:
    getattr(module, key).data = value


def write_in_place(module: nn.Module, key: str, value: Tensor) -> None:
    with torch.no_grad():
        getattr(module, key).copy_(value)


def write_past_autograd(module: nn.Module, key: str, value: Tensor) -> None:
    getattr(module, key).data.copy_(value)


def register(module: nn.Module, key: str, value: Tensor) -> None:
    delattr(module, key)
    module.register_parameter(key, nn.Parameter(value))


def write_parameter_dict(module: nn.Module, key: str, value: Tensor) -> None:
    module._parameters[key] = nn.Parameter(value)


REPLACE: list[Callable[[nn.Module, str, Tensor], None]] = [
    assign,
    assign_data,
    write_in_place,
    write_past_autograd,
    register,
    write_parameter_dict,
]


@both_kinds
@pytest.mark.parametrize("replace", REPLACE, ids=lambda f: f.__name__)
def test_replaced_weights(name: str, replace: Callable[[nn.Module, str, Tensor], None]) -> None:
    made = pair(name, 3, 4)
    for key in weight_names(made[0]):
        value = torch.randn(getattr(made[0], key).shape)
        for module in made:
            module(sample(module))
            replace(module, key, value.clone())
        assert_parity(made, sample(made[0]))


@both_kinds
def test_a_weight_replaced_by_a_tensor_that_is_no_parameter(name: str) -> None:
    made = called_before(name, 3, 4)
    key = recurrent(made[0])
    for module in made:
        kept = getattr(module, key).detach()
        delattr(module, key)
        setattr(module, key, kept * 2)
    assert_parity(made, sample(made[0]))
    assert key not in made[1].state_dict()


@both_kinds
def test_a_tensor_is_refused_while_the_parameter_is_there(name: str) -> None:
    made = pair(name, 3, 4)
    key, value = recurrent(made[0]), torch.zeros(4, 4)
    theirs, ours = (outcome(lambda m=module: setattr(m, key, value)) for module in made)
    assert_same_error(ours, theirs)


@layers
def test_a_layer_without_a_deleted_weight_uses_the_last_one(name: str) -> None:
    made = called_before(name, 3, 4)
    for module in made:
        del module.weight_hh_l0
    assert_parity(made, sample(made[0]))


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_without_a_deleted_weight_fails(name: str) -> None:
    made = pair(name, 3, 4)
    for module in made:
        del module.weight_hh
    theirs, ours = (outcome(lambda m=module: m(torch.randn(2, 3))) for module in made)
    assert_same_error(ours, theirs)


# ---- tying --------------------------------------------------------------------------------------
@layers
def test_tied_layers(name: str) -> None:
    made = called_before(name, 4, 4, 2)
    for module in made:
        for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(module, f"{key}_l1", getattr(module, f"{key}_l0"))
        assert len(list(module.parameters())) == 4
    assert_parity(made, sample(made[0], 4))


@layers
def test_tied_directions(name: str) -> None:
    made = called_before(name, 3, 4, bidirectional=True)
    for module in made:
        module.weight_hh_l0_reverse = module.weight_hh_l0
    assert_parity(made, sample(made[0]))


@layers
def test_weights_tied_across_modules(name: str) -> None:
    grads = []
    first, second = pair(name, 3, 3), pair(name, 3, 3)
    x = torch.randn(5, 2, 3)
    for a, b in zip(first, second, strict=True):
        b.weight_hh_l0 = a.weight_hh_l0
        b(a(x)[0])[0].pow(2).sum().backward()
        grads.append(a.weight_hh_l0.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


# ---- parametrizations ---------------------------------------------------------------------------
class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2.0


def old_weight_norm(module: nn.Module, key: str) -> None:
    nn.utils.weight_norm(module, key)


def new_weight_norm(module: nn.Module, key: str) -> None:
    parametrizations.weight_norm(module, key)


def old_spectral_norm(module: nn.Module, key: str) -> None:
    torch.manual_seed(3)
    nn.utils.spectral_norm(module, key)


def new_spectral_norm(module: nn.Module, key: str) -> None:
    torch.manual_seed(3)
    parametrizations.spectral_norm(module, key)


def orthogonal(module: nn.Module, key: str) -> None:
    torch.manual_seed(3)
    parametrizations.orthogonal(module, key)


def own(module: nn.Module, key: str) -> None:
    parametrize.register_parametrization(module, key, Twice())


def pruning(module: nn.Module, key: str) -> None:
    prune.l1_unstructured(module, key, amount=0.4)


HOW = [old_weight_norm, new_weight_norm, old_spectral_norm, new_spectral_norm, orthogonal, own]
HOW += [pruning]


def scale_parameters(module: nn.Module) -> None:
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(1.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@both_kinds
@pytest.mark.parametrize("how", HOW, ids=lambda f: f.__name__)
def test_parametrized(name: str, how: Callable[[nn.Module, str], None]) -> None:
    made = called_before(name, 3, 4)
    for module in made:
        how(module, recurrent(module))
    assert list(made[1].state_dict()) == list(made[0].state_dict())
    assert type(made[1]).__name__ == type(made[0]).__name__
    for _ in range(2):
        expected, _ = assert_parity(made, sample(made[0]))
        assert len([g for g in expected.grads.values() if g is not None]) >= 4
        for module in made:
            scale_parameters(module)
    for module in made:
        module.eval()
    assert_parity(made, sample(made[0]))


@layers
@pytest.mark.parametrize("how", [new_weight_norm, own], ids=lambda f: f.__name__)
def test_parametrized_everywhere_and_undone(name: str, how: Callable[..., None]) -> None:
    made = called_before(name, 3, 4, 2, bidirectional=True)
    for module in made:
        for key in [key for key in weight_names(module) if "weight" in key]:
            how(module, key)
    assert_parity(made, random_packed([3, 5, 1], 3))
    assert_parity(made, sample(made[0]))
    for module in made:
        for key in list(module.parametrizations):
            parametrize.remove_parametrizations(module, key)
    assert type(made[1]).__name__ == name
    assert_parity(made, sample(made[0]))
    assert sorted(weight_names(made[1])) == sorted(weight_names(made[0]))


@layers
def test_parametrization_cache(name: str) -> None:
    made = called_before(name, 3, 4)
    for module in made:
        own(module, "weight_hh_l0")
    with parametrize.cached():
        assert_parity(made, sample(made[0]), backward=False)
        assert_parity(made, sample(made[0]))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@layers
def test_old_weight_norm_undone(name: str) -> None:
    made = called_before(name, 3, 4)
    for module in made:
        nn.utils.weight_norm(module, "weight_hh_l0")
        module(sample(module))
        scale_parameters(module)
        nn.utils.remove_weight_norm(module, "weight_hh_l0")
    assert_parity(made, sample(made[0]))


# ---- plain attributes ---------------------------------------------------------------------------
@layers
def test_dropout_changed_after_construction(name: str) -> None:
    made = called_before(name, 3, 4, 3)
    x = sample(made[0])
    for value in (0.5, 1.0, 0.0):
        results = []
        for module in made:
            module.dropout = value
            torch.manual_seed(8)
            results.append(module(x)[0])
        torch.testing.assert_close(results[1], results[0])
    for module in made:
        module.dropout = 2.0
    theirs, ours = (outcome(lambda m=module: m(x)) for module in made)
    assert_same_error(ours, theirs)
    for module in made:
        module.eval()
    assert_parity(made, x)


@layers
def test_batch_first_changed_after_construction(name: str) -> None:
    made = called_before(name, 3, 4)
    for module in made:
        module.batch_first = True
    assert_parity(made, torch.randn(2, 5, 3), random_state(made[0], 2))


# ---- dtype, device, memory ----------------------------------------------------------------------
CONVERT: dict[str, Callable[[nn.Module], nn.Module]] = {
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to(float64)": lambda m: m.to(torch.float64),
    "to(tensor)": lambda m: m.to(torch.zeros((), dtype=torch.float64)),
    "to(cpu)": lambda m: m.to("cpu"),
    "half then float": lambda m: m.half().float(),
    "type": lambda m: m.type(torch.float64),
}


@both_kinds
@pytest.mark.parametrize("convert", CONVERT)
def test_converted(name: str, convert: str) -> None:
    made = called_before(name, 3, 4)
    for module in made:
        assert CONVERT[convert](module) is module
    for (key, found), (_, wanted) in zip(*(m.named_parameters() for m in made[::-1]), strict=True):
        assert found.dtype == wanted.dtype, key
    assert_parity(made, sample(made[0]))


@both_kinds
def test_empty_from_meta(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    made = copy.deepcopy(ours).to("meta").to_empty(device=torch.get_default_device())
    made.load_state_dict(theirs.state_dict())
    assert_parity((theirs, made), sample(theirs))


@both_kinds
def test_weights_sharing_one_flat_buffer(name: str) -> None:
    made = called_before(name, 3, 4)
    for module in made:
        vector = nn.utils.parameters_to_vector(module.parameters()) * 0.5
        nn.utils.vector_to_parameters(vector, module.parameters())  # weights become views
    assert_parity(made, sample(made[0]))


def fill_recurrent_weight(weight: Tensor) -> None:
    weight.fill_(0.25)


@pytest.mark.cpu_only("a forked process cannot use CUDA")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@both_kinds
@pytest.mark.timeout(60)
def test_shared_memory(name: str) -> None:
    made = called_before(name, 3, 4)
    child = multiprocessing.get_context("fork")
    for module in made:
        assert module.share_memory() is module
        weight = getattr(module, recurrent(module))
        assert weight.is_shared()
        process = child.Process(target=fill_recurrent_weight, args=(weight.data,))
        process.start()
        process.join(30)
        assert process.exitcode == 0
        assert weight.eq(0.25).all()
    assert_parity(made, sample(made[0]))

"""Number formats: autocast, 16-bit, double and complex give torch's dtypes and values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pairs import (
    CELLS,
    LAYERS,
    assert_parity,
    assert_same_error,
    outcome,
    outputs_of,
    pair,
    random_packed,
    random_state,
    run,
)
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

both_kinds = pytest.mark.parametrize("name", LAYERS + CELLS)
layers = pytest.mark.parametrize("name", LAYERS)
SIXTEEN = (torch.bfloat16, torch.float16)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])


def sample(module: nn.Module) -> Tensor:
    return torch.randn((3, 5) if isinstance(module, nn.RNNCellBase) else (6, 3, 5))


def converted(name: str, dtype: torch.dtype, **options: Any) -> tuple[nn.Module, nn.Module]:
    theirs, ours = pair(name, 5, 7, **options)
    return theirs.to(dtype), ours.to(dtype)


# ---- modules of another dtype -------------------------------------------------------------------
@both_kinds
@DTYPES
@pytest.mark.parametrize("given", [False, True])
def test_module_of_a_dtype(name: str, dtype: torch.dtype, given: bool) -> None:
    made = converted(name, dtype)
    assert_parity(made, sample(made[0]).to(dtype), random_state(made[0], 3) if given else None)


@layers
@DTYPES
def test_deep_bidirectional_batch_first(name: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    made = converted(name, dtype, **options)
    assert_parity(made, torch.randn(3, 6, 5).to(dtype), random_state(made[0], 3))
    assert_parity(made, torch.randn(6, 5).to(dtype))


@layers
@DTYPES
def test_packed(name: str, dtype: torch.dtype) -> None:
    made = converted(name, dtype, bidirectional=True)
    assert_parity(made, random_packed([2, 6, 3], 5, dtype=dtype), random_state(made[0], 3))


@DTYPES
def test_projection(dtype: torch.dtype) -> None:
    made = converted("LSTM", dtype, proj_size=3, num_layers=2)
    assert_parity(made, torch.randn(6, 3, 5).to(dtype), random_state(made[0], 3))


@both_kinds
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_modules(name: str) -> None:
    made = converted(name, torch.complex64)
    for key, weight in made[0].named_parameters():
        with torch.no_grad():
            weight.imag.normal_(std=0.2)
            made[1].get_parameter(key).copy_(weight)
    x = torch.complex(sample(made[0]), sample(made[0]))
    assert_parity(made, x, layout=False)


@layers
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64], ids=str)
def test_input_of_another_kind_is_refused(name: str, dtype: torch.dtype, autocast: bool) -> None:
    made = pair(name, 5, 7)
    x = torch.zeros(6, 3, 5, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        theirs, ours = (outcome(lambda m=module: m(x)) for module in made)
    if autocast:  # torch has cast the weights before it sees
        for found in (theirs, ours):
            assert isinstance(found.error, RuntimeError)
            assert str(found.error).startswith("mat1 and mat2 must have the same dtype, but got")
    else:
        assert_same_error(ours, theirs)


@layers
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_16_bit_results_are_as_accurate_as_torchs(name: str, dtype: torch.dtype) -> None:
    # 33 steps of 33 units: error against float64 on the same 16-bit weights and input.
    theirs, ours = pair(name, 33, 33)
    x = torch.randn(33, 7, 33).to(dtype)
    exact = run(copy.deepcopy(theirs).to(dtype).double(), x.double())
    errors: list[dict[str, Tensor]] = []
    for module in (theirs.to(dtype), ours.to(dtype)):
        found = run(module, x).outputs
        errors.append({k: (v.double() - exact.outputs[k]).abs().max() for k, v in found.items()})
    one_rounding = torch.finfo(dtype).eps  # of results below 2
    for key, error in errors[1].items():
        assert error <= max(errors[0][key].item(), one_rounding), key


# ---- autocast on the CPU ------------------------------------------------------------------------
def arguments(name: str) -> dict[str, tuple[Any, ...]]:
    """Mix inputs and states in the mixtures of dtypes that a model under autocast meets."""
    half = torch.bfloat16
    layer = pair(name, 5, 7, 2, bidirectional=True)[0]
    x, hx = torch.randn(6, 3, 5), random_state(layer, 3)
    hx16 = tuple(h.to(half) for h in hx) if isinstance(hx, tuple) else hx.to(half)  # type: ignore
    packed = random_packed([3, 6, 2], 5)
    return {
        "x32": (x,),
        "x16": (x.to(half),),
        "x32 h32": (x, hx),
        "x32 h16": (x, hx16),
        "x16 h32": (x.to(half), hx),
        "x16 h16": (x.to(half), hx16),
        "unbatched": (x[:, 0],),
        "packed": (packed,),
        "packed h32": (packed, hx),
        "packed16": (packed.to(half),),
    }


CASES = ["x32", "x16", "x32 h32", "x32 h16", "x16 h32", "x16 h16"]
CASES += ["unbatched", "packed", "packed h32", "packed16"]


def under_autocast(module: nn.Module, dtype: torch.dtype, *args: Any) -> dict[str, Tensor]:
    with torch.autocast("cpu", dtype=dtype):
        return outputs_of(module, module(*args))


def assert_same_under_autocast(
    made: tuple[nn.Module, nn.Module], dtype: torch.dtype, *args: Any
) -> None:
    """Equal dtypes, and values within `dtype`'s tolerance; what torch accepts must be accepted."""
    theirs, ours = (outcome(lambda m=module: under_autocast(m, dtype, *args)) for module in made)
    if theirs.error is not None:  # some CPUs lack the oneDNN primitive that torch then asks for
        return
    assert ours.error is None, str(ours)
    for key, expected in theirs.value.items():
        assert_close(ours.value[key], expected, kind="output", dtype=dtype, name=key)


@layers
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_bfloat16(name: str, case: str, weights: torch.dtype, grad: bool) -> None:
    made = pair(name, 5, 7, 2, bidirectional=True)
    for module in made:
        module.to(weights)
    with torch.set_grad_enabled(grad):
        assert_same_under_autocast(made, torch.bfloat16, *arguments(name)[case])


@layers
@pytest.mark.parametrize("case", CASES)
def test_autocast_float16(name: str, case: str) -> None:
    made = pair(name, 5, 7, 2, bidirectional=True)
    assert_same_under_autocast(made, torch.float16, *arguments(name)[case])


@pytest.mark.parametrize("both", [False, True])
def test_autocast_projection(both: bool) -> None:
    made = pair("LSTM", 5, 7, 2, proj_size=3, bidirectional=both)
    assert_same_under_autocast(made, torch.bfloat16, torch.randn(6, 3, 5))
    assert_same_under_autocast(made, torch.bfloat16, random_packed([3, 6, 2], 5))


@layers
@pytest.mark.parametrize("packed", [False, True])
def test_autocast_training(name: str, packed: bool) -> None:
    made = pair(name, 5, 7, 2)
    x: Any = random_packed([3, 6, 2], 5) if packed else torch.randn(6, 3, 5)
    grads = []
    for module in made:
        leaf = (x.data if packed else x).clone().requires_grad_()
        given = PackedSequence(leaf, *x[1:]) if packed else leaf
        with torch.autocast("cpu", dtype=torch.bfloat16):
            named = outputs_of(module, module(given))
            loss = torch.stack([value.float().pow(2).sum() for value in named.values()]).sum()
        loss.backward()
        grads.append({"x": leaf.grad} | {k: w.grad for k, w in module.named_parameters()})
    for key, wanted in grads[0].items():
        assert wanted.dtype == torch.float32
        assert_close(grads[1][key], wanted, kind="gradient", dtype=torch.bfloat16, name=key)


@layers
def test_autocast_leaves_double_alone(name: str) -> None:
    made = converted(name, torch.float64)
    x = torch.randn(6, 3, 5).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = (outputs_of(module, module(x)) for module in made)
    for key, wanted in expected.items():
        assert wanted.dtype == torch.float64
        assert_close(found[key], wanted, kind="output", name=key)


@layers
def test_autocast_switched_off_inside(name: str) -> None:
    made = pair(name, 5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert_parity(made, torch.randn(6, 3, 5))
    with torch.autocast("cuda", enabled=False):
        assert_parity(made, torch.randn(6, 3, 5))


@layers
@pytest.mark.parametrize("rows", [0, 3])
def test_any_16_bit_input_is_taken_under_autocast_only(name: str, rows: int) -> None:
    made = pair(name, 5, 7)
    x = torch.randn(6, rows, 5).half()
    named = [under_autocast(module, torch.bfloat16, x)["output"].float() for module in made]
    assert_close(named[1], named[0], kind="output", dtype=torch.bfloat16)
    theirs, ours = (outcome(lambda m=module: m(x)) for module in made)
    assert_same_error(ours, theirs)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("h_dtype", [None, torch.float32, torch.bfloat16])
def test_autocast_cells(name: str, x_dtype: torch.dtype, h_dtype: torch.dtype | None) -> None:
    made = pair(name, 5, 7)
    args: tuple[Any, ...] = (torch.randn(3, 5).to(x_dtype),)
    if h_dtype is not None:
        args += (random_state(made[0], 3, h_dtype),)
    assert_same_under_autocast(made, torch.bfloat16, *args)

"""Modules under autocast on a device: types, values and gradients, and training with a scaler.

Every test runs on the CPU too, so that it is known to be right where there is no GPU. Compared is
with torch's modules on the CPU in float64, with weights and data rounded to autocast's type.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import rnnkern
import torch
from gpu.kinks import smooth_pair
from pairs import CELLS, LAYERS, NARROW, on_cpu, pair, random_packed, random_state, run, to
from tolerances import assert_close
from torch import Tensor, nn

KINDS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in LAYERS + CELLS),
    ("LSTM", {"proj_size": 6}),
    ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ("RNN", {"nonlinearity": "relu"}),
    ("RNNCell", {"nonlinearity": "relu"}),
]
kinds = pytest.mark.parametrize(("name", "extra"), KINDS, ids=str)
narrow_types = pytest.mark.parametrize("narrow", NARROW, ids=str)


def assert_like_float64(
    modules: tuple[nn.Module, nn.Module], device: str, narrow: torch.dtype, x: Any, hx: Any
) -> None:
    """Compare outputs and gradients, which are of the weights' and the data's own type."""
    theirs, ours = modules
    ours.to(device)
    exact = copy.deepcopy(theirs).to(narrow).double()
    rounded = to(to((x, hx), "cpu", narrow), "cpu", torch.float64)
    wanted = run(exact, *rounded)

    def call(*args: Any) -> Any:
        with torch.autocast(device, narrow):
            return ours(*args)

    found = run(ours, *to((x, hx), device), call=call)
    assert {t.device.type for t in found.outputs.values()} == {device}
    if device == "cuda":
        assert {t.dtype for t in found.outputs.values()} == {narrow}
    assert {t.dtype for t in found.grads.values() if t is not None} == {torch.float32}
    found = on_cpu(found)
    assert list(found.outputs) == list(wanted.outputs)
    assert list(found.grads) == list(wanted.grads)
    deep = getattr(ours, "num_layers", 1) > 1
    for key, value in wanted.outputs.items():
        kind: Any = "gradient" if deep else "output"
        assert_close(found.outputs[key].double(), value, kind=kind, dtype=narrow, name=key)
    for key, gradient in wanted.grads.items():
        own = found.grads[key]
        assert own is not None
        assert gradient is not None
        assert_close(own.double(), gradient, kind="gradient", dtype=narrow, name=key)


@kinds
@narrow_types
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_dense(
    device: str, name: str, extra: dict[str, Any], narrow: torch.dtype, given: bool
) -> None:
    modules = smooth_pair(name, 8, 24, **extra)
    x = torch.randn((3, 8) if name in CELLS else (6, 3, 8))
    hx = random_state(modules[0], 3) if given else None
    assert_like_float64(modules, device, narrow, x, hx)


@kinds
@narrow_types
def test_packed(device: str, name: str, extra: dict[str, Any], narrow: torch.dtype) -> None:
    if name in CELLS:
        pytest.skip("cells take no packed data")
    modules = smooth_pair(name, 8, 24, **extra)
    x = random_packed([3, 6, 1, 6], 8)
    assert_like_float64(modules, device, narrow, x, random_state(modules[0], 4))


# ---- torch.amp.GradScaler -----------------------------------------------------------------------
def step(
    module: nn.Module, x: Tensor, narrow: torch.dtype, scaler: Any
) -> tuple[dict[str, Tensor], float]:
    """Take one step of training; return the gradients that it takes, and the scale after it."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    with torch.autocast(x.device.type, narrow):
        result = module(x)
        y = result[0] if isinstance(result, tuple) else result
        loss = y.float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grads = {key: w.grad.clone() for key, w in module.named_parameters() if w.grad is not None}
    scaler.step(optimizer)
    scaler.update()
    return grads, float(scaler.get_scale())


@pytest.mark.parametrize("name", LAYERS + CELLS)
@narrow_types
def test_training_with_a_scaler(device: str, name: str, narrow: torch.dtype) -> None:
    theirs, ours = pair(name, 8, 24)
    ours.to(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    x = torch.randn((3, 8) if name in CELLS else (6, 3, 8))
    exact = copy.deepcopy(theirs).to(narrow).double()
    result = exact(x.to(narrow).double())
    y = result[0] if isinstance(result, tuple) else result
    weights = dict(exact.named_parameters())
    wanted = torch.autograd.grad(y.square().mean(), list(weights.values()))
    before = {key: w.detach().clone() for key, w in ours.named_parameters()}
    grads, scale = step(ours, x.to(device), narrow, scaler)
    assert scale == 2.0**10
    assert list(grads) == list(weights)
    for (key, own), gradient in zip(grads.items(), wanted, strict=True):
        assert own.dtype == torch.float32
        assert_close(own.cpu().double(), gradient, kind="gradient", dtype=narrow, name=key)
        moved = ours.get_parameter(key) - before[key]
        torch.testing.assert_close(moved, -0.5 * own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS + CELLS)
@narrow_types
def test_a_step_without_finite_gradients_is_left_out(
    device: str, name: str, narrow: torch.dtype
) -> None:
    module = getattr(rnnkern, name)(8, 24).to(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    x = torch.randn((3, 8) if name in CELLS else (6, 3, 8))
    x.view(-1, 8)[1, 2] = float("nan")
    before = {key: w.detach().clone() for key, w in module.named_parameters()}
    _, scale = step(module, x.to(device), narrow, scaler)
    assert scale == 2.0**9
    assert all(torch.equal(w, before[key]) for key, w in module.named_parameters())

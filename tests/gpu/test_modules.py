"""Modules on a device against torch's own on the CPU in float64: outputs, states and gradients.

Every test runs on the CPU too, so that it is known to be right where there is no GPU.
"""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import rnnkern
import torch
from gpu.kinks import smooth_pair
from pairs import (
    CELLS,
    LAYERS,
    NARROW,
    assert_device_parity,
    outputs_of,
    pair,
    random_packed,
    random_state,
    run,
    to,
)
from parity.test_inputs import KINDS, VIEWS
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_packed_sequence
from torch.utils.checkpoint import checkpoint

WIDE = (torch.float64, torch.float32)
FORMS: list[dict[str, Any]] = [
    {},
    {"bias": False, "batch_first": True},
    {"num_layers": 3, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
]
kinds = pytest.mark.parametrize(("name", "extra"), KINDS, ids=str)
layers = pytest.mark.parametrize("name", LAYERS)
wide = pytest.mark.parametrize("dtype", WIDE, ids=str)
all_types = pytest.mark.parametrize("dtype", [*WIDE, *NARROW], ids=str)
given_or_not = pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])


# ---- layers -------------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize("form", FORMS, ids=str)
@given_or_not
@all_types
def test_dense(
    device: str,
    name: str,
    extra: dict[str, Any],
    form: dict[str, Any],
    given: bool,
    dtype: torch.dtype,
) -> None:
    made = pair(name, 8, 24, **form, **extra, dtype=dtype)
    for module in made:
        module.eval()
    x = torch.randn((3, 6, 8) if form.get("batch_first") else (6, 3, 8)).to(dtype)
    hx = random_state(made[0], 3) if given else None
    assert_device_parity(made, device, x, hx, deep="num_layers" in form)


@kinds
@pytest.mark.parametrize("sizes", [(1, 1, 4, 2), (7, 9, 1, 5), (5, 33, 3, 17)], ids=str)
@wide
def test_odd_sizes(
    device: str,
    name: str,
    extra: dict[str, Any],
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> None:
    features, hidden, steps, rows = sizes
    made = pair(name, features, max(hidden, 1 + extra.get("proj_size", 0)), **extra, dtype=dtype)
    x = torch.randn(steps, rows, features, dtype=dtype)
    assert_device_parity(made, device, x, random_state(made[0], rows))


@kinds
@given_or_not
@wide
def test_unbatched(
    device: str, name: str, extra: dict[str, Any], given: bool, dtype: torch.dtype
) -> None:
    made = pair(name, 5, 7, 2, bidirectional=True, batch_first=True, **extra, dtype=dtype)
    hx = random_state(made[0], None) if given else None
    for steps in (1, 6):
        assert_device_parity(made, device, torch.randn(steps, 5, dtype=dtype), hx)


@kinds
@pytest.mark.parametrize("shape", [(0, 6, 5), (3, 1, 5)], ids=["no_rows", "one_step"])
@wide
def test_small_batches(
    device: str, name: str, extra: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    made = pair(name, 5, 7, 2, bidirectional=True, batch_first=True, **extra, dtype=dtype)
    assert_device_parity(
        made, device, torch.randn(shape, dtype=dtype), random_state(made[0], shape[0])
    )


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("batch_first", [False, True])
@layers
def test_strided_input(device: str, name: str, batch_first: bool, view: str) -> None:
    made = pair(name, 5, 7, bidirectional=True, batch_first=batch_first)
    assert_device_parity(made, device, torch.randn(8, 6, 5), view=VIEWS[view])


@kinds
@pytest.mark.parametrize("lengths", [[9, 7, 7, 3, 1], [3, 9, 1, 7, 7]], ids=["sorted", "unsorted"])
@given_or_not
@all_types
def test_packed(
    device: str,
    name: str,
    extra: dict[str, Any],
    lengths: list[int],
    given: bool,
    dtype: torch.dtype,
) -> None:
    made = pair(name, 8, 24, 2, bidirectional=True, **extra, dtype=dtype)
    hx = random_state(made[0], 5) if given else None
    assert_device_parity(made, device, random_packed(lengths, 8, dtype=dtype), hx, deep=True)


@kinds
@wide
@pytest.mark.parametrize("where", ["host", "device"])
def test_lengths(
    device: str, name: str, extra: dict[str, Any], dtype: torch.dtype, where: str
) -> None:
    theirs, ours = pair(name, 5, 7, 2, bidirectional=True, **extra, dtype=dtype)
    ours.to(device)
    lengths = [3, 9, 1, 7, 7]
    packed = random_packed(lengths, 5, dtype=torch.float64)
    padded = pad_packed_sequence(packed)[0].to(dtype)
    y, states = theirs.double()(packed._replace(data=packed.data.to(dtype).double()))
    wanted = [pad_packed_sequence(y)[0], *(states if isinstance(states, tuple) else (states,))]
    steer = torch.tensor(lengths, device=device if where == "device" else "cpu")
    result = outputs_of(ours, ours(padded.to(device), lengths=steer))
    for found, value in zip(result.values(), wanted, strict=True):
        assert_close(found.cpu().double(), value, kind="output", dtype=dtype)


@kinds
@wide
@pytest.mark.parametrize("where", ["host", "device"])
def test_resets(
    device: str, name: str, extra: dict[str, Any], dtype: torch.dtype, where: str
) -> None:
    theirs, ours = pair(name, 5, 7, **extra, dtype=dtype)
    theirs.double()
    x, resets = torch.randn(6, 4, 5, dtype=dtype), torch.rand(6, 4) < 0.4
    first = random_state(theirs, 4)
    state = to(first, "cpu", dtype)
    steer = resets.to(device if where == "device" else "cpu")
    found = outputs_of(ours.to(device), ours(x.to(device), to(state, device), resets=steer))

    now, steps = to(state, "cpu", torch.float64), []
    for x_t, reset in zip(x.double(), resets.unsqueeze(-1), strict=True):
        kept = [s.masked_fill(reset, 0.0) for s in (now if isinstance(now, tuple) else (now,))]
        y, now = theirs(x_t.unsqueeze(0), tuple(kept) if isinstance(now, tuple) else kept[0])
        steps.append(y)
    wanted = [torch.cat(steps), *(now if isinstance(now, tuple) else (now,))]
    for value, expected in zip(found.values(), wanted, strict=True):
        assert_close(value.cpu().double(), expected, kind="output", dtype=dtype)


@layers
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e4])
def test_extreme_values_propagate(device: str, name: str, value: float) -> None:
    made = pair(name, 3, 5, dtype=torch.float64)
    x = torch.randn(6, 3, 3, dtype=torch.float64)
    x[2, 1, 0] = value
    assert_device_parity(made, device, x)


@pytest.mark.parametrize("name", ["RNN", "RNNCell"])
@pytest.mark.parametrize("extra", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_gradients_of_relu(
    device: str, name: str, extra: dict[str, Any], dtype: torch.dtype
) -> None:
    if name in CELLS and extra:
        pytest.skip("a cell is one layer")
    made = smooth_pair(name, 8, 24, nonlinearity="relu", **extra)
    for module in made:
        module.to(dtype)
    x = torch.randn((3, 8) if name in CELLS else (6, 3, 8)).to(dtype)
    hx = random_state(made[0], 3)
    assert_device_parity(made, device, x, hx, deep=bool(extra), smooth=True)


# ---- cells --------------------------------------------------------------------------------------
CELL_KINDS: list[tuple[str, dict[str, Any]]] = [
    ("LSTMCell", {}),
    ("GRUCell", {}),
    ("RNNCell", {"nonlinearity": "tanh"}),
    ("RNNCell", {"nonlinearity": "relu", "bias": False}),
]
cell_kinds = pytest.mark.parametrize(("name", "extra"), CELL_KINDS, ids=str)


@cell_kinds
@pytest.mark.parametrize("rows", [None, 0, 1, 7])
@given_or_not
@all_types
def test_cells(
    device: str,
    name: str,
    extra: dict[str, Any],
    rows: int | None,
    given: bool,
    dtype: torch.dtype,
) -> None:
    made = pair(name, 5, 24, **extra, dtype=dtype)
    x = torch.randn((5,) if rows is None else (rows, 5)).to(dtype)
    assert_device_parity(made, device, x, random_state(made[0], rows) if given else None)


# ---- wrong devices ------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("other", ["meta", "cpu"])
def test_another_device_is_refused_by_name(device: str, name: str, other: str) -> None:
    if other == device:
        pytest.skip("the same device")
    module = getattr(rnnkern, name)(3, 4).to(device)
    x = torch.randn((2, 3) if name in CELLS else (5, 2, 3))
    hx = random_state(module, 2)
    for arguments, wrong in (
        ((x.to(other),), "input"),
        ((x.to(device), to(hx, other)), "hx|h0|hidden|state"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=wrong) as caught:
            module(*arguments)
        assert other in str(caught.value)


# ---- where modules live -------------------------------------------------------------------------
def through_pickle(module: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(module))
    return copied


def through_save(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copied: nn.Module = torch.load(buffer, weights_only=False)
    return copied


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_save])
def test_copies_stay_on_their_device(device: str, name: str, way: Any) -> None:
    theirs, ours = pair(name, 3, 4, dtype=torch.float64)
    made = way(ours.to(device))
    assert {p.device.type for p in made.parameters()} == {device}
    x = torch.randn((2, 3) if name in CELLS else (5, 2, 3), dtype=torch.float64)
    assert_device_parity((theirs, made), device, x)
    with torch.no_grad():
        for weight in made.parameters():
            weight.zero_()
    assert_device_parity((theirs, ours), device, x)


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("assign", [False, True])
def test_weights_travel_between_devices(device: str, name: str, assign: bool) -> None:
    theirs, ours = pair(name, 3, 4, dtype=torch.float64)
    x = torch.randn((2, 3) if name in CELLS else (5, 2, 3), dtype=torch.float64)
    assert_device_parity((theirs, ours), device, x)
    assert_device_parity((theirs, ours.cpu()), "cpu", x)
    there = getattr(rnnkern, name)(3, 4, device=device, dtype=torch.float64)
    there.load_state_dict({k: v.to(device) for k, v in theirs.state_dict().items()}, assign=assign)
    assert_device_parity((theirs, there), device, x)
    back = getattr(nn, name)(3, 4, dtype=torch.float64)
    back.load_state_dict(there.state_dict())
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in back.state_dict().items())


# ---- modes --------------------------------------------------------------------------------------
@layers
def test_training_dropout_follows_the_seed(device: str, name: str) -> None:
    module = getattr(rnnkern, name)(4, 16, 2, dropout=0.5).to(device)
    x = torch.randn(5, 3, 4, device=device)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(module(x)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@layers
@pytest.mark.parametrize("needs", [(), ("input",), ("hx",)], ids=str)
def test_frozen_weights(device: str, name: str, needs: tuple[str, ...]) -> None:
    made = pair(name, 3, 4, 2, dtype=torch.float64)
    for module in made:
        for key, weight in module.named_parameters():
            weight.requires_grad_("hh_l1" in key)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    assert_device_parity(made, device, x, random_state(made[0], 2), needs=needs)


@layers
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(device: str, name: str, mode: Any) -> None:
    made = pair(name, 3, 4, 2, dtype=torch.float64)
    with mode():
        assert_device_parity(
            made, device, torch.randn(5, 2, 3, dtype=torch.float64), backward=False
        )


@layers
def test_checkpoint(device: str, name: str) -> None:
    made = pair(name, 3, 4, dtype=torch.float64)
    ours = made[1]

    def call(*args: Any) -> Any:
        return checkpoint(ours, *args, use_reentrant=False)

    x = torch.randn(5, 2, 3, dtype=torch.float64)
    wanted = run(ours.to(device), x.to(device))
    found = run(ours, x.to(device), call=call)
    for key, gradient in wanted.grads.items():
        assert gradient is not None
        assert torch.equal(found.grads[key], gradient)


@layers
def test_results_changed_in_place_are_noticed(device: str, name: str) -> None:
    module = getattr(rnnkern, name)(3, 4).to(device)
    x = torch.randn(5, 2, 3, device=device)
    y, _ = module(x)
    y.detach().zero_()
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@layers
def test_threads(device: str, name: str) -> None:
    module = getattr(rnnkern, name)(3, 8, 2, bidirectional=True).to(device)
    xs = [torch.randn(7, 2, 3, device=device) for _ in range(4)]

    def gradients(x: Tensor) -> list[Tensor]:
        loss = module(x)[0].square().sum()
        return list(torch.autograd.grad(loss, list(module.parameters())))

    wanted = [gradients(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(gradients, xs * 3))
    for k, values in enumerate(found):
        assert all(map(torch.equal, values, wanted[k % 4]))


# ---- compile and export -------------------------------------------------------------------------
@pytest.mark.parametrize("name", LAYERS + CELLS)
@given_or_not
def test_compile(device: str, name: str, given: bool) -> None:
    torch._dynamo.reset()
    made = pair(name, 3, 4, dtype=torch.float64)
    call = torch.compile(made[1].to(device), fullgraph=True, backend="aot_eager")
    x = torch.randn((2, 3) if name in CELLS else (5, 2, 3), dtype=torch.float64)
    hx = random_state(made[0], 2) if given else None
    wanted = run(made[1], to(x, device), to(hx, device))
    found = run(made[1], to(x, device), to(hx, device), call=call)
    for key, value in wanted.outputs.items():
        assert_close(found.outputs[key], value, kind="output", name=key)
    for key, gradient in wanted.grads.items():
        assert gradient is not None
        assert_close(found.grads[key], gradient, kind="gradient", name=key)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_export(device: str, name: str) -> None:
    theirs, ours = pair(name, 3, 4, dtype=torch.float64)
    x = torch.randn((2, 3) if name in CELLS else (5, 2, 3), dtype=torch.float64)
    program = torch.export.export(ours.to(device), (x.to(device),))
    found = outputs_of(theirs, program.module()(x.to(device)))
    for key, value in outputs_of(theirs, theirs(x)).items():
        assert_close(found[key].cpu(), value, kind="output", name=key)

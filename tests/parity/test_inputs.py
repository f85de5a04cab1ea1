"""Inputs: each layout, form and size that torch takes gives equal outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import rnnkern
import torch
from pairs import (
    LAYERS,
    assert_parity,
    assert_same_layout,
    outputs_of,
    pair,
    random_packed,
    random_state,
    run,
)
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

pytestmark = pytest.mark.usefixtures("every_device")
# Name of the layer and the keyword that makes it special.
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"proj_size": 3}),
    ("GRU", {}),
    ("RNN", {"nonlinearity": "tanh"}),
    ("RNN", {"nonlinearity": "relu"}),
]
kinds = pytest.mark.parametrize(("name", "extra"), KINDS, ids=str)


# ---- dense --------------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("layers", "both"), [(1, False), (1, True), (2, False), (3, True)])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_dense(
    name: str,
    extra: dict[str, Any],
    bias: bool,
    layers: int,
    both: bool,
    batch_first: bool,
    given: bool,
) -> None:
    made = pair(name, 5, 7, layers, bias=bias, batch_first=batch_first, bidirectional=both, **extra)
    x = torch.randn((3, 6, 5) if batch_first else (6, 3, 5))
    assert_parity(made, x, random_state(made[0], 3) if given else None)


@kinds
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("steps", [1, 7, 33])
@pytest.mark.parametrize("batch", [1, 7, 33])
def test_odd_lengths_and_batches(
    name: str, extra: dict[str, Any], batch_first: bool, steps: int, batch: int
) -> None:
    # In float32 one of some 20,000 pre-activations may round to the other side of relu's kink.
    dtype = torch.float64 if extra.get("nonlinearity") == "relu" else torch.float32
    made = pair(name, 3, 9, bidirectional=True, batch_first=batch_first, dtype=dtype, **extra)
    x = torch.randn((batch, steps, 3) if batch_first else (steps, batch, 3), dtype=dtype)
    assert_parity(made, x, random_state(made[0], batch))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("features", [1, 7, 33])
@pytest.mark.parametrize("hidden", [1, 7, 16, 33, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odd_widths(name: str, features: int, hidden: int, dtype: torch.dtype) -> None:
    made = pair(name, features, hidden, 2, dtype=dtype)
    assert_parity(made, torch.randn(5, 3, features, dtype=dtype), random_state(made[0], 3))


@pytest.mark.parametrize(("hidden", "proj"), [(2, 1), (33, 7), (33, 32)])
@pytest.mark.parametrize("both", [False, True])
def test_odd_projections(hidden: int, proj: int, both: bool) -> None:
    made = pair("LSTM", 7, hidden, 2, bidirectional=both, proj_size=proj, dtype=torch.float64)
    assert_parity(made, torch.randn(5, 3, 7, dtype=torch.float64), random_state(made[0], 3))


@kinds
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_unbatched_ignores_batch_first(
    name: str, extra: dict[str, Any], batch_first: bool, both: bool, given: bool
) -> None:
    made = pair(name, 5, 7, 2, batch_first=batch_first, bidirectional=both, **extra)
    for steps in (1, 6):
        hx = random_state(made[0], None) if given else None
        assert_parity(made, torch.randn(steps, 5), hx)


@kinds
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_batch_of_zero_rows(
    name: str, extra: dict[str, Any], batch_first: bool, given: bool
) -> None:
    made = pair(name, 5, 7, 2, batch_first=batch_first, bidirectional=True, **extra)
    x = torch.randn((0, 6, 5) if batch_first else (6, 0, 5))
    expected, actual = assert_parity(made, x, random_state(made[0], 0) if given else None)
    for key, wanted in expected.grads.items():
        found = actual.grads[key]
        assert wanted is not None
        assert found is not None
        assert torch.equal(found, wanted)


# ---- memory layouts -----------------------------------------------------------------------------
# From a contiguous leaf [T, B, I] to what the module gets: same size, other strides.
VIEWS = {
    "contiguous": lambda x: x,
    "time_from_batch_major": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features_outermost": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every_other_step": lambda x: x[::2],
    "every_other_row": lambda x: x[:, ::2],
    "every_other_feature": lambda x: torch.stack([x, -x], -1)[..., 0],
    "offset": lambda x: torch.cat([x, x], 0)[1 : 1 + x.size(0)],
    "one_row_expanded": lambda x: x[:, :1].expand(-1, 4, -1),
    "one_step_expanded": lambda x: x[:1].expand(9, -1, -1),
    "one_scalar_expanded": lambda x: x[:1, :1, :1].expand(4, 3, x.size(-1)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("batch_first", [False, True])
@kinds
def test_strided_input(name: str, extra: dict[str, Any], batch_first: bool, view: str) -> None:
    made = pair(name, 5, 7, bidirectional=True, batch_first=batch_first, **extra)
    assert_parity(made, torch.randn(8, 6, 5), view=VIEWS[view])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("form", ["transposed", "sliced", "expanded"])
def test_strided_state(name: str, form: str) -> None:
    made = pair(name, 5, 7, 2, bidirectional=True)

    def strided(state: Tensor) -> Tensor:
        if form == "transposed":
            return state.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        if form == "sliced":
            return torch.cat([state, state], -1)[..., 3 : 3 + state.size(-1)]
        return state[:, :1].expand_as(state)

    results = []
    for module in made:
        torch.manual_seed(1)
        x = torch.randn(6, 3, 5)
        hx = random_state(module, 3)
        leaves = [h.requires_grad_() for h in (hx if isinstance(hx, tuple) else (hx,))]
        views = tuple(strided(leaf) for leaf in leaves)
        y, _ = module(x, views if isinstance(hx, tuple) else views[0])
        y.pow(2).sum().backward()
        results.append((y, [leaf.grad for leaf in leaves]))
    (wanted, wanted_grads), (found, found_grads) = results
    assert_close(found, wanted, kind="output")
    for actual, expected in zip(found_grads, wanted_grads, strict=True):
        assert_close(actual, expected, kind="gradient")


@pytest.mark.parametrize("name", LAYERS)
def test_strided_weights(name: str) -> None:
    made = pair(name, 5, 7, 2)
    for module in made:
        for weight in module.parameters():
            if weight.dim() == 2:
                weight.data = weight.data.t().contiguous().t()
    assert_parity(made, torch.randn(6, 3, 5), random_state(made[0], 3))


@pytest.mark.parametrize("name", LAYERS)
def test_strided_output_gradients(name: str) -> None:
    made = pair(name, 5, 7, 2, bidirectional=True)
    x = torch.randn(6, 3, 5)
    for gradient in (torch.ones(()).expand(6, 3, 14), torch.randn(14, 3, 6).permute(2, 1, 0)):
        grads = []
        for module in made:
            y, _ = module(x)
            grads.append(torch.autograd.grad(y, list(module.parameters()), gradient))
        for actual, expected in zip(grads[1], grads[0], strict=True):
            assert_close(actual, expected, kind="gradient")


# ---- packed -------------------------------------------------------------------------------------
LENGTHS = {
    "sorted": [9, 7, 7, 3, 1],
    "unsorted": [3, 9, 1, 7, 7],
    "equal": [4, 4, 4],
    "one_row": [6],
    "one_step": [1, 1, 1],
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("given", [False, True])
@kinds
def test_packed(name: str, extra: dict[str, Any], lengths: str, both: bool, given: bool) -> None:
    made = pair(name, 5, 7, 2, bidirectional=both, **extra)
    packed = random_packed(LENGTHS[lengths], 5)
    hx = random_state(made[0], len(LENGTHS[lengths])) if given else None
    assert_parity(made, packed, hx)
    outputs = [module(packed)[0] for module in made]
    assert type(outputs[1]) is PackedSequence
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        expected, actual = getattr(outputs[0], field), getattr(outputs[1], field)
        assert (actual is None) == (expected is None)
        assert actual is None or torch.equal(actual, expected)
    assert_same_layout(outputs[1].data, outputs[0].data, "packed data")


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("given", [False, True])
@kinds
def test_packed_that_only_tells_the_way_back(
    name: str, extra: dict[str, Any], both: bool, given: bool
) -> None:
    """Made by hand: the state is that of sorted rows, the final states are not sorted."""
    made = pair(name, 5, 7, 2, bidirectional=both, **extra)
    whole = random_packed([3, 5, 1, 4], 5)
    packed = PackedSequence(whole.data, whole.batch_sizes, unsorted_indices=whole.unsorted_indices)
    assert_parity(made, packed, random_state(made[0], 4) if given else None)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_ignores_the_layers_batch_first(name: str, batch_first: bool) -> None:
    made = pair(name, 5, 7, batch_first=batch_first)
    assert_parity(made, random_packed([4, 6, 2], 5), random_state(made[0], 3))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_through_padding_and_back(name: str, batch_first: bool) -> None:
    made = pair(name, 5, 7, bidirectional=True, batch_first=batch_first)
    lengths = torch.tensor([2, 6, 4], device="cpu")
    x = torch.randn((3, 6, 5) if batch_first else (6, 3, 5))
    results = []
    for module in made:
        leaf = x.clone().requires_grad_()
        packed = pack_padded_sequence(leaf, lengths, batch_first, enforce_sorted=False)
        padded, back = pad_packed_sequence(module(packed)[0], batch_first, padding_value=-1.0)
        assert torch.equal(back, lengths)
        padded.pow(2).sum().backward()
        results.append((padded, leaf.grad))
    assert_close(results[1][0], results[0][0], kind="output")
    assert_close(results[1][1], results[0][1], kind="gradient")


@pytest.mark.parametrize("name", LAYERS)
def test_packed_double(name: str) -> None:
    made = pair(name, 5, 7, 2, bidirectional=True, dtype=torch.float64)
    assert_parity(made, random_packed([3, 9, 7], 5, dtype=torch.float64), random_state(made[0], 3))


# ---- which tensors need a gradient --------------------------------------------------------------
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("needs", [(), ("input",), ("hx",), ("input", "hx")], ids=str)
@pytest.mark.parametrize("weights", ["all", "none", "recurrent", "biases", "second_layer"])
def test_gradients_only_where_wanted(name: str, needs: tuple[str, ...], weights: str) -> None:
    made = pair(name, 5, 7, 2, bidirectional=True)
    wanted = {"all": "", "none": "?", "recurrent": "_hh_", "biases": "bias", "second_layer": "_l1"}
    for module in made:
        for key, weight in module.named_parameters():
            weight.requires_grad_(wanted[weights] in key)
    x, hx = torch.randn(6, 3, 5), random_state(made[0], 3)
    if weights == "none" and not needs:
        assert_parity(made, x, hx, needs=needs, backward=False)
        y, state = made[1](x, hx)
        for tensor in (y, *(state if isinstance(state, tuple) else (state,))):
            assert not tensor.requires_grad
            assert tensor.grad_fn is None
        return
    assert_parity(made, x, hx, needs=needs)


@pytest.mark.parametrize("loss_on", [("output",), ("h_n",), ("c_n",), ("output", "c_n")], ids=str)
@pytest.mark.parametrize("both", [False, True])
@kinds
def test_a_loss_on_part_of_the_outputs(
    name: str, extra: dict[str, Any], both: bool, loss_on: tuple[str, ...]
) -> None:
    if name != "LSTM" and "c_n" in loss_on:
        loss_on = tuple(key for key in loss_on if key != "c_n") or ("h_n",)
    made = pair(name, 5, 7, 2, bidirectional=both, **extra)
    assert_parity(made, torch.randn(6, 3, 5), random_state(made[0], 3), loss_on=loss_on)


# ---- values -------------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4, -1e4, 1e-40])
@pytest.mark.parametrize("where", ["input", "hx"])
def test_extreme_values_propagate(
    name: str, extra: dict[str, Any], value: float, where: str
) -> None:
    assert_values_propagate(name, extra, value, where)


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-40])
def test_extreme_weights_propagate(name: str, extra: dict[str, Any], value: float) -> None:
    assert_values_propagate(name, extra, value, "weight")


@pytest.mark.cpu_only("it multiplies roundings by 10,000: the numbers drawn have to be these")
@kinds
@pytest.mark.parametrize("value", [1e4, -1e4])
def test_large_weights_propagate(name: str, extra: dict[str, Any], value: float) -> None:
    assert_values_propagate(name, extra, value, "weight")


def assert_values_propagate(name: str, extra: dict[str, Any], value: float, where: str) -> None:
    made = pair(name, 5, 7, bidirectional=True, **extra)
    x, hx = torch.randn(6, 3, 5), random_state(made[0], 3)
    if where == "input":
        x[2, 1, 3] = value
    elif where == "hx":
        (hx[0] if isinstance(hx, tuple) else hx)[0, 1, 2] = value  # type: ignore[index]
    else:
        for module in made:
            module.weight_hh_l0.data[1, 2] = value
    runs = [run(module, x, hx, backward=False) for module in made]
    for key, expected in runs[0].outputs.items():
        assert_close(runs[1].outputs[key], expected, kind="output", name=key)


@pytest.mark.parametrize("name", LAYERS)
def test_more_steps_than_a_16_bit_counter_holds(name: str) -> None:
    made = pair(name, 1, 1)
    x = torch.randn(65_700, 1, 1)
    with torch.no_grad():
        assert_parity(made, x, backward=False)


# ---- forms of the arguments ---------------------------------------------------------------------
@pytest.mark.parametrize("name", LAYERS)
def test_keyword_arguments(name: str) -> None:
    theirs, ours = pair(name, 5, 7)
    x, hx = torch.randn(6, 3, 5), random_state(theirs, 3)
    assert_close(ours(input=x, hx=hx)[0], theirs(input=x, hx=hx)[0], kind="output")
    assert_close(ours(x, None)[0], theirs(x, None)[0], kind="output")


def test_lstm_state_as_a_list() -> None:
    theirs, ours = pair("LSTM", 5, 7)
    x, state = torch.randn(6, 3, 5), [torch.randn(1, 3, 7), torch.randn(1, 3, 7)]
    assert_close(ours(x, state)[0], theirs(x, state)[0], kind="output")
    assert type(ours(x, state)[1]) is tuple


@pytest.mark.parametrize("name", LAYERS)
def test_a_parameter_as_input_and_state(name: str) -> None:
    made = pair(name, 5, 7)
    results = []
    for module in made:
        torch.manual_seed(3)
        x = nn.Parameter(torch.randn(6, 3, 5))
        states = [nn.Parameter(torch.randn(1, 3, 7)) for _ in range(2 if name == "LSTM" else 1)]
        y, _ = module(x, tuple(states) if name == "LSTM" else states[0])
        y.sum().backward()
        results.append([y.detach(), x.grad, *(state.grad for state in states)])
    for found, wanted in zip(results[1], results[0], strict=True):
        assert_close(found, wanted, kind="gradient")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_meta_tensors_give_shapes(name: str, batch_first: bool) -> None:
    options = {"batch_first": batch_first, "bidirectional": True, "device": "meta"}
    theirs, ours = (getattr(lib, name)(5, 7, 2, **options) for lib in (nn, rnnkern))
    x = torch.empty(6, 3, 5, device="meta")
    expected, actual = outputs_of(theirs, theirs(x)), outputs_of(ours, ours(x))
    for key, wanted in expected.items():
        assert_same_layout(actual[key], wanted, key)
        assert actual[key].device == wanted.device

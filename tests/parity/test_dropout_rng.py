"""Dropout between layers: the same random numbers at the same places as torch.nn on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import (
    LAYERS,
    assert_parity,
    assert_same_run,
    outputs_of,
    pair,
    random_packed,
    random_state,
    run,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

layers = pytest.mark.parametrize("name", LAYERS)
SEED = 12345


def inputs(
    features: int, dtype: torch.dtype, batch_first: bool = False
) -> dict[str, Tensor | PackedSequence]:
    """Every form a dropout mask can have between two layers."""
    return {
        "dense": torch.randn(6, 3, features, dtype=dtype),
        "unbatched": torch.randn(6, features, dtype=dtype),
        "sorted": random_packed([5, 4, 1], features, dtype=dtype),
        "unsorted": random_packed([1, 5, 4], features, dtype=dtype),
        "one step": torch.randn(1, 3, features, dtype=dtype),
        "one row": torch.randn(6, 1, features, dtype=dtype),
        "no rows": torch.randn((0, 6, features) if batch_first else (6, 0, features), dtype=dtype),
    }


FORMS = list(inputs(1, torch.float32))


def seeded_run(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
    """Return the run from a fixed seed, and the generator's state after it."""
    torch.manual_seed(SEED)
    return run(module, *args, **kwargs), torch.get_rng_state()


def assert_same_under_one_seed(made: tuple[nn.Module, nn.Module], *args: Any, **kw: Any) -> None:
    (expected, their_rng), (actual, our_rng) = (seeded_run(m, *args, **kw) for m in made)
    assert torch.equal(our_rng, their_rng), "ours drew another number of random values"
    assert_same_run(actual, expected)


@layers
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dropout", [0.3, 1.0])
def test_training(name: str, form: str, batch_first: bool, both: bool, dropout: float) -> None:
    options = {"batch_first": batch_first, "bidirectional": both, "dropout": dropout}
    made = pair(name, 5, 7, 3, **options)
    assert_same_under_one_seed(made, inputs(5, torch.float32, batch_first)[form])


@layers
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_draw_the_same_masks(name: str, dtype: torch.dtype) -> None:
    made = pair(name, 5, 7, 2, dropout=0.5, bidirectional=True)
    for module in made:
        module.to(dtype)
    assert_same_under_one_seed(made, inputs(5, dtype)["dense"])


def test_with_a_projection() -> None:
    made = pair("LSTM", 5, 7, 3, dropout=0.5, bidirectional=True, proj_size=3)
    for form in FORMS:
        assert_same_under_one_seed(made, inputs(5, torch.float32)[form])


@layers
def test_with_an_initial_state_and_frozen_weights(name: str) -> None:
    made = pair(name, 5, 7, 3, dropout=0.5)
    x, hx = torch.randn(6, 3, 5), random_state(made[0], 3)
    assert_same_under_one_seed(made, x, hx)
    for module in made:
        module.requires_grad_(False)
    assert_same_under_one_seed(made, x, hx)
    assert_same_under_one_seed(made, x, hx, needs=("hx",))
    with torch.no_grad():
        assert_same_under_one_seed(made, x, hx, backward=False)
    with torch.inference_mode():
        assert_same_under_one_seed(made, x, hx, backward=False)


@layers
def test_strided_input_draws_the_same_mask(name: str) -> None:
    for batch_first in (False, True):
        made = pair(name, 5, 7, 2, dropout=0.5, batch_first=batch_first)
        x = torch.randn(3, 6, 5)
        assert_same_under_one_seed(made, x, view=lambda t: t.transpose(0, 1))
        assert_same_under_one_seed(made, x, view=lambda t: t[:, :1].expand(-1, 4, -1))


@layers
@pytest.mark.parametrize(("dropout", "training"), [(0.5, False), (0.0, True), (0.0, False)])
def test_no_random_number_is_drawn(name: str, dropout: float, training: bool) -> None:
    made = pair(name, 5, 7, 3, dropout=dropout)
    for module in made:
        module.train(training)
    torch.manual_seed(SEED)
    before = torch.get_rng_state()
    assert_parity(made, torch.randn(6, 3, 5, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


@layers
def test_one_layer_draws_nothing(name: str) -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        made = pair(name, 5, 7, 1, dropout=0.5)
    x = torch.randn(6, 3, 5)
    before = torch.get_rng_state()
    assert_parity(made, x)
    assert torch.equal(torch.get_rng_state(), before)


@layers
def test_masks_are_equal_exactly(name: str) -> None:
    # One step, one row: unit j of layer k is dropped if and only if column j of the gradient of
    # weight_ih_l(k+1) is exactly zero.
    made = pair(name, 5, 65, 4, dropout=0.5)
    x, masks = torch.randn(1, 1, 5), []
    for module in made:
        torch.manual_seed(SEED)
        outputs_of(module, module(x))["output"].sum().backward()
        grads = [getattr(module, f"weight_ih_l{k}").grad for k in (1, 2, 3)]
        masks.append(torch.stack([grad.ne(0).any(0) for grad in grads]))
    assert torch.equal(masks[1], masks[0])
    assert 0 < masks[0].sum() < masks[0].numel()


def test_results_are_equal_bit_by_bit_where_arithmetic_is_exact() -> None:
    # Small integers and p = 1/2 make every product and sum of a relu layer exact in any order.
    for options in ({}, {"bidirectional": True}, {"batch_first": True}):
        made = pair("RNN", 5, 7, 3, nonlinearity="relu", dropout=0.5, **options)
        with torch.no_grad():
            for theirs, ours in zip(*(m.parameters() for m in made), strict=True):
                theirs.copy_(torch.randint(-1, 2, theirs.shape))
                ours.copy_(theirs)
        x = torch.randint(-2, 3, (4, 3, 5)).float()
        with torch.no_grad():
            results = []
            for module in made:
                torch.manual_seed(SEED)
                results.append(outputs_of(module, module(x)))
        for key, expected in results[0].items():
            assert expected.abs().max() < 2**24
            assert expected.ne(0).any()
            assert torch.equal(results[1][key], expected), key


@layers
def test_successive_calls_go_on_drawing(name: str) -> None:
    made = pair(name, 5, 7, 2, dropout=0.5)
    x, results = torch.randn(6, 3, 5), []
    for module in made:
        torch.manual_seed(SEED)
        results.append([run(module, x) for _ in range(3)])
    for expected, actual in zip(*results, strict=True):
        assert_same_run(actual, expected)
    first, second, _ = (one.outputs["output"] for one in results[1])
    assert not torch.equal(first, second)


@layers
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_dropout_after_the_layer_meets_the_same_layout(name: str, batch_first: bool) -> None:
    # nn.Dropout draws in memory order, so the strides of the output decide which entry it drops.
    made = pair(name, 5, 7, 2, dropout=0.5, batch_first=batch_first)
    x, results = torch.randn(4, 6, 5), []
    for module in made:
        torch.manual_seed(SEED)
        results.append(nn.functional.dropout(module(x)[0], 0.5).eq(0))
    assert torch.equal(results[1], results[0])

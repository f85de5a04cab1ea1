"""Errors of forward: the same exception and text as torch.nn, and never a wrong answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairs import (
    LAYERS,
    Outcome,
    assert_same_error,
    assert_same_error_kind,
    outcome,
    outputs_of,
    pair,
)
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence

pytestmark = pytest.mark.usefixtures("every_device")
layers = pytest.mark.parametrize("name", LAYERS)


def state(name: str, *shape: int, **options: Any) -> Any:
    """Zeros as the state of the layer: h, or (h, c)."""
    h = torch.zeros(shape, **options)
    return (h, h.clone()) if name == "LSTM" else h


def outcomes(made: tuple[nn.Module, nn.Module], *args: Any, **kwargs: Any) -> list[Outcome]:
    return [outcome(lambda m=module: m(*args, **kwargs)) for module in made]


def assert_same_refusal(made: tuple[nn.Module, nn.Module], *args: Any, **kwargs: Any) -> None:
    theirs, ours = outcomes(made, *args, **kwargs)
    assert_same_error(ours, theirs)


# ---- checked by torch.nn itself, or by ATen's recurrent functions: type and text are equal ------
BAD_INPUT: dict[str, Callable[[], Tensor]] = {
    "no dimension": lambda: torch.tensor(1.0),
    "1-D": lambda: torch.randn(3),
    "4-D": lambda: torch.randn(1, 5, 2, 3),
    "too few features": lambda: torch.randn(5, 2, 2),
    "too many features": lambda: torch.randn(5, 2, 7),
    "too few features, unbatched": lambda: torch.randn(5, 2),
    "no features": lambda: torch.randn(5, 2, 0),
    "double": lambda: torch.randn(5, 2, 3).double(),
    "half": lambda: torch.randn(5, 2, 3).half(),
    "integer": lambda: torch.zeros(5, 2, 3, dtype=torch.int64),
    "boolean": lambda: torch.zeros(5, 2, 3, dtype=torch.bool),
    "no steps": lambda: torch.randn(0, 2, 3),
    "no steps, no rows": lambda: torch.randn(0, 0, 3),
    "no steps, unbatched": lambda: torch.randn(0, 3),
    "another device": lambda: torch.empty(5, 2, 3, device="meta"),
}


@layers
@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.parametrize("with_state", [False, True])
def test_bad_input(name: str, case: str, with_state: bool) -> None:
    hx = (state(name, 1, 2, 4),) if with_state else ()
    assert_same_refusal(pair(name, 3, 4), BAD_INPUT[case](), *hx)


@layers
def test_no_steps_batch_first(name: str) -> None:
    assert_same_refusal(pair(name, 3, 4, batch_first=True), torch.randn(2, 0, 3))


BAD_STATE: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "too many rows": ((5, 2, 3), (1, 3, 4)),
    "too few rows": ((5, 2, 3), (1, 1, 4)),
    "no rows": ((5, 2, 3), (1, 0, 4)),
    "too wide": ((5, 2, 3), (1, 2, 5)),
    "too narrow": ((5, 2, 3), (1, 2, 3)),
    "too many layers": ((5, 2, 3), (2, 2, 4)),
    "2-D for a batch": ((5, 2, 3), (2, 4)),
    "4-D": ((5, 2, 3), (1, 1, 2, 4)),
    "1-D": ((5, 2, 3), (4,)),
    "3-D for one row": ((5, 3), (1, 1, 4)),
    "1-D for one row": ((5, 3), (4,)),
    "too wide for one row": ((5, 3), (1, 5)),
    "too many layers for one row": ((5, 3), (2, 4)),
}


@layers
@pytest.mark.parametrize("case", BAD_STATE)
@pytest.mark.parametrize("batch_first", [False, True])
def test_bad_state(name: str, case: str, batch_first: bool) -> None:
    shape, state_shape = BAD_STATE[case]
    x = torch.randn(shape)
    if batch_first and x.dim() == 3:
        x = x.transpose(0, 1)
    assert_same_refusal(pair(name, 3, 4, batch_first=batch_first), x, state(name, *state_shape))


@layers
@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}], ids=str)
def test_state_of_another_depth(name: str, options: dict[str, Any]) -> None:
    made = pair(name, 3, 4, **options)
    assert_same_refusal(made, torch.randn(5, 2, 3), state(name, 1, 2, 4))
    assert_same_refusal(made, torch.randn(5, 2, 3), state(name, 4, 2, 4))


@pytest.mark.parametrize(
    ("h", "c"),
    [
        ((1, 2, 4), (1, 2, 4)),
        ((1, 2, 2), (1, 2, 2)),
        ((1, 2, 2), (1, 3, 4)),
        ((1, 2, 2), (2, 4)),
    ],
    ids=str,
)
def test_state_of_a_projection(h: tuple[int, ...], c: tuple[int, ...]) -> None:
    made = pair("LSTM", 3, 4, proj_size=2)
    assert_same_refusal(made, torch.randn(5, 2, 3), (torch.zeros(h), torch.zeros(c)))


FORMS: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: torch.zeros(1, 2, 4),
    "an empty tuple": lambda: (),
    "one state": lambda: (torch.zeros(1, 2, 4),),
    "three states": lambda: (torch.zeros(1, 2, 4),) * 3,
    "a string": lambda: "zeros",
    "numbers": lambda: (0, 0),
    "None inside": lambda: (torch.zeros(1, 2, 4), None),
    "zero": lambda: 0,
}


@layers
@pytest.mark.parametrize("form", FORMS)
def test_state_of_another_form(name: str, form: str) -> None:
    theirs, ours = outcomes(pair(name, 3, 4), torch.randn(5, 2, 3), FORMS[form]())
    if theirs.error is None:
        assert ours.error is None, str(ours)
        return
    assert_same_error_kind(ours, theirs)


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_lstm_state_given_to_another_layer(name: str) -> None:
    assert_same_refusal(pair(name, 3, 4), torch.randn(5, 2, 3), state("LSTM", 1, 2, 4))


@layers
@pytest.mark.parametrize("wrong", [None, [[1.0]], 3.0, "text"], ids=str)
def test_input_that_is_no_tensor(name: str, wrong: Any) -> None:
    assert_same_refusal(pair(name, 3, 4), wrong)


@layers
def test_wrong_call(name: str) -> None:
    for module in pair(name, 3, 4):
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'input'"):
            module()
        with pytest.raises(TypeError, match="unexpected keyword argument 'unknown'"):
            module(torch.randn(5, 2, 3), unknown=1)


@layers
def test_devices_that_differ(name: str) -> None:
    made = pair(name, 3, 4)
    assert_same_refusal(made, torch.randn(5, 2, 3), state(name, 1, 2, 4, device="meta"))
    on_meta = pair(name, 3, 4, device="meta")
    assert_same_refusal(on_meta, torch.randn(5, 2, 3))


# ---- PackedSequence -----------------------------------------------------------------------------
def on_host(*integers: int) -> Tensor:
    """Return lengths or sizes of steps where torch wants them."""
    return torch.tensor(integers, dtype=torch.int64, device="cpu")


def sequences(*lengths: int, features: int = 3, in_order: bool = False) -> PackedSequence:
    # Not pack_sequence: it makes the lengths on the default device, and wants them on the host.
    padded = pad_sequence([torch.randn(n, features) for n in lengths])
    return pack_padded_sequence(padded, on_host(*lengths), enforce_sorted=in_order)


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_packed_checks_of_torch(name: str) -> None:
    made = pair(name, 3, 4)
    assert_same_refusal(made, sequences(3, 2, features=2))
    assert_same_refusal(made, sequences(3, 2).double())
    assert_same_refusal(made, sequences(3, 2, in_order=True), state(name, 1, 3, 4))
    assert_same_refusal(made, sequences(3, 2, in_order=True), state(name, 2, 2, 4))
    assert_same_refusal(made, PackedSequence(torch.randn(2, 2, 3), on_host(2, 2)))


@layers
def test_packed_without_steps(name: str) -> None:
    empty = PackedSequence(torch.randn(0, 3), on_host())
    assert_same_refusal(pair(name, 3, 4), empty)


# torch checks these late or (LSTM) not at all, and some it answers with nonsense.
MALFORMED: dict[str, Callable[[], tuple[Any, ...]]] = {
    "features": lambda: (sequences(3, 2, features=2),),
    "more features": lambda: (sequences(3, 2, features=9),),
    "dtype": lambda: (sequences(3, 2).double(),),
    "3-D data": lambda: (PackedSequence(torch.randn(2, 2, 3), on_host(2, 2)),),
    "1-D data": lambda: (PackedSequence(torch.randn(3), on_host(2, 1)),),
    "too few data": lambda: (PackedSequence(torch.randn(3, 3), on_host(2, 2)),),
    "too many data": lambda: (PackedSequence(torch.randn(9, 3), on_host(2, 2)),),
    "growing sizes": lambda: (PackedSequence(torch.randn(3, 3), on_host(1, 2)),),
    "negative sizes": lambda: (PackedSequence(torch.randn(3, 3), on_host(4, -1)),),
    "float sizes": lambda: (PackedSequence(torch.randn(3, 3), on_host(2, 1).float()),),
    "2-D sizes": lambda: (PackedSequence(torch.randn(3, 3), on_host(2, 1).unsqueeze(0)),),
}
MALFORMED_STATE: dict[str, tuple[bool, tuple[int, ...]]] = {
    "more rows": (True, (1, 3, 4)),
    "more rows than indices": (False, (1, 3, 4)),
    "fewer rows": (True, (1, 1, 4)),
    "fewer rows than indices": (False, (1, 1, 4)),
    "layers": (True, (2, 2, 4)),
    "width": (True, (1, 2, 5)),
    "2-D": (True, (2, 4)),
}


def assert_refused_or_equal(made: tuple[nn.Module, nn.Module], *args: Any) -> None:
    """Where torch raises ours raises; where torch answers, ours answers the same or refuses."""
    theirs, ours = outcomes(made, *args)
    if theirs.error is not None:
        assert ours.error is not None, f"torch raises {theirs}, ours accepts"
    if ours.error is not None:
        kinds = (ValueError, RuntimeError, TypeError, IndexError)
        assert isinstance(ours.error, kinds), f"ours {ours}; torch {theirs}"
        assert str(ours.error)
        return
    expected = outputs_of(made[0], theirs.value)
    for key, found in outputs_of(made[1], ours.value).items():
        assert_close(found, expected[key], kind="output", name=key)


@layers
@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("both", [False, True])
def test_malformed_packed_input(name: str, case: str, both: bool) -> None:
    assert_refused_or_equal(pair(name, 3, 4, bidirectional=both), *MALFORMED[case]())


@layers
@pytest.mark.parametrize("form", ["int32", "strided"])
def test_batch_sizes_of_another_form(name: str, form: str) -> None:
    # torch refuses int32; to read them right is as good, to misread them is not.
    theirs, ours = pair(name, 3, 4)
    right = PackedSequence(torch.randn(6, 3), on_host(3, 2, 1))
    wrong = on_host(3, 2, 1).int() if form == "int32" else on_host(3, 9, 2, 9, 1, 9)[::2]
    found = outcome(lambda: ours(PackedSequence(right.data, wrong)))
    if found.error is not None:
        assert isinstance(found.error, (ValueError, RuntimeError, TypeError))
        return
    expected = outputs_of(theirs, theirs(right))
    for key, value in outputs_of(ours, found.value).items():
        assert_close(value, expected[key], kind="output", name=key)


@pytest.mark.cpu_only("torch selects rows beyond the state, after which a GPU is lost")
@layers
@pytest.mark.parametrize("case", MALFORMED_STATE)
def test_malformed_state_for_packed_input(name: str, case: str) -> None:
    in_order, shape = MALFORMED_STATE[case]
    packed = sequences(3, 2, in_order=in_order)
    assert_refused_or_equal(pair(name, 3, 4), packed, state(name, *shape))


# ---- refused deep inside torch (matrix products, oneDNN): an error here too, of clear kind ------
def assert_refused(made: tuple[nn.Module, nn.Module], *args: Any) -> None:
    theirs, ours = outcomes(made, *args)
    assert theirs.error is not None, "torch accepts this: the test is wrong"
    assert type(ours.error) is type(theirs.error), f"ours {ours}; torch {theirs}"


@layers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64], ids=str)
def test_state_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    assert_refused(pair(name, 3, 4), torch.randn(5, 2, 3), state(name, 1, 2, 4, dtype=dtype))


@layers
@pytest.mark.parametrize("key", ["weight_hh_l0", "bias_ih_l0", "weight_ih_l1"])
def test_weights_of_differing_dtypes(name: str, key: str) -> None:
    made = pair(name, 3, 4, 2)
    for module in made:
        weight = getattr(module, key)
        weight.data = weight.data.double()
    assert_refused(made, torch.randn(5, 2, 3))


@layers
@pytest.mark.parametrize("key", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
@pytest.mark.parametrize("change", [-1, 1, 3])
def test_weights_of_another_shape(name: str, key: str, change: int) -> None:
    # torch's LSTM does not look at the shape and reads past the end of a smaller weight.
    module = pair(name, 3, 4)[1]
    shape = [size + change for size in getattr(module, key).shape]
    setattr(module, key, nn.Parameter(torch.full(shape, 0.1)))
    with pytest.raises((ValueError, RuntimeError)):
        module(torch.randn(5, 2, 3))


@layers
def test_weight_set_to_none(name: str) -> None:
    made = pair(name, 3, 4)
    for module in made:
        module.weight_ih_l0 = None
    theirs, ours = outcomes(made, torch.randn(5, 2, 3))
    assert theirs.error is not None
    assert ours.error is not None


@layers
def test_an_error_leaves_the_module_usable(name: str) -> None:
    made = pair(name, 3, 4)
    x = torch.randn(5, 2, 3)
    expected = made[1](x)[0]
    for bad in (torch.randn(5, 2, 9), x.double(), x[:0]):
        assert outcome(lambda b=bad: made[1](b)).error is not None
    assert torch.equal(made[1](x)[0], expected)

"""LSTMCell, GRUCell and RNNCell: one step, with torch's forms, sizes, errors and loops."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import rnnkern
import torch
from pairs import (
    CELLS,
    Outcome,
    assert_parity,
    assert_same_error,
    assert_same_error_kind,
    outcome,
    outputs_of,
    pair,
    random_state,
    weighted_sum,
)
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils import skip_init

pytestmark = pytest.mark.usefixtures("every_device")
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("LSTMCell", {}),
    ("GRUCell", {}),
    ("RNNCell", {"nonlinearity": "tanh"}),
    ("RNNCell", {"nonlinearity": "relu"}),
]
kinds = pytest.mark.parametrize(("name", "extra"), KINDS, ids=str)
cells = pytest.mark.parametrize("name", CELLS)


def state(name: str, *shape: int, **options: Any) -> Any:
    """Zeros as the state of the cell: h, or (h, c)."""
    h = torch.zeros(shape, **options)
    return (h, h.clone()) if name == "LSTMCell" else h


# ---- values -------------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("rows", [None, 0, 1, 7, 33])
def test_one_step(
    name: str, extra: dict[str, Any], bias: bool, given: bool, rows: int | None
) -> None:
    made = pair(name, 5, 7, bias=bias, **extra)
    x = torch.randn(5) if rows is None else torch.randn(rows, 5)
    assert_parity(made, x, random_state(made[0], rows) if given else None)


@cells
@pytest.mark.parametrize("features", [1, 7, 33])
@pytest.mark.parametrize("hidden", [1, 7, 16, 33, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odd_widths(name: str, features: int, hidden: int, dtype: torch.dtype) -> None:
    made = pair(name, features, hidden, dtype=dtype)
    assert_parity(made, torch.randn(3, features, dtype=dtype), random_state(made[0], 3))


VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:1].expand(4, -1),
    "every_other_row": lambda x: x[::2],
    "offset": lambda x: torch.cat([x, x], 1)[:, 2:7],
}


@kinds
@pytest.mark.parametrize("view", VIEWS)
def test_strided_input(name: str, extra: dict[str, Any], view: str) -> None:
    assert_parity(pair(name, 5, 7, **extra), torch.randn(6, 5), view=VIEWS[view])


@cells
def test_strided_state_and_weights(name: str) -> None:
    made = pair(name, 5, 7)
    for module in made:
        for weight in module.parameters():
            if weight.dim() == 2:
                weight.data = weight.data.t().contiguous().t()
    h, c = torch.randn(7, 3).t(), torch.randn(3, 14)[:, ::2]
    # The memory order of torch's result follows the state's here, by accident: values only.
    hx: Any = (h, c) if name == "LSTMCell" else h
    assert_parity(made, torch.randn(3, 5), hx, layout=False)


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e4])
def test_extreme_values_propagate(name: str, extra: dict[str, Any], value: float) -> None:
    made = pair(name, 5, 7, **extra)
    x = torch.randn(3, 5)
    x[1, 2] = value
    assert_parity(made, x, random_state(made[0], 3), backward=False)


@cells
@pytest.mark.parametrize("needs", [(), ("input",), ("hx",)], ids=str)
def test_gradients_only_where_wanted(name: str, needs: tuple[str, ...]) -> None:
    made = pair(name, 5, 7)
    for module in made:
        module.weight_hh.requires_grad_(False)
        module.bias_ih.requires_grad_(False)
    assert_parity(made, torch.randn(3, 5), random_state(made[0], 3), needs=needs)


def test_a_loss_on_one_state_of_the_lstm_cell() -> None:
    made = pair("LSTMCell", 5, 7)
    for loss_on in (("h_n",), ("c_n",)):
        assert_parity(made, torch.randn(3, 5), random_state(made[0], 3), loss_on=loss_on)


@kinds
@pytest.mark.parametrize("batched", [True, False])
def test_a_loop_over_time(name: str, extra: dict[str, Any], batched: bool) -> None:
    made = pair(name, 5, 7, **extra)
    steps = torch.randn(12, 3, 5) if batched else torch.randn(12, 5)
    results: list[dict[str, Tensor]] = []
    for module in made:
        xs = steps.clone().requires_grad_()
        hx, seen = None, []
        for x in xs:
            hx = module(x, hx)
            seen.append(hx[0] if isinstance(hx, tuple) else hx)
        y = torch.stack(seen)
        weighted_sum([y]).backward()
        results.append({"y": y, "x": xs.grad} | {k: w.grad for k, w in module.named_parameters()})
    for key, wanted in results[0].items():
        kind: Any = "output" if key == "y" else "gradient"
        assert_close(results[1][key], wanted, kind=kind, name=key)


@cells
def test_a_cell_agrees_with_the_layer(name: str) -> None:
    cell = pair(name, 5, 7, dtype=torch.float64)[1]
    layer = getattr(rnnkern, name.removesuffix("Cell"))(5, 7, dtype=torch.float64)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    hx = None
    for step in x:
        hx = cell(step, hx)
    final = layer(x)[1]
    for key, found in outputs_of(cell, hx).items():
        wanted = final[0 if key == "h_n" else 1][0] if isinstance(final, tuple) else final[0]
        assert_close(found, wanted, kind="output", name=key)


# ---- forms --------------------------------------------------------------------------------------
def test_lstm_cell_returns_a_tuple_and_takes_a_list() -> None:
    theirs, ours = pair("LSTMCell", 5, 7)
    x, hx = torch.randn(3, 5), [torch.randn(3, 7), torch.randn(3, 7)]
    expected, found = theirs(x, hx), ours(x, hx)
    assert type(found) is tuple
    for wanted, got in zip(expected, found, strict=True):
        assert_close(got, wanted, kind="output")
    assert_close(ours(input=x, hx=hx)[0], expected[0], kind="output")


@cells
def test_results_share_no_memory(name: str) -> None:
    ours = pair(name, 5, 7)[1]
    hx: Any = random_state(ours, 3)
    with torch.no_grad():
        results = outputs_of(ours, ours(torch.randn(3, 5), hx))
    tensors = [*results.values(), *(hx if isinstance(hx, tuple) else (hx,))]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@cells
@pytest.mark.parametrize(("features", "hidden"), [(0, 4), (3, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_sizes_of_zero(name: str, features: int, hidden: int) -> None:
    made = pair(name, features, hidden)
    assert_parity(made, torch.randn(2, features), backward=False)


@cells
def test_skip_init(name: str) -> None:
    made = skip_init(getattr(rnnkern, name), 5, 7, device=torch.get_default_device())
    theirs = getattr(nn, name)(5, 7)
    made.load_state_dict(theirs.state_dict())
    assert_parity((theirs, made), torch.randn(3, 5))


@cells
def test_meta_tensors_give_shapes(name: str) -> None:
    theirs, ours = (getattr(lib, name)(5, 7, device="meta") for lib in (nn, rnnkern))
    x = torch.empty(3, 5, device="meta")
    for wanted, found in zip(
        outputs_of(theirs, theirs(x)).values(), outputs_of(ours, ours(x)).values(), strict=True
    ):
        assert found.device == wanted.device
        assert found.shape == wanted.shape


# ---- errors -------------------------------------------------------------------------------------
def outcomes(made: tuple[nn.Module, nn.Module], *args: Any) -> list[Outcome]:
    return [outcome(lambda m=module: m(*args)) for module in made]


BAD: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "3-D input": ((1, 2, 3), None),
    "input without dimension": ((), None),
    "features": ((2, 2), None),
    "features, unbatched": ((2,), None),
    "more features": ((2, 9), (2, 4)),
    "3-D state": ((2, 3), (1, 2, 4)),
    "state without dimension": ((2, 3), ()),
    "state width": ((2, 3), (2, 5)),
    "state width, unbatched": ((3,), (5,)),
    "state rows": ((2, 3), (3, 4)),
    "one state row for many": ((2, 3), (1, 4)),
    "state without rows": ((2, 3), (0, 4)),
    "2-D state, 1-D input": ((3,), (1, 4)),
    "1-D state, 2-D input": ((2, 3), (4,)),
}


@cells
@pytest.mark.parametrize("case", BAD)
def test_bad_shapes(name: str, case: str) -> None:
    shape, state_shape = BAD[case]
    hx = () if state_shape is None else (state(name, *state_shape),)
    theirs, ours = outcomes(pair(name, 3, 4), torch.zeros(shape), *hx)
    assert_same_error(ours, theirs)


@pytest.mark.parametrize(
    ("h", "c"), [((2, 4), (2, 5)), ((2, 4), (3, 4)), ((2, 4), (1, 2, 4)), ((2, 5), (2, 4))], ids=str
)
def test_bad_shape_of_one_lstm_state(h: tuple[int, ...], c: tuple[int, ...]) -> None:
    made = pair("LSTMCell", 3, 4)
    theirs, ours = outcomes(made, torch.randn(2, 3), (torch.zeros(h), torch.zeros(c)))
    assert_same_error(ours, theirs)


FORMS: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: torch.zeros(2, 4),
    "a stacked tensor": lambda: torch.zeros(2, 2, 4),
    "one state": lambda: (torch.zeros(2, 4),),
    "two states": lambda: (torch.zeros(2, 4), torch.zeros(2, 4)),
    "three states": lambda: (torch.zeros(2, 4),) * 3,
    "an empty tuple": lambda: (),
    "a number": lambda: 0,
}


@cells
@pytest.mark.parametrize("form", FORMS)
def test_state_of_another_form(name: str, form: str) -> None:
    theirs, ours = outcomes(pair(name, 3, 4), torch.randn(2, 3), FORMS[form]())
    if theirs.error is None:
        assert ours.error is None, str(ours)
        return
    assert_same_error_kind(ours, theirs)


@cells
@pytest.mark.parametrize("wrong", [None, [1.0, 2.0, 3.0], 1.0], ids=str)
def test_input_that_is_no_tensor(name: str, wrong: Any) -> None:
    theirs, ours = outcomes(pair(name, 3, 4), wrong)
    assert_same_error(ours, theirs)


@cells
def test_dtypes_and_devices_that_differ(name: str) -> None:
    # torch's text comes from deep inside (matrix product, meta device); ours need only be clear.
    made = pair(name, 3, 4)
    x = torch.randn(2, 3)
    for args in (
        (x.double(),),
        (x.long(),),
        (x, state(name, 2, 4, dtype=torch.float64)),
        (x.to("meta"),),
        (x, state(name, 2, 4, device="meta")),
    ):
        theirs, ours = outcomes(made, *args)
        assert theirs.error is not None
        assert isinstance(ours.error, (ValueError, RuntimeError)), str(ours)


def test_unknown_nonlinearity_is_refused_by_forward() -> None:
    theirs, ours = (library.RNNCell(3, 4, nonlinearity="swish") for library in (nn, rnnkern))
    expected, found = outcomes((theirs, ours), torch.randn(2, 3))
    assert_same_error(found, expected)
    for module in (theirs, ours):
        module.nonlinearity = "relu"
    ours.load_state_dict(theirs.state_dict())
    assert_parity((theirs, ours), torch.randn(2, 3))

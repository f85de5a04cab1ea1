"""torch.library.opcheck on both operators: schema, fakes, autograd registration, AOT dispatch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import Case, build, cotangents, feature_cases, leaves, run_op
from rnnkern.cells import CELLS
from rnnkern.ops import DIFFERENTIABLE, LayerInputs
from torch import Tensor

CASES = feature_cases(T=4, B=3, I=3, H=4)
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
cases = pytest.mark.parametrize("case", CASES, ids=str)
# AOT dispatch traces the double backward too; one case of each cell, and all features of the LSTM.
traced = pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.cell == "lstm" or (c.D == 2 and c.lengths and c.resets)],
    ids=str,
)


def backward_arguments(args: LayerInputs, mask: list[bool] | None = None) -> tuple[object, ...]:
    """Return the arguments of ``layer_backward`` after a run of ``layer`` on the same ones."""
    with torch.no_grad():
        y, hn, cn, *kept = torch.ops.rnnkern.layer(*args, True)
        outputs = (y, hn) if args.c0 is None else (y, hn, cn)
        gradients: list[Tensor | None] = [*cotangents(outputs), None][:3]
    if mask is None:
        mask = [getattr(args, name) is not None for name in DIFFERENTIABLE]
    return (*args, *kept, *gradients, mask)


@cases
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layer(case: Case, save: bool, dtype: torch.dtype) -> None:
    args = leaves(build(case, dtype))
    torch.library.opcheck(torch.ops.rnnkern.layer.default, (*args, save), test_utils=QUICK)


@traced
def test_layer_under_aot_dispatch(case: Case) -> None:
    args = leaves(build(case))
    torch.library.opcheck(
        torch.ops.rnnkern.layer.default, (*args, True), test_utils="test_aot_dispatch_dynamic"
    )


@cases
def test_layer_backward(case: Case) -> None:
    args = leaves(build(case))
    torch.library.opcheck(
        torch.ops.rnnkern.layer_backward.default, backward_arguments(args), test_utils=QUICK
    )


@traced
def test_layer_backward_under_aot_dispatch(case: Case) -> None:
    args = build(case)
    torch.library.opcheck(
        torch.ops.rnnkern.layer_backward.default,
        backward_arguments(args),
        test_utils="test_aot_dispatch_dynamic",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_narrow_types(cell: str, dtype: torch.dtype) -> None:
    args = leaves(build(Case(cell, D=2, lengths=True), dtype))
    torch.library.opcheck(torch.ops.rnnkern.layer.default, (*args, True), test_utils=QUICK)
    torch.library.opcheck(
        torch.ops.rnnkern.layer_backward.default, backward_arguments(args), test_utils=QUICK
    )


@pytest.fixture
def _fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # which fills it
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_fresh_memory_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", feature_cases(T=6, B=5, H=9), ids=str)
def test_every_element_of_every_output_is_written(case: Case, dtype: torch.dtype) -> None:
    args = leaves(build(case, dtype))
    for save in (True, False):
        assert not any(t.isnan().any() for t in torch.ops.rnnkern.layer(*args, save))
    for gradient in torch.ops.rnnkern.layer_backward(*backward_arguments(args)):
        assert not gradient.isnan().any()


@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(cell: str) -> None:
    args = leaves(build(Case(cell, B=1, D=2)))
    empty = args._replace(
        input=args.input[:, :0].detach(),
        h0=args.h0[:, :0].detach(),
        c0=None if args.c0 is None else args.c0[:, :0].detach(),
    )
    torch.library.opcheck(torch.ops.rnnkern.layer.default, (*empty, True), test_utils=QUICK)
    y, hn, *_ = run_op(empty)
    assert y.shape == (5, 0, 10)
    assert hn.shape == (2, 0, 5)
    (gradient,) = torch.autograd.grad(y.sum(), empty.w_hh)
    assert bool((gradient == 0).all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_results_have_the_real_form(case: Case) -> None:
    """Shapes, dtypes and strides of the meta kernels, with every gradient masked out in turn."""
    args = build(case)

    def on_meta(value: object) -> object:
        return value.to("meta") if isinstance(value, Tensor) else value

    present = [getattr(args, name) is not None for name in DIFFERENTIABLE]
    masks = [present] + [
        [on and i != k for i, on in enumerate(present)] for k in range(len(present)) if present[k]
    ]
    calls = [(torch.ops.rnnkern.layer, (*args, save)) for save in (False, True)]
    calls += [(torch.ops.rnnkern.layer_backward, backward_arguments(args, m)) for m in masks]
    for op, arguments in calls:
        real, fake = op(*arguments), op(*map(on_meta, arguments))
        for r, f in zip(real, fake, strict=True):
            assert f.device.type == "meta"
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())

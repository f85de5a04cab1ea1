"""Every cell, ISA and type, direction, layout and odd size against the reference in float64."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence

import pytest
import torch
from cases import (
    BFLOAT16_ISAS,
    ISAS,
    KERNELS,
    LAYOUTS,
    OUTPUTS,
    Case,
    Layout,
    Results,
    assert_matches,
    build,
    cast,
    evaluate,
    expected,
    feature_cases,
    mapped,
    use_isa,
)
from rnnkern import cpu
from rnnkern.cells import CELLS
from rnnkern.ops import DIFFERENTIABLE, LayerInputs
from torch import Tensor, nn

# 1, less than a vector, over two vectors, and over one panel of any ISA (64 units of one gate).
WIDTHS = ((1, 1), (33, 7), (7, 33), (5, 70))
BATCHES = (1, 3, 17)

isas = pytest.mark.parametrize("isa", ISAS)
kernels = pytest.mark.parametrize(("isa", "dtype"), KERNELS, ids=str)


@functools.cache
def solved(case: Case, narrow: bool = False) -> tuple[LayerInputs, Results]:
    """Return float64 arguments and the reference's results, the same whatever asks first.

    `narrow`: of arguments that are exact in bfloat16, not only in float32.
    """
    torch.manual_seed(zlib.crc32(str(case).encode()))
    args = build(case)
    if narrow:
        args = cast(cast(args, torch.bfloat16), torch.float64)
    return args, expected(args, needs=needs(case, narrow))


def needs(case: Case, narrow: bool) -> Sequence[str]:
    """Return what to differentiate by: in bfloat16 one rounded sign decides on relu's gradients."""
    return () if narrow and case.cell == "rnn_relu" else DIFFERENTIABLE


def check(case: Case, isa: str, dtype: torch.dtype) -> None:
    narrow = dtype == torch.bfloat16
    args, wanted = solved(case, narrow)
    with use_isa(isa):
        assert cpu.computed(dtype) == dtype
        found = evaluate(cast(args, dtype), needs=needs(case, narrow))
        assert all(t.dtype == dtype for t in found.values())
        assert_matches(found, wanted, dtype=dtype)
        with torch.no_grad():
            without_saving = evaluate(cast(args, dtype))
        assert without_saving.keys() == {"y", "hn", "cn"} & found.keys()
    assert_matches(without_saving, {k: wanted[k] for k in without_saving}, dtype=dtype)


@kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_odd_sizes(cell: str, D: int, layout: Layout, isa: str, dtype: torch.dtype) -> None:
    for input_size, hidden_size in WIDTHS:
        for batch in BATCHES:
            case = Case(cell, T=4, B=batch, I=input_size, H=hidden_size, D=D, layout=layout)
            check(case, isa, dtype)


@kernels
@pytest.mark.parametrize("layout", ["batch_first", "packed_unsorted"])
def test_odd_projections(layout: Layout, isa: str, dtype: torch.dtype) -> None:
    for hidden, projected in ((2, 1), (7, 5), (33, 9), (70, 68)):
        for batch in BATCHES:
            check(Case("lstm", B=batch, H=hidden, P=projected, D=2, layout=layout), isa, dtype)


@kernels
@pytest.mark.parametrize("case", feature_cases(T=6, B=5, H=9), ids=str)
def test_features(case: Case, isa: str, dtype: torch.dtype) -> None:
    check(case, isa, dtype)


@kernels
@pytest.mark.parametrize("cell", CELLS)
def test_every_number_of_rows(cell: str, isa: str, dtype: torch.dtype) -> None:
    """Every height of register tile, alone and beside others, and heights that shrink with time."""
    for batch in (*range(1, 18), 31, 32, 33, 65):
        lengths = batch % 2 == 0
        check(Case(cell, T=3, B=batch, H=5, lengths=lengths), isa, dtype)


@pytest.mark.parametrize("isa", BFLOAT16_ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_relu_in_bfloat16(layout: Layout, isa: str) -> None:
    """Of small integers, so that every sum is exact and no sign is rounded."""
    torch.manual_seed(3)
    case = Case("rnn_relu", T=3, B=3, I=3, H=35, D=2, layout=layout, resets=True, reset_state=True)
    args = mapped(build(case), lambda t: t.sign() * (torch.rand(t.shape) < 0.1))
    with use_isa(isa):
        found = evaluate(cast(args, torch.bfloat16))
    wanted = expected(args)
    assert torch.equal(found["y"].double(), wanted["y"])
    assert_matches(found, wanted, dtype=torch.bfloat16)


# ---- no less accurate than torch ----------------------------------------------------------------
# Two correct implementations have errors of the same size but not the same errors, so the largest
# of a few hundred entries varies. FACTOR allows for that, and one eps for a torch result that
# happens to be exact.
FACTOR = 2.0
MODULES = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}


def torch_module(args: LayerInputs) -> nn.RNNBase:
    H = args.w_hh.shape[1]
    options = {"nonlinearity": args.cell[4:]} if args.cell.startswith("rnn") else {}
    module = MODULES[args.cell](args.input.shape[-1], H, bidirectional=True, **options)
    module.to(args.input.dtype)
    weights = [t for direction in args.directions for t in direction if t is not None]
    with torch.no_grad():
        for own, given in zip(module.parameters(), weights, strict=True):
            own.copy_(given)
    return module


def torch_results(args: LayerInputs) -> Results:
    module = torch_module(args)
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    names += tuple(f"{name}_reverse" for name in names)

    def function(own: LayerInputs) -> tuple[Tensor, ...]:
        hx = own.h0 if own.c0 is None else (own.h0, own.c0)
        y, state = module(own.input, hx)
        return (y, state) if isinstance(state, Tensor) else (y, *state)

    results = evaluate(args, function)
    gradients = (p.grad for p in module.parameters())
    return results | {f"d{n}": g for n, g in zip(names, gradients, strict=True) if g is not None}


def root_mean_square(found: Results, wanted: Results, names: list[str]) -> float:
    squares = [
        ((found[n].double() - wanted[n]) ** 2).mean() / wanted[n].square().mean() for n in names
    ]
    return float(torch.stack(squares).mean().sqrt())


@pytest.mark.parametrize(("isa", "dtype"), [k for k in KERNELS if k[1] != torch.float64], ids=str)
@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize(("T", "B", "H"), [(20, 1, 64), (40, 9, 33), (7, 32, 128)])
def test_error_is_not_above_torch(
    cell: str, T: int, B: int, H: int, isa: str, dtype: torch.dtype
) -> None:
    case, narrow = Case(cell, T=T, B=B, I=48, H=H, D=2), dtype == torch.bfloat16
    args, wanted = solved(case, narrow)
    args = cast(args, dtype)
    theirs = torch_results(args)
    with use_isa(isa):
        ours = evaluate(args, needs=needs(case, narrow))
    assert ours.keys() == wanted.keys() <= theirs.keys()
    eps = torch.finfo(dtype).eps
    for names in ([n for n in wanted if n in OUTPUTS], [n for n in wanted if n not in OUTPUTS]):
        if not names:
            continue
        limit = FACTOR * root_mean_square(theirs, wanted, names) + eps
        assert root_mean_square(ours, wanted, names) <= limit, names

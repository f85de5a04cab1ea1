"""Accuracy of the kernels' tanh and sigmoid, in units of the last place, measured through cells."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from cases import ISAS, run_op, use_isa
from rnnkern.cells import CELLS
from rnnkern.ops import LayerInputs
from torch import Tensor

MAX_ULP = 4.0
LANES = 67  # hidden units: whole vectors of every ISA and a tail

isas = pytest.mark.parametrize("isa", ISAS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


# ---- single functions out of cells --------------------------------------------------------------
def run_cell(
    cell: str, data: Tensor, w_ih: Tensor, b_ih: Tensor, c0: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Run a layer on data [T,B,I] with zero recurrent weights and initial h."""
    H = b_ih.shape[0] // CELLS[cell].gates
    args = dict.fromkeys(LayerInputs._fields) | {
        "cell": cell,
        "input": data,
        "h0": data.new_zeros(1, data.shape[1], H),
        "c0": c0,
        "w_ih": w_ih,
        "w_hh": data.new_zeros(b_ih.shape[0], H),
        "b_ih": b_ih,
        "batch_first": False,
    }
    return run_op(LayerInputs(**args))


def tanh_by_rnn(x: Tensor) -> Tensor:
    """Tanh of x [n,H], as the output of an Elman RNN that sees its input and nothing else."""
    eye, bias = torch.eye(x.shape[1]).to(x), x.new_zeros(x.shape[1])
    return run_cell("rnn_tanh", x.unsqueeze(0), eye, bias)[0][0]


def sigmoid_by_lstm(x: Tensor) -> Tensor:
    """Sigmoid of x [n,H], as the LSTM's c = f·c' + i·g with f = sigmoid(-inf), g = tanh(100)."""
    H = x.shape[1]
    w_ih = torch.cat([torch.eye(H), torch.zeros(3 * H, H)]).to(x)
    bias = torch.tensor([0.0, -math.inf, 100.0, 0.0]).repeat_interleave(H).to(x)
    c0 = x.new_ones(1, x.shape[0], H)
    return run_cell("lstm", x.unsqueeze(0), w_ih, bias, c0)[2][0]


def tanh_of_bias(x: Tensor) -> Tensor:
    """Tanh of x [H] given as bias: the way in for values that an identity matrix would spread."""
    H = x.shape[0]
    return run_cell("rnn_tanh", x.new_zeros(1, 1, 1), x.new_zeros(H, 1), x)[0][0, 0]


def sigmoid_of_bias(x: Tensor) -> Tensor:
    """Sigmoid of x [H] given as bias."""
    H = x.shape[0]
    rest = torch.tensor([-math.inf, 100.0, 0.0]).repeat_interleave(H).to(x)
    data, w_ih = x.new_zeros(1, 1, 1), x.new_zeros(4 * H, 1)
    return run_cell("lstm", data, w_ih, torch.cat([x, rest]), x.new_ones(1, 1, H))[2][0, 0]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": tanh_by_rnn,
    "sigmoid": sigmoid_by_lstm,
}
OF_BIAS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": tanh_of_bias,
    "sigmoid": sigmoid_of_bias,
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


# ---- measuring ----------------------------------------------------------------------------------
def exact(name: str, x: float) -> mpmath.mpf:
    with mpmath.workprec(160):
        return mpmath.tanh(x) if name == "tanh" else 1 / (1 + mpmath.exp(-mpmath.mpf(x)))


@functools.cache
def samples(name: str, dtype: torch.dtype) -> tuple[Tensor, list[mpmath.mpf]]:
    """[n,LANES] inputs, and the exact values: log-uniform magnitudes, and the interesting range."""
    generator = torch.Generator().manual_seed(3)

    def uniform(low: float, high: float, rows: int) -> Tensor:
        u = torch.rand(rows, LANES, generator=generator, dtype=torch.float64)
        return low + (high - low) * u

    info = torch.finfo(dtype)
    lowest, highest = math.log(info.tiny) * 1.02, math.log(info.max) * 0.99
    magnitudes = uniform(lowest, highest, 40).exp()
    x = torch.cat([magnitudes, uniform(-5, 6, 80).exp(), uniform(-1.5, 1.5, 40)])
    x[::2] *= -1
    # The ends of tanh's polynomial and its saturation, of exp's range, and a power of two.
    edges = torch.tensor([0.625, 9.01, 19.06, 88.72, 103.9, 709.7, 1.0])
    x[0, :14] = torch.cat([edges, -edges])
    x[1, :14] = torch.nextafter(x[0, :14].to(dtype), torch.tensor(0.0, dtype=dtype)).double()
    x = x.to(dtype)
    return x, [exact(name, v) for v in x.flatten().tolist()]


def ulp_errors(found: Tensor, wanted: list[mpmath.mpf]) -> np.ndarray:
    """|found - exact| over the spacing of the type's numbers at the exact value."""
    info = np.finfo(found.numpy().dtype)
    smallest = mpmath.mpf(float(info.smallest_normal))
    errors = []
    with mpmath.workprec(160):
        for value, target in zip(found.flatten().tolist(), wanted, strict=True):
            if abs(target) < smallest:
                # Denormal results may be flushed to zero: 1/(1+e^-x) overflows first, as in torch.
                errors.append(0.0 if abs(value) <= 2 * smallest else math.inf)
                continue
            exponent = mpmath.frexp(target)[1]
            spacing = mpmath.ldexp(1, exponent - info.nmant - 1)
            errors.append(float(abs(mpmath.mpf(value) - target) / spacing))
    return np.array(errors)


@dtypes
@isas
@functions
def test_ulp(name: str, isa: str, dtype: torch.dtype) -> None:
    x, wanted = samples(name, dtype)
    with use_isa(isa):
        found = FUNCTIONS[name](x)
    errors = ulp_errors(found, wanted)
    worst = int(errors.argmax())
    assert errors.max() <= MAX_ULP, f"{name}({x.flatten()[worst].item()!r})"
    assert errors.max() > 0, "a measurement that finds no error at all measures nothing"


@dtypes
@isas
@functions
def test_lanes_and_tails_agree(name: str, isa: str, dtype: torch.dtype) -> None:
    """The same number gives the same bits in every lane, and alone."""
    x, _ = samples(name, dtype)
    column = x.flatten()[:: LANES // 3].contiguous()
    with use_isa(isa):
        alone = FUNCTIONS[name](column.unsqueeze(1))
        for width in (3, 8, 16, 41):
            spread = FUNCTIONS[name](column.unsqueeze(1).expand(-1, width).contiguous())
            assert torch.equal(spread, alone.expand(-1, width))


@dtypes
@isas
def test_special_values(isa: str, dtype: torch.dtype) -> None:
    inf, nan = math.inf, math.nan
    info = torch.finfo(dtype)
    big = [20.0, 30.0, 1e3, info.max]
    table = {
        "tanh": [(0.0, 0.0), (-0.0, 0.0), (inf, 1.0), (-inf, -1.0), (nan, nan), (-nan, nan)]
        + [(v, 1.0) for v in big]
        + [(-v, -1.0) for v in big],
        "sigmoid": [(0.0, 0.5), (-0.0, 0.5), (inf, 1.0), (-inf, 0.0), (nan, nan), (-nan, nan)]
        + [(2 * v, 1.0) for v in big[:3]]
        + [(info.max, 1.0), (-info.max, 0.0), (-1e3, 0.0)],
    }
    with use_isa(isa):
        for name, pairs in table.items():
            x, wanted = torch.tensor(pairs, dtype=dtype).unbind(1)
            for repeat in (1, 5):  # tails, and whole vectors
                found = OF_BIAS[name](x.repeat(repeat))
                torch.testing.assert_close(
                    found, wanted.repeat(repeat), rtol=0, atol=0, equal_nan=True
                )


@dtypes
@isas
def test_denormals(isa: str, dtype: torch.dtype) -> None:
    """Tanh of a number whose square vanishes is that number; sigmoid is one half."""
    info = torch.finfo(dtype)
    steps = torch.tensor([1.0, 3.0, 1000.0, 2.0**20], dtype=torch.float64)
    x = torch.cat([steps * info.eps, torch.tensor([1.0, 4.0])]) * info.smallest_normal
    x = torch.cat([x, -x]).to(dtype)
    assert bool((x != 0).all())
    with use_isa(isa):
        assert torch.equal(tanh_of_bias(x), x)
        assert torch.equal(sigmoid_of_bias(x), torch.full_like(x, 0.5))


@dtypes
@isas
@functions
def test_monotonic_and_bounded(name: str, isa: str, dtype: torch.dtype) -> None:
    """No bump larger than the error bound where the pieces of the approximation meet."""
    low = 0.0 if name == "sigmoid" else -1.0
    for centre in (0.625, -0.625, 9.01, 1e-3, 44.0):
        x = torch.linspace(centre * 0.999, centre * 1.001, 40 * LANES, dtype=torch.float64)
        with use_isa(isa):
            y = FUNCTIONS[name](x.sort().values.to(dtype).view(-1, LANES)).flatten()
        slack = 2 * MAX_ULP * torch.finfo(dtype).eps * y.abs().max()
        assert bool((y.diff() >= -slack).all())
        assert float(y.min()) >= low
        assert float(y.max()) <= 1.0

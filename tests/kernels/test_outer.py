"""The weight gradients' product: right in every form, equal for any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import use_isa
from rnnkern import _native
from rnnkern.gemm import outer
from tolerances import assert_close

# N rows, O columns of a, I columns of each factor
SHAPES = [
    (1, 1, (1,)),
    (7, 33, (28,)),
    (33, 4, (70, 1)),
    (300, 130, (1, 33)),
    (257, 96, (64, 64)),
    (1000, 13, (33,)),
    (513, 260, ()),
    (40_000, 3, (5, 2)),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(autouse=True)
def _more_threads_than_cpus() -> Iterator[None]:
    _native.allow_oversubscription(True)
    yield
    _native.allow_oversubscription(False)


def run(
    a: torch.Tensor, factors: list[torch.Tensor], sums: bool = True
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Return the products and the sum, in memory that held NaN before."""
    outs = [torch.full((a.shape[1], b.shape[1]), torch.nan, dtype=a.dtype) for b in factors]
    total = torch.full((a.shape[1],), torch.nan, dtype=a.dtype) if sums else None
    outer(a, list(zip(factors, outs, strict=True)), total)
    return outs, total


def draw(
    shape: tuple[int, int, tuple[int, ...]], dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    N, O, widths = shape
    return torch.randn(N, O, dtype=dtype), [torch.randn(N, I, dtype=dtype) for I in widths]


@DTYPES
@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value(isa: str, dtype: torch.dtype, shape: tuple[int, int, tuple[int, ...]]) -> None:
    a, factors = draw(shape, dtype)
    with use_isa(isa):
        outs, total = run(a, factors)
    for b, out in zip(factors, outs, strict=True):
        assert_close(out, (a.double().t() @ b.double()).to(dtype), kind="gradient")
    assert total is not None
    assert_close(total, a.double().sum(0).to(dtype), kind="gradient")


@DTYPES
@pytest.mark.parametrize(
    "shape", [*SHAPES, (40, 700, (300, 40)), (600, 5, (900,)), (1000, 260, (64,))], ids=str
)
def test_threads(dtype: torch.dtype, shape: tuple[int, int, tuple[int, ...]]) -> None:
    a, factors = draw(shape, dtype)
    torch.set_num_threads(1)
    outs, total = run(a, factors)
    assert total is not None
    for threads in (2, 3, 4, 7):
        torch.set_num_threads(threads)
        others, other_total = run(a, factors)
        assert other_total is not None
        assert torch.equal(other_total, total)
        assert all(torch.equal(*pair) for pair in zip(others, outs, strict=True))


@DTYPES
def test_gaps_between_rows(dtype: torch.dtype) -> None:
    whole = torch.randn(64, 90, dtype=dtype)
    a, b = whole[:, 10:50], whole[:, 33:]
    (out,), _ = run(a, [b], sums=False)
    assert_close(out, a.t() @ b, kind="gradient")


@DTYPES
def test_no_rows(dtype: torch.dtype) -> None:
    (out,), total = run(torch.empty(0, 5, dtype=dtype), [torch.empty(0, 3, dtype=dtype)])
    assert total is not None
    assert torch.equal(out, torch.zeros(5, 3, dtype=dtype))
    assert torch.equal(total, torch.zeros(5, dtype=dtype))
    (empty,), _ = run(torch.randn(4, 5, dtype=dtype), [torch.empty(4, 0, dtype=dtype)])
    assert empty.shape == (5, 0)

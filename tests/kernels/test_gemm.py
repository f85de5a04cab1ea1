"""The dense product around the recurrence: right in every form, equal for any number of threads."""

from __future__ import annotations

import pytest
import torch
from rnnkern.gemm import linear
from tolerances import assert_close

SHAPES = [(1, 1, 1), (7, 33, 28), (33, 1, 70), (1, 300, 130), (200, 64, 600), (130, 5000, 70)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def factors(
    shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    N, K, O = shape
    if transposed:
        return torch.randn(K, N, dtype=dtype).t(), torch.randn(K, O, dtype=dtype).t()
    return torch.randn(N, K, dtype=dtype), torch.randn(O, K, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_value(
    dtype: torch.dtype, shape: tuple[int, int, int], transposed: bool, bias: bool
) -> None:
    a, w = factors(shape, dtype, transposed)
    b = torch.randn(shape[2], dtype=dtype) if bias else None
    found = linear(a, w, b)
    wanted = torch.nn.functional.linear(a.double(), w.double(), None if b is None else b.double())
    assert found.is_contiguous()
    assert_close(found, wanted.to(dtype), kind="output")


@DTYPES
@pytest.mark.parametrize(
    "shape", [*SHAPES, (256, 20000, 132), (1, 2304, 65), (1, 4096, 128), (4096, 1100, 1)], ids=str
)
@pytest.mark.parametrize("transposed", [False, True])
def test_threads(dtype: torch.dtype, shape: tuple[int, int, int], transposed: bool) -> None:
    a, w = factors(shape, dtype, transposed)
    torch.set_num_threads(1)
    one = linear(a, w)
    for threads in (2, 3, 4, 7):
        torch.set_num_threads(threads)
        assert torch.equal(linear(a, w), one)


@DTYPES
def test_gaps_between_rows(dtype: torch.dtype) -> None:
    whole = torch.randn(64, 900, dtype=dtype)
    part = whole[:, 100:700]
    w = torch.randn(90, 600, dtype=dtype)
    assert_close(linear(part, w), part @ w.t(), kind="output")
    assert_close(linear(part.t(), w[:, :64]), part.t() @ w[:, :64].t(), kind="output")


@DTYPES
def test_empty_factors(dtype: torch.dtype) -> None:
    assert linear(torch.empty(0, 5, dtype=dtype), torch.empty(3, 5, dtype=dtype)).shape == (0, 3)
    nothing = linear(torch.empty(4, 0, dtype=dtype), torch.empty(3, 0, dtype=dtype))
    assert torch.equal(nothing, torch.zeros(4, 3, dtype=dtype))

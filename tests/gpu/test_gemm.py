"""Products by torch's cuBLAS, in a precision that torch's flag does not have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu.flags import tf32
from rnnkern.cuda_gemm import CublasGemm, gemm, torchs_cublas
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
SIZES = [(1, 1, 1), (7, 33, 1), (1, 7, 33), (300, 513, 130), (320, 512, 128)]
wishes = pytest.mark.parametrize("wish", [False, True], ids=["exact", "tf32"])


@pytest.fixture(autouse=True)
def _finished() -> Iterator[None]:
    yield
    torch.cuda.synchronize()


def made(wish: bool) -> CublasGemm:
    cublas = torchs_cublas()
    assert cublas is not None
    return CublasGemm(cublas, wish)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@wishes
def test_products(wish: bool, sizes: tuple[int, int, int]) -> None:
    M, K, N = sizes
    a, w, b = (torch.randn(size, device="cuda") for size in ((M, K), (N, K), (N,)))
    product = a.double() @ w.double().t()
    multiplies, rounds = made(wish), wish and torch.cuda.get_device_capability() >= (8, 0)
    limit = 2e-3 if rounds else 1e-5
    with tf32(products=not wish):
        found = multiplies.linear(a, w, b)
        largest = (a.abs() @ w.abs().t() + b.abs()).max()  # of what is summed
        assert (found - (product + b)).abs().max() < limit * largest
        if rounds and sizes == (320, 512, 128):  # aligned as tensor cores want it
            assert error(found, product + b) > 1e-5
        assert error(multiplies.linear(a, w), product) < limit
        out = torch.full((M + 2, N), torch.nan, device="cuda")
        multiplies.outer(a.t().contiguous(), w.t(), out[1:-1])
        assert error(out[1:-1], product) < limit
        assert out[[0, -1]].isnan().all()
        multiplies.add(out[1:-1], a, w.t())
        assert error(out[1:-1], 2 * product) < limit
        assert error(a @ w.t(), product) < (1e-5 if wish else 2e-3)  # torch's own, by its flag


@wishes
def test_they_repeat_bit_for_bit_on_any_stream(wish: bool) -> None:
    a, w, b = (torch.randn(size, device="cuda") for size in ((2000, 300), (1024, 300), (1024,)))
    multiplies = made(wish)
    wanted = multiplies.linear(a, w, b)
    torch.cuda.synchronize()
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = multiplies.linear(a, w, b)
        torch.cuda.synchronize()
        assert torch.equal(found, wanted)


@wishes
def test_in_a_cuda_graph(wish: bool) -> None:
    a, w, b = (torch.randn(size, device="cuda") for size in ((200, 96), (64, 96), (64,)))
    multiplies = made(wish)
    multiplies.linear(a, w, b)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = multiplies.linear(a, w, b)
    a.copy_(torch.randn_like(a))
    graph.replay()
    assert error(found, a.double() @ w.double().t() + b) < (2e-3 if wish else 1e-5)


def test_the_flag_chooses() -> None:
    data = torch.empty(0, device="cuda")
    for products in (False, True):
        with tf32(products=products):
            assert isinstance(gemm(data, not products), CublasGemm)
            assert not isinstance(gemm(data, products), CublasGemm)

"""Where float32 is multiplied in TF32, in the recurrence and in the products around it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Case, build, leaves
from cuda_host.conftest import Host
from ops.test_opcheck import backward_arguments
from rnnkern import cuda, cuda_gemm, cuda_precision
from rnnkern.cuda_gemm import Cublas, CublasGemm, gemm
from rnnkern.cuda_precision import allows_tf32, uses_tf32
from torch import Tensor

MATMUL = torch.backends.cuda.matmul


# ---- what is wanted -----------------------------------------------------------------------------
def test_tf32_in_both_of_torch_s_ways_to_say_so() -> None:
    for allowed, precision in ((True, "tf32"), (False, "ieee"), (False, "none")):
        assert allows_tf32(SimpleNamespace(fp32_precision=precision)) is allowed
        assert allows_tf32(SimpleNamespace(allow_tf32=allowed)) is allowed
    assert allows_tf32(MATMUL) is False  # torch's default
    assert allows_tf32(torch.backends.cudnn.rnn) is True


@pytest.mark.parametrize("layers", [False, True], ids=["cudnn_exact", "cudnn_tf32"])
@pytest.mark.parametrize("products", [False, True], ids=["matmul_exact", "matmul_tf32"])
@pytest.mark.parametrize("cudnn", ["available", "disabled", "missing"])
def test_tf32_where_torch_uses_it(
    layers: bool, products: bool, cudnn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allows(settings: Any) -> bool:
        return products if settings is MATMUL else layers

    monkeypatch.setattr(cuda_precision, "allows_tf32", allows)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", cudnn != "disabled")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: cudnn != "missing")
    by_cudnn = cudnn == "available"
    assert uses_tf32(T=9) == (layers if by_cudnn else products)
    assert uses_tf32(T=1) == (layers and products if by_cudnn else products)


# ---- who multiplies -----------------------------------------------------------------------------
class Blas:
    """What stands for cuBLAS, with a new handle for each product."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.handles: list[ctypes.c_int] = []
        self.cublas = Cublas(library, self._handle)

    def _handle(self) -> int:
        handle = ctypes.c_int(-1)
        self.handles.append(handle)
        return ctypes.addressof(handle)

    def products(self) -> tuple[int, int]:
        """Return how many there were so far: exact, and with TF32."""
        exact, tf32 = map(self.library.cublas_host_products, (0, 1))
        return exact, tf32


@pytest.fixture
def blas(cublas_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Blas]:
    """Let rnnkern find it."""
    blas = Blas(cublas_library)
    monkeypatch.setattr(cuda_gemm, "torchs_cublas", lambda: blas.cublas)
    yield blas
    cublas_library.cublas_host_fail(0)


@pytest.fixture(params=[False, True], ids=["matmul_exact", "matmul_tf32"])
def flag(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Set torch's flag of products; nothing may change it."""
    allowed = bool(request.param)
    MATMUL.allow_tf32 = allowed
    yield allowed
    assert MATMUL.allow_tf32 is allowed
    MATMUL.allow_tf32 = False
    if hasattr(MATMUL, "fp32_precision"):
        MATMUL.fp32_precision = "none"


CASES = [
    Case("lstm"),
    Case("lstm", P=3),
    Case("gru", D=2),
    Case("gru_reset_before", D=2, layout="packed"),
    Case("rnn_tanh", bias=False, lengths=True),
]


def results(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(3)
    args = build(case, dtype)
    with torch.no_grad():
        found = cuda.run("layer", 0, (*args, True))
        return [*found, *cuda.run("layer_backward", 0, backward_arguments(leaves(args)))]


@pytest.mark.parametrize("tf32", [False, True], ids=["cudnn_exact", "cudnn_tf32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_follow_the_layer_and_not_the_flag(
    host: Host, blas: Blas, flag: bool, tf32: bool, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of cuBLAS, where the two differ: values, and gradients of everything."""
    wanted = results(case)  # exact, by torch on this CPU
    monkeypatch.setattr(cuda, "uses_tf32", lambda T: tf32)
    before = blas.products()
    found = results(case)
    exact, rounded = (now - then for now, then in zip(blas.products(), before, strict=True))
    assert exact == 0 if tf32 else rounded == 0
    assert (exact + rounded > 3) == (tf32 != flag)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if tf32 else 1e-5, atol=2e-2 if tf32 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_are_torch_s(blas: Blas, flag: bool, dtype: torch.dtype) -> None:
    for tf32 in (False, True):
        assert not isinstance(gemm(torch.empty(0, dtype=dtype), tf32), CublasGemm)


def test_without_cublas(monkeypatch: pytest.MonkeyPatch, flag: bool) -> None:
    """Never less exact than torch's layer would be; more, if it must."""
    monkeypatch.setattr(cuda_gemm, "torchs_cublas", lambda: None)
    assert not isinstance(gemm(torch.empty(0), tf32=True), CublasGemm)
    if flag:
        with pytest.raises(RuntimeError, match=r"matmul allows TF32, cuDNN's flag does not"):
            gemm(torch.empty(0), tf32=False)


def test_torch_s_own_cublas_is_found_where_there_is_one() -> None:
    assert (cuda_gemm.torchs_cublas() is not None) == (torch.version.cuda is not None)


# ---- its matrices -------------------------------------------------------------------------------
def turned(t: Tensor) -> Tensor:
    """Return it as it lies by columns."""
    return t.t().contiguous().t()


def apart(t: Tensor) -> Tensor:
    """Return it with something between its rows."""
    return torch.cat((t, torch.full_like(t, torch.nan)), 1)[:, : t.shape[1]]


def scattered(t: Tensor) -> Tensor:
    """Return it with something between its elements."""
    return torch.stack((t, torch.full_like(t, torch.nan)), 2)[..., 0]


WAYS = [Tensor.contiguous, turned, apart, scattered, lambda t: turned(apart(t))]
SIZES = [(1, 1, 1), (7, 1, 33), (1, 7, 1), (33, 7, 1), (1, 33, 7), (4, 5, 6), (3, 0, 2), (0, 3, 2)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("of_a", WAYS)
@pytest.mark.parametrize("of_b", WAYS)
def test_products_of_matrices_in_every_layout(
    blas: Blas,
    sizes: tuple[int, int, int],
    of_a: Callable[[Tensor], Tensor],
    of_b: Callable[[Tensor], Tensor],
) -> None:
    M, K, N = sizes
    exact = CublasGemm(blas.cublas, tf32=False)
    a, b, bias, c = (torch.randn(size) for size in ((M, K), (K, N), (N,), (M, N)))
    product = a.double() @ b.double()
    given = bias.clone()
    out = torch.full((M + 2, N), torch.nan)

    def check(found: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)

    check(exact.linear(of_a(a), of_b(b.t().contiguous())), product)
    check(exact.linear(of_a(a), of_b(b.t().contiguous()), bias), product + bias)
    assert torch.equal(bias, given)
    exact.outer(of_a(a.t().contiguous()), of_b(b), out[1:-1])
    check(out[1:-1], product)
    assert out[[0, -1]].isnan().all()
    exact.add(out[1:-1], of_a(a), of_b(b))
    check(out[1:-1], 2 * product)
    summed = c.clone()
    exact.add(summed, of_a(a), of_b(b))
    check(summed, product + c)


def test_tf32_is_the_handle_s_mode_at_each_product(blas: Blas) -> None:
    a, b = torch.randn(9, 20), torch.randn(7, 20)
    exact, rounded = (CublasGemm(blas.cublas, tf32).linear(a, b) for tf32 in (False, True))
    modes = [handle.value for handle in blas.handles]
    assert modes == [Cublas.DEFAULT_MATH, Cublas.TF32_MATH]
    error = (rounded - exact).abs().max()
    assert 1e-5 < error < 1e-1


def test_threads_with_different_wishes(blas: Blas) -> None:
    a, b = torch.randn(9, 20), torch.randn(7, 20)
    both = [CublasGemm(blas.cublas, tf32) for tf32 in (False, True)]
    wanted = [one.linear(a, b) for one in both]

    def call(i: int) -> bool:
        return all(torch.equal(both[i % 2].linear(a, b), wanted[i % 2]) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(4)))


def test_what_cublas_says_is_an_error(blas: Blas) -> None:
    a, exact = torch.randn(3, 3), CublasGemm(blas.cublas, tf32=False)
    blas.library.cublas_host_fail(13)
    with pytest.raises(RuntimeError, match="cuBLAS: status 13"):
        exact.linear(a, a)
    blas.library.cublas_host_fail(Cublas.NO_MEMORY)
    with pytest.raises(torch.OutOfMemoryError, match="cuBLAS: no memory"):
        exact.linear(a, a)
    blas.library.cublas_host_fail(0)
    torch.testing.assert_close(exact.linear(a, a), a @ a.t())
    long = torch.empty(1, 1).expand(2**31, 1)
    with pytest.raises(
        RuntimeError, match=r"product \[2147483648,1\] · \[1,1\]: cuBLAS takes sizes"
    ):
        blas.cublas.multiply(long, torch.empty(1, 1), torch.empty(1, 1), adds=False, tf32=False)

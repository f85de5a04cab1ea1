"""One product of matrices on CUDA, in the precision that the layer around it wants.

torch multiplies, wherever its flag says what is wanted. It has one flag for the products of the
whole process and another one for cuDNN's layers, and as torch starts they differ: TF32 in layers,
exact products. Where they differ, the product is asked of cuBLAS itself: of the library that torch
has loaded, with the handle that torch keeps for this thread and device. There the precision is a
mode of the handle, which torch sets anew each time it takes one, so nothing of torch changes, and
no product of another thread.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rnnkern import cuda_precision

_MOST = 2**31 - 1  # of an int


class Gemm(ABC):
    """Products of matrices that lie in one device's memory; each queued on its current stream."""

    @abstractmethod
    def linear(self, a: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """Return a [M,K] · wᵀ [K,N] + b [N]."""

    @abstractmethod
    def add(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Add a [M,K] · b [K,N] to `out` [M,N], rounded once."""

    @abstractmethod
    def outer(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Write aᵀ [M,K] · b [K,N] to `out` [M,N]."""


class _Torch(Gemm):
    """torch's products, which follow its flags."""

    def linear(self, a: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return a @ w.t() if b is None else torch.addmm(b, a, w.t())

    def add(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        out.addmm_(a, b)

    def outer(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.mm(a.t(), b, out=out)


class Cublas:
    """The two functions of cuBLAS that a product takes.

    Parameters
    ----------
    library : ctypes.CDLL
        What has them.
    handle : callable
        Returns torch's handle, of this thread and the current device, set to the current stream.
    """

    DEFAULT_MATH, TF32_MATH = 0, 3  # of cublasMath_t
    NO_MEMORY = 3  # of cublasStatus_t: CUBLAS_STATUS_ALLOC_FAILED

    def __init__(self, library: ctypes.CDLL, handle: Callable[[], int]) -> None:
        size, pointer = ctypes.c_int, ctypes.c_void_p
        number = ctypes.POINTER(ctypes.c_float)
        matrix = (pointer, size)
        self._handle = handle
        self._set_mode = library.cublasSetMathMode
        self._set_mode.argtypes = (pointer, size)
        self._sgemm = library.cublasSgemm_v2
        self._sgemm.argtypes = (
            *(pointer, size, size, size, size, size),
            *(number, *matrix, *matrix, number, *matrix),
        )

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, *, adds: bool, tf32: bool) -> None:
        """Write a [M,K] · b [K,N], float32, to `out` [M,N], contiguous; or add it to that.

        Raises
        ------
        RuntimeError
            If a matrix has over 2³¹ - 1 rows or columns, as torch's products do, or cuBLAS fails.
        torch.OutOfMemoryError
            If cuBLAS finds no memory.
        """
        (M, K), N = a.shape, b.shape[1]
        if M == 0 or N == 0 or K == 0:
            if not adds:
                out.zero_()
            return
        if max(M, K, N) > _MOST:
            raise RuntimeError(f"product [{M},{K}] · [{K},{N}]: cuBLAS takes sizes below 2^31")
        (a, a_turned, lda), (b, b_turned, ldb) = map(_operand, (a, b))
        one, beta = ctypes.c_float(1), ctypes.c_float(1 if adds else 0)
        with torch.cuda.device_of(out):
            handle = self._handle()
            self._check(self._set_mode(handle, self.TF32_MATH if tf32 else self.DEFAULT_MATH))
            # Its matrices have columns where ours have rows: outᵀ = bᵀ·aᵀ.
            done = self._sgemm(
                *(handle, b_turned, a_turned, N, M, K),
                *(one, b.data_ptr(), ldb, a.data_ptr(), lda),
                *(beta, out.data_ptr(), N),
            )
        self._check(done)

    def _check(self, status: int) -> None:
        if status == self.NO_MEMORY:
            raise torch.OutOfMemoryError("cuBLAS: no memory (CUBLAS_STATUS_ALLOC_FAILED)")
        if status != 0:
            raise RuntimeError(f"cuBLAS: status {status}")


class CublasGemm(Gemm):
    """Products by cuBLAS itself, with or without TF32."""

    def __init__(self, cublas: Cublas, tf32: bool) -> None:
        self._cublas, self._tf32 = cublas, tf32

    def linear(self, a: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """Return a·wᵀ + b; the bias goes ahead."""
        out = a.new_empty(a.shape[0], w.shape[0])
        if b is not None:
            out.copy_(b)
        self._cublas.multiply(a, w.t(), out, adds=b is not None, tf32=self._tf32)
        return out

    def add(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Add a·b to `out`."""
        self._cublas.multiply(a, b, out, adds=True, tf32=self._tf32)

    def outer(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Write aᵀ·b to `out`."""
        self._cublas.multiply(a.t(), b, out, adds=False, tf32=self._tf32)


_TORCH = _Torch()


def gemm(data: Tensor, tf32: bool) -> Gemm:
    """Return what multiplies data like this; `tf32`: whether float32 may be multiplied so.

    Raises
    ------
    RuntimeError
        If torch's products would be less exact than wanted, and its cuBLAS cannot be found. Where
        they would be more exact, torch multiplies.
    """
    if data.dtype != torch.float32 or tf32 == cuda_precision.products_use_tf32():
        return _TORCH
    cublas = torchs_cublas()
    if cublas is not None:
        return CublasGemm(cublas, tf32)
    if tf32:
        return _TORCH
    raise RuntimeError(
        "torch.backends.cuda.matmul allows TF32, cuDNN's flag does not, and rnnkern does not find"
        " torch's cuBLAS to multiply exactly: set both alike"
    )


@lru_cache
def torchs_cublas() -> Cublas | None:
    """Return the cuBLAS that torch has loaded, or None where it cannot be found.

    It is looked for among the libraries that torch's own depends on, whatever its version.
    """
    path = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    try:
        return Cublas(ctypes.CDLL(str(path)), torch.cuda.current_blas_handle)
    except (OSError, AttributeError):
        return None


def _operand(t: Tensor) -> tuple[Tensor, int, int]:
    """Return a matrix, copied if it must be, whether it lies by columns, and the stride between."""
    for turned, lying in enumerate((t, t.t())):
        rows, width = lying.shape
        stride = width if rows == 1 else lying.stride(0)
        if (width == 1 or lying.stride(1) == 1) and width <= stride <= _MOST:
            return t, turned, stride
    return t.contiguous(), 0, t.shape[1]

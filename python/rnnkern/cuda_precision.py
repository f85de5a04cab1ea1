"""Whether float32 is multiplied in TF32 on CUDA: what torch's own layers would do.

torch's layers are cuDNN's and follow its flag, in the recurrence and around it. Our products around
the recurrence are torch's, which follow the flag of ``torch.backends.cuda.matmul``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch


def uses_tf32(T: int) -> bool:
    """Return whether the recurrence may use TF32 for float32 data.

    torch's layers are cuDNN's where there is cuDNN and it is enabled; torch's cells are products
    of their own and follow the flag of ``torch.backends.cuda.matmul``. A call of one step may be
    either, and so needs both.
    """
    cudnn = torch.backends.cudnn
    products = allows_tf32(torch.backends.cuda.matmul)
    if not (cudnn.enabled and cudnn.is_available()):
        return products
    layers = allows_tf32(cudnn.rnn) if hasattr(cudnn, "rnn") else bool(cudnn.allow_tf32)
    return layers and (products or T > 1)


def allows_tf32(settings: Any) -> bool:
    """Return whether one of torch's modules of settings allows TF32."""
    precision = getattr(settings, "fp32_precision", None)  # from torch 2.9 on
    return bool(settings.allow_tf32 if precision is None else precision == "tf32")


class _ExactProducts:
    """How many calls want torch's products exact, and how to undo it after the last of them.

    torch has one flag for the process. While a call here wants exactness, products of other threads
    are exact too; a thread that changes the flag meanwhile may find its change undone.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._calls = 0
        self._restore: Callable[[], None] | None = None

    @contextmanager
    def __call__(self, exact: bool) -> Iterator[None]:
        """Multiply exactly what is queued inside, if `exact`."""
        if not exact:
            yield
            return
        with self._lock:
            if self._restore is None and allows_tf32(torch.backends.cuda.matmul):
                self._restore = _forbid_tf32()
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if self._calls == 0 and self._restore is not None:
                    self._restore()
                    self._restore = None


exact_products = _ExactProducts()


def _forbid_tf32() -> Callable[[], None]:
    """Make torch's products exact; return what undoes it.

    torch has an old flag and, from 2.9 on, a new one beside it. It raises if asked for the old one
    when the two disagree, as its compiler may ask at any time; so the old one, where it is in use,
    sets both.
    """
    matmul: Any = torch.backends.cuda.matmul
    try:
        by_old_flag = bool(matmul.allow_tf32)
    except RuntimeError:
        by_old_flag = False
    if by_old_flag:
        return _forbid_by_old_flag(matmul)
    # Where the flag only inherits what a more general one says, it is to do so again.
    matmul.fp32_precision = "none"
    before = "none" if allows_tf32(matmul) else "tf32"
    matmul.fp32_precision = "ieee"

    def restore() -> None:
        matmul.fp32_precision = before

    return restore


def _forbid_by_old_flag(matmul: Any) -> Callable[[], None]:
    try:
        medium = torch.get_float32_matmul_precision() == "medium"  # of products on CPUs
    except RuntimeError:
        medium = False
    matmul.allow_tf32 = False

    def restore() -> None:
        matmul.allow_tf32 = True
        if medium:
            torch.set_float32_matmul_precision("medium")

    return restore

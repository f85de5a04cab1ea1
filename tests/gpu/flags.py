"""torch's flags of TF32 and of cuDNN, for a while.

Not by pytest's monkeypatch: it takes a flag that a module computes for none, and would delete it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from rnnkern import cuda


@contextmanager
def tf32(*, products: bool, layers: bool | None = None) -> Iterator[None]:
    """Set the flag of torch's products, and of cuDNN's layers unless it is None."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = bool(matmul.allow_tf32), bool(cudnn.allow_tf32)
    try:
        matmul.allow_tf32 = products
        if layers is not None:
            cudnn.allow_tf32 = layers
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
        if not before[0] and hasattr(matmul, "fp32_precision"):
            matmul.fp32_precision = "none"  # as it is at first: exact unless a general flag says so


@contextmanager
def exact() -> Iterator[None]:
    """Multiply float32 exactly on the GPU, as on the CPU; nothing still runs there afterwards."""
    with pytest.MonkeyPatch.context() as patch, tf32(products=False):
        patch.setattr(cuda, "uses_tf32", lambda T: False)
        yield
        torch.cuda.synchronize()


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Have torch's own modules run ATen's recurrent functions, as on the CPU.

    cuDNN's have no backward in eval mode and no second one, other masks of dropout and other words.
    """
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before

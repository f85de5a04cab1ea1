"""torch's flags of TF32, for a while.

Not by pytest's monkeypatch: it takes a flag that a module computes for none, and would delete it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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

"""Whether float32 is multiplied in TF32 on CUDA: what torch's own layers would do.

torch's layers are cuDNN's and follow its flag, in the recurrence and around it.
"""

from __future__ import annotations

from typing import Any

import torch


def uses_tf32(T: int) -> bool:
    """Return whether a layer may use TF32 for float32 data.

    torch's layers are cuDNN's where there is cuDNN and it is enabled; torch's cells are products
    of their own and follow the flag of ``torch.backends.cuda.matmul``. A call of one step may be
    either, and so needs both.
    """
    cudnn = torch.backends.cudnn
    products = products_use_tf32()
    if not (cudnn.enabled and cudnn.is_available()):
        return products
    layers = allows_tf32(cudnn.rnn) if hasattr(cudnn, "rnn") else bool(cudnn.allow_tf32)
    return layers and (products or T > 1)


def products_use_tf32() -> bool:
    """Return whether torch's products of float32 may use TF32."""
    return allows_tf32(torch.backends.cuda.matmul)


def allows_tf32(settings: Any) -> bool:
    """Return whether one of torch's modules of settings allows TF32."""
    precision = getattr(settings, "fp32_precision", None)  # from torch 2.9 on
    return bool(settings.allow_tf32 if precision is None else precision == "tf32")

"""The one matrix product of the package, through the faster of torch's two GEMM libraries.

``torch.mm`` is MKL's on x86, and MKL keeps AVX-512 off on CPUs that are not Intel's; it also picks its blocking
by the number of threads, so that the last bits of a result change with it. torch carries oneDNN too, which
does neither: in float32 the products go there, through the operator torch's own compiler uses for
``nn.Linear``. ``docs/performance.md`` has the numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear"]


def _has_onednn() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN = _has_onednn()


def linear(a: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Return a·wᵀ + b.

    Parameters
    ----------
    a : Tensor
        [N,K], or the transpose of a [K,N] tensor.
    w : Tensor
        [O,K], or the transpose of a [K,O] tensor.
    b : Tensor or None
        [O].

    Returns
    -------
    Tensor
        [N,O], contiguous.
    """
    if _ONEDNN and a.dtype == torch.float32 and a.numel() > 0:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            _dense(a), _dense(w), b, "none", [], ""
        )
        return product
    return torch.mm(a, w.t()) if b is None else torch.addmm(b, a, w.t())


def _dense(t: Tensor) -> Tensor:
    """Return `t` without gaps between its rows or columns: oneDNN is slow by orders of magnitude else."""
    if t.is_contiguous() or t.t().is_contiguous():
        return t
    return t.t().contiguous().t() if t.stride(0) == 1 else t.contiguous()

"""The one matrix product of the package: equal bit for bit for every number of threads, and fast.

Large float32 products go to oneDNN, through the operator torch's own compiler uses for
``nn.Linear``. What ``torch.mm`` calls on x86, MKL, keeps AVX-512 off on CPUs that are not Intel's,
and chooses its blocking by the number of threads, so that the last bits of a result change with it.
Small products, where oneDNN's call costs more than the work, and float64, which it does not have,
go to the native core. ``docs/performance.md`` has the numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnnkern._native import _cpu

__all__ = ["linear"]

# Elements of w: packing fewer costs the native product less than the call of oneDNN.
_SMALL = 1 << 15
# Length of the sums from which the order of the factors matters to oneDNN.
_DEEP = 1 << 8
# Length of a sum up to which the number of threads leaves oneDNN's results alone, in general and
# for products of fewer than eight rows.
_PIECE = 1 << 12
_PIECE_OF_FEW_ROWS = 1 << 10


def _has_onednn() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN = _has_onednn()


def linear(a: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Return a·wᵀ + b, on the CPU.

    Parameters
    ----------
    a : Tensor
        [N,K], or the transpose of a [K,N] tensor; float32 or float64.
    w : Tensor
        [O,K], or the transpose of a [K,O] tensor.
    b : Tensor or None
        [O].

    Returns
    -------
    Tensor
        [N,O], contiguous.
    """
    (N, K), O = a.shape, w.shape[0]
    if _ONEDNN and a.dtype == torch.float32 and K * O > _SMALL:
        if K > _DEEP and O < N and b is None and not a.is_contiguous():
            # A weight gradient, dxᵀ·input: oneDNN prefers the wide factor in second place.
            return _onednn(w, a, None).t().contiguous()
        return _onednn(a, w, b)
    out = a.new_empty(N, O)
    if N > 0:
        a, w = a.contiguous(), w.contiguous()
        run = _cpu.linear_float64 if a.dtype == torch.float64 else _cpu.linear_float32
        bias = 0 if b is None else b.data_ptr()
        run(torch.get_num_threads(), N, K, O, a.data_ptr(), w.data_ptr(), bias, out.data_ptr())
    return out


def _onednn(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return a·wᵀ + b, summed in pieces too short for oneDNN to divide among threads."""
    length = _PIECE if min(a.shape[0], w.shape[0]) >= 8 else _PIECE_OF_FEW_ROWS
    first, *others = zip(a.split(length, 1), w.split(length, 1), strict=True)
    total = _onednn_piece(*first, b)
    for piece in others:
        total += _onednn_piece(*piece, None)
    return total


def _onednn_piece(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(w), b, "none", [], "")
    return product


def _dense(t: Tensor) -> Tensor:
    """Return `t` without gaps between rows or columns, which make oneDNN crawl."""
    if t.is_contiguous() or t.t().is_contiguous():
        return t
    return t.t().contiguous().t() if t.stride(0) == 1 else t.contiguous()

"""The CPU's dense products around the recurrence, equal bit for bit for every number of threads.

Large float32 products go to oneDNN, through the operator torch's own compiler uses for
``nn.Linear``. What ``torch.mm`` calls on x86, MKL, keeps AVX-512 off on CPUs that are not Intel's,
and chooses its blocking by the number of threads, so that the last bits of a result change with it.
Small products, where oneDNN's call costs more than the work, float64, which it does not have, and
those of a forked child, where oneDNN would wait for threads that stayed in the parent, go to the
native core. ``docs/performance.md`` has the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnnkern._native import _cpu

__all__ = ["linear", "outer"]

# Elements of w: packing fewer costs the native product less than the call of oneDNN.
_SMALL = 1 << 15
# Length of a sum up to which the number of threads leaves oneDNN's results alone, in general and
# for products of fewer than eight rows.
_PIECE = 1 << 12
_PIECE_OF_FEW_ROWS = 1 << 10
# Rows that an outer product sums in one go: 64 of its blocks. Longer sums are made of such pieces,
# so that rounding errors do not grow with the number of all blocks.
_ROWS = 1 << 14


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
    large = a.dtype == torch.float32 and K * O > _SMALL
    if _ONEDNN and large and not _cpu.in_forked_child():
        return _onednn(a, w, b)
    out = a.new_empty(N, O)
    if N > 0:
        a, w = a.contiguous(), w.contiguous()
        run = _cpu.linear_float64 if a.dtype == torch.float64 else _cpu.linear_float32
        bias = 0 if b is None else b.data_ptr()
        run(torch.get_num_threads(), N, K, O, a.data_ptr(), w.data_ptr(), bias, out.data_ptr())
    return out


def outer(a: Tensor, factors: Sequence[tuple[Tensor, Tensor]], sum: Tensor | None = None) -> None:
    """Write aᵀ·b, the sum of the outer products of their rows, for up to two factors b, on the CPU.

    Parameters
    ----------
    a : Tensor
        [N,O], dense within a row; float32 or float64.
    factors : sequence of (Tensor, Tensor)
        b [N,I], dense within a row, and the output [O,I], contiguous.
    sum : Tensor or None
        [O], set to the sum of a's rows.
    """
    N = a.shape[0]
    if N <= _ROWS:
        return _outer_piece(a, factors, sum)
    totals = [*(out for _, out in factors), *([] if sum is None else [sum])]
    for row in range(0, N, _ROWS):
        rows = slice(row, row + _ROWS)
        values = totals if row == 0 else [torch.empty_like(t) for t in totals]
        outs = values[: len(factors)]
        pairs = [(b[rows], out) for (b, _), out in zip(factors, outs, strict=True)]
        _outer_piece(a[rows], pairs, None if sum is None else values[-1])
        if row > 0:
            for total, value in zip(totals, values, strict=True):
                total += value
    return None


def _outer_piece(
    a: Tensor, factors: Sequence[tuple[Tensor, Tensor]], sum: Tensor | None = None
) -> None:
    N, O = a.shape
    if N == 0:
        for t in (*(out for _, out in factors), sum):
            if t is not None:
                t.zero_()
    elif O > 0:
        run = _cpu.outer_float64 if a.dtype == torch.float64 else _cpu.outer_float32
        addresses = tuple(
            (b.shape[1], b.data_ptr(), b.stride(0), out.data_ptr()) for b, out in factors
        )
        total = 0 if sum is None else sum.data_ptr()
        run(torch.get_num_threads(), N, O, a.data_ptr(), a.stride(0), total, addresses)


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

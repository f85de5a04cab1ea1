"""The one table of tolerances: how far two correct implementations may lie apart, by dtype."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["output", "gradient"]

# A limit is a number of machine epsilons, relative to the largest expected entry (at least 1):
#     max |actual - expected| <= limit * eps(dtype) * max(1, max |expected|)
# The norm, not each entry, sets the scale, because sums of products cancel.
#
# float32, float64: two orders of summing a dot product of K terms differ by about sqrt(K) eps; the
#   tests have K <= 100, so 10 eps before the gate functions (4 ULP each), which contract, and a
#   recurrence that carries the error on: 32 eps. A gradient sums over all steps and rows such
#   products, through as many layers again: 4 times the output's limit.
# float16, bfloat16: torch rounds every intermediate (pre-activation, gate, state) to 16 bits, half
#   an epsilon each, some 8 roundings a step of which the last few count; a kernel that keeps some
#   or all of them in float32 differs from it by up to that: 4 eps, and 4 times that for a gradient.
LIMITS: dict[torch.dtype, dict[Kind, float]] = {
    torch.float64: {"output": 32, "gradient": 128},
    torch.float32: {"output": 32, "gradient": 128},
    torch.float16: {"output": 4, "gradient": 16},
    torch.bfloat16: {"output": 4, "gradient": 16},
}


def tolerance(dtype: torch.dtype, kind: Kind) -> float:
    """Largest admissible error of a quantity of size at most 1; complex counts as its real part."""
    real = torch.empty((), dtype=dtype).real.dtype if dtype.is_complex else dtype
    return LIMITS[real][kind] * torch.finfo(real).eps


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    kind: Kind,
    dtype: torch.dtype | None = None,
    name: str = "tensor",
) -> None:
    """Fail unless `actual` equals `expected` within the table; NaN and Inf must sit alike.

    Parameters
    ----------
    kind : which column of the table.
    dtype : the row, where the tensors' own dtype says nothing about the accuracy of the
        computation (float32 results of an autocast region). Default: `expected.dtype`.
    name : what to call the tensor in the message.
    """
    assert actual.shape == expected.shape, f"{name}: {actual.shape} for {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} for {expected.dtype}"
    if expected.numel() == 0:
        return
    wide = torch.complex128 if expected.dtype.is_complex else torch.float64
    a, e = actual.detach().to(wide), expected.detach().to(wide)
    finite = torch.isfinite(e)
    scale = max(1.0, e[finite].abs().max().item()) if finite.any() else 1.0
    limit = tolerance(dtype or expected.dtype, kind) * scale
    torch.testing.assert_close(
        a, e, rtol=0.0, atol=limit, equal_nan=True, msg=lambda m: f"{name} ({kind}): {m}"
    )

"""Modules of relu with which no rounding moves a pre-activation over its kink, in any layer.

Rounded to 16 bits a pre-activation near 0 may lie on the other side, and then a gradient is there
or is not. Biases of random sign and size 3.75 to 4.25 keep all away from it: with row sums of |W|
of 1/8 and of |U| of 1/4, |h| <= (4.25 + |x| / 8) / (3 / 4), and below 7 for |x| < 7, as in a layer
above this one too; so |W·x + U·h| < 3. (`cases.clear_of_kink` does so for one layer.)
"""

from __future__ import annotations

from typing import Any

import torch
from pairs import pair
from torch import Tensor, nn


def smooth_pair(name: str, *args: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Return torch's module and ours as `pair` does; those of relu, with biases, such ones."""
    theirs, ours = pair(name, *args, **options)
    if options.get("nonlinearity") == "relu":
        with torch.no_grad():
            for key, w in theirs.named_parameters():
                w.copy_(_change(key, w.detach()))
        ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _change(name: str, w: Tensor) -> Tensor:
    """Return a weight of the name's kind, rounded to its type toward 0."""
    if "ih" in name and w.dim() == 1:
        signs = torch.where(torch.rand(w.shape) < 0.5, -1.0, 1.0)
        return (signs * (3.8 + 0.4 * torch.rand(w.shape))).to(w)
    if w.dim() == 1:
        return torch.zeros_like(w)
    limit = 0.12 if "ih" in name else 0.24
    wide = w.double()
    return (wide * (limit / wide.abs().sum(1).max())).to(w.dtype)

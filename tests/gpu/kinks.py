"""Weights with which no rounding moves a pre-activation of relu over its kink.

Rounded to 16 bits a pre-activation near 0 may lie on the other side, and then a gradient is there
or is not. Biases of random sign and size 3.75 to 4.25 keep all away from it: with row sums of |W|
of 1/8 and of |U| of 1/4, |h| <= (4.25 + |x| / 8) / (3 / 4), and below 7 for |x| < 7, as in a layer
above this one too; so |W·x + U·h| < 3.
"""

from __future__ import annotations

import torch
from rnnkern.arguments import LayerInputs
from torch import Tensor, nn


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


def smooth_layer(args: LayerInputs) -> LayerInputs:
    """Return the arguments of a layer with biases, with such weights."""
    names = [name for name in args._fields if name.startswith(("w_", "b_"))]
    present = {name: getattr(args, name) for name in names}
    return args._replace(**{k: _change(k, w) for k, w in present.items() if w is not None})


def smooth_module(module: nn.Module) -> None:
    """Give a module of relu with biases such weights."""
    with torch.no_grad():
        for name, w in module.named_parameters():
            w.copy_(_change(name, w.detach()))

"""The products around the recurrence on CUDA, each one over all rows of data."""

from __future__ import annotations

import torch
from torch import Tensor

from rnnkern.arguments import LayerInputs, Sizes
from rnnkern.cuda_gemm import Gemm
from rnnkern.kernels import Backward


def project(gemm: Gemm, a: LayerInputs, s: Sizes) -> Tensor:
    """Return x [N,D·G·H] = input·w_ihᵀ + b_ih of all directions."""
    w, b = _joined(a)
    return gemm.linear(a.input.view(s.N, s.I), w, b)


def differentiate(gemm: Gemm, run: Backward) -> None:
    """Run the recurrence, then multiply its dx, dr and dh into the gradients."""
    a, cell, s, wanted, out = run.a, run.cell, run.s, run.wanted, run.out
    run.add_states(every=True)
    new = a.input.new_zeros if run.steps.ragged else a.input.new_empty
    dx = new(s.D, s.N, s.G * s.H)
    recurrent = any(on for name, on in wanted.items() if name.startswith(("w_h", "b_hh")))
    projects = a.w_hr is not None
    needs_extra = recurrent and cell.extra != "none" and (cell.extra != "output" or projects)
    extra = new(s.D, s.N, s.H) if needs_extra else None
    dh = new(s.D, s.N, s.P) if projects else None
    run.recurrence(
        None,
        [
            (None,) * 6 + tuple(None if t is None else t[d] for t in (dx, extra, dh))
            for d in range(s.D)
        ],
    )
    if wanted["input"]:
        dinput = gemm.linear(dx[0], a.w_ih.t())
        if s.D == 2:
            gemm.add(dinput, dx[1], a.directions[1][0])
        out["input"] = dinput.view_as(a.input)
    input = run.input_without_padding().view(s.N, s.I)
    for d in range(s.D):
        own = (None if t is None else t[d] for t in (extra, dh))
        _add_weights(gemm, run, d, input, dx[d], *own)


def _add_weights(
    gemm: Gemm,
    run: Backward,
    d: int,
    input: Tensor,
    dx: Tensor,
    extra: Tensor | None,
    dh: Tensor | None,
) -> None:
    """Add the gradients of direction `d`'s weights to ``run.out``."""
    cell, s, wanted, out = run.cell, run.s, run.wanted, run.out
    suffix = "_reverse" if d else ""
    h_prev, gates = run.g.h_prev[d], s.G * s.H
    if wanted["w_ih" + suffix]:
        out["w_ih" + suffix] = dw = dx.new_empty(gates, s.I)
        gemm.outer(dx, input, dw)
    if wanted["w_hh" + suffix]:
        out["w_hh" + suffix] = dr = dx.new_empty(gates, s.P)
        if cell.extra == "recurrent_gradient" and extra is not None:
            last = gates - s.H  # the last gate has a gradient of its own
            gemm.outer(dx[:, :last], h_prev, dr[:last])
            gemm.outer(extra, h_prev, dr[last:])
        elif cell.extra == "operand" and extra is not None:
            last = cell.last_phase * s.H  # the last phase has an operand of its own
            gemm.outer(dx[:, :last], h_prev, dr[:last])
            gemm.outer(dx[:, last:], extra, dr[last:])
        else:
            gemm.outer(dx, h_prev, dr)
    biases = wanted["b_ih" + suffix] or wanted["b_hh" + suffix]
    if biases:
        out["b_ih" + suffix] = db = dx.sum(0)
        if cell.extra == "recurrent_gradient" and extra is not None:
            out["b_hh" + suffix] = torch.cat((db[: gates - s.H], extra.sum(0)))
        else:
            out["b_hh" + suffix] = db.clone()
    if wanted["w_hr" + suffix] and dh is not None and extra is not None:
        out["w_hr" + suffix] = dw_hr = dx.new_empty(s.P, s.H)
        gemm.outer(dh, extra, dw_hr)


def _joined(a: LayerInputs) -> tuple[Tensor, Tensor | None]:
    """Return w_ih [D·G·H,I] and b_ih of all directions, joined for one GEMM."""
    if len(a.directions) == 1:
        return a.w_ih, a.b_ih
    (w, _, b, _, _), (w_reverse, _, b_reverse, _, _) = a.directions
    if b is None and b_reverse is None:
        return torch.cat((w, w_reverse)), None
    b = w.new_zeros(w.shape[0]) if b is None else b
    b_reverse = w.new_zeros(w.shape[0]) if b_reverse is None else b_reverse
    return torch.cat((w, w_reverse)), torch.cat((b, b_reverse))

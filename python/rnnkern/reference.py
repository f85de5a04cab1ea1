"""The reference: every cell and every sequence feature in plain torch operations.

It defines what the kernels must compute. It also runs where no kernel does (other devices and
dtypes), and it is what the kernels' double backward differentiates.

A cell is a function of the input's pre-activation ``x = W·input + b_ih`` [B,G·H], the states (h
[B,P], and c [B,H]), the recurrent weights ``R`` [G·H,P] and bias ``b`` [G·H] or None; it returns
the new states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

States = tuple[Tensor, ...]
CellFunction = Callable[[Tensor, States, Tensor, "Tensor | None"], States]

REFERENCES: dict[str, CellFunction] = {}


def _reference(name: str) -> Callable[[CellFunction], CellFunction]:
    def register(function: CellFunction) -> CellFunction:
        REFERENCES[name] = function
        return function

    return register


@_reference("rnn_tanh")
def elman_tanh(x: Tensor, states: States, R: Tensor, b: Tensor | None) -> States:
    """Elman (1990) with tanh."""
    return ((x + linear(states[0], R, b)).tanh(),)


@_reference("rnn_relu")
def elman_relu(x: Tensor, states: States, R: Tensor, b: Tensor | None) -> States:
    """Elman (1990) with relu."""
    return ((x + linear(states[0], R, b)).relu(),)


@_reference("lstm")
def lstm(x: Tensor, states: States, R: Tensor, b: Tensor | None) -> States:
    """Hochreiter & Schmidhuber (1997), with the forget gate of Gers et al. (2000)."""
    h, c = states
    i, f, g, o = (x + linear(h, R, b)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@_reference("gru")
def gru(x: Tensor, states: States, R: Tensor, b: Tensor | None) -> States:
    """GRU with the reset gate after the product, as in torch and cuDNN."""
    (h,) = states
    x_r, x_z, x_n = x.chunk(3, -1)
    r_r, r_z, r_n = linear(h, R, b).chunk(3, -1)
    r, z = (x_r + r_r).sigmoid(), (x_z + r_z).sigmoid()
    n = (x_n + r * r_n).tanh()
    return (n + z * (h - n),)


@_reference("gru_reset_before")
def gru_reset_before(x: Tensor, states: States, R: Tensor, b: Tensor | None) -> States:
    """Cho et al. (2014), eq. 5-8: the reset gate acts on h before the product."""
    (h,) = states
    H = h.shape[-1]
    b_rz, b_n = (None, None) if b is None else (b[: 2 * H], b[2 * H :])
    r, z = (x[..., : 2 * H] + linear(h, R[: 2 * H], b_rz)).sigmoid().chunk(2, -1)
    n = (x[..., 2 * H :] + linear(r * h, R[2 * H :], b_n)).tanh()
    return (n + z * (h - n),)


def scan(
    cell: CellFunction,
    x: Tensor,
    initial: States,
    R: Tensor,
    b: Tensor | None,
    w_hr: Tensor | None,
    *,
    reverse: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset: States | None,
) -> tuple[Tensor, States]:
    """Run one direction over padded, time-major data.

    Parameters
    ----------
    x : Tensor
        [T,B,G·H].
    initial, reset : tuple of Tensor
        States [B,P] (and [B,H]) before the first step, and before a reset step (None: zero).
    lengths : Tensor or None
        [B]; a step beyond a row's length gives 0 and leaves its state.
    resets : Tensor or None
        bool [T,B]; step t starts a new segment.

    Returns
    -------
    tuple
        The outputs [T,B,P] and the final states.
    """
    T = x.shape[0]
    states = initial
    outputs: list[Tensor] = [x] * T
    if resets is not None and reset is None:
        reset = tuple(torch.zeros_like(s) for s in initial)
    for t in range(T - 1, -1, -1) if reverse else range(T):
        active = None if lengths is None else (t < lengths).unsqueeze(-1)
        before, x_t = states, x[t]
        if active is not None:
            x_t = torch.where(active, x_t, 0)  # so that what stands in the padding cannot matter
        boundary = t + 1 if reverse else t
        if resets is not None and reset is not None and boundary < T:
            cut = resets[boundary].unsqueeze(-1)
            if lengths is not None:
                cut = cut & (boundary < lengths).unsqueeze(-1)
            before = tuple(torch.where(cut, r, s) for r, s in zip(reset, states, strict=True))
        after = cell(x_t, before, R, b)
        if w_hr is not None:
            after = (linear(after[0], w_hr), *after[1:])
        if active is None:
            states, outputs[t] = after, after[0]
        else:
            states = tuple(torch.where(active, a, s) for a, s in zip(after, states, strict=True))
            outputs[t] = torch.where(active, after[0], 0)
    return torch.stack(outputs), states


def unpack(data: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn packed rows [N,...] into padded ones [T,B,...].

    Returns
    -------
    tuple
        The padded tensor, the lengths [B], and the index [N] of each packed row in [T·B].
    """
    T, B = batch_sizes.numel(), int(batch_sizes[0])
    columns = torch.arange(B, device=batch_sizes.device)
    valid = columns < batch_sizes.unsqueeze(1)
    index = valid.flatten().nonzero().squeeze(1).to(data.device)
    padded = data.new_zeros(T * B, *data.shape[1:]).index_copy(0, index, data)
    return padded.view(T, B, *data.shape[1:]), valid.sum(0).to(data.device), index


def layer(
    cell: str,
    input: Tensor,
    initial: States,
    directions: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]],
    *,
    batch_sizes: Tensor | None = None,
    order: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset: States | None = None,
    batch_first: bool = False,
) -> tuple[Tensor, States]:
    """Run one layer, differentiably; arguments and results are those of ``rnnkern::layer``.

    Parameters
    ----------
    input : Tensor
        [T,B,I]; [B,T,I] with `batch_first`; [N,I] with `batch_sizes`.
    initial, reset : tuple of Tensor
        [D,B,P] (and [D,B,H]).
    directions : list
        Of (w_ih, w_hh, b_ih, b_hh, w_hr), one entry a direction.
    batch_sizes, order : Tensor or None
        Of a packed sequence: active rows per step, and the batch row at each sorted position.
    lengths : Tensor or None
        [B].
    resets : Tensor or None
        bool [T,B]; [B,T] with `batch_first`.

    Returns
    -------
    tuple
        The output, [T,B,D·P] or [N,D·P], and the final states, like `initial`.
    """
    function = REFERENCES[cell]
    resets, order = (None if t is None else t.to(input.device) for t in (resets, order))
    if batch_first:
        input = input.transpose(0, 1)
        resets = None if resets is None else resets.transpose(0, 1)
    index = None
    if batch_sizes is not None:
        input, lengths, index = unpack(input, batch_sizes)
        if order is not None:
            initial = tuple(s[:, order] for s in initial)
            resets = None if resets is None else resets[:, order]
            reset = None if reset is None else tuple(s[:, order] for s in reset)
    if lengths is not None:
        lengths = lengths.to(input.device)
        padding = torch.arange(input.shape[0], device=input.device).unsqueeze(1) >= lengths
        input = input.masked_fill(padding.unsqueeze(-1), 0)
    outputs, finals = [], []
    for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(directions):
        y, final = scan(
            function,
            linear(input, w_ih, b_ih),
            tuple(s[d] for s in initial),
            w_hh,
            b_hh,
            w_hr,
            reverse=d == 1,
            lengths=lengths,
            resets=resets,
            reset=None if reset is None else tuple(s[d] for s in reset),
        )
        outputs.append(y)
        finals.append(final)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    states = tuple(torch.stack(s) for s in zip(*finals, strict=True))
    if index is not None:
        y = y.flatten(0, 1).index_select(0, index)
        if order is not None:
            back = torch.empty_like(order).scatter_(
                0, order, torch.arange(order.numel(), device=order.device)
            )
            states = tuple(s[:, back] for s in states)
    return y, states

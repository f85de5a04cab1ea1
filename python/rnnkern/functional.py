"""The functional form: recurrent layers as functions of input, weights and state.

Weights come as one flat sequence in the order of ``torch.nn``'s ``_flat_weights``: layer by layer,
in a layer direction by direction, and for each (w_ih [G·H,I], w_hh [G·H,P], b_ih [G·H], b_hh [G·H],
w_hr [P,H]), without the biases if `bias` is False and without w_hr if there is no projection. I is
D·P from the second layer on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnkern import layers
from rnnkern.cells import get_cell
from rnnkern.layers import States, Structure

__all__ = ["gru", "lstm", "recurrent", "rnn"]

Data = TypeVar("Data", Tensor, PackedSequence)


def recurrent(
    cell: str,
    input: Data,
    weights: Sequence[Tensor],
    states: States | None = None,
    *,
    num_layers: int = 1,
    bias: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_states: States | None = None,
) -> tuple[Data, States]:
    """Run any registered cell.

    Parameters
    ----------
    cell : str
        A name from ``rnnkern.cells.CELLS``.
    input : Tensor or PackedSequence
        [T,B,I], [B,T,I] with `batch_first`, unbatched [T,I], or packed.
    weights : sequence of Tensor
        See the module's text.
    states, reset_states : tuple of Tensor, optional
        Initial states, and states before a reset step: h [L·D,B,P] and, if the cell has one, c
        [L·D,B,H]; without the batch dimension for unbatched input. Zero if left out.
    dropout : float
        Probability of zeroing an output between layers, when `training`.
    lengths : Tensor, optional
        Integers [B] in [0, T]; steps beyond give 0 and leave the state.
    resets : Tensor, optional
        bool [T,B] ([B,T] with `batch_first`, [T] unbatched): step t starts a new segment.

    Returns
    -------
    output : Tensor or PackedSequence
        As the input, with D·P features.
    states : tuple of Tensor
        The final states, of the initial states' form.

    Raises
    ------
    ValueError
        If the cell is unknown, the weights do not form a stack, or a tensor does not fit; the
        message names the argument, what was expected and what came.
    """
    structure = _structure(cell, weights, num_layers, bias, bidirectional, batch_first, dropout)
    packed = isinstance(input, PackedSequence)
    if not packed and not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor or a PackedSequence, got {type(input).__name__}")
    data = input.data if isinstance(input, PackedSequence) else input
    if data.dim() not in ((2,) if packed else (2, 3)):
        raise ValueError(f"input: expected 2 or 3 dimensions, got {data.dim()}")
    _check_weights(structure, weights, data)
    unbatched = not packed and data.dim() == 2
    if isinstance(input, PackedSequence):
        B = int(input.batch_sizes[0])
    else:
        B = 1 if unbatched else data.shape[0 if batch_first else 1]
    if states is not None:
        shapes = layers.state_shapes(structure, weights, B, unbatched)
        layers.check_states("states", _tensors("states", states), shapes)
        for state in states:
            if state.dtype != data.dtype and not layers.autocasts(data):
                raise ValueError(f"states: expected {data.dtype}, got {state.dtype}")
    if reset_states is not None:
        _tensors("reset_states", reset_states)
    return layers.run(  # type: ignore[return-value]
        structure,
        input,
        states,
        weights,
        dropout=dropout,
        training=training,
        lengths=lengths,
        resets=resets,
        reset_states=reset_states,
    )


def _tensors(name: str, values: Sequence[Tensor]) -> States:
    for i, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(value).__name__}")
    return tuple(values)


def _structure(
    cell: str,
    weights: Sequence[Tensor],
    num_layers: int,
    bias: bool,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
) -> Structure:
    info = get_cell(cell)
    if not isinstance(num_layers, int):
        raise TypeError(f"num_layers: expected an integer, got {type(num_layers).__name__}")
    if num_layers < 1:
        raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
    if not isinstance(dropout, int | float):
        raise TypeError(f"dropout: expected a number, got {type(dropout).__name__}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")
    directions = num_layers * (2 if bidirectional else 1)
    plain = 2 + 2 * bias
    counts = (
        (directions * plain, directions * (plain + 1)) if info.projects else (directions * plain,)
    )
    if len(weights) not in counts:
        raise ValueError(
            f"weights: expected {' or '.join(map(str, counts))} tensors for {num_layers} layer(s),"
            f" bias={bias}, bidirectional={bidirectional}, got {len(weights)}"
        )
    projection = len(weights) != directions * plain
    return Structure(info, num_layers, bias, bidirectional, projection, batch_first)


def _check_weights(structure: Structure, weights: Sequence[Tensor], data: Tensor) -> None:
    """Check all weights against what the first w_hh (and w_hr) and the input imply."""
    _tensors("weights", weights)
    count, D = structure.weights_per_direction, structure.directions
    w_hh, last = weights[1], weights[count - 1]
    G = structure.cell.gates
    if w_hh.dim() != 2 or w_hh.shape[0] % G != 0 or w_hh.shape[0] == 0:
        raise ValueError(
            f"weights[1]: expected w_hh, {G} gates by hidden units, got {list(w_hh.shape)}"
        )
    H = w_hh.shape[0] // G
    P = last.shape[0] if structure.projection and last.dim() == 2 else H
    names = ["w_ih", "w_hh", *(["b_ih", "b_hh"] if structure.bias else []), "w_hr"]
    for i, w in enumerate(weights):
        below = data.shape[-1] if i < D * count else D * P
        name = names[i % count]
        expected = {"w_ih": [G * H, below], "w_hh": [G * H, P], "w_hr": [P, H]}.get(name, [G * H])
        if list(w.shape) != expected:
            raise ValueError(
                f"weights[{i}] ({name}): expected shape {expected}, got {list(w.shape)}"
            )
        if w.dtype != data.dtype and not layers.autocasts(data):
            raise ValueError(f"weights[{i}] ({name}): expected {data.dtype}, got {w.dtype}")


def lstm(
    input: Data,
    weights: Sequence[Tensor],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    num_layers: int = 1,
    bias: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Data, tuple[Tensor, Tensor]]:
    """Run an LSTM.

    Hochreiter & Schmidhuber (1997), with the forget gate of Gers et al. (2000) and, where the
    weights have w_hr, the projection of Sak et al. (2014).

    Parameters and errors are those of :func:`recurrent`; `hx` and `reset_state` are (h, c).

    Returns
    -------
    output : Tensor or PackedSequence
        As the input, with D·P features.
    (h, c) : tuple of Tensor
        [L·D,B,P] and [L·D,B,H].
    """
    y, (h, c) = recurrent(
        "lstm",
        input,
        weights,
        hx,
        num_layers=num_layers,
        bias=bias,
        bidirectional=bidirectional,
        batch_first=batch_first,
        dropout=dropout,
        training=training,
        lengths=lengths,
        resets=resets,
        reset_states=reset_state,
    )
    return y, (h, c)


def gru(
    input: Data,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    reset_after: bool = True,
    num_layers: int = 1,
    bias: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
) -> tuple[Data, Tensor]:
    """Run a GRU.

    The reset gate acts after the recurrent product, as in torch, or with `reset_after` False
    before it, as in Cho et al. (2014), eq. 5-8.

    Parameters and errors are those of :func:`recurrent`; `hx` and `reset_state` are h.

    Returns
    -------
    output : Tensor or PackedSequence
        As the input, with D·H features.
    h : Tensor
        [L·D,B,H].
    """
    y, (h,) = recurrent(
        "gru" if reset_after else "gru_reset_before",
        input,
        weights,
        None if hx is None else (hx,),
        num_layers=num_layers,
        bias=bias,
        bidirectional=bidirectional,
        batch_first=batch_first,
        dropout=dropout,
        training=training,
        lengths=lengths,
        resets=resets,
        reset_states=None if reset_state is None else (reset_state,),
    )
    return y, h


def rnn(
    input: Data,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bias: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
) -> tuple[Data, Tensor]:
    """Run an Elman RNN (1990) with tanh or relu.

    Parameters and errors are those of :func:`recurrent`; `hx` and `reset_state` are h.

    Returns
    -------
    output : Tensor or PackedSequence
        As the input, with D·H features.
    h : Tensor
        [L·D,B,H].
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    y, (h,) = recurrent(
        f"rnn_{nonlinearity}",
        input,
        weights,
        None if hx is None else (hx,),
        num_layers=num_layers,
        bias=bias,
        bidirectional=bidirectional,
        batch_first=batch_first,
        dropout=dropout,
        training=training,
        lengths=lengths,
        resets=resets,
        reset_states=None if reset_state is None else (reset_state,),
    )
    return y, h

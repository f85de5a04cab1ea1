"""Drop-in replacements for ``torch.nn``'s recurrent modules.

Constructors, parameters, state_dict, checks and their messages are torch's own (the classes derive
from ``nn.RNNBase`` and ``nn.RNNCellBase``); forward runs rnnkern's fused kernels, and takes three
keyword arguments more: `lengths`, `resets` and `reset_state`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkern import cpu, eager, layers
from rnnkern.cells import get_cell
from rnnkern.layers import States, Structure

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


class _Recurrent(nn.RNNBase):
    """What LSTM, GRU and RNN share: torch's argument checks around :func:`rnnkern.layers.run`."""

    _pairs_states = False  # whether a state is a pair, h and c

    def _structure(self) -> Structure:
        return Structure(
            get_cell(self._cell_name()),
            self.num_layers,
            self.bias,
            self.bidirectional,
            self.proj_size > 0,
            self.batch_first,
        )

    def _cell_name(self) -> str:
        return self.mode.lower()

    def _current_weights(self) -> list[Tensor]:
        """Return the weights as they are now: assigned, tied, parametrized or swapped."""
        if torch.compiler.is_compiling():
            return [getattr(self, name) for name in self._flat_weights_names]
        self._update_flat_weights()
        return self._flat_weights  # type: ignore[return-value]

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Any = None,
    ) -> tuple[Any, Any]:
        """Run the layers over a batch of sequences.

        Parameters
        ----------
        input : Tensor or PackedSequence
            [T,B,I], [B,T,I] with `batch_first`, or unbatched [T,I].
        hx : Tensor or tuple of Tensor, optional
            Initial state as in torch; zero if left out.
        lengths : Tensor, optional
            Integers [B] in [0, T], in any order and on any device. A step beyond a row's length
            gives y = 0 and leaves the row's state, so the final state is that of its last step.
            Not with a PackedSequence.
        resets : Tensor, optional
            bool [T,B] ([B,T] with `batch_first`, [T] unbatched): step t starts a new segment. No
            information crosses its start in either direction. Backward reads it again: do not
            change it in place before.
        reset_state : Tensor or tuple of Tensor, optional
            The state before a reset step, of hx's form, differentiable; zero if left out.

        Returns
        -------
        output : Tensor or PackedSequence
            As the input, with D·P features, in torch's memory layout.
        hidden : Tensor or tuple of Tensor
            The final state, of hx's form.

        Raises
        ------
        ValueError, RuntimeError
            As torch's module does, and for lengths, resets or reset_state that do not fit.
        """
        if lengths is None and resets is None and reset_state is None:
            result = self._forward_eagerly(input, hx)
            if result is not None:
                return result
        weights = self._current_weights()
        batch_sizes = input.batch_sizes if isinstance(input, PackedSequence) else None
        states = None if hx is None else self._as_states(hx)
        self._check(input, states, batch_sizes)
        y, finals = layers.run(
            self._structure(),
            input,
            states,
            weights,
            dropout=self.dropout,
            training=self.training,
            lengths=lengths,
            resets=resets,
            reset_states=None if reset_state is None else self._as_reset_states(reset_state),
        )
        return y, self._as_hidden(finals)

    def _forward_eagerly(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, Any] | None:
        """Return the result the short way, or None if this call cannot go it."""
        if (
            type(input) is not Tensor
            or torch.compiler.is_compiling()
            or (self.training and self.dropout > 0)
        ):
            return None
        stack = cpu.stack(
            self._cell_name(),
            self.input_size,
            self.hidden_size,
            self.proj_size,
            self.num_layers,
            self.bidirectional,
            self.bias,
            self.batch_first,
        )
        found: Any = self._parameters
        try:
            weights = [found[name] for name in self._flat_weights_names]
        except KeyError:  # computed from others, by a parametrization
            return None
        states = hx if hx is None or self._pairs_states else (hx,)
        results = eager.run(stack, input, states, weights)
        if results is None:
            return None
        y, finals = results[0], self._as_hidden(results[1:])
        return y.transpose(0, 1) if self.batch_first else y, finals

    def _as_states(self, hx: Any) -> States:
        return (hx,)

    def _as_reset_states(self, reset_state: Any) -> States:
        count = get_cell(self._cell_name()).states
        states = (reset_state,) if count == 1 else reset_state
        if not isinstance(states, tuple | list) or not all(isinstance(s, Tensor) for s in states):
            form = "a tensor" if count == 1 else "a pair of tensors"
            raise TypeError(f"reset_state: expected {form}, got {type(reset_state).__name__}")
        return tuple(states)

    def _as_hidden(self, states: States) -> Any:
        return states[0]

    def _check(
        self, input: Tensor | PackedSequence, states: States | None, batch_sizes: Tensor | None
    ) -> None:
        """Raise what torch's module raises, with the same words."""
        data = input.data if isinstance(input, PackedSequence) else input
        if batch_sizes is None:
            if data.dim() not in (2, 3):
                raise ValueError(self._message_input_rank(data))
            if states is not None:
                self._check_state_rank(data, states)
            if data.dim() == 2:
                data = data.unsqueeze(0 if self.batch_first else 1)
                states = None if states is None else tuple(s.unsqueeze(1) for s in states)
        if states is None:
            self.check_input(data, batch_sizes)
        else:
            self.check_forward_args(data, self._as_hidden(states), batch_sizes)
        if batch_sizes is None and data.size(1 if self.batch_first else 0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    def _message_input_rank(self, data: Tensor) -> str:
        name = type(self).__name__
        return f"{name}: Expected input to be 2D or 3D, got {data.dim()}D instead"

    def _check_state_rank(self, data: Tensor, states: States) -> None:
        if states[0].dim() != data.dim():
            form = "unbatched 2-D" if data.dim() == 2 else "batched 3-D"
            raise RuntimeError(
                f"For {form} input, hx should also be {data.dim()}-D"
                f" but got {states[0].dim()}-D tensor"
            )


class LSTM(_Recurrent):
    """Long short-term memory: a drop-in for :class:`torch.nn.LSTM`.

    The cell is Hochreiter & Schmidhuber's (1997) with the forget gate of Gers et al. (2000);
    `proj_size` is the projection of Sak et al. (2014). The constructor is ``torch.nn.LSTM``'s.

    Forward takes `lengths`, `resets` and `reset_state` besides; see there.
    """

    _pairs_states = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def _as_states(self, hx: Any) -> States:
        if isinstance(hx, tuple | list) and len(hx) > 2:
            raise RuntimeError("lstm expects two hidden states")
        return (hx[0], hx[1])

    def _as_hidden(self, states: States) -> Any:
        return states

    def _check_state_rank(self, data: Tensor, states: States) -> None:
        h, c = states
        if h.dim() != data.dim() or c.dim() != data.dim():
            form = "unbatched 2-D" if data.dim() == 2 else "batched 3-D"
            raise RuntimeError(
                f"For {form} input, hx and cx should also be {data.dim()}-D"
                f" but got ({h.dim()}-D, {c.dim()}-D) tensors"
            )


class GRU(_Recurrent):
    """Gated recurrent unit: a drop-in for :class:`torch.nn.GRU`.

    The constructor is ``torch.nn.GRU``'s and one keyword more:

    reset_after : bool
        True (default): the reset gate acts after the recurrent product, as in torch and cuDNN.
        False: it acts on the state before the product, as in Cho et al. (2014), eq. 5-8.

    Forward takes `lengths`, `resets` and `reset_state` besides; see there.
    """

    def __init__(self, *args: Any, reset_after: bool = True, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if not isinstance(reset_after, bool):
            raise TypeError(
                f"reset_after should be of type bool, got: {type(reset_after).__name__}"
            )
        super().__init__("GRU", *args, **kwargs)
        self.reset_after = reset_after

    def __setstate__(self, d: dict[str, Any]) -> None:
        super().__setstate__(d)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("reset_after", True)

    def extra_repr(self) -> str:
        """Return the constructor's arguments that differ from their defaults."""
        text = super().extra_repr()
        return text if self.reset_after else text + ", reset_after=False"

    def _cell_name(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"


class RNN(_Recurrent):
    """Elman RNN (1990) with tanh or relu: a drop-in for :class:`torch.nn.RNN`.

    The constructor is ``torch.nn.RNN``'s, with `nonlinearity` as fourth positional argument or
    keyword.

    Forward takes `lengths`, `resets` and `reset_state` besides; see there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)

    def _message_input_rank(self, data: Tensor) -> str:
        return f"RNN: Expected input to be 2D or 3D, got {data.dim()}D tensor instead"


class _Cell(nn.RNNCellBase):
    """What the three cells share: one step of one layer."""

    def _cell_name(self) -> str:
        """Return the cell's name in the registry; every subclass has its own."""
        raise NotImplementedError

    def _step(self, input: Tensor, hx: Any) -> States:
        name, cell = type(self).__name__, get_cell(self._cell_name())
        self._check_input(input)
        unbatched = input.dim() == 1
        states = None if hx is None else self._as_states(name, hx, unbatched)
        x = input.unsqueeze(0) if unbatched else input
        if states is None:
            states = (x.new_zeros(x.size(0), self.hidden_size),) * cell.states
        elif unbatched:
            states = tuple(s.unsqueeze(0) for s in states)
        structure = Structure(cell, bias=self.bias_ih is not None)
        weights = [self.weight_ih, self.weight_hh]
        if structure.bias:
            weights += [self.bias_ih, self.bias_hh]
        self._check_sizes(x, states)
        data, initial = x.unsqueeze(0), tuple(s.unsqueeze(0) for s in states)
        results = None
        if not torch.compiler.is_compiling():
            I, H = self.input_size, self.hidden_size
            stack = cpu.stack(cell.name, I, H, 0, 1, False, structure.bias, False)
            results = eager.run(stack, data, initial, weights)
        if results is None:
            results = layers.run(structure, data, initial, weights, one_step=True)[1]
        finals = tuple(s.squeeze(0) for s in results[-cell.states :])
        return tuple(s.squeeze(0) for s in finals) if unbatched else finals

    def _check_input(self, input: Tensor) -> None:
        if input.dim() not in (1, 2):
            name = type(self).__name__
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")

    def _as_states(self, name: str, hx: Any, unbatched: bool) -> States:
        if hx.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        return (hx,)

    def _check_sizes(self, x: Tensor, states: States) -> None:
        """Raise what torch's cells raise, in ``aten/src/ATen/native/RNN.cpp``'s words."""
        if x.size(1) != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {x.size(1)} expected {self.input_size}"
            )
        for k, s in enumerate(states):
            if x.size(0) != s.size(0):
                raise RuntimeError(
                    f"Input batch size {x.size(0)} doesn't match hidden{k} batch size {s.size(0)}"
                )
            if s.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{k} has inconsistent hidden_size: got {s.size(1)},"
                    f" expected {self.hidden_size}"
                )


class RNNCell(_Cell):
    """One step of an Elman RNN: a drop-in for :class:`torch.nn.RNNCell`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return the next state [B,H] (or [H]) from input [B,I] (or [I]) and the state before."""
        return self._step(input, hx)[0]

    def _cell_name(self) -> str:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return f"rnn_{self.nonlinearity}"


class LSTMCell(_Cell):
    """One step of an LSTM: a drop-in for :class:`torch.nn.LSTMCell`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the next (h, c), each [B,H] (or [H]), from the input [B,I] (or [I]) and (h, c)."""
        h, c = self._step(input, hx)
        return h, c

    def _cell_name(self) -> str:
        return "lstm"

    def _as_states(self, name: str, hx: Any, unbatched: bool) -> States:
        for index, s in enumerate(hx):
            if s.dim() not in (1, 2):
                raise ValueError(
                    f"{name}: Expected hx[{index}] to be 1D or 2D, got {s.dim()}D instead"
                )
        if not unbatched and isinstance(hx, Tensor):
            raise TypeError(
                "lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor"
            )
        if not unbatched and len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        return (hx[0], hx[1])


class GRUCell(_Cell):
    """One step of a GRU: a drop-in for :class:`torch.nn.GRUCell`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return the next state [B,H] (or [H]) from input [B,I] (or [I]) and the state before."""
        return self._step(input, hx)[0]

    def _cell_name(self) -> str:
        return "gru"

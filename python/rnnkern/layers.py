"""A stack of recurrent layers: what the modules and the functional form share.

Here the sequence forms meet the operator: padded, packed and unbatched input, `lengths`, `resets`,
states of all layers in one tensor, dropout between layers, autocast, and the choice between kernel
and reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

import rnnkern.ops  # noqa: F401  which registers the operators
from rnnkern import cpu, cuda
from rnnkern.arguments import LayerInputs, sizes_of
from rnnkern.cells import Cell
from rnnkern.checks import KERNEL_DTYPES, check_lengths, check_resets
from rnnkern.fallback import reference_layer
from rnnkern.plain import alive

States = tuple[Tensor, ...]
# What torch calls its types in its own messages.
_SCALAR_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.bool: "Bool",
}
Direction = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None"]


@dataclass(frozen=True)
class Structure:
    """The static shape of a stack.

    Attributes
    ----------
    cell : Cell
        The recurrent cell of every layer.
    num_layers : int
        Layers, each reading the output of the one below.
    bias : bool
        Whether every direction has b_ih and b_hh.
    bidirectional : bool
        Whether every layer has a second, reversed direction.
    projection : bool
        Whether every direction has w_hr.
    batch_first : bool
        Whether padded data is [B,T,...] rather than [T,B,...].
    """

    cell: Cell
    num_layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    projection: bool = False
    batch_first: bool = False

    @property
    def directions(self) -> int:
        """Directions a layer."""
        return 2 if self.bidirectional else 1

    @property
    def weights_per_direction(self) -> int:
        """Tensors a direction, in torch's order: w_ih, w_hh, b_ih, b_hh, w_hr."""
        return 2 + 2 * self.bias + self.projection


def missing_kernel(input: Tensor, cell: Cell, projects: bool) -> str | None:
    """Return why no kernel of a cell serves `input`, or None if one does.

    `projects`: whether the layer has a projection. Without a kernel the reference runs.
    """
    if input.device.type not in ("cpu", "cuda", "meta"):
        return f"no kernel for device type '{input.device.type}'"
    if input.dtype not in KERNEL_DTYPES:
        return f"no kernel for dtype {input.dtype}"
    if input.device.type == "cuda":
        stages = cuda.stages(cell, projects)
        reason: str | None = cuda.missing(input.device.index or 0, stages)
        if reason is not None:
            return reason
    if _transforms():
        return "torch.func transforms and forward-mode AD differentiate plain torch operations"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _transforms() -> bool:
    """Return whether a transform is active; torch.compile asks while it traces and guards that."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def run(
    structure: Structure,
    input: Tensor | PackedSequence,
    states: States | None,
    weights: Sequence[Tensor],
    *,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_states: States | None = None,
    one_step: bool = False,
) -> tuple[Tensor | PackedSequence, States]:
    """Run the whole stack on padded [T,B,I], unbatched [T,I] or packed input.

    Parameters
    ----------
    states, reset_states : tuple of Tensor or None
        [L·D,B,P] (and [L·D,B,H]); [L·D,P] (and [L·D,H]) for unbatched input; None: zero.
    weights : sequence of Tensor
        Layer by layer, direction by direction, `structure.weights_per_direction` tensors each.
    dropout : float
        Probability of zeroing an output between layers, when `training`.
    lengths : Tensor or None
        Integers [B] in [0, T], on any device.
    resets : Tensor or None
        bool [T,B] ([B,T] with batch_first; [T] for unbatched input).
    one_step : bool
        Called for a cell module, whose types under autocast differ.

    Returns
    -------
    tuple
        The output, of the input's form with D·P features, and the final states, of `states`' form.

    Raises
    ------
    TypeError
        If lengths or resets are not tensors.
    ValueError
        If lengths, resets or reset states do not fit the input.
    """
    for name, t in (("lengths", lengths), ("resets", resets)):
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    packed = input if isinstance(input, PackedSequence) else None
    data = input.data if isinstance(input, PackedSequence) else input
    batch_first = structure.batch_first and packed is None
    unbatched = packed is None and data.dim() == 2
    if packed is not None and lengths is not None:
        raise ValueError("lengths: a PackedSequence carries its own lengths; give one or the other")
    if unbatched:
        if lengths is not None:
            raise ValueError(
                "lengths: expected None for unbatched (2-D) input; slice the input instead"
            )
        data = data.unsqueeze(0 if batch_first else 1)
        states = None if states is None else tuple(s.unsqueeze(1) for s in states)
        if resets is not None:
            if resets.shape != (data.shape[1 if batch_first else 0],):
                raise ValueError(
                    f"resets: expected [T] for unbatched input, got {list(resets.shape)}"
                )
            resets = resets.unsqueeze(0 if batch_first else 1)
    if reset_states is not None and resets is None:
        raise ValueError("reset_state: has no effect without resets")
    if packed is not None:
        if packed.batch_sizes.dtype != torch.int64:
            raise RuntimeError("expected scalar type Long but found Int")
        B = int(packed.batch_sizes[0])
        if resets is not None and structure.batch_first:
            if resets.dim() != 2:
                raise ValueError(f"resets: expected [B,T], got {list(resets.shape)}")
            resets = resets.transpose(0, 1)
    else:
        B = data.shape[0 if batch_first else 1]
    if states is None:
        shapes = state_shapes(structure, weights, B, False)
        states = tuple(data.new_zeros(shape) for shape in shapes)
    if reset_states is not None:
        check_states("reset_state", reset_states, state_shapes(structure, weights, B, unbatched))
        if unbatched:
            reset_states = tuple(s.unsqueeze(1) for s in reset_states)
    _check_devices(data, weights, states, resets, reset_states)
    y, finals = _stack(
        structure,
        data,
        states,
        weights,
        packed=packed,
        dropout=dropout if training else 0.0,
        lengths=lengths,
        resets=resets,
        reset_states=reset_states,
        one_step=one_step,
    )
    if packed is not None:
        if packed.sorted_indices is None and packed.unsorted_indices is not None:  # made by hand
            finals = tuple(s.index_select(1, packed.unsorted_indices) for s in finals)
        return (
            PackedSequence(y, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices),
            finals,
        )
    if structure.batch_first:
        y = y.transpose(0, 1)
    if unbatched:
        return y.squeeze(0 if batch_first else 1), tuple(s.squeeze(1) for s in finals)
    return y, finals


def state_shapes(
    structure: Structure, weights: Sequence[Tensor], B: int, unbatched: bool
) -> list[tuple[int, ...]]:
    """Return the shapes of the states of the whole stack."""
    rows = structure.num_layers * structure.directions
    P = weights[1].shape[1]
    H = weights[1].shape[0] // structure.cell.gates
    widths = (P, H)[: structure.cell.states]
    return [(rows, width) if unbatched else (rows, B, width) for width in widths]


def check_states(name: str, given: States, shapes: list[tuple[int, ...]]) -> None:
    """Raise ValueError unless there is one state for each shape."""
    if len(given) != len(shapes):
        raise ValueError(f"{name}: expected {len(shapes)} state(s), got {len(given)}")
    for g, shape in zip(given, shapes, strict=True):
        if g.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(g.shape)}")


def _check_devices(
    data: Tensor,
    weights: Sequence[Tensor],
    states: States,
    resets: Tensor | None,
    reset_states: States | None,
) -> None:
    """Raise torch's own messages for tensors on different devices."""
    for name, tensors in (("hidden", states), ("reset_state", reset_states or ())):
        for t in tensors:
            if t.device != data.device:
                raise RuntimeError(
                    "Input and hidden tensors are not at the same device, found input tensor at"
                    f" {data.device} and {name} tensor at {t.device}"
                )
    for w in weights:
        if w.device != data.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at"
                f" {data.device} and parameter tensor at {w.device}"
            )
    if resets is not None and resets.dtype != torch.bool:
        raise ValueError(f"resets: expected dtype torch.bool, got {resets.dtype}")


def _check_dtypes(
    data: Tensor, states: States, weights: Sequence[Tensor], reset_states: States | None
) -> None:
    """Raise what torch's products raise for factors of different types."""
    first = weights[0].dtype
    for t in (data, *states):
        if t.dtype != first:
            given, wanted = _SCALAR_NAMES.get(t.dtype, t.dtype), _SCALAR_NAMES.get(first, first)
            raise RuntimeError(
                f"mat1 and mat2 must have the same dtype, but got {given} and {wanted}"
            )
    for w in weights:
        if w.dtype != first:
            given, wanted = _SCALAR_NAMES.get(first, first), _SCALAR_NAMES.get(w.dtype, w.dtype)
            raise RuntimeError(
                f"self and mat2 must have the same dtype, but got {given} and {wanted}"
            )
    for t in reset_states or ():
        if t.dtype != first:
            raise RuntimeError(f"reset_state: expected {first}, got {t.dtype}")


def _stack(
    structure: Structure,
    data: Tensor,
    states: States,
    weights: Sequence[Tensor],
    *,
    packed: PackedSequence | None,
    dropout: float,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_states: States | None,
    one_step: bool,
) -> tuple[Tensor, States]:
    data, states, weights = alive(data), tuple(map(alive, states)), [*map(alive, weights)]
    dtypes = None
    if autocasts(data):
        # On a CPU not all of torch's results are narrow, and the kernel does not compute in every
        # narrow type; on a GPU torch's own recurrent operators are narrow throughout.
        compute = autocast_dtype(data)
        fused = packed is None and not structure.projection and not one_step
        dtypes = None if data.is_cuda else _autocast_dtypes(structure, data, states, fused)
        data, *rest = (t.to(compute) for t in (data, *states, *weights, *(reset_states or ())))
        states, rest = tuple(rest[: len(states)]), rest[len(states) :]
        weights, rest = rest[: len(weights)], rest[len(weights) :]
        reset_states = None if reset_states is None else tuple(rest)
    else:
        _check_dtypes(data, states, weights, reset_states)
    D, count = structure.directions, structure.weights_per_direction
    batch_first = structure.batch_first and packed is None
    finals: list[States] = []
    for index in range(structure.num_layers):
        rows = slice(index * D, (index + 1) * D)
        layer_weights = [
            _direction(structure, weights[(index * D + d) * count : (index * D + d + 1) * count])
            for d in range(D)
        ]
        if index > 0 and dropout > 0:
            data = torch.dropout(data, dropout, train=True)
        data, final = run_layer(
            structure.cell,
            data,
            states if structure.num_layers == 1 else tuple(s[rows] for s in states),
            layer_weights,
            packed=packed,
            lengths=lengths,
            resets=resets,
            reset_states=None if reset_states is None else tuple(s[rows] for s in reset_states),
            batch_first=batch_first,
        )
        if batch_first and resets is not None:
            resets = resets.transpose(0, 1)
        batch_first = False  # the output of a layer is time-major
        finals.append(final)
    if structure.num_layers == 1:
        final_states = finals[0]
    else:
        final_states = tuple(torch.cat(s) for s in zip(*finals, strict=True))
    if dtypes is not None:
        data = data.to(dtypes[0])
        final_states = tuple(s.to(d) for s, d in zip(final_states, dtypes, strict=True))
    return data, final_states


def _direction(structure: Structure, tensors: Sequence[Tensor]) -> Direction:
    b_ih, b_hh = tensors[2:4] if structure.bias else (None, None)
    return tensors[0], tensors[1], b_ih, b_hh, tensors[-1] if structure.projection else None


def autocasts(data: Tensor) -> bool:
    """Return whether autocast applies; it leaves float64, other kinds and meta tensors alone."""
    kind, narrows = data.device.type, data.is_floating_point() and data.dtype != torch.float64
    return narrows and kind != "meta" and torch.is_autocast_enabled(kind)


def autocast_dtype(data: Tensor) -> torch.dtype:
    """Return the type that autocast has a layer computed in."""
    narrow = torch.get_autocast_dtype(data.device.type)
    if data.is_cuda:
        return narrow
    return cpu.computed(narrow) if data.is_cpu else torch.float32


def _autocast_dtypes(
    structure: Structure, data: Tensor, states: States, fused: bool
) -> list[torch.dtype]:
    """Return the types of torch's own results under autocast, where only the products are narrow.

    `fused`: torch would run its fused CPU LSTM, which is narrow throughout.
    """
    narrow = torch.get_autocast_dtype(data.device.type)
    if structure.cell.name.startswith("rnn") or (fused and structure.cell.name == "lstm"):
        return [narrow] * len(states)
    dtypes = [torch.promote_types(s.dtype, narrow) for s in states]
    return [narrow, *dtypes[1:]] if structure.projection else dtypes


def run_layer(
    cell: Cell,
    data: Tensor,
    states: States,
    directions: list[Direction],
    *,
    packed: PackedSequence | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_states: States | None = None,
    batch_first: bool = False,
) -> tuple[Tensor, States]:
    """Run one layer through the operator, or through the reference where there is no kernel.

    Parameters are those of :class:`rnnkern.ops.LayerInputs`, with the states as tuples.

    Returns
    -------
    tuple
        The output, [T,B,D·P] or packed rows [N,D·P], and the final states.
    """
    two = cell.states == 2
    args = LayerInputs(  # type: ignore[call-arg]
        cell.name,
        data,
        states[0],
        states[1] if two else None,
        *directions[0],
        *(directions[1] if len(directions) == 2 else (None,) * 5),
        None if packed is None else packed.batch_sizes,
        None if packed is None else packed.sorted_indices,
        lengths,
        resets,
        None if reset_states is None else reset_states[0],
        reset_states[1] if two and reset_states is not None else None,
        batch_first,
    )
    if missing_kernel(data, cell, args.w_hr is not None) is not None:
        sizes = sizes_of(args, cell)
        check_resets(args, sizes)
        check_lengths(args, sizes)
        y, *final = reference_layer(args)
        return y, tuple(final)
    # A trace must come out the same in every grad mode; the operator's backward copes with either.
    recording = torch.is_grad_enabled() or torch._C._get_tracing_state() is not None
    save = recording and any(t.requires_grad for t in args if isinstance(t, Tensor))
    y, hn, cn, *_ = torch.ops.rnnkern.layer(*args, save)
    return y, (hn, cn) if two else (hn,)

"""The torch operators: ``rnnkern::layer`` runs one layer, ``rnnkern::layer_backward`` its gradient.

One call is one layer: the input product of every direction (one GEMM each), the recurrence over the whole
sequence in the native core, and in backward the recurrence again and then one GEMM for every weight
gradient. Rows of data are time-major, or batch-major (`batch_first`), or packed; the native core addresses
all three in place.

Both are registered with a schema, a CPU kernel, a fake kernel, an autograd formula and a vmap rule, so
they work under ``torch.compile``, ``torch.export``, ``torch.func`` and ``opcheck``. The gradient of
``layer_backward`` differentiates the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern import reference
from rnnkern._native import _cpu
from rnnkern.cells import Cell, get_cell
from rnnkern.gemm import linear


class LayerInputs(NamedTuple):
    """The arguments that both operators share, in the order of their schema."""

    cell: str
    input: Tensor  # [T,B,I]; [B,T,I] with batch_first; [N,I] with batch_sizes
    h0: Tensor  # [D,B,P]
    c0: Tensor | None  # [D,B,H]
    w_ih: Tensor  # [G·H,I]
    w_hh: Tensor  # [G·H,P]
    b_ih: Tensor | None  # [G·H]
    b_hh: Tensor | None  # [G·H]
    w_hr: Tensor | None  # [P,H]
    w_ih_reverse: Tensor | None
    w_hh_reverse: Tensor | None
    b_ih_reverse: Tensor | None
    b_hh_reverse: Tensor | None
    w_hr_reverse: Tensor | None
    batch_sizes: Tensor | None  # int64 [T], on the CPU
    order: Tensor | None  # int64 [B], the batch row at each sorted position of packed data
    lengths: Tensor | None  # int64 [B]
    resets: Tensor | None  # bool [T,B]; [B,T] with batch_first
    reset_h: Tensor | None  # [D,B,P]
    reset_c: Tensor | None  # [D,B,H]
    batch_first: bool

    @property
    def directions(self) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]]:
        """The weights (w_ih, w_hh, b_ih, b_hh, w_hr) of each direction."""
        one = [(self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr)]
        if self.w_ih_reverse is None or self.w_hh_reverse is None:
            return one
        reverse = (self.w_ih_reverse, self.w_hh_reverse, self.b_ih_reverse, self.b_hh_reverse)
        return [*one, (*reverse, self.w_hr_reverse)]


DIFFERENTIABLE = (
    *("input", "h0", "c0"),
    *("w_ih", "w_hh", "b_ih", "b_hh", "w_hr"),
    *("w_ih_reverse", "w_hh_reverse", "b_ih_reverse", "b_hh_reverse", "w_hr_reverse"),
    *("reset_h", "reset_c"),
)
_POSITIONS = tuple(LayerInputs._fields.index(name) for name in DIFFERENTIABLE)

_SCHEMA_TYPES = {"cell": "str", "batch_first": "bool"}
_REQUIRED = ("input", "h0", "w_ih", "w_hh")
_SCHEMA = ", ".join(
    f"{_SCHEMA_TYPES.get(name, 'Tensor' if name in _REQUIRED else 'Tensor?')} {name}"
    for name in LayerInputs._fields
)

_LIBRARY = torch.library.Library("rnnkern", "DEF")
_LIBRARY.define(
    f"layer({_SCHEMA}, bool save)"
    " -> (Tensor y, Tensor hn, Tensor cn, Tensor gates, Tensor h_prev, Tensor saved)"
)
_LIBRARY.define(
    f"layer_backward({_SCHEMA}, Tensor gates, Tensor h_prev, Tensor saved,"
    " Tensor? dy, Tensor? dhn, Tensor? dcn, bool[] output_mask)"
    f" -> ({', '.join(f'Tensor d{name}' for name in DIFFERENTIABLE)})"
)


class Sizes(NamedTuple):
    """The sizes of one call, in the notation of ``csrc/core/problem.h``."""

    T: int
    B: int
    N: int  # data rows
    I: int  # noqa: E741
    H: int
    P: int
    D: int
    G: int


def _sizes(a: LayerInputs, cell: Cell) -> Sizes:
    D, B, P = a.h0.shape
    H = P if a.w_hr is None else a.w_hr.shape[1]
    if a.batch_sizes is not None:
        N, I = a.input.shape  # noqa: E741
        T = a.batch_sizes.shape[0]
    else:
        T, _, I = a.input.shape  # noqa: E741
        if a.batch_first:
            T = a.input.shape[1]
        N = T * B
    return Sizes(T, B, N, I, H, P, D, cell.gates)


def _check(a: LayerInputs, cell: Cell) -> Sizes:
    """Make sure of everything the native core relies on; modules raise torch's own messages earlier."""
    for name, dim in (("h0", 3), ("input", 3 if a.batch_sizes is None else 2)):
        if getattr(a, name).dim() != dim:
            raise ValueError(f"{name}: expected {dim} dimensions, got {list(getattr(a, name).shape)}")
    s = _sizes(a, cell)
    if s.T < 1:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if s.D != (1 if a.w_ih_reverse is None else 2):
        raise ValueError(f"h0: expected one state a direction, got {list(a.h0.shape)}")
    if (a.c0 is None) != (cell.states == 1):
        raise ValueError(f"c0: {cell.name} has {cell.states} state(s)")
    if a.w_hr is not None and not cell.projects:
        raise ValueError(f"w_hr: {cell.name} has no projection")
    if a.batch_sizes is None:
        _shape("input", a.input, (s.B, s.T, s.I) if a.batch_first else (s.T, s.B, s.I))
    elif a.lengths is not None:
        raise ValueError("lengths: packed input carries its own lengths; give one or the other")
    gh = s.G * s.H
    for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(a.directions):
        suffix = "_reverse" if d else ""
        _shape("w_ih" + suffix, w_ih, (gh, s.I))
        _shape("w_hh" + suffix, w_hh, (gh, s.P))
        _shape("b_ih" + suffix, b_ih, (gh,))
        _shape("b_hh" + suffix, b_hh, (gh,))
        if (w_hr is None) != (a.w_hr is None):
            raise ValueError(f"w_hr{suffix}: expected a projection in both directions or in none")
        _shape("w_hr" + suffix, w_hr, (s.P, s.H))
    _shape("c0", a.c0, (s.D, s.B, s.H))
    _shape("reset_h", a.reset_h, (s.D, s.B, s.P))
    _shape("reset_c", a.reset_c, (s.D, s.B, s.H))
    dtype = a.input.dtype
    for name in DIFFERENTIABLE:
        t = getattr(a, name)
        if t is not None and (t.dtype != dtype or t.device.type != "cpu"):
            raise ValueError(f"{name}: expected {dtype} on cpu, got {t.dtype} on {t.device}")
    return s


def _shape(name: str, t: Tensor | None, shape: tuple[int, ...]) -> None:
    if t is not None and t.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class _Steps(NamedTuple):
    """Which rows run at which step: the native core's Sequence, and the tensors it points into."""

    native: tuple[int, ...]
    keep: tuple[Tensor | None, ...]
    padding: Tensor | None  # bool [T,B], the steps beyond their row's length

    @property
    def ragged(self) -> bool:
        return self.padding is not None


def _steps(a: LayerInputs, s: Sizes) -> _Steps:
    active = order = offset = padding = None
    if a.batch_sizes is not None:
        active, order = a.batch_sizes, a.order
        _integers("batch_sizes", active, (s.T,))
        offset = active.cumsum(0) - active
        if (
            int(active[0]) != s.B
            or int(active[-1]) < 1
            or int(offset[-1] + active[-1]) != s.N
            or bool((active[1:] > active[:-1]).any())
        ):
            raise ValueError(
                f"batch_sizes: expected {s.N} rows in steps that never grow from {s.B},"
                f" got {active.tolist() if s.T <= 16 else f'{s.T} steps'}"
            )
        if order is not None:
            _integers("order", order, (s.B,))
            order = order.cpu().contiguous()
            if not torch.equal(order.sort().values, torch.arange(s.B)):
                raise ValueError(f"order: expected a permutation of {s.B} rows")
    elif a.lengths is not None:
        _integers("lengths", a.lengths, (s.B,))
        lengths = a.lengths.cpu().to(torch.int64)
        low, high = (int(v) for v in lengths.aminmax()) if s.B else (0, 0)
        if low < 0 or high > s.T:
            raise ValueError(f"lengths: expected values in [0, {s.T}], got {low}..{high}")
        if low < s.T:
            order = lengths.argsort(descending=True, stable=True)
            steps = torch.arange(s.T)
            active = s.B - torch.searchsorted(lengths.sort().values, steps, right=True)
            padding = steps.unsqueeze(1) >= lengths
    active = None if active is None else active.contiguous()
    resets, strides = a.resets, (0, 0)
    if resets is not None:
        expected = (s.B, s.T) if a.batch_first else (s.T, s.B)
        if resets.dtype != torch.bool or resets.shape != expected:
            raise ValueError(
                f"resets: expected bool {list(expected)}, got {resets.dtype} {list(resets.shape)}"
            )
        resets = resets.cpu()
        strides = resets.stride()[::-1] if a.batch_first else resets.stride()
    native = (s.T, s.B, *map(_address, (active, order, offset, resets)), *strides)
    return _Steps(native, (active, order, offset, resets), padding)


def _integers(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if t.dtype not in (torch.int64, torch.int32) or t.shape != shape:
        raise ValueError(f"{name}: expected integers {list(shape)}, got {t.dtype} {list(t.shape)}")


def _computed(a: LayerInputs) -> LayerInputs:
    """Return the inputs contiguous and in the type the kernel computes in: float32, or float64."""
    dtype = torch.float64 if a.input.dtype == torch.float64 else torch.float32
    values: list[Any] = list(a)
    for i in _POSITIONS:
        if values[i] is not None:
            values[i] = values[i].to(dtype).contiguous()
    return LayerInputs(*values)


def _joined(a: LayerInputs) -> tuple[Tensor, Tensor | None]:
    """Return w_ih [D·G·H,I] and b_ih of all directions as one, so that the input product is one GEMM."""
    if len(a.directions) == 1:
        return a.w_ih, a.b_ih
    (w, _, b, _, _), (w_reverse, _, b_reverse, _, _) = a.directions
    if b is None and b_reverse is None:
        return torch.cat((w, w_reverse)), None
    b = w.new_zeros(w.shape[0]) if b is None else b
    b_reverse = w.new_zeros(w.shape[0]) if b_reverse is None else b_reverse
    return torch.cat((w, w_reverse)), torch.cat((b, b_reverse))


def _rows(t: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return time-major data [T,B,...] as rows without a copy where possible, and its row strides."""
    T, B = t.shape[:2]
    if not t.is_contiguous() and t.transpose(0, 1).is_contiguous():
        return t.transpose(0, 1), (1, T)
    return t.contiguous(), (B, 1)


def _input_rows(a: LayerInputs, s: Sizes) -> tuple[int, int]:
    return (1, s.T) if a.batch_first else (s.B, 1)


def _layer_cpu(*args: Any) -> tuple[Tensor, ...]:
    a, save = LayerInputs(*args[:-1]), args[-1]
    cell, dtype = get_cell(a.cell), a.input.dtype
    s = _check(a, cell)
    steps = _steps(a, s)
    a = _computed(a)
    x = linear(a.input.view(s.N, s.I), *_joined(a))
    new = a.input.new_zeros if steps.ragged else a.input.new_empty
    y = new((s.N, s.D * s.P) if a.batch_sizes is not None else (s.T, s.B, s.D * s.P))
    h_prev, saved = (
        (new(s.D, s.N, s.P), new(s.D, s.N, cell.saved * s.H)) if save else (x.new_empty(0),) * 2
    )
    hn = torch.empty_like(a.h0)
    cn = a.input.new_empty(0) if a.c0 is None else torch.empty_like(a.c0)
    if s.B > 0:
        directions = tuple(
            (
                d == 1,
                *map(_address, (w_hh, b_hh, w_hr)),
                x.data_ptr() + d * s.G * s.H * x.element_size(),
                *(_address(None if t is None else t[d]) for t in (a.h0, a.c0, a.reset_h, a.reset_c)),
                hn[d].data_ptr(),
                _address(None if a.c0 is None else cn[d]),
                y.data_ptr() + d * s.P * y.element_size(),
                *((h_prev[d].data_ptr(), saved[d].data_ptr()) if save else (0, 0)),
            )
            for d, (_, w_hh, _, b_hh, w_hr) in enumerate(a.directions)
        )
        sizes = (s.H, s.P, _input_rows(a, s), (s.B, 1))
        run = _cpu.forward_float64 if x.dtype == torch.float64 else _cpu.forward_float32
        run(cell.index, torch.get_num_threads(), steps.native, sizes, save, directions)
    gates = x if save else x.new_empty(0)
    return y.to(dtype), hn.to(dtype), cn.to(dtype), gates, h_prev, saved


def _layer_fake(*args: Any) -> tuple[Tensor, ...]:
    a, save = LayerInputs(*args[:-1]), args[-1]
    cell = get_cell(a.cell)
    s = _sizes(a, cell)
    new = a.input.new_empty
    y = new((s.N, s.D * s.P) if a.batch_sizes is not None else (s.T, s.B, s.D * s.P))
    hn = new((s.D, s.B, s.P))
    cn = new(0) if a.c0 is None else new((s.D, s.B, s.H))
    dtype = torch.float64 if a.input.dtype == torch.float64 else torch.float32
    shapes = ((s.N, s.D * s.G * s.H), (s.D, s.N, s.P), (s.D, s.N, cell.saved * s.H))
    kept = [new(shape if save else 0, dtype=dtype) for shape in shapes]
    return y, hn, cn, *kept


class _BackwardInputs(NamedTuple):
    """The arguments of ``layer_backward`` beyond those of the layer."""

    gates: Tensor  # [N,D·G·H], activated
    h_prev: Tensor  # [D,N,P]
    saved: Tensor  # [D,N,K·H]
    dy: Tensor | None  # like y
    dhn: Tensor | None  # [D,B,P]
    dcn: Tensor | None  # [D,B,H]
    output_mask: Sequence[bool]  # one entry for each of DIFFERENTIABLE


_LAYER_FIELDS = len(LayerInputs._fields)


def _split(args: Sequence[Any]) -> tuple[LayerInputs, _BackwardInputs]:
    return LayerInputs(*args[:_LAYER_FIELDS]), _BackwardInputs(*args[_LAYER_FIELDS:])


def _layer_backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    a, g = _split(args)
    cell, dtype = get_cell(a.cell), a.input.dtype
    s = _check(a, cell)
    _check_backward(cell, s, g)
    steps = _steps(a, s)
    a = _computed(a)
    wanted = dict(zip(DIFFERENTIABLE, g.output_mask, strict=True))
    new = a.input.new_zeros if steps.ragged else a.input.new_empty
    dx = new(s.D, s.N, s.G * s.H)
    needs_extra = cell.extra != "none" and (cell.extra != "output" or a.w_hr is not None)
    extra = new(s.D, s.N, s.H) if needs_extra else None
    dh = new(s.D, s.N, s.P) if a.w_hr is not None else None
    out: dict[str, Tensor | None] = {
        "h0": torch.zeros_like(a.h0),
        "c0": None if a.c0 is None else torch.zeros_like(a.c0),
        "reset_h": None if a.reset_h is None else torch.zeros_like(a.reset_h),
        "reset_c": None if a.reset_c is None else torch.zeros_like(a.reset_c),
    }
    dy, dhn, dcn = (None if t is None else t.to(dx.dtype) for t in (g.dy, g.dhn, g.dcn))
    y_rows = (s.B, 1)
    if dy is not None:
        dy, y_rows = (dy.contiguous(), y_rows) if a.batch_sizes is not None else _rows(dy)
    dhn, dcn = (None if t is None else t.contiguous() for t in (dhn, dcn))
    if s.B > 0:

        def at(t: Tensor | None, d: int) -> int:
            return 0 if t is None else t[d].data_ptr()

        directions = tuple(
            (
                d == 1,
                *map(_address, (w_hh, w_hr)),
                g.gates.data_ptr() + d * s.G * s.H * g.gates.element_size(),
                *(at(t, d) for t in (g.h_prev, g.saved)),
                0 if dy is None else dy.data_ptr() + d * s.P * dy.element_size(),
                *(at(t, d) for t in (dhn, dcn, dx, extra, dh)),
                *(at(out[name], d) for name in ("h0", "c0", "reset_h", "reset_c")),
            )
            for d, (_, w_hh, _, _, w_hr) in enumerate(a.directions)
        )
        sizes = (s.H, s.P, _input_rows(a, s), y_rows)
        run = _cpu.backward_float64 if dx.dtype == torch.float64 else _cpu.backward_float32
        run(cell.index, torch.get_num_threads(), steps.native, sizes, directions)
    if wanted["input"]:
        dinput = linear(dx[0], a.w_ih.t())
        if s.D == 2:
            dinput += linear(dx[1], a.directions[1][0].t())
        out["input"] = dinput.view_as(a.input)
    input = _without_padding(a, steps).view(s.N, s.I)
    for d in range(s.D):
        suffix = "_reverse" if d else ""
        out |= _weight_gradients(a, g, cell, s, d, suffix, input, dx, extra, dh, wanted)
    return tuple(
        out[name].to(dtype) if wanted[name] and out.get(name) is not None else dx.new_empty(0, dtype=dtype)
        for name in DIFFERENTIABLE
    )


def _weight_gradients(
    a: LayerInputs,
    g: _BackwardInputs,
    cell: Cell,
    s: Sizes,
    d: int,
    suffix: str,
    input: Tensor,
    dx: Tensor,
    extra: Tensor | None,
    dh: Tensor | None,
    wanted: dict[str, bool],
) -> dict[str, Tensor | None]:
    """Return the weight gradients of direction `d`, each one GEMM (or sum) over all data rows."""
    out: dict[str, Tensor | None] = {}
    dx_d, split = dx[d], cell.last_phase * s.H
    if wanted["w_ih" + suffix]:
        out["w_ih" + suffix] = linear(dx_d.t(), input.t())
    if wanted["w_hh" + suffix]:
        if cell.extra == "recurrent_gradient" and extra is not None:
            split = (s.G - 1) * s.H
            rows = ((dx_d[:, :split], g.h_prev[d]), (extra[d], g.h_prev[d]))
        elif cell.extra == "operand" and extra is not None:
            rows = ((dx_d[:, :split], g.h_prev[d]), (dx_d[:, split:], extra[d]))
        else:
            rows = ((dx_d, g.h_prev[d]),)
        parts = [linear(dr.t(), operand.t()) for dr, operand in rows]
        out["w_hh" + suffix] = parts[0] if len(parts) == 1 else torch.cat(parts)
    if wanted["b_ih" + suffix] or wanted["b_hh" + suffix]:
        db = dx_d.sum(0)
        out["b_ih" + suffix] = db
        if cell.extra == "recurrent_gradient" and extra is not None:
            out["b_hh" + suffix] = torch.cat((db[: (s.G - 1) * s.H], extra[d].sum(0)))
        else:
            out["b_hh" + suffix] = db.clone()
    if wanted["w_hr" + suffix] and dh is not None and extra is not None:
        out["w_hr" + suffix] = linear(dh[d].t(), extra[d].t())
    return out


def _check_backward(cell: Cell, s: Sizes, g: _BackwardInputs) -> None:
    _shape("gates", g.gates, (s.N, s.D * s.G * s.H))
    _shape("h_prev", g.h_prev, (s.D, s.N, s.P))
    _shape("saved", g.saved, (s.D, s.N, cell.saved * s.H))
    if g.dy is not None and (g.dy.shape[-1] != s.D * s.P or g.dy.numel() != s.N * s.D * s.P):
        raise ValueError(f"dy: expected the shape of y, got {list(g.dy.shape)}")
    _shape("dhn", g.dhn, (s.D, s.B, s.P))
    _shape("dcn", g.dcn, (s.D, s.B, s.H))
    for name in ("gates", "h_prev", "saved"):
        if not getattr(g, name).is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor")


def _without_padding(a: LayerInputs, steps: _Steps) -> Tensor:
    """Return the input with zeros in the padding, where NaN would turn 0·NaN into a NaN gradient."""
    if steps.padding is None:
        return a.input
    padding = steps.padding.t() if a.batch_first else steps.padding
    return a.input.masked_fill(padding.unsqueeze(-1), 0)


def _layer_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    a, g = _split(args)
    return tuple(
        a.input.new_empty(getattr(a, name).shape if on and getattr(a, name) is not None else 0)
        for name, on in zip(DIFFERENTIABLE, g.output_mask, strict=True)
    )


def _layer_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.fixed = (inputs[0], inputs[_LAYER_FIELDS - 1])
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*inputs[1 : _LAYER_FIELDS - 1], *output[3:])


def _layer_autograd(ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None, *_: Any) -> Any:
    cell, batch_first = ctx.fixed
    *tensors, gates, h_prev, saved = ctx.saved_tensors
    a = LayerInputs(cell, *tensors, batch_first)
    mask = [ctx.needs_input_grad[i] for i in _POSITIONS]
    grads: list[Tensor | None] = [None] * (_LAYER_FIELDS + 1)
    if all(t is None for t in (dy, dhn, dcn)):
        return tuple(grads)
    if gates.numel() == 0:  # the forward pass was asked to save nothing: repeat it
        gates, h_prev, saved = torch.ops.rnnkern.layer(*a, True)[3:]
    if a.c0 is None:
        dcn = None
    values = torch.ops.rnnkern.layer_backward(*a, gates, h_prev, saved, dy, dhn, dcn, mask)
    for i, value, on in zip(_POSITIONS, values, mask, strict=True):
        grads[i] = value if on else None
    return tuple(grads)


def _layer_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.fixed = (inputs[0], inputs[_LAYER_FIELDS - 1], list(inputs[-1]))
    ctx.save_for_backward(*inputs[1 : _LAYER_FIELDS - 1], *inputs[-4:-1])


def _layer_backward_autograd(ctx: Any, *gradients: Tensor | None) -> Any:
    """Differentiate the gradient of the reference (double backward)."""
    cell, batch_first, mask = ctx.fixed
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = [
            t.view_as(t) if t is not None and t.requires_grad else t for t in ctx.saved_tensors
        ]
        *layer_tensors, dy, dhn, dcn = tensors
        a = LayerInputs(cell, *layer_tensors, batch_first)
        leaves = {
            name: getattr(a, name) if getattr(a, name).requires_grad
            else getattr(a, name).detach().requires_grad_()
            for name, on in zip(DIFFERENTIABLE, mask, strict=True)
            if on
        }
        a = a._replace(**leaves)
        outputs = reference_layer(a)
        pairs = [(y, d) for y, d in zip(outputs, (dy, dhn, dcn), strict=False) if d is not None]
        first = torch.autograd.grad(
            [y for y, _ in pairs],
            list(leaves.values()),
            [d for _, d in pairs],
            create_graph=True,
            allow_unused=True,
        )
        asked = dict(zip(DIFFERENTIABLE, gradients, strict=True))
        second = [
            (value, asked[name])
            for name, value in zip(leaves, first, strict=True)
            if value is not None and value.requires_grad and asked[name] is not None
        ]
        sources = [
            (i, t)
            for i, t in enumerate([*a, None, None, None, dy, dhn, dcn])
            if isinstance(t, Tensor) and t.requires_grad and ctx.needs_input_grad[i]
        ]
        values: Sequence[Tensor | None] = [None] * len(sources)
        if second and sources:
            values = torch.autograd.grad(
                [value for value, _ in second],
                [t for _, t in sources],
                [gg for _, gg in second],
                create_graph=create_graph,
                allow_unused=True,
            )
    grads: list[Tensor | None] = [None] * (_LAYER_FIELDS + len(_BackwardInputs._fields))
    for (i, _), value in zip(sources, values, strict=True):
        grads[i] = value
    return tuple(grads)


def reference_layer(a: LayerInputs) -> tuple[Tensor, ...]:
    """Run the reference on the operator's own arguments; returns (y, hn) or (y, hn, cn)."""
    initial = (a.h0,) if a.c0 is None else (a.h0, a.c0)
    resets = tuple(t for t in (a.reset_h, a.reset_c) if t is not None)
    y, states = reference.layer(
        a.cell,
        a.input,
        initial,
        a.directions,
        batch_sizes=a.batch_sizes,
        order=a.order,
        lengths=a.lengths,
        resets=a.resets,
        reset=resets or None,
        batch_first=a.batch_first,
    )
    return y, *states


def _loop_over_batch(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """Return a vmap rule that runs the operator once for each sample."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        samples = [
            op(
                *(
                    arg.select(dim, i) if isinstance(arg, Tensor) and dim is not None else arg
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(values) for values in zip(*samples, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


_LIBRARY.impl("layer", _layer_cpu, "CPU")
_LIBRARY.impl("layer_backward", _layer_backward_cpu, "CPU")
torch.library.register_fake("rnnkern::layer", _layer_fake, lib=_LIBRARY)
torch.library.register_fake("rnnkern::layer_backward", _layer_backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "rnnkern::layer", _layer_autograd, setup_context=_layer_setup, lib=_LIBRARY
)
torch.library.register_autograd(
    "rnnkern::layer_backward",
    _layer_backward_autograd,
    setup_context=_layer_backward_setup,
    lib=_LIBRARY,
)
torch.library.register_vmap(
    "rnnkern::layer", _loop_over_batch(lambda *a: torch.ops.rnnkern.layer(*a)), lib=_LIBRARY
)
torch.library.register_vmap(
    "rnnkern::layer_backward",
    _loop_over_batch(lambda *a: torch.ops.rnnkern.layer_backward(*a)),
    lib=_LIBRARY,
)

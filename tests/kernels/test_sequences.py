"""What lengths, packed rows, resets and layouts mean, shown with plain runs, not the reference."""

from __future__ import annotations

import math

import pytest
import rnnkern
import torch
from cases import Case, Results, assert_matches, build, evaluate, leaves, random_lengths, run_op
from rnnkern.cells import CELLS
from rnnkern.functional import recurrent
from rnnkern.ops import LayerInputs
from torch import Tensor

DTYPE = torch.float64
STATES = ("h0", "c0", "reset_h", "reset_c")
WEIGHTS = tuple(n for n in LayerInputs._fields if n.startswith(("w_", "b_")))

cells = pytest.mark.parametrize("cell", CELLS)
directions = pytest.mark.parametrize("D", [1, 2])
projections = [(cell, P) for cell in CELLS for P in ((0, 3) if CELLS[cell].projects else (0,))]
cells_and_projections = pytest.mark.parametrize(("cell", "P"), projections)


def one_row(args: LayerInputs, row: int, steps: slice, **changes: object) -> LayerInputs:
    """Return the arguments of one batch row over some steps, alone, without lengths and resets."""
    states = {n: getattr(args, n) for n in STATES}
    own = {n: t[:, row : row + 1] for n, t in states.items() if t is not None}
    data = args.input[steps, row : row + 1]
    own |= {"input": data, "lengths": None, "resets": None, "reset_h": None, "reset_c": None}
    return args._replace(**own | changes)  # type: ignore[arg-type]


def loss(outputs: tuple[Tensor, ...], args: LayerInputs) -> Tensor:
    """Weigh every output with fixed numbers that depend on its place only."""
    del args
    return sum(((torch.arange(t.numel()).view(t.shape) * 0.7).sin() * t).sum() for t in outputs)


def gradients(value: Tensor, args: LayerInputs) -> Results:
    names = [n for n in (*STATES, *WEIGHTS, "input") if getattr(args, n) is not None]
    grads = torch.autograd.grad(value, [getattr(args, n) for n in names], allow_unused=True)
    return {f"d{n}": g for n, g in zip(names, grads, strict=True) if g is not None}


# ---- lengths ------------------------------------------------------------------------------------
def rows_alone(args: LayerInputs, lengths: list[int]) -> tuple[Tensor, ...]:
    """Run each row by itself over its own length; a row of no steps keeps its state and gives 0."""
    T = args.input.shape[0]
    outputs = []
    for row, length in enumerate(lengths):
        if length == 0:
            width = args.h0.shape[0] * args.h0.shape[2]
            states = [t for t in (args.h0, args.c0) if t is not None]
            outputs.append(
                (args.input.new_zeros(T, 1, width), *(s[:, row : row + 1] for s in states))
            )
            continue
        y, *finals = run_op(one_row(args, row, slice(length)))
        rest = y.new_zeros(T - length, *y.shape[1:])
        outputs.append((torch.cat([y, rest]), *finals))
    return tuple(torch.cat(parts, 1) for parts in zip(*outputs, strict=True))


@directions
@cells_and_projections
def test_lengths_are_rows_run_alone(cell: str, P: int, D: int) -> None:
    args = leaves(build(Case(cell, T=6, B=7, P=P, D=D, lengths=True), DTYPE))
    assert args.lengths is not None
    together, alone = run_op(args), rows_alone(args, args.lengths.tolist())
    found, wanted = (
        dict(zip(("y", "hn", "cn"), outputs, strict=False)) | gradients(loss(outputs, args), args)
        for outputs in (together, alone)
    )
    assert_matches(found, wanted, dtype=DTYPE)
    padding = torch.arange(6).unsqueeze(1) >= args.lengths
    assert bool((together[0][padding] == 0).all())


@directions
@cells
def test_all_lengths_zero(cell: str, D: int) -> None:
    args = build(Case(cell, D=D), DTYPE)._replace(lengths=torch.zeros(3, dtype=torch.int64))
    found = evaluate(args)
    assert bool((found["y"] == 0).all())
    assert torch.equal(found["hn"], args.h0)
    for name in WEIGHTS:
        if getattr(args, name) is not None:
            assert bool((found[f"d{name}"] == 0).all()), name
    assert bool((found["dinput"] == 0).all())
    assert bool((found["dh0"] != 0).any())
    if args.c0 is not None:
        assert torch.equal(found["cn"], args.c0)


@cells
def test_full_lengths_are_no_lengths(cell: str) -> None:
    args = build(Case(cell, D=2), DTYPE)
    full = args._replace(lengths=torch.full((3,), 5))
    assert_matches(evaluate(full), evaluate(args), dtype=DTYPE)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_lengths_of_any_integer_type(dtype: torch.dtype) -> None:
    args = build(Case("gru", B=9, lengths=True), DTYPE)
    assert args.lengths is not None
    wanted = evaluate(args)
    spread = torch.zeros(18, dtype=dtype)
    spread[::2] = args.lengths.to(dtype)
    for lengths in (args.lengths.to(dtype), spread[::2]):
        assert_matches(evaluate(args._replace(lengths=lengths)), wanted, dtype=DTYPE)


@directions
@cells_and_projections
def test_rows_may_come_in_any_order(cell: str, P: int, D: int) -> None:
    args = build(Case(cell, T=6, B=7, P=P, D=D, lengths=True, resets=True, reset_state=True), DTYPE)
    order = torch.randperm(7)
    moved = {
        n: getattr(args, n)[:, order]
        for n in ("input", "resets", *STATES)
        if getattr(args, n) is not None
    }
    y, *finals = run_op(args)
    y_moved, *finals_moved = run_op(args._replace(**moved, lengths=args.lengths[order]))
    assert_matches({"y": y_moved}, {"y": y[:, order]}, dtype=DTYPE)
    for name, a, e in zip(("hn", "cn"), finals_moved, finals, strict=False):
        assert_matches({name: a}, {name: e[:, order]}, dtype=DTYPE)


# ---- packed -------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["packed", "packed_unsorted"])
@directions
@cells_and_projections
def test_packed_is_padded_with_lengths(cell: str, P: int, D: int, layout: str) -> None:
    case = Case(cell, T=6, B=7, P=P, D=D, layout=layout, resets=True, reset_state=True)
    args = build(case, DTYPE)
    assert args.batch_sizes is not None
    sorted_lengths = (torch.arange(7) < args.batch_sizes.unsqueeze(1)).sum(0)
    order = torch.arange(7) if args.order is None else args.order
    lengths = torch.empty(7, dtype=torch.int64)
    lengths[order] = sorted_lengths
    rows = [(t, int(order[j])) for t, n in enumerate(args.batch_sizes) for j in range(n)]
    steps, columns = (torch.tensor(v) for v in zip(*rows, strict=True))
    data = torch.full((6, 7, case.I), math.nan, dtype=DTYPE)
    data[steps, columns] = args.input
    padded = args._replace(input=data, batch_sizes=None, order=None, lengths=lengths)

    def picked(own: LayerInputs) -> tuple[Tensor, ...]:
        y, *finals = run_op(own)
        return y[steps, columns], *finals

    found, wanted = evaluate(args), evaluate(padded, picked)
    wanted["dinput"] = wanted["dinput"][steps, columns]
    assert_matches(found, wanted, dtype=DTYPE)


# ---- resets -------------------------------------------------------------------------------------
def segments(resets: list[bool], length: int) -> list[tuple[int, int]]:
    starts = [t for t in range(length) if t == 0 or resets[t]]
    return list(zip(starts, [*starts[1:], length], strict=True))


def run_segments(args: LayerInputs, row: int, length: int) -> tuple[Tensor, ...]:
    """Run the segments of one row separately, each direction in its own order, and join them.

    A segment begins with the state the sequence begins with, in the direction's first segment if no
    reset stands at its start, else with the reset state.
    """
    assert args.resets is not None
    resets = args.resets[:, row].tolist()
    parts = segments(resets, length)
    halves: list[list[Tensor]] = []
    finals: list[list[Tensor]] = []
    for d in range(args.h0.shape[0]):
        pieces = []
        ordered = parts if d == 0 else parts[::-1]
        for k, (begin, end) in enumerate(ordered):
            own = one_row(args, row, slice(begin, end))
            from_reset = resets[0] if d == 0 and k == 0 else k > 0
            if from_reset:
                for initial, reset in (("h0", "reset_h"), ("c0", "reset_c")):
                    state, given = getattr(own, initial), getattr(args, reset)
                    if state is not None:
                        new = torch.zeros_like(state) if given is None else given[:, row : row + 1]
                        own = own._replace(**{initial: new})
            y, *final = run_op(own)
            pieces.append(y.chunk(args.h0.shape[0], -1)[d])
        halves.append([torch.cat(pieces if d == 0 else pieces[::-1])])
        finals.append([s[d] for s in final])
    y = torch.cat([h[0] for h in halves], -1)
    return y, *(torch.stack(s) for s in zip(*finals, strict=True))


@pytest.mark.parametrize("reset_state", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@directions
@cells_and_projections
def test_resets_are_segments(cell: str, P: int, D: int, ragged: bool, reset_state: bool) -> None:
    case = Case(cell, T=8, B=6, P=P, D=D, resets=True, reset_state=reset_state)
    args = build(case, DTYPE)
    assert args.resets is not None
    args.resets[:, 0] = False  # one row without, and one with nothing but resets
    args.resets[:, 1] = True
    lengths = torch.full((6,), 8)
    if ragged:
        lengths = random_lengths(8, 6).clamp(min=1)
        args = args._replace(lengths=lengths)
    args = leaves(args)
    rows = []
    for row, length in enumerate(lengths.tolist()):
        y, *finals = run_segments(args, row, length)
        rows.append((torch.cat([y, y.new_zeros(8 - length, *y.shape[1:])]), *finals))
    apart = tuple(torch.cat(parts, 1) for parts in zip(*rows, strict=True))
    found, wanted = (
        dict(zip(("y", "hn", "cn"), outputs, strict=False)) | gradients(loss(outputs, args), args)
        for outputs in (run_op(args), apart)
    )
    assert_matches(found, wanted, dtype=DTYPE)
    if reset_state:
        assert bool((found["dreset_h"] != 0).any())


@directions
@cells_and_projections
def test_nothing_crosses_a_reset(cell: str, P: int, D: int) -> None:
    """Another input, or infinity, in one segment changes no bit of another, nor of its gradient."""
    T, B, cut = 7, 3, 4
    args = build(Case(cell, T=T, B=B, P=P, D=D), DTYPE)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[cut] = True
    args = args._replace(resets=resets)
    plain = evaluate(args)
    for value in (5.0, math.inf, math.nan):
        for changed, kept in ((slice(cut), slice(cut, T)), (slice(cut, T), slice(cut))):
            data = args.input.clone()
            data[changed] = value
            other = evaluate(args._replace(input=data))
            assert torch.equal(other["y"][kept], plain["y"][kept])
            assert torch.equal(other["dinput"][kept], plain["dinput"][kept])
            assert not torch.equal(other["y"][changed], plain["y"][changed])
    # And without the reset it does cross: the check above can fail.
    data = args.input.clone()
    data[0] = 5.0
    without = args._replace(resets=None)
    crossed = evaluate(without._replace(input=data))["y"]
    assert not torch.equal(crossed[cut:], evaluate(without)["y"][cut:])


@cells
def test_resets_beyond_a_length_do_not_matter(cell: str) -> None:
    args = build(Case(cell, T=6, B=5, D=2, lengths=True, resets=True, reset_state=True), DTYPE)
    assert args.resets is not None
    assert args.lengths is not None
    padding = torch.arange(6).unsqueeze(1) >= args.lengths
    wanted = evaluate(args)
    for resets in (args.resets | padding, args.resets & ~padding):
        assert_matches(evaluate(args._replace(resets=resets)), wanted, dtype=DTYPE)


@cells
def test_resets_of_any_strides(cell: str) -> None:
    args = build(Case(cell, T=6, B=4, D=2, resets=True), DTYPE)
    assert args.resets is not None
    column = args.resets[:, :1]
    wanted = evaluate(args._replace(resets=column.repeat(1, 4)))
    found = evaluate(args._replace(resets=column.expand(-1, 4)))
    assert_matches(found, wanted, dtype=DTYPE)
    spread = torch.zeros(12, 8, dtype=torch.bool)
    spread[::2, 1::2] = args.resets
    found = evaluate(args._replace(resets=spread[::2, 1::2]))
    assert_matches(found, evaluate(args), dtype=DTYPE)


# ---- padding, layouts ---------------------------------------------------------------------------
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("layout", ["padded", "batch_first"])
@cells_and_projections
def test_padding_reaches_nothing(cell: str, P: int, layout: str, garbage: float) -> None:
    case = Case(
        cell, T=6, B=5, P=P, D=2, layout=layout, lengths=True, resets=True, reset_state=True
    )
    args = build(case, DTYPE)
    assert args.lengths is not None
    padding = torch.arange(6).unsqueeze(1) >= args.lengths
    assert bool(padding.any())
    padding = padding.t() if args.batch_first else padding
    clean = args.input.masked_fill(padding.unsqueeze(-1), 0.0)
    dirty = args.input.masked_fill(padding.unsqueeze(-1), garbage)
    wanted = evaluate(args._replace(input=clean))
    found = evaluate(args._replace(input=dirty))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert bool(value.isfinite().all()), name
        assert torch.equal(found[name], value), name
    assert bool((found["dinput"][padding] == 0).all())
    with torch.no_grad():
        assert torch.equal(evaluate(args._replace(input=dirty))["y"], wanted["y"])


@directions
@cells_and_projections
def test_batch_first_is_a_transpose(cell: str, P: int, D: int) -> None:
    case = Case(cell, T=6, B=4, P=P, D=D, lengths=True, resets=True, reset_state=True)
    args = build(case, DTYPE)
    assert args.resets is not None
    swapped = args._replace(
        input=args.input.transpose(0, 1), resets=args.resets.t(), batch_first=True
    )
    found, wanted = evaluate(swapped), evaluate(args)
    found["dinput"] = found["dinput"].transpose(0, 1)
    assert_matches(found, wanted, dtype=DTYPE)


@cells
def test_directions_are_runs_of_their_own(cell: str) -> None:
    """The backward direction is a forward run over the reversed sequence with its own weights."""
    args = build(Case(cell, T=6, B=4, D=2), DTYPE)
    y, *finals = run_op(args)
    plain = args._replace(**dict.fromkeys((n for n in WEIGHTS if n.endswith("_reverse")), None))
    for d, half in enumerate(y.chunk(2, -1)):
        states = {
            n: getattr(args, n)[d : d + 1] for n in ("h0", "c0") if getattr(args, n) is not None
        }
        own = plain._replace(**states)
        if d == 1:
            data = args.input.flip(0)
            weights = {n.removesuffix("_reverse"): getattr(args, n) for n in WEIGHTS if "_rev" in n}
            own = own._replace(input=data, **weights)
        y_own, *finals_own = run_op(own)
        assert_matches({"y": half}, {"y": y_own.flip(0) if d else y_own}, dtype=DTYPE)
        for a, e in zip(finals, finals_own, strict=True):
            assert_matches({"hn": a[d : d + 1]}, {"hn": e}, dtype=DTYPE)


@cells
def test_chunks_are_the_whole(cell: str) -> None:
    """A sequence run in pieces, each beginning with the state the last one left."""
    args = build(Case(cell, T=12, B=3), DTYPE)
    y, *finals = run_op(args)
    pieces, own = [], args
    for begin, end in ((0, 1), (1, 6), (6, 12)):
        part, *states = run_op(own._replace(input=args.input[begin:end]))
        own = own._replace(**dict(zip(("h0", "c0"), states, strict=False)))
        pieces.append(part)
    assert_matches(
        {"y": torch.cat(pieces), "hn": states[0]}, {"y": y, "hn": finals[0]}, dtype=DTYPE
    )


# ---- the same through modules -------------------------------------------------------------------
@pytest.mark.parametrize("batch_first", [False, True])
def test_stacks_pass_structure_on(batch_first: bool) -> None:
    """Two layers with lengths and resets are one layer after the other."""
    module = rnnkern.LSTM(
        3, 5, num_layers=2, bidirectional=True, batch_first=batch_first, dtype=DTYPE
    )
    shape = (4, 6) if batch_first else (6, 4)
    x, resets = torch.randn(*shape, 3, dtype=DTYPE), torch.rand(shape) < 0.3
    lengths = torch.tensor([6, 0, 3, 1])
    hx = (torch.randn(4, 4, 5, dtype=DTYPE), torch.randn(4, 4, 5, dtype=DTYPE))
    reset = (torch.randn(4, 4, 5, dtype=DTYPE), torch.randn(4, 4, 5, dtype=DTYPE))
    y, (h, c) = module(x, hx, lengths=lengths, resets=resets, reset_state=reset)
    weights = list(module.parameters())
    data, finals = x, []
    for k in range(2):
        rows = slice(2 * k, 2 * k + 2)
        data, final = recurrent(
            "lstm",
            data,
            weights[8 * k : 8 * k + 8],
            tuple(s[rows] for s in hx),
            bidirectional=True,
            batch_first=batch_first,
            lengths=lengths,
            resets=resets,
            reset_states=tuple(s[rows] for s in reset),
        )
        finals.append(final)
    assert_matches({"y": y}, {"y": data}, dtype=DTYPE)
    assert_matches({"hn": h}, {"hn": torch.cat([f[0] for f in finals])}, dtype=DTYPE)
    assert_matches({"cn": c}, {"cn": torch.cat([f[1] for f in finals])}, dtype=DTYPE)

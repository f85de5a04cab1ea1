"""Random arguments for one layer of any cell and feature, and ways to run and compare them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias
from unittest import mock

import pytest
import torch
from rnnkern import _native, arguments, cuda
from rnnkern.cells import CELLS
from rnnkern.fallback import reference_layer
from rnnkern.ops import DIFFERENTIABLE, LayerInputs
from tolerances import Kind, assert_close
from torch import Tensor

Layout = Literal["padded", "batch_first", "packed", "packed_unsorted"]
LAYOUTS: tuple[Layout, ...] = ("padded", "batch_first", "packed", "packed_unsorted")
Results: TypeAlias = dict[str, Tensor]

# These add kernels for bfloat16 data to those of AVX-512; for other data they are the same.
BFLOAT16_ISAS = [i for i in _native.supported_isas() if i in ("avx512_bf16", "amx_bf16")]
ISAS = [i for i in _native.supported_isas() if i not in BFLOAT16_ISAS]
KERNELS = [(isa, dtype) for isa in ISAS for dtype in (torch.float32, torch.float64)]
KERNELS += [(isa, torch.bfloat16) for isa in BFLOAT16_ISAS]
OUTPUTS = ("y", "hn", "cn")


@dataclass(frozen=True)
class Case:
    """The sizes and features of one layer; sizes are named as in the kernels."""

    cell: str
    T: int = 5
    B: int = 3
    I: int = 4
    H: int = 5
    P: int = 0  # projected size; 0: no projection
    D: int = 1
    layout: Layout = "padded"
    lengths: bool = False
    resets: bool = False
    reset_state: bool = False
    bias: bool = True

    @property
    def packed(self) -> bool:
        """Whether the data rows are those of a PackedSequence."""
        return self.layout.startswith("packed")

    def __str__(self) -> str:
        """Return a short name for a test's id: the cell and what differs from the defaults."""
        parts = [self.cell]
        for item in dataclasses.fields(self)[1:]:
            value = getattr(self, item.name)
            if value is True:
                parts.append(item.name)
            elif value is False:
                parts.append(f"no_{item.name}")
            else:
                parts.append(value if isinstance(value, str) else f"{item.name}{value}")
            if value == item.default:
                parts.pop()
        return "-".join(parts)


def feature_cases(**sizes: int) -> list[Case]:
    """Return for every cell a handful of cases that between them use every sequence feature."""
    cases = []
    for cell, info in CELLS.items():
        cases.append(Case(cell, **sizes))
        cases.append(Case(cell, D=2, lengths=True, layout="batch_first", **sizes))
        cases.append(Case(cell, D=2, resets=True, reset_state=True, bias=False, **sizes))
        cases.append(
            Case(cell, layout="packed_unsorted", D=2, resets=True, reset_state=True, **sizes)
        )
        cases.append(Case(cell, lengths=True, resets=True, reset_state=True, D=2, **sizes))
        if info.projects:
            cases.append(Case(cell, P=2, D=2, lengths=True, resets=True, reset_state=True, **sizes))
            cases.append(Case(cell, P=2, layout="packed", bias=False, **sizes))
    return cases


# ---- building -----------------------------------------------------------------------------------
def random_lengths(T: int, B: int) -> Tensor:
    """Return [B] lengths in [0, T], a full and, where there is room, an empty row among them.

    They are on the host, as torch has them.
    """
    lengths = torch.randint(0, T + 1, (B,), device="cpu")
    lengths[torch.randint(B, (), device="cpu")] = T
    if B > 1:
        lengths[(int(lengths.argmax()) + 1) % B] = 0
    return lengths


def random_resets(T: int, B: int) -> Tensor:
    """Return bool [T,B], about a third set; the first and the last step of some row among them."""
    resets = torch.rand(T, B) < 0.3
    resets[0, torch.randint(B, ())] = True
    resets[-1, torch.randint(B, ())] = True
    return resets


def build(case: Case, dtype: torch.dtype = torch.float64) -> LayerInputs:
    """Draw the arguments from torch's generator; every number is exact in float32.

    They are on torch's default device, but what counts rows and steps is on the host.
    """
    c, info = case, CELLS[case.cell]
    P = c.P or c.H

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype)

    scale = (1 / (c.H + c.I)) ** 0.5
    directions: list[Tensor | None] = []
    for d in range(2):
        present = d < c.D
        widths = (c.I, P) if present else ()
        directions += [normal(info.gates * c.H, w, scale=scale) for w in widths] or [None, None]
        biases = present and c.bias
        directions += [normal(info.gates * c.H, scale=0.5) if biases else None for _ in range(2)]
        directions += [normal(P, c.H, scale=c.H**-0.5) if present and c.P else None]

    lengths = batch_sizes = order = None
    rows = c.T * c.B
    if c.packed:
        own = random_lengths(c.T, c.B).clamp(min=1)
        if c.layout == "packed_unsorted":
            order = own.argsort(descending=True, stable=True)
        own = own.sort(descending=True).values
        batch_sizes = (torch.arange(c.T, device="cpu").unsqueeze(1) < own).sum(1)
        rows = int(own.sum())
    elif c.lengths:
        lengths = random_lengths(c.T, c.B)
    if c.packed:
        data = normal(rows, c.I)
    else:
        data = normal(*((c.B, c.T) if c.layout == "batch_first" else (c.T, c.B)), c.I)
    resets = random_resets(c.T, c.B) if c.resets else None
    if resets is not None and c.layout == "batch_first":
        resets = resets.t().contiguous()
    two = info.states == 2
    return LayerInputs(
        c.cell,
        data,
        normal(c.D, c.B, P),
        normal(c.D, c.B, c.H) if two else None,
        *directions,
        batch_sizes,
        order,
        lengths,
        resets,
        normal(c.D, c.B, P) if c.reset_state else None,
        normal(c.D, c.B, c.H) if c.reset_state and two else None,
        c.layout == "batch_first",
    )


def mapped(args: LayerInputs, change: Callable[[Tensor], Tensor]) -> LayerInputs:
    """Return the arguments with `change` applied to every differentiable tensor."""
    present = {name: getattr(args, name) for name in DIFFERENTIABLE}
    return args._replace(**{name: change(t) for name, t in present.items() if t is not None})


def cast(args: LayerInputs, dtype: torch.dtype) -> LayerInputs:
    """Return the arguments in another floating-point type."""
    return mapped(args, lambda t: t.to(dtype))


def clear_of_kink(args: LayerInputs) -> LayerInputs:
    """Return arguments with which no rounding changes a sign of what the relu cell is applied to.

    There its gradients jump. The first feature becomes ±1 with weights of ±16, all signs drawn, so
    that a unit is far above zero at about half of all steps and far below at the others. What is
    added to that, with recurrent weights of a fifth, stays below 12 by five standard deviations.
    """
    if args.cell != "rnn_relu":
        return args
    args = mapped(args, lambda t: t.detach().clone())
    for w_ih, w_hh, *_ in args.directions:
        w_ih[:, 0] = 16 * _signs(w_ih[:, 0])
        w_hh /= 5
    args.input[..., 0] = _signs(args.input[..., 0])
    return args


def _signs(like: Tensor) -> Tensor:
    return torch.randint(0, 2, like.shape).to(like.dtype) * 2 - 1


def on_device(args: LayerInputs, device: str) -> LayerInputs:
    """Return the arguments on a device, but batch_sizes, which torch keeps on the host."""
    moved: list[Any] = [t.to(device) if isinstance(t, Tensor) else t for t in args]
    return LayerInputs(*moved)._replace(batch_sizes=args.batch_sizes)


def first_rows(args: LayerInputs, rows: int) -> LayerInputs:
    """Return the arguments of the first rows of a padded batch."""
    per_row = {name: getattr(args, name) for name in ("input", "h0", "c0", "reset_h", "reset_c")}
    cut = {name: t[:, :rows] for name, t in per_row.items() if t is not None}
    if args.resets is not None:
        cut["resets"] = args.resets[:, :rows]
    return args._replace(**cut)


def leaves(args: LayerInputs, needs: Iterable[str] = DIFFERENTIABLE) -> LayerInputs:
    """Return copies that require gradients where `needs` says so."""
    wanted = set(needs)
    copies = mapped(args, lambda t: t.detach().clone())
    for name in DIFFERENTIABLE:
        tensor = getattr(copies, name)
        if tensor is not None:
            tensor.requires_grad_(name in wanted)
    return copies


# ---- running ------------------------------------------------------------------------------------
def run_op(args: LayerInputs, save: bool = True) -> tuple[Tensor, ...]:
    """Run the operator; returns (y, hn) or (y, hn, cn)."""
    y, hn, cn, *_ = torch.ops.rnnkern.layer(*args, save)
    return (y, hn) if args.c0 is None else (y, hn, cn)


def cotangents(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return fixed random output gradients, the same for equal shapes and exact in bfloat16."""
    generator = torch.Generator("cpu").manual_seed(7)
    drawn = [torch.randn(t.shape, generator=generator, device="cpu").bfloat16() for t in outputs]
    return [d.to(t.device, t.dtype) for d, t in zip(drawn, outputs, strict=True)]


def evaluate(
    args: LayerInputs,
    function: Callable[[LayerInputs], tuple[Tensor, ...]] = run_op,
    *,
    needs: Iterable[str] = DIFFERENTIABLE,
) -> Results:
    """Run forward and backward on fresh leaves; returns outputs, and gradients as "d" + name."""
    own = leaves(args, needs)
    outputs = function(own)
    results = dict(zip(OUTPUTS, (t.detach() for t in outputs), strict=False))
    differentiable = [t for t in outputs if t.requires_grad]
    if differentiable:
        weights = dict(zip(map(id, outputs), cotangents(outputs), strict=True))
        torch.autograd.backward(differentiable, [weights[id(t)] for t in differentiable])
    for name in DIFFERENTIABLE:
        tensor = getattr(own, name)
        if tensor is not None and tensor.grad is not None:
            results["d" + name] = tensor.grad
    return results


def expected(args: LayerInputs, *, needs: Iterable[str] = DIFFERENTIABLE) -> Results:
    """Return what the reference computes in float64."""
    return evaluate(cast(args, torch.float64), reference_layer, needs=needs)


@contextmanager
def cuda_extension(native: Any, why_not: str = "") -> Iterator[None]:
    """Put a module, or None, in the place of rnnkern._cuda; nothing is known of its devices yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "load_cuda", lambda: (native, why_not))
        for name in ("_missing", "_uncooperative"):
            patch.setattr(cuda, name, lru_cache(getattr(cuda, name).__wrapped__))
        yield


@contextmanager
def cuda_operators(native: Any, why_not: str = "", device: int = 0) -> Iterator[None]:
    """Run the operators on CPU tensors as on a GPU with such an extension."""

    def operator(name: str) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *args: cuda.run(name, device, args)

    library = torch.library.Library("rnnkern", "IMPL")
    for name in ("layer", "layer_backward"):
        library.impl(name, operator(name), "CPU", allow_override=True)
    try:
        with (
            cuda_extension(native, why_not),
            mock.patch.object(arguments, "RECOVERING", frozenset()),  # as a GPU does not
        ):
            yield
    finally:
        library._destroy()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the kernels of one ISA, and those of the one before afterwards."""
    before = _native.isa()
    _native.select_isa(name)
    try:
        yield
    finally:
        _native.select_isa(before)


# ---- comparing ----------------------------------------------------------------------------------
def assert_matches(found: Results, wanted: Results, *, dtype: torch.dtype) -> None:
    """Compare with float64 results, within the table's limits for a computation in `dtype`.

    A gradient that one side lacks counts as zero on that side, as autograd has it.
    """
    for name in sorted(found.keys() | wanted.keys()):
        kind: Kind = "output" if name in OUTPUTS else "gradient"
        one, other = found.get(name), wanted.get(name)
        some = one if one is not None else other
        assert some is not None
        a, e = (torch.zeros_like(some) if t is None else t for t in (one, other))
        assert_close(a.double(), e.double(), kind=kind, dtype=dtype, name=name)


def assert_identical(found: Results, wanted: Results, where: str = "") -> None:
    """Compare bit by bit."""
    assert found.keys() == wanted.keys(), where
    for name, value in wanted.items():
        assert same_bits(found[name], value), f"{where}: {name} differs"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes, NaN payloads and signs of zero included."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    as_integers: Any = [t.contiguous().view(integers) for t in (a, b)]
    return a.dtype == b.dtype and torch.equal(*as_integers)


# ---- other processes ----------------------------------------------------------------------------
def run_python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script that may hang, crash or change its process, with this one's import path."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )

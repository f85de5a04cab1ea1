"""What the operators make sure of before the native core reads through bare addresses.

Modules raise torch's own messages earlier; these also stop a direct call of an operator. Each
names the argument, what was expected and what came.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from rnnkern.arguments import DIFFERENTIABLE, BackwardInputs, Kept, LayerInputs, Sizes, sizes_of
from rnnkern.cells import Cell

STEERING = ("batch_sizes", "order", "lengths", "resets")
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_layer(a: LayerInputs, cell: Cell) -> Sizes:
    """Check every argument of a layer and return its sizes."""
    _ranks(a)
    s = sizes_of(a, cell)
    if s.T < 1:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    _presence(a, cell, s)
    if a.batch_sizes is None:
        _shape("input", a.input, (s.B, s.T, s.I) if a.batch_first else (s.T, s.B, s.I))
    gh = s.G * s.H
    for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(a.directions):
        suffix = "_reverse" if d else ""
        _shape("w_ih" + suffix, w_ih, (gh, s.I))
        _shape("w_hh" + suffix, w_hh, (gh, s.P))
        _shape("b_ih" + suffix, b_ih, (gh,))
        _shape("b_hh" + suffix, b_hh, (gh,))
        _shape("w_hr" + suffix, w_hr, (s.P, s.H))
    _shape("c0", a.c0, (s.D, s.B, s.H))
    _shape("reset_h", a.reset_h, (s.D, s.B, s.P))
    _shape("reset_c", a.reset_c, (s.D, s.B, s.H))
    if a.input.dtype not in KERNEL_DTYPES:
        raise ValueError(f"input: expected one of {KERNEL_DTYPES}, got {a.input.dtype}")
    for name in DIFFERENTIABLE:
        t = getattr(a, name)
        if t is not None and t.dtype != a.input.dtype:
            raise ValueError(f"{name}: expected {a.input.dtype}, got {t.dtype}")
    check_devices(a)
    return s


def check_devices(a: LayerInputs, g: BackwardInputs | None = None) -> None:
    """Check that the data lies on one device; what only steers may lie on any that has values."""
    device = a.input.device
    for group in (a,) if g is None else (a, g):
        for name, t in zip(group._fields, group, strict=True):
            if not isinstance(t, Tensor) or t.device == device:
                continue
            if name not in STEERING or t.device.type == "meta":
                raise ValueError(f"{name}: expected a tensor on {device}, got {t.device}")


def check_backward(
    s: Sizes, a: LayerInputs, g: BackwardInputs, kept: Kept, computed: torch.dtype
) -> None:
    """Check the arguments of ``layer_backward`` beyond those of the layer."""
    for name, shape in zip(kept._fields, kept, strict=True):
        t = getattr(g, name)
        _shape(name, t, shape)
        if t.dtype != computed:
            raise ValueError(f"{name}: expected {computed}, got {t.dtype}")
        if not t.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor")
    rows = (s.N,) if a.batch_sizes is not None else (s.T, s.B)
    _shape("dy", g.dy, (*rows, s.D * s.P))
    _shape("dhn", g.dhn, (s.D, s.B, s.P))
    _shape("dcn", g.dcn, (s.D, s.B, s.H))
    for name in ("dy", "dhn", "dcn"):
        t = getattr(g, name)
        if t is not None and t.dtype != a.input.dtype:
            raise ValueError(f"{name}: expected {a.input.dtype}, got {t.dtype}")
    check_devices(a, g)
    if len(g.output_mask) != len(DIFFERENTIABLE):
        raise ValueError(
            f"output_mask: expected {len(DIFFERENTIABLE)} entries, got {len(g.output_mask)}"
        )


def check_batch_sizes(batch_sizes: Tensor, s: Sizes) -> tuple[Tensor, Tensor]:
    """Check a packed sequence's sizes; return the rows of each step, and its first row."""
    active = integers("batch_sizes", batch_sizes, (s.T,))
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
    return active, offset


def check_order(order: Tensor | None, s: Sizes) -> Tensor | None:
    """Check the batch row at each sorted position of a packed sequence; return it on the CPU."""
    if order is None:
        return None
    order = integers("order", order, (s.B,))
    if not torch.equal(order.sort().values, torch.arange(s.B, device=order.device)):
        raise ValueError(f"order: expected a permutation of {s.B} rows")
    return order


def check_resets(a: LayerInputs, s: Sizes) -> None:
    """Check the type and the shape of the resets."""
    expected = (s.B, s.T) if a.batch_first else (s.T, s.B)
    if a.resets is not None and (a.resets.dtype != torch.bool or a.resets.shape != expected):
        raise ValueError(
            f"resets: expected bool {list(expected)}, got {a.resets.dtype} {list(a.resets.shape)}"
        )


def check_lengths(a: LayerInputs, s: Sizes) -> Tensor | None:
    """Check the lengths and return them as int64 on the CPU, or None if every row has T steps."""
    if a.lengths is None:
        return None
    lengths = integers("lengths", a.lengths, (s.B,))
    if is_batchedtensor(lengths):  # nobody can look at the values that vmap maps over
        return lengths
    low, high = (int(v) for v in lengths.aminmax()) if s.B else (0, 0)
    if low < 0 or high > s.T:
        raise ValueError(f"lengths: expected values in [0, {s.T}], got {low}..{high}")
    return lengths if low < s.T else None


def integers(
    name: str, t: Tensor, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """Return integers of any type, device and stride as the native core reads them."""
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool or t.shape != shape:
        raise ValueError(f"{name}: expected integers {list(shape)}, got {t.dtype} {list(t.shape)}")
    return moved(name, t, device).to(torch.int64).contiguous()


def moved(name: str, t: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device, where its copy is queued and not waited for.

    Pinned memory is read only when the copy's turn comes, and the caller may have written to it by
    then; from pageable memory the driver may wait for its turn. So a pinned copy of our own is
    sent, which torch's allocator hands on only when it has been read. A graph would read that
    memory again in every replay, when it is others'; so it cannot capture the copy.
    """
    if t.device == torch.device(device):
        return t
    if torch.device(device).type != "cuda" or t.device.type != "cpu":
        return t.to(device)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{name}: expected on {device} while a CUDA graph is captured, got on cpu"
            )
    return torch.empty_like(t, pin_memory=True).copy_(t).to(device, non_blocking=True)


def _ranks(a: LayerInputs) -> None:
    if a.batch_sizes is not None:
        if a.lengths is not None:
            raise ValueError("lengths: packed input carries its own lengths; give one or the other")
        if a.batch_first:
            raise ValueError("batch_first: expected False for packed input, got True")
        _rank("batch_sizes", a.batch_sizes, 1)
    elif a.order is not None:
        raise ValueError("order: expected None without batch_sizes")
    _rank("input", a.input, 3 if a.batch_sizes is None else 2)
    _rank("h0", a.h0, 3)
    _rank("w_hr", a.w_hr, 2)


def _presence(a: LayerInputs, cell: Cell, s: Sizes) -> None:
    """Check that what belongs together came together."""
    if (a.w_ih_reverse is None) != (a.w_hh_reverse is None):
        raise ValueError("w_hh_reverse: expected with w_ih_reverse, or neither")
    if len(a.directions) != s.D:
        raise ValueError(f"h0: expected one state a direction, got {list(a.h0.shape)}")
    if s.D == 1 and not a.b_ih_reverse is a.b_hh_reverse is a.w_hr_reverse is None:
        raise ValueError(
            "b_ih_reverse, b_hh_reverse, w_hr_reverse: expected None without w_ih_reverse"
        )
    if s.D == 2 and (a.w_hr is None) != (a.w_hr_reverse is None):
        raise ValueError("w_hr_reverse: expected a projection in both directions or in none")
    if a.w_hr is not None and not cell.projects:
        raise ValueError(f"w_hr: {cell.name} has no projection")
    if a.w_hr is not None and 0 in a.w_hr.shape:
        raise ValueError(f"w_hr: expected [P, H] of at least 1 each, got {list(a.w_hr.shape)}")
    if (a.c0 is None) != (cell.states == 1):
        raise ValueError(f"c0: {cell.name} has {cell.states} state(s)")
    if a.resets is None and (a.reset_h is not None or a.reset_c is not None):
        raise ValueError("reset_h, reset_c: expected None without resets")
    if (a.reset_h is None or cell.states == 1) != (a.reset_c is None):
        raise ValueError(f"reset_h, reset_c: {cell.name} has {cell.states} state(s)")


def _rank(name: str, t: Tensor | None, rank: int) -> None:
    if t is not None and t.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimension(s), got {list(t.shape)}")


def _shape(name: str, t: Tensor | None, shape: tuple[int, ...]) -> None:
    if t is not None and t.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")

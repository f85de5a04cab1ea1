"""The backend of NVIDIA GPUs; see ``csrc/cuda``.

A call only queues work on torch's current stream: it never waits for the device or reads from it.
So what lies on the device is not checked on the host. Lengths that are out of range make every
result of their row NaN; a row that the order of packed rows leaves out has NaN as its final states.
"""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rnnkern import cuda_products, fallback, kernels
from rnnkern._native import load_cuda
from rnnkern.arguments import LayerInputs, Sizes
from rnnkern.cells import Cell, get_cell
from rnnkern.checks import (
    check_batch_sizes,
    check_lengths,
    check_order,
    check_resets,
    integers,
    moved,
)
from rnnkern.cuda_gemm import gemm
from rnnkern.cuda_precision import uses_tf32
from rnnkern.kernels import Backend, Backward, Steps, address

Plan: TypeAlias = dict[str, dict[str, Any]]
_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
PLANS = ("stepwise", "persistent")
_INPUT, _PROJECTION = map(LayerInputs._fields.index, ("input", "w_hr"))
# What CUDA says of a device, a driver or a build and will say again. Any other error may pass.
_LASTING = frozenset(
    f"cudaError{name}"
    for name in (
        *("NoDevice", "InvalidDevice", "NotSupported"),
        *("InsufficientDriver", "CallRequiresNewerDriver", "StubLibrary", "SystemDriverMismatch"),
        *("NoKernelImageForDevice", "InvalidKernelImage", "InvalidDeviceFunction"),
        *("InvalidPtx", "UnsupportedPtxVersion", "CompatNotSupportedOnDevice"),
        *("JitCompilerNotFound", "JitCompilationDisabled"),
    )
)


def pinned_plan() -> str:
    """Return which plan ``RNNKERN_CUDA_PLAN`` asks for; the first of `PLANS` where it is not set.

    Raises
    ------
    ValueError
        If it is set to anything else.
    """
    name = os.environ.get("RNNKERN_CUDA_PLAN", PLANS[0])
    if name not in PLANS:
        raise ValueError(f"RNNKERN_CUDA_PLAN: expected {' or '.join(PLANS)}, got {name!r}")
    return name


class Cuda(Backend):
    """All four types; 16-bit data is summed, and c carried from step to step, in float32.

    Parameters
    ----------
    native : module
        ``rnnkern._cuda``, or its like on the host, for tests.
    device : int
        Where to run if the data is on no GPU, which only that like can do.
    """

    def __init__(self, native: Any, device: int = 0) -> None:
        self._native, self._device = native, device

    def computed(self, dtype: torch.dtype) -> torch.dtype:
        """Return the data's own type."""
        return dtype

    def summed(self, dtype: torch.dtype) -> torch.dtype:
        """Return float64 for float64, float32 for the others."""
        return torch.float64 if dtype == torch.float64 else torch.float32

    def project(self, a: LayerInputs, s: Sizes, steps: Steps, save: bool) -> Tensor:
        """Return x, by one product."""
        return cuda_products.project(gemm(a.input, uses_tf32(s.T)), a, s)

    def differentiate(self, run: Backward) -> None:
        """Run the recurrence, then one product for each gradient of the input and the weights."""
        cuda_products.differentiate(gemm(run.a.input, uses_tf32(run.s.T)), run)

    def steps(self, a: LayerInputs, s: Sizes) -> Steps:
        """Return packed rows as they are, and padded ones with their lengths on the device."""
        device = a.input.device
        active = offset = order = lengths = padding = None
        if a.batch_sizes is not None:
            active, offset = check_batch_sizes(a.batch_sizes, s)
            if a.order is None or a.order.device.type == "cpu":
                order = check_order(a.order, s)
                order = None if order is None else moved("order", order, device)
            else:
                order = integers("order", a.order, (s.B,), device).clamp(0, s.B - 1)
        elif a.lengths is not None:
            on_device = a.lengths.device.type != "cpu"
            if on_device or check_lengths(a, s) is not None:
                lengths = integers("lengths", a.lengths, (s.B,), device)
                padding = torch.arange(s.T, device=device).unsqueeze(1) >= lengths
        check_resets(a, s)
        resets = None if a.resets is None else moved("resets", a.resets, device)
        strides = kernels.time_major_strides(resets, a.batch_first)
        native = (s.T, s.B, *map(address, (active, order, offset, resets)), *strides)
        return Steps((*native, address(lengths)), (active, order, offset, resets, lengths), padding)

    def forward(self, cell: Cell, like: Tensor, *problem: Any) -> None:
        """Queue the recurrence."""
        self._run("forward", cell, like, problem)

    def backward(self, cell: Cell, like: Tensor, *problem: Any) -> None:
        """Queue the recurrence's gradient."""
        self._run("backward", cell, like, problem)

    def _run(self, which: str, cell: Cell, like: Tensor, problem: tuple[Any, ...]) -> None:
        run = getattr(self._native, f"{which}_{_NAMES[like.dtype]}")
        stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
        device = like.device.index if like.is_cuda else self._device
        how = (uses_tf32(T=problem[0][0]), pinned_plan() == "persistent")
        size = run(cell.index, (device, stream, 0, *how), *problem)
        # The allocator hands it on only to work that comes later on the same stream.
        workspace = like.new_empty(size, dtype=torch.uint8)
        with _current(like.device):
            run(cell.index, (device, stream, workspace.data_ptr(), *how), *problem)

    def plan(
        self, cell: Cell, data: Tensor, dtype: torch.dtype, T: int, B: int, H: int, D: int, P: int
    ) -> Plan:
        """Return how both passes would run; `P` is 0 without a projection."""
        device = data.device.index if data.is_cuda else self._device
        where = (device, 0, 0, uses_tf32(T), pinned_plan() == "persistent")
        choose = getattr(self._native, f"plan_{_NAMES[dtype]}")
        with _current(data.device):
            chosen: Plan = choose(cell.index, where, (B, H, D, P))
        return chosen


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU current; torch's guard, unlike the runtime's, makes no context on another one.

    It cannot for a device that torch does not find, of which the kernels are asked all the same.
    """
    if device.type != "cuda" or device.index >= torch.cuda.device_count():
        return nullcontext()
    return torch.cuda.device(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def missing(index: int, stages: int = 1) -> str | None:
    """Return why the kernels do not run on a device, with a warning the first time; or None.

    Parameters
    ----------
    index : int
        Of the device.
    stages : int
        Of a step, as `stages` has them: those of several are cooperative launches.

    Raises
    ------
    RuntimeError
        If the device fails for a reason that may pass, such as want of memory.
    """
    reason = _missing(index)
    return reason if reason is not None or stages == 1 else _uncooperative(index)


def stages(cell: Cell, projects: bool) -> int:
    """Return how many stages a step has, each of which needs all of the one before."""
    return cell.phases + projects


@lru_cache  # which keeps no exceptions
def _missing(index: int) -> str | None:
    native, reason = load_cuda()
    if native is not None:
        with _current(torch.device("cuda", index)):
            problem = _lasting(index, native.device_problem(index))
        reason = f"the CUDA kernels do not run on device {index} ({problem})" if problem else ""
    return _told(reason)


@lru_cache
def _uncooperative(index: int) -> str | None:
    with _current(torch.device("cuda", index)):
        problem = _lasting(index, load_cuda()[0].cooperation_problem(index))
    reason = (
        f"device {index} has no cooperative launches ({problem}), as a step of two stages needs"
    )
    return _told(reason if problem else "")


def _told(reason: str) -> str | None:
    if reason:
        warnings.warn(f"rnnkern: {reason}; the reference runs instead", stacklevel=2)
    return reason or None


def _lasting(index: int, problem: str) -> str:
    """Return a problem that stays as long as the process does, or ""; raise for any other."""
    name = problem.partition(":")[0]
    if problem and name not in _LASTING:
        kind = torch.OutOfMemoryError if name == "cudaErrorMemoryAllocation" else RuntimeError
        raise kind(f"rnnkern: device {index}: {problem}")
    return problem


def plan(
    cell: Cell, data: Tensor, dtype: torch.dtype, T: int, B: int, H: int, D: int, P: int
) -> Plan:
    """Return how the kernels would run T steps of B rows of a type, where they do."""
    return Cuda(load_cuda()[0]).plan(cell, data, dtype, T, B, H, D, P)


def summary() -> str:
    """Return one line: whether there are kernels, what runs on each GPU, and a pinned plan."""
    native, why_not = load_cuda()
    parts = [f"no kernels: {why_not}" if native is None else "rnnkern._cuda is built"]
    if not torch.cuda.is_available():
        problem = "" if native is None else native.device_problem(0)
        parts.append("torch finds no device" + (f" ({problem})" if problem else ""))
    for i in range(torch.cuda.device_count()):
        problem = "no kernels"
        if native is not None:
            with _current(torch.device("cuda", i)):
                problem = native.device_problem(i)
        what = f"the reference runs ({problem})" if problem else "the kernels run"
        parts.append(f"{i}: {torch.cuda.get_device_name(i)}, {what}")
    pinned = os.environ.get("RNNKERN_CUDA_PLAN")
    if pinned is not None:
        known = "" if pinned in PLANS else f", which is not {' or '.join(PLANS)}"
        parts.append(f"plan by RNNKERN_CUDA_PLAN={pinned}{known}")
    return "; ".join(parts)


def _without_autocast() -> AbstractContextManager[object]:
    """Keep autocast from changing the types of the products inside an operator."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
    guard: AbstractContextManager[object] = torch._C._ExcludeDispatchKeyGuard(keys)
    return guard


def run(operator: str, index: int, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Run ``layer`` or ``layer_backward`` on a device: the kernel, or the reference without one."""
    needed = stages(get_cell(args[0]), args[_PROJECTION] is not None)
    with _without_autocast():
        if missing(index, needed) is not None:
            return getattr(fallback, operator)(*args)  # type: ignore[no-any-return]
        backend = Cuda(load_cuda()[0], index)
        return getattr(kernels, operator)(backend, *args)  # type: ignore[no-any-return]


def layer(*args: Any) -> tuple[Tensor, ...]:
    """Run ``rnnkern::layer``."""
    return run("layer", args[_INPUT].device.index, args)


def layer_backward(*args: Any) -> tuple[Tensor, ...]:
    """Run ``rnnkern::layer_backward``."""
    return run("layer_backward", args[_INPUT].device.index, args)

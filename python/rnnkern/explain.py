"""Say which path a module takes for an input, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnkern import cpu, cuda, layers
from rnnkern._native import isa
from rnnkern.cells import get_cell
from rnnkern.modules import _Cell, _Recurrent

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """How a call would run.

    Attributes
    ----------
    cell : str
        The cell's name in the registry.
    backend : str
        "cpu" or "cuda" for the native kernels, "reference" for plain torch operations.
    reason : str
        Why the reference runs, or "" when a kernel does.
    dtype, compute_dtype : torch.dtype
        Of the data, and of the arithmetic.
    isa : str
        The instruction set of the CPU kernels; "" otherwise.
    threads : int
        Threads of the team, from ``torch.get_num_threads()`` and the plan.
    plan : dict
        On a CPU how the team shares each pass: groups over directions, batch rows and hidden units,
        and helpers, which make the products of whole chunks of steps. On a GPU, of each pass, its
        kind ("stepwise": a launch for each step, or "persistent": one for all), whether tensor
        cores multiply, the batch rows of a block, whether it has more units where these have few
        products, and of a persistent kernel the groups, the blocks of each, and the bytes of
        weights that a block keeps and streams.
    """

    cell: str
    backend: str
    reason: str
    dtype: torch.dtype
    compute_dtype: torch.dtype
    isa: str = ""
    threads: int = 0
    plan: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return it as lines for people."""
        if self.backend == "reference":
            return f"{self.cell}: reference (torch operations), because {self.reason}"
        types = str(self.dtype).removeprefix("torch.")
        if self.dtype != self.compute_dtype:
            types += f", computed in {self.compute_dtype}".replace("torch.", "")
        if self.backend == "cuda":
            lines = [f"{self.cell}: cuda kernel, {types}"]
            lines += [f"  {name}: {_launches(plan)}" for name, plan in self.plan.items()]
            return "\n".join(lines)
        lines = [f"{self.cell}: {self.backend} kernel, {self.isa}, {types}"]
        for name, plan in self.plan.items():
            groups = ", ".join(
                f"{plan[key]:.0f} {what}"
                for key, what, least in (
                    ("direction_groups", "over directions", 2),
                    ("row_groups", "over batch rows", 2),
                    ("unit_groups", "over hidden units", 2),
                    ("helpers", "for the products of whole chunks", 1),
                )
                if plan[key] >= least
            )
            lines.append(
                f"  {name}: {plan['threads']:.0f} thread(s){': ' + groups if groups else ''};"
                f" model {plan['step_microseconds']:.1f} µs a step"
            )
        return "\n".join(lines)


def _launches(plan: dict[str, Any]) -> str:
    """Return in words how a pass runs on a GPU."""
    cores = "tensor cores" if plan["tensor_cores"] else "fused multiply-adds"
    units = "up to 64 units" if plan["wide_blocks"] else "16 units"
    words = f"one launch a step, {cores}, {plan['rows_of_a_block']} rows of {units} a block"
    if plan["kind"] == "persistent":
        words = words.replace("a step", "for all steps") + (
            f" at a time; {plan['groups']} group(s) a direction of {plan['blocks_of_a_group']}"
            f" block(s), {plan['resident_bytes']} bytes of weights in each"
        )
        if plan["streamed_bytes"]:
            words += f", {plan['streamed_bytes']} streamed at every step"
    return words


def explain(module: _Recurrent | _Cell, input: Tensor | PackedSequence) -> Explanation:
    """Return which path `module` takes for `input`: cell, backend, ISA, threads and plan.

    Parameters
    ----------
    module : rnnkern module
        One of LSTM, GRU, RNN and their cells.
    input : Tensor or PackedSequence
        As for the module's forward.

    Returns
    -------
    Explanation
        Its attributes for programs, its ``str`` for people.

    Raises
    ------
    TypeError
        If the module is not one of rnnkern's.
    """
    if isinstance(module, _Recurrent):
        module._check(input, None, getattr(input, "batch_sizes", None))
        name, D, P = module._cell_name(), 2 if module.bidirectional else 1, module.proj_size
        batch_first = module.batch_first
    elif isinstance(module, _Cell):
        name, D, P, batch_first = module._cell_name(), 1, 0, False
        module._check_input(input)  # type: ignore[arg-type]
    else:
        raise TypeError(f"module: expected one of rnnkern's modules, got {type(module).__name__}")
    data = input.data if isinstance(input, PackedSequence) else input
    dtype = layers.autocast_dtype(data) if layers.autocasts(data) else data.dtype
    reason = layers.missing_kernel(data, get_cell(name), P > 0)
    if reason is not None:
        return Explanation(name, "reference", reason, data.dtype, dtype)
    if isinstance(input, PackedSequence):
        T, B = input.batch_sizes.numel(), int(input.batch_sizes[0])
    elif isinstance(module, _Cell):
        T, B = 1, data.shape[0] if data.dim() == 2 else 1
    else:
        T, B = data.shape[:2] if data.dim() == 3 else (data.shape[0], 1)
        if batch_first and data.dim() == 3:
            T, B = B, T
    if data.is_cuda:
        passes = cuda.plan(get_cell(name), data, dtype, T, max(B, 1), module.hidden_size, D, P)
        return Explanation(name, "cuda", "", data.dtype, dtype, plan=passes)
    compute = cpu.computed(dtype)
    plan_of = cpu.KERNELS[compute].plan
    cell, H = get_cell(name).index, module.hidden_size
    plan = {
        label: plan_of(
            cell,
            torch.get_num_threads(),
            *(T, max(B, 1), H, P or H, D, data.shape[-1]),
            backward,
            isinstance(input, PackedSequence),
        )
        for label, backward in (("forward", False), ("backward", True))
    }
    threads = int(max(p["threads"] for p in plan.values()))
    return Explanation(name, "cpu", "", data.dtype, compute, isa(), threads, plan)

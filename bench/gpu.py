"""Time rnnkern's modules against torch.nn's (cuDNN) on one GPU, side by side.

    python bench/gpu.py [--quick] [--cell lstm] [--dtype bf16] [--plan persistent] [--json FILE]

The two take turns in one process. A turn is timed by CUDA events around as many calls as take some
milliseconds; printed are the medians in µs a step (of one layer), the median of the rounds' ratios
(cuDNN's time / ours: above 1 rnnkern is faster) and, where docs/cuda.md models one, the floor's
share of our time. Before anything is timed, the outputs of the two are compared. A case that the
device has no memory for is a row that says so. The JSON also has whether torch says that its cuDNN
takes data of the type; where it does not, torch.nn's module runs torch's own kernels.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rnnkern
import torch
from rnnkern import cuda
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from tqdm import tqdm

CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
TOLERANCE = {"bf16": 5e-2, "fp16": 1e-2, "tf32": 1e-2, "fp32": 1e-3}
# Modelled µs a step of LSTM, forward and backward, on an H100-class chip (docs/cuda.md).
FLOORS = {
    (256, "tf32"): {1: (0.93, 0.96), 16: (1.1, 1.2), 64: (1.2, 1.5), 256: (1.8, 2.1)},
    (256, "bf16"): {1: (0.76, 0.82), 16: (0.9, 1.2), 64: (0.9, 1.3), 256: (1.2, 1.8)},
    (512, "fp32"): {1: (1.1, 1.1), 16: (1.9, 2.1), 64: (3.9, 4.5), 256: (14, 16)},
    (512, "bf16"): {1: (1.0, 1.0), 16: (1.2, 1.6), 64: (1.5, 2.3), 256: (2.1, 3.9)},
    (1024, "tf32"): {1: (1.6, 1.6), 16: (2.4, 2.9), 64: (4.9, 7.1), 256: (17, 26)},
    (1024, "bf16"): {1: (1.2, 1.3), 16: (1.7, 2.6), 64: (2.4, 4.0), 256: (6.8, 13)},
    (2048, "bf16"): {1: (1.9, 2.1), 16: (2.9, 6.2), 64: (9, 22), 256: (33, 85)},
}


@dataclass(frozen=True)
class Case:
    """One comparison; I = H."""

    cell: str
    dtype: str
    H: int
    B: int
    T: int
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False

    def __str__(self) -> str:
        """Return it as a cell of the table."""
        more = f" {self.layers} layers" if self.layers > 1 else ""
        more += " bidirectional" if self.bidirectional else ""
        more += " packed" if self.packed else ""
        return f"{self.cell} {self.dtype} H={self.H} B={self.B} T={self.T}{more}"


def cases(quick: bool) -> Iterator[Case]:
    """Yield the grid, and the forms at a few sizes each."""
    sizes = (256, 768) if quick else (128, 256, 512, 768, 1024, 2048)
    batches, steps = ((1, 64), (64,)) if quick else ((1, 16, 64, 256), (64, 1024))
    for cell, dtype in itertools.product(CELLS, DTYPES):
        for H, B, T in itertools.product(sizes, batches, steps):
            yield Case(cell, dtype, H, B, T)
        for form in ({"layers": 2}, {"bidirectional": True}, {"packed": True}):
            for H, B in ((512, 64),) if quick else ((256, 16), (512, 64), (1024, 256)):
                for T in steps:
                    yield Case(cell, dtype, H, B, T, **form)  # type: ignore[arg-type]


def modules(case: Case) -> tuple[nn.Module, nn.Module]:
    """Return torch's module and ours with the same weights."""
    made = []
    for library in (nn, rnnkern):
        kind = getattr(library, CELLS[case.cell])
        module = kind(case.H, case.H, case.layers, bidirectional=case.bidirectional)
        made.append(module.to("cuda", DTYPES[case.dtype]))
    made[1].load_state_dict(made[0].state_dict())
    return made[0], made[1]


def call_of(module: nn.Module, data: Any, leaf: torch.Tensor, training: bool) -> Callable[[], Any]:
    """Return a call that runs forward, or forward and backward with all gradients."""

    def inference() -> Any:
        with torch.no_grad():
            return module(data)[0]

    def train() -> Any:
        y = module(data)[0]
        y = y if isinstance(y, torch.Tensor) else y.data
        return torch.autograd.grad(y, [leaf, *module.parameters()], torch.ones_like(y))

    return train if training else inference


def microseconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the time of one call, by events around several."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Return one row for inference and one for training."""
    tf32 = case.dtype == "tf32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    theirs, ours = modules(case)
    leaf = torch.randn(
        case.T, case.B, case.H, device="cuda", dtype=DTYPES[case.dtype], requires_grad=True
    )
    data: Any = leaf
    if case.packed:
        lengths = torch.randint(1, case.T + 1, (case.B,))
        packed = pack_padded_sequence(leaf.detach(), lengths, enforce_sorted=False)
        leaf = packed.data.requires_grad_()
        data = packed._replace(data=leaf)
    found, wanted = (call_of(m, data, leaf, False)() for m in (ours, theirs))
    if case.packed:
        found, wanted = found.data, wanted.data
    error = float((found.float() - wanted.float()).abs().max())
    rows = []
    for training in (False, True):
        for module in (theirs, ours):
            module.train(training)  # cuDNN reads this, and not whether gradients are recorded
        calls = [call_of(m, data, leaf, training) for m in (theirs, ours)]
        for call in calls:
            microseconds(call, 2)  # loads code, starts threads
        repeats = [max(1, int(5e3 / microseconds(call, 1))) for call in calls]
        times = [
            [microseconds(c, n) for c, n in zip(calls, repeats, strict=True)] for _ in range(rounds)
        ]
        a, b = (statistics.median(column) for column in zip(*times, strict=True))
        steps = case.T * case.layers
        floor = FLOORS.get((case.H, case.dtype), {}).get(case.B)
        modelled = case.cell == "lstm" and floor and not case.packed and not case.bidirectional
        limit = (sum(floor) if training else floor[0]) if modelled and floor else None
        rows.append(
            asdict(case)
            | {
                "mode": "training" if training else "inference",
                "cudnn_us_a_step": a / steps,
                "rnnkern_us_a_step": b / steps,
                "ratio": statistics.median(x / y for x, y in times),
                "share_of_floor": limit / (b / steps) if limit else None,
                "largest_difference": error,
                "torch_has_cudnn_for_it": torch.backends.cudnn.is_acceptable(leaf),
                "same_numbers": error <= TOLERANCE[case.dtype],
            }
        )
    return rows


def out_of_memory(case: Case) -> dict[str, Any]:
    """Return the row of a case that the device has no room for."""
    return asdict(case) | {"mode": "", "out_of_memory": True}


def as_line(case: Case, row: dict[str, Any]) -> str:
    """Return a row of the table."""
    if row.get("out_of_memory"):
        return f"| {case} | out of memory | | | | |"
    share = "" if row["share_of_floor"] is None else f"{row['share_of_floor']:.2f}"
    wrong = "" if row["same_numbers"] else " **outputs differ**"
    return (
        f"| {case} | {row['mode']} | {row['cudnn_us_a_step']:.2f} |"
        f" {row['rnnkern_us_a_step']:.2f} | {row['ratio']:.2f}{wrong} | {share} |"
    )


def rows_of(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of a case, or one that says that it is too large for the device."""
    try:
        return measure(case, rounds)
    except torch.OutOfMemoryError:
        pass  # the traceback, which is gone after this block, holds the case's tensors
    gc.collect()
    torch.cuda.empty_cache()
    return [out_of_memory(case)]


def head() -> str:
    """Return the commit of the checkout that this file lies in, or ""."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def environment(commit: str) -> dict[str, str]:
    """Return what a number means nothing without."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "rnnkern": rnnkern.__version__,
        "commit": commit,
        "plan": cuda.pinned_plan(),
        "command": " ".join(sys.argv),
    }


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cell", action="append", choices=CELLS)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument(
        "--plan", choices=cuda.PLANS, help="default: RNNKERN_CUDA_PLAN, or the first"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="written anew after every case")
    parser.add_argument("--commit", default=head(), help="default: that of this checkout")
    options = parser.parse_args()
    if not torch.cuda.is_available() or cuda.missing(0) is not None:
        print(f"no GPU to measure on: {cuda.summary()}", file=sys.stderr)
        return 2
    if not options.commit:
        parser.error("--commit: needed, since this is not a git checkout")
    if options.plan:
        os.environ["RNNKERN_CUDA_PLAN"] = options.plan
    where = environment(options.commit)
    chosen = [
        c
        for c in cases(options.quick)
        if c.cell in (options.cell or CELLS) and c.dtype in (options.dtype or DTYPES)
    ]
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    print("| case | mode | cuDNN µs/step | rnnkern µs/step | ratio | of the floor |")
    print("|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for case in tqdm(chosen, file=sys.stderr):
        for row in rows_of(case, options.rounds):
            print(as_line(case, row), flush=True)
            rows.append(row)
        if options.json:
            text = json.dumps({"environment": where, "rows": rows}, indent=1)
            options.json.write_text(text + "\n")
    return 0 if all(row.get("same_numbers", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

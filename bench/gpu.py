"""Time rnnkern's modules against torch.nn's (cuDNN) on one GPU, side by side.

    python bench/gpu.py [--quick] [--cell lstm] [--dtype bf16] [--form packed] [--plan persistent]
                        [--json FILE]

The two take turns in one process. A turn is timed by CUDA events around as many calls as take some
milliseconds. Before anything is timed, the outputs of the two are compared, and their gradients
before training is. A case that one of them fails on, or that the device has no memory for, is a
row that says so. If the device itself fails, the run ends; `--resume` goes on after the case.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, TypeAlias

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
    "default": torch.float32,
}
# Whether (cuDNN, torch's products) multiply float32 in TF32; "default" is as torch starts.
TF32 = {"tf32": (True, True), "default": (True, False)}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layers": {"layers": 2},
    "bidirectional": {"bidirectional": True},
    "packed": {"packed": True},
}
Call: TypeAlias = Callable[[], tuple[torch.Tensor, ...]]
# Of the largest entry that torch has, and at least of 1.
TOLERANCE = {"bf16": 5e-2, "fp16": 1e-2, "tf32": 1e-2, "default": 1e-2, "fp32": 1e-3}
# Modelled µs a step of LSTM's recurrence alone, forward and backward, on an H100-class chip
# (docs/cuda.md).
FLOORS = {
    (256, "tf32"): {1: (0.93, 0.96), 16: (1.1, 1.2), 64: (1.2, 1.5), 256: (1.8, 2.1)},
    (256, "bf16"): {1: (0.76, 0.82), 16: (0.9, 1.2), 64: (0.9, 1.3), 256: (1.2, 1.8)},
    (512, "fp32"): {1: (1.1, 1.1), 16: (1.9, 2.1), 64: (3.9, 4.5), 256: (14, 16)},
    (512, "bf16"): {1: (1.0, 1.0), 16: (1.2, 1.6), 64: (1.5, 2.3), 256: (2.1, 3.9)},
    (1024, "tf32"): {1: (1.6, 1.6), 16: (2.4, 2.9), 64: (4.9, 7.1), 256: (17, 26)},
    (1024, "bf16"): {1: (1.2, 1.3), 16: (1.7, 2.6), 64: (2.4, 4.0), 256: (6.8, 13)},
    (2048, "bf16"): {1: (1.9, 2.1), 16: (2.9, 6.2), 64: (9, 22), 256: (33, 85)},
}

# What the columns of the table are, and what the JSON calls them.
LEGEND = {
    "cudnn_us_a_step": "torch.nn's time, µs a step of one layer; median",
    "rnnkern_us_a_step": "rnnkern's",
    "ratio": "the first by the second, median of the rounds: above 1 rnnkern is faster",
    "recurrence_floor_by_call": "the modelled floor of the recurrence alone, by rnnkern's time for"
    " the whole call, products around the recurrence and all: the recurrence, which takes less than"
    " the call, is at least so near its floor",
    "largest_difference": "of the outputs, as a part of torch's largest entry and at least of 1",
    "largest_gradient_difference": "of all gradients, each as a part of its largest entry likewise",
    "torch_has_cudnn_for_it": "whether cuDNN takes data of the type, as torch says; where it does"
    " not, torch.nn runs torch's own kernels",
}
HEAD = (
    "| case | mode | cuDNN µs/step | rnnkern µs/step | ratio |"
    " recurrence's floor / whole call |\n|---|---|---|---|---|---|"
)


class CaseError(Exception):
    """One of the two failed on a case."""

    def __init__(self, contender: str, error: RuntimeError) -> None:
        super().__init__(f"{contender}: {error}")
        self.row = {
            "failed": contender,
            "out_of_memory": isinstance(error, torch.OutOfMemoryError),
            "error": next(iter(str(error).splitlines()), type(error).__name__),
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


def cases(quick: bool) -> Iterator[tuple[str, Case]]:
    """Yield the cases with the names of their forms, the plain ones first."""
    sizes = (256, 768) if quick else (128, 256, 512, 768, 1024, 2048)
    batches, steps = ((1, 64), (64,)) if quick else ((1, 16, 64, 256), (64, 1024))
    for form, more in FORMS.items():
        if quick and form != "plain":
            sizes, batches = (512,), (64,)
        for values in itertools.product(CELLS, DTYPES, sizes, batches, steps):
            yield form, Case(*values, **more)


def modules(case: Case) -> tuple[nn.Module, nn.Module]:
    """Return torch's module and ours with the same weights."""
    made = []
    for contender, library in (("torch.nn", nn), ("rnnkern", rnnkern)):
        kind = getattr(library, CELLS[case.cell])
        with blaming(contender):
            module = kind(case.H, case.H, case.layers, bidirectional=case.bidirectional)
            made.append(module.to("cuda", DTYPES[case.dtype]))
    made[1].load_state_dict(made[0].state_dict())
    return made[0], made[1]


@contextmanager
def blaming(contender: str) -> Iterator[None]:
    """Say whose error it is. Kernels fail after their call: wait for the device inside."""
    try:
        yield
    except RuntimeError as error:
        raise CaseError(contender, error) from error


def largest_difference(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """Return by how much tensors differ at most, each by its largest entry and at least by 1.

    NaN where there is one.
    """
    parts = [
        (a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1)
        for a, b in zip(found, wanted, strict=True)
    ]
    return float(torch.stack(parts).max())


def call_of(module: nn.Module, data: Any, leaf: torch.Tensor, training: bool) -> Call:
    """Return a call for the output, or for all gradients, by forward and backward."""

    def output() -> torch.Tensor:
        y = module(data)[0]
        return y if isinstance(y, torch.Tensor) else y.data  # of packed data

    def inference() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (output(),)

    def train() -> tuple[torch.Tensor, ...]:
        y = output()
        return torch.autograd.grad(y, [leaf, *module.parameters()], torch.ones_like(y))

    return train if training else inference


def microseconds(call: Call, repeats: int) -> float:
    """Return the time of one call, by events around several."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def data_of(case: Case) -> tuple[Any, torch.Tensor]:
    """Return the input, and the leaf that it consists of."""
    leaf = torch.randn(
        case.T, case.B, case.H, device="cuda", dtype=DTYPES[case.dtype], requires_grad=True
    )
    if not case.packed:
        return leaf, leaf
    seeded = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, case.T + 1, (case.B,), generator=seeded)
    lengths[0] = case.T
    packed = pack_padded_sequence(leaf.detach(), lengths, enforce_sorted=False)
    leaf = packed.data.requires_grad_()
    return packed._replace(data=leaf), leaf


def difference(calls: dict[str, Call]) -> float:
    """Return by how much the results of the two differ at most."""
    results = {}
    for contender, call in calls.items():
        with blaming(contender):
            results[contender] = call()
            torch.cuda.synchronize()
    return largest_difference(results["rnnkern"], results["torch.nn"])


def timed(calls: dict[str, Call], rounds: int) -> list[list[float]]:
    """Return the times of both in each round."""
    repeats = {}
    for contender, call in calls.items():
        with blaming(contender):
            microseconds(call, 2)  # loads code, starts threads
            repeats[contender] = max(1, int(5e3 / microseconds(call, 1)))
    times: list[list[float]] = []
    for _ in range(rounds):
        times.append([])
        for contender, call in calls.items():
            with blaming(contender):
                times[-1].append(microseconds(call, repeats[contender]))
    return times


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Return one row for inference and one for training."""
    layers, products = TF32.get(case.dtype, (False, False))
    torch.backends.cudnn.allow_tf32 = layers
    torch.backends.cuda.matmul.allow_tf32 = products
    theirs, ours = modules(case)
    data, leaf = data_of(case)
    rows: list[dict[str, Any]] = []
    found: dict[str, float] = {}
    for training in (False, True):
        for module in (theirs, ours):
            module.train(training)  # cuDNN reads this, and not whether gradients are recorded
        calls = {
            contender: call_of(module, data, leaf, training)
            for contender, module in (("torch.nn", theirs), ("rnnkern", ours))
        }
        which = "largest_gradient_difference" if training else "largest_difference"
        found[which] = difference(calls)
        times = timed(calls, rounds)
        a, b = (statistics.median(column) for column in zip(*times, strict=True))
        steps = case.T * case.layers
        limit = floor_of(case, training)
        rows.append(
            asdict(case)
            | {
                "mode": "training" if training else "inference",
                "cudnn_us_a_step": a / steps,
                "rnnkern_us_a_step": b / steps,
                "ratio": statistics.median(x / y for x, y in times),
                "recurrence_floor_by_call": None if limit is None else limit / (b / steps),
                "torch_has_cudnn_for_it": torch.backends.cudnn.is_acceptable(leaf),
                "same_numbers": all(d <= TOLERANCE[case.dtype] for d in found.values()),
            }
            | found
        )
    return rows


def floor_of(case: Case, training: bool) -> float | None:
    """Return the modelled floor of the recurrence, µs a step, where there is one."""
    floor = FLOORS.get((case.H, case.dtype), {}).get(case.B)
    if floor is None or case.cell != "lstm" or case.packed or case.bidirectional:
        return None
    return sum(floor) if training else floor[0]


def as_line(case: Case, row: dict[str, Any]) -> str:
    """Return a row of the table."""
    if row.get("out_of_memory"):
        return f"| {case} | out of memory ({row['failed']}) | | | | |"
    if "failed" in row:
        return f"| {case} | **{row['failed']} failed**: {row['error'].replace('|', '/')} | | | | |"
    floor = row["recurrence_floor_by_call"]
    share = "" if floor is None else f"{floor:.2f}"
    wrong = "" if row["same_numbers"] else " **results differ**"
    return (
        f"| {case} | {row['mode']} | {row['cudnn_us_a_step']:.2f} |"
        f" {row['rnnkern_us_a_step']:.2f} | {row['ratio']:.2f}{wrong} | {share} |"
    )


def rows_of(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of a case, or one that says who failed on it, or both were too large for."""
    try:
        return measure(case, rounds)
    except CaseError as error:
        row = error.row
    except RuntimeError as error:  # of what the two share, such as their input
        row = CaseError("the case", error).row
    # The tracebacks, which are gone after these blocks, held the case's tensors.
    return [asdict(case) | {"mode": ""} | row]


def works() -> bool:
    """Return whether the device does anything still: some errors stay as long as the process."""
    try:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        return bool(torch.ones(2, device="cuda").sum() == 2)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return False


def wrong(row: dict[str, Any]) -> bool:
    """Return whether a row is a fault of rnnkern's; want of memory is none."""
    if "failed" in row:
        return row["failed"] != "torch.nn" and not row["out_of_memory"]
    return not row["same_numbers"]


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
    parser.add_argument("--form", action="append", choices=FORMS)
    parser.add_argument(
        "--plan", choices=cuda.PLANS, help="default: RNNKERN_CUDA_PLAN, or the first"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="written anew after every case")
    parser.add_argument("--resume", action="store_true", help="keep the cases that --json has")
    parser.add_argument("--commit", default=head(), help="default: that of this checkout")
    options = parser.parse_args()
    if not torch.cuda.is_available() or cuda.missing(0) is not None:
        print(f"no GPU to measure on: {cuda.summary()}", file=sys.stderr)
        return 2
    if not options.commit:
        parser.error("--commit: needed, since this is not a git checkout")
    if options.resume and not options.json:
        parser.error("--resume: needs --json")
    if options.plan:
        os.environ["RNNKERN_CUDA_PLAN"] = options.plan
    where = environment(options.commit)
    rows: list[dict[str, Any]] = []
    if options.resume and options.json.exists():
        kept = json.loads(options.json.read_text())
        if {**kept["environment"], "command": ""} != {**where, "command": ""}:
            parser.error("--resume: the file is of another device, version, plan or commit")
        rows = kept["rows"]
    known = {tuple(row[name] for name in Case.__dataclass_fields__) for row in rows}
    chosen = [
        case
        for form, case in cases(options.quick)
        if form in (options.form or FORMS) and case.cell in (options.cell or CELLS)
        if case.dtype in (options.dtype or DTYPES) and astuple(case) not in known
    ]
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    print(*(f"{name}: {meaning}" for name, meaning in LEGEND.items()), sep="\n")
    print(HEAD)
    for case in tqdm(chosen, file=sys.stderr):
        for row in rows_of(case, options.rounds):
            print(as_line(case, row), flush=True)
            rows.append(row)
        if options.json:
            text = {"environment": where, "legend": LEGEND, "rows": rows}
            options.json.write_text(json.dumps(text, indent=1) + "\n")
        if "failed" in rows[-1] and not works():
            print(f"the device works no more after {case}; go on by --resume", file=sys.stderr)
            return 1
    return int(any(map(wrong, rows)))


if __name__ == "__main__":
    sys.exit(main())

"""Time rnnkern's modules against torch.nn's on the CPU, side by side.

    python bench/versus_torch.py [--threads 2] [--rounds 30] [--cell lstm --cell gru --cell rnn]

Both run in one process, round by round in turn; each turn is a pause, in which the other's idle
pool threads stop spinning, one untimed call and one timed call. Printed are the median times and
the median of the rounds' ratios with its quartiles (torch's time / ours: above 1 rnnkern is
faster). Before anything is timed, outputs and gradients of the two are compared.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import rnnkern
import torch
from rnnkern import _native
from torch import nn

SHAPES = [(100, 1, 128), (100, 8, 256), (100, 32, 256), (50, 64, 512)]
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}


def training(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], object]:
    """Return a call that runs forward and backward for all gradients, the input's included."""
    wanted = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x)[0], wanted, dy)


def inference(module: nn.Module, x: torch.Tensor, _: torch.Tensor) -> Callable[[], object]:
    """Return a call that runs forward without autograd."""

    def call() -> object:
        with torch.no_grad():
            return module(x)

    return call


def milliseconds(call: Callable[[], object], pause: float) -> float:
    """Return the time of one call after a pause and an untimed one."""
    time.sleep(pause)
    call()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def check(theirs: nn.Module, ours: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    """Stop unless both compute the same numbers."""
    for a, b in zip(training(theirs, x, dy)(), training(ours, x, dy)(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


def cpu_name() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--pause", type=float, default=0.01, help="seconds before each turn")
    parser.add_argument("--cell", action="append", choices=CELLS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{cpu_name()}, {options.threads} threads, ISA {_native.isa()}, torch {torch.__version__},"
        f" rnnkern {rnnkern.__version__}, float32, I = H, median of {options.rounds} rounds"
    )
    print("| cell | T, B, H | mode | torch ms | rnnkern ms | ratio | quartiles |")
    print("|---|---|---|---|---|---|---|")
    for cell in options.cell or CELLS:
        for T, B, H in SHAPES:
            theirs, ours = (getattr(m, CELLS[cell])(H, H) for m in (nn, rnnkern))
            ours.load_state_dict(theirs.state_dict())
            x, dy = torch.randn(T, B, H, requires_grad=True), torch.randn(T, B, H)
            check(theirs, ours, x, dy)
            for mode, make in (("inference", inference), ("training", training)):
                calls = make(theirs, x, dy), make(ours, x, dy)
                times = [
                    [milliseconds(call, options.pause) for call in calls]
                    for _ in range(options.rounds)
                ]
                ratios = [a / b for a, b in times]
                low, middle, high = statistics.quantiles(ratios, n=4)
                a, b = (statistics.median(column) for column in zip(*times, strict=True))
                print(
                    f"| {cell} | {T}, {B}, {H} | {mode} | {a:.2f} | {b:.2f} | {middle:.2f} |"
                    f" {low:.2f} to {high:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

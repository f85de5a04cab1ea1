"""The options of ``rnnkern bench``: names, ranges, defaults."""

from __future__ import annotations

import argparse
import math
import shlex

from rnnkern.bench.cases import CELLS, MODES
from rnnkern.console.options import add_threads, count, number, path

CONTENDERS = ("torch", "compile", "onnxruntime")
"""Those that rnnkern can be compared with."""
PAUSE = 10.0
"""Milliseconds before each turn."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument_group("what to measure").add_argument
    add("--quick", action="store_true", help="a few cases and rounds, without torch.compile")
    add("--cell", action="append", choices=CELLS, help="only this cell (may be repeated)")
    add("--mode", action="append", choices=MODES, help="only this mode (may be repeated)")
    add(
        "--case",
        action="append",
        metavar="TEXT",
        help="only cases whose names contain this, such as 100x32x256 (may be repeated)",
    )
    add(
        "--contender",
        action="append",
        choices=CONTENDERS,
        help="compare only with this (may be repeated; default: all that are installed)",
    )
    add("--list", action="store_true", help="print the names of the chosen cases, and stop")
    measuring = parser.add_argument_group("how to measure")
    add_threads(measuring)
    add = measuring.add_argument
    add(
        "--rounds",
        type=count(10**6),
        metavar="N",
        help="rounds of each case (default: as many as fit into a few seconds)",
    )
    add(
        "--pause",
        type=number(
            float, lambda value: 0 <= value <= 1e4 and math.isfinite(value), "0 to 10000 ms"
        ),
        default=PAUSE,
        metavar="MS",
        help="milliseconds before each turn (default: %(default)g)",
    )
    add(
        "--scaling",
        action="store_true",
        help="instead of comparing, run the cases (default: those of --quick) with 1, 2, 4 and 8 "
        "threads",
    )
    parser.add_argument_group("files").add_argument(
        "--out",
        type=path,
        metavar="FOLDER",
        help="also write bench.json, bench.md and bench.png there (default: print the tables only)",
    )


def repeat(args: argparse.Namespace, threads: int) -> str:
    """Return the command that repeats a run, as a line for the shell."""
    words = ["rnnkern", "bench"]
    words += [f"--{name}" for name in ("quick", "scaling") if getattr(args, name)]
    for name in ("cell", "mode", "case", "contender"):
        for value in getattr(args, name) or ():
            words += [f"--{name}", value]
    words += ["--rounds", str(args.rounds)] if args.rounds else []
    words += ["--pause", f"{args.pause:g}"] if args.pause != PAUSE else []
    return shlex.join([*words, "--threads", str(threads)])

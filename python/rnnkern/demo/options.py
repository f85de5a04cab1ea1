"""The options of ``rnnkern demo``: names, ranges, defaults."""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path

from rnnkern.console.options import add_threads, count, number, path
from rnnkern.demo.model import CELLS

PICTURE = Path("rnnkern-demo.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    training = parser.add_argument_group("model and training")
    add = training.add_argument
    add("--cell", choices=CELLS, default="lstm", help="recurrent layer (default: %(default)s)")
    for name, default, most, text in (
        ("--hidden", 256, 10**12, "hidden units of a layer"),
        ("--layers", 1, 10**6, "recurrent layers"),
        ("--steps", 1000, 10**7, "training steps"),
        ("--batch", 32, 10**6, "streams of text, read side by side"),
        ("--seq-len", 64, 10**7, "characters of each stream in a step"),
    ):
        text += " (default: %(default)s)"
        add(name, type=count(most), default=default, metavar="N", help=text)
    add(
        "--lr",
        type=_positive,
        default=5e-3,
        metavar="X",
        help="highest learning rate (default: %(default)s)",
    )
    add_threads(training)
    add(
        "--seed",
        type=number(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1"),
        default=0,
        metavar="N",
        help="of the first weights and the sampled text (default: %(default)s)",
    )
    add = parser.add_argument_group("files").add_argument
    add(
        "--text",
        type=path,
        metavar="FILE",
        help="UTF-8 text to learn (default: the source files of Python's standard library)",
    )
    add("--out", type=path, metavar="PNG", help=f"picture to write (default: {PICTURE})")
    add("--save", type=path, metavar="FILE", help="write the rnnkern model, as safetensors")
    add("--sample-from", type=path, metavar="FILE", help="read such a model, and only sample text")
    add = parser.add_argument_group("sampled text").add_argument
    add("--prompt", default="\n", metavar="TEXT", help="text to go on from (default: a new line)")
    add(
        "--length",
        type=count(10**8),
        default=400,
        metavar="N",
        help="characters to sample (default: %(default)s)",
    )
    add(
        "--temperature",
        type=_positive,
        default=0.7,
        metavar="X",
        help="low for likely text, 1 for the model's own odds (default: %(default)s)",
    )


def repeat(args: argparse.Namespace, threads: int) -> str:
    """Return the command that repeats a training run, as a line for the shell."""
    words = ["rnnkern", "demo"]
    for name in ("cell", "hidden", "layers", "steps", "batch", "seq_len", "lr", "seed"):
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += ["--threads", str(threads)]
    return shlex.join(words + (["--text", str(args.text)] if args.text else []))


_positive = number(
    float, lambda value: value > 0 and math.isfinite(value), "a number greater than 0"
)

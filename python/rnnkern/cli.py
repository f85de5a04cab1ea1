"""The command line: ``rnnkern demo``, ``rnnkern bench``, ``rnnkern info``.

A command is one row of `COMMANDS`. Its exit status is what its function returns; a `CommandError`
becomes one line on stderr and status 2, as do wrong options; Ctrl-C gives status 130.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

import rnnkern
from rnnkern.bench import options as bench_options
from rnnkern.console import machine
from rnnkern.console.errors import CommandError
from rnnkern.demo import options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default those of the process.

    Returns
    -------
    int
        Exit status: what the command returned (0 if all is well); 2 for an error that the user can
        put right; 130 for Ctrl-C; 141 if the reader of the output went away.
    """
    _let_any_text_through()
    name = "rnnkern"
    try:
        args = _parser().parse_args(argv)
        command: Command = args.command
        name += f" {command.name}"
        status = command.run(args)
        sys.stdout.flush()
        return status
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except CommandError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        _drop_output()
        return 141
    except OSError as error:  # the disk that our output goes to is full
        _drop_output()
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2


def _drop_output() -> None:
    """Send what is still buffered to nowhere: Python would fail to flush it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes
    ----------
    name, help : str
        As the user sees them.
    add_arguments : callable
        Declares its options.
    run : callable
        Takes the parsed options and returns the exit status.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def later(module: str) -> Callable[[argparse.Namespace], int]:
    """Return a command's function that imports its module, and calls ``run`` there, when used."""

    def run(args: argparse.Namespace) -> int:
        status: int = importlib.import_module(module).run(args)
        return status

    return run


def print_info(args: argparse.Namespace) -> int:
    """Print versions, instruction sets, threads, OpenMP runtimes and GPUs; return 0."""
    native = importlib.import_module("rnnkern._native")
    pinned = os.environ.get("RNNKERN_ISA")
    rows = [
        ("rnnkern", rnnkern.__version__),
        ("ISA", native.isa() + (f" (by RNNKERN_ISA={pinned})" if pinned else "")),
        ("ISAs", ", ".join(native.supported_isas()) + " supported"),
        ("threads", f"{torch.get_num_threads()} (torch.get_num_threads)"),
        ("CPU", f"{machine.cpu_name()}, {machine.cpu_count()} for this process"),
        ("OpenMP", openmp_summary(machine.openmp_runtimes())),
        ("torch", torch.__version__),
        ("GPUs", ", ".join(machine.gpu_names()) or "none found"),
        ("CUDA", importlib.import_module("rnnkern.cuda").summary()),
        ("Python", platform.python_version()),
    ]
    for name, value in rows:
        print(f"{name:<9}{value}")
    return 0


def openmp_summary(runtimes: list[str] | None) -> str:
    """Say which OpenMP runtimes a process has loaded, given their paths, or None if unknown."""
    if runtimes is None:
        return "unknown (this system has no /proc/self/maps)"
    if len(runtimes) < 2:
        return "".join(runtimes) or "none loaded"
    lines = [f"{len(runtimes)} different runtimes are loaded; their threads compete for the CPUs"]
    return f"\n{'':9}".join(lines + runtimes)


COMMANDS = (
    Command(
        "demo",
        "train a character model with torch.nn and with rnnkern, side by side",
        options.add_arguments,
        later("rnnkern.demo.command"),
    ),
    Command(
        "bench",
        "time the CPU kernels against torch.nn, onnxruntime and the machine's limits",
        bench_options.add_arguments,
        later("rnnkern.bench.command"),
    ),
    Command("info", "print versions, ISA, threads and OpenMP runtime", lambda _: None, print_info),
)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} ({self.prog} --help tells more)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rnnkern", description="Fused recurrent layers for PyTorch.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"rnnkern {rnnkern.__version__}")
    rows = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        row = rows.add_parser(
            command.name, help=command.help, description=command.help + ".", allow_abbrev=False
        )
        command.add_arguments(row)
        row.set_defaults(command=command)
    return parser


def _let_any_text_through() -> None:
    """Have characters that the output's encoding lacks escaped, instead of ending in an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())

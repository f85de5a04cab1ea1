"""``rnnkern bench``: the order in which things are done."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch

from rnnkern.bench import (
    contenders,
    environment,
    markdown,
    memory,
    plot,
    report,
    result,
    roofline,
)
from rnnkern.bench.cases import CELLS, Case, all_cases, select
from rnnkern.bench.contenders import NAMES, OURS, THEIRS
from rnnkern.bench.measure import Plan, hot_microseconds
from rnnkern.bench.options import repeat
from rnnkern.bench.report import Report
from rnnkern.console.errors import CommandError, require
from rnnkern.console.files import check_writable, write

SCALING = (1, 2, 4, 8)
"""Threads of a scaling run."""
_FILES = ("bench.json", "bench.md", "bench.png")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed options, see `rnnkern.bench.options`.

    Returns
    -------
    int
        Exit status: 0, or 1 if a contender failed in a case or computed other numbers.

    Raises
    ------
    CommandError
        For everything that the user can put right.
    """
    chosen = _choose(args)
    if args.list:
        print("\n".join(case.name for case in chosen))
        return 0
    for module in ("rich.table", "rich.console"):
        require(module, "bench")
    if args.out:
        _check_folder(args.out)
    with _threads(args.threads):
        return _measure(args, chosen)


def _choose(args: argparse.Namespace) -> list[Case]:
    some = args.cell or args.mode or args.case
    chosen = select(
        all_cases(),
        quick=args.quick or (args.scaling and not some),
        cells=args.cell or (),
        modes=args.mode or (),
        substrings=args.case or (),
    )
    if not chosen:
        raise CommandError("no case passes the filters: rnnkern bench --list prints all names")
    return chosen


def _check_folder(folder: Path) -> None:
    """Make the folder, and refuse before hours of work what could not be written after them."""
    require("matplotlib.backends.backend_agg", "bench")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out {folder}: cannot be made: {error.strerror}") from None
    for name in _FILES:
        check_writable(folder / name, "--out")


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """Set torch's thread count, and put it back afterwards."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        yield
    finally:
        torch.set_num_threads(before)


def _measure(args: argparse.Namespace, chosen: Sequence[Case]) -> int:
    start = time.perf_counter()
    found = Report(environment.describe(), repeat(args, torch.get_num_threads()))
    print(f"Machine: {environment.line(found.machine)}", flush=True)
    interrupted, limits = False, None
    try:
        if args.scaling:
            _scale(args, chosen, found)
        else:
            threads, cells = torch.get_num_threads(), args.cell or list(CELLS)
            limits = roofline.measure(threads)
            found.latency = _latency(cells)
            _compare(args, chosen, found)
            # The best counts, and a machine that others use has worse minutes: once more.
            limits = limits.best(roofline.measure(threads))
            found.latency = _less(found.latency, _latency(cells))
    except KeyboardInterrupt:  # what was measured so far is shown all the same
        interrupted = True
    if limits is not None:
        found.set_limits(limits)
    report.print_tables(found)
    print(f"Repeat:  {found.command}")
    if args.out:
        write(args.out / "bench.json", report.as_json(found).encode())
        write(args.out / "bench.md", markdown.document(found).encode())
        write(args.out / "bench.png", plot.draw(found))
        print(f"Files:   {', '.join(str(args.out / name) for name in _FILES)}")
    print(f"Took:    {time.perf_counter() - start:.0f} s")
    if interrupted:
        raise KeyboardInterrupt
    return 1 if found.failed else 0


def _plan(args: argparse.Namespace) -> Plan:
    pause = args.pause * 1e-3
    if args.quick or args.scaling:
        return Plan(args.rounds, pause, budget=0.8, least=3, most=15)
    return Plan(args.rounds, pause)


def _compare(args: argparse.Namespace, chosen: Sequence[Case], found: Report) -> None:
    wanted = args.contender or [name for name in NAMES if not (args.quick and name == "compile")]
    names = [name for name in NAMES if name == OURS or name in wanted]
    with memory.Process() as process:
        for number, case in enumerate(chosen, 1):
            one = result.run(
                case,
                plan=_plan(args),
                names=names,
                memory=process.measure,
            )
            found.results.append(one)
            _tell(f"{number}/{len(chosen)}", one)


def _scale(args: argparse.Namespace, chosen: Sequence[Case], found: Report) -> None:
    total = len(chosen) * len(SCALING)
    for case in chosen:
        for threads in SCALING:
            with _threads(threads):
                one = result.run(case, plan=_plan(args), names=(THEIRS, OURS))
            found.scaling.append((threads, one))
            _tell(f"{len(found.scaling)}/{total}, {threads} threads", one)


def _tell(place: str, one: result.Result) -> None:
    """Say on stderr how far the run is."""
    ratio = one.ratios.get(THEIRS)
    text = f"{ratio.median:.2f} x" if ratio else ""
    errors = "; ".join(f"{name}: {message}" for name, message in one.errors.items())
    print(f"[{place}] {one.case.name} {errors or text}", file=sys.stderr, flush=True)


_Latency: TypeAlias = dict[str, dict[str, float]]


def _less(one: _Latency, other: _Latency) -> _Latency:
    return {
        cell: {name: min(value, other[cell][name]) for name, value in times.items()}
        for cell, times in one.items()
    }


def _latency(cells: Sequence[str]) -> _Latency:
    """Time one step of one row, hot, by torch and by ours; microseconds by cell and contender."""
    found: _Latency = {}
    for cell in cells:
        problem = contenders.Problem(Case(cell, "inference", 1, 1, 64))
        with contenders.grad_mode(problem.case):
            found[cell] = {
                name: hot_microseconds(problem.contender(name, 1).call) for name in (THEIRS, OURS)
            }
    return found

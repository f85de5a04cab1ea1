"""What was measured -> tables for the terminal and for Markdown, and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rnnkern.bench import limit, targets
from rnnkern.bench.contenders import NAMES, OURS, THEIRS
from rnnkern.bench.measure import Spread
from rnnkern.bench.memory import Memory
from rnnkern.bench.result import Result
from rnnkern.bench.roofline import Roofline, Team
from rnnkern.console.errors import require

NONE = "n/a"


@dataclass
class Report:
    """Everything that the outputs show.

    Attributes
    ----------
    machine : dict
        From `environment.describe`.
    command : str
        The command that repeats the run.
    roofline : Roofline or None
        The machine's limits.
    results : list of Result
        The cases.
    latency : dict
        Microseconds of one step, by cell and contender.
    scaling : list
        Pairs of a number of threads and a `Result`.
    """

    machine: dict[str, Any]
    command: str
    roofline: Roofline | None = None
    results: list[Result] = field(default_factory=list)
    latency: dict[str, dict[str, float]] = field(default_factory=dict)
    scaling: list[tuple[int, Result]] = field(default_factory=list)

    def set_limits(self, roofline: Roofline) -> None:
        """Take the machine's limits, and give every case its own."""
        self.roofline = roofline
        for result in self.results:
            result.limit = limit.seconds(result.case, roofline)

    @property
    def everything(self) -> list[Result]:
        """All results, those of a scaling run too."""
        return [*self.results, *(result for _, result in self.scaling)]

    @property
    def failed(self) -> bool:
        """Whether a contender failed in a case."""
        return any(result.errors for result in self.everything)

    @property
    def outcomes(self) -> list[targets.Outcome]:
        """What was reached of the targets; nothing in a scaling run."""
        if self.scaling:
            return []
        ours = {cell: times[OURS] for cell, times in self.latency.items()}
        has_bf16 = self.roofline is None or self.roofline.whole.bf16 is not None
        return targets.outcomes(self.results, ours, has_bf16=has_bf16)


@dataclass(frozen=True)
class Table:
    """A table of strings; the first column is aligned to the left."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(report: Report) -> list[Table]:
    """Return all tables of a report that have rows."""
    found = [
        _roofline_table(report.roofline),
        _case_table(report.results),
        _latency_table(report.latency),
        _scaling_table(report.scaling),
        _target_table(report.outcomes),
        _error_table(report.everything),
    ]
    return [table for table in found if table.rows]


def print_tables(report: Report) -> None:
    """Print all tables to stdout, in colour on a terminal."""
    box = require("rich.box", "bench")
    # As wide as the tables need: what a narrow terminal breaks is still all there.
    console = require("rich.console", "bench").Console(highlight=False, width=250)
    for table in tables(report):
        made = require("rich.table", "bench").Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, name in enumerate(table.header):
            # Only headers have words to break between.
            longest = max(len(row[index]) for row in table.rows)
            justify = "right" if index else "left"
            made.add_column(name, justify=justify, min_width=min(longest, 40), overflow="fold")
        for row in table.rows:
            made.add_row(*(cell.replace("[", r"\[") for cell in row))
        with console.capture() as captured:
            console.print(f"\n[bold]{table.title}[/]")
            console.print(made)
        print("\n".join(line.rstrip() for line in captured.get().rstrip().splitlines()))
    print()


def as_json(report: Report) -> str:
    """Return the report as JSON."""
    data = {
        "machine": report.machine,
        "command": report.command,
        "roofline": _roofline_dict(report.roofline),
        "cases": [result.as_dict() for result in report.results],
        "latency_microseconds": report.latency,
        "scaling": [{"threads": threads, **result.as_dict()} for threads, result in report.scaling],
        "targets": [asdict(outcome) for outcome in report.outcomes],
    }
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _roofline_dict(roofline: Roofline | None) -> dict[str, Any] | None:
    """Return the limits in SI units; memory has no capacity in it, caches have."""
    if roofline is None:
        return None
    teams = [asdict(team) for team in roofline.teams]
    for team in teams:
        team["levels"] = [
            level | {"capacity": None if level["capacity"] == float("inf") else level["capacity"]}
            for level in team["levels"]
        ]
    return {"teams": teams}


def _roofline_table(roofline: Roofline | None) -> Table:
    teams = roofline.teams if roofline else ()
    names = [level.name for level in teams[0].levels] if teams else []

    def row(team: Team) -> list[str]:
        rates = {level.name: f"{level.bandwidth / 1e9:.0f}" for level in team.levels}
        bf16 = f"{team.bf16 / 1e9:.0f}" if team.bf16 else NONE
        barrier = f"{team.barrier * 1e9:.0f}" if team.barrier else NONE
        rest = [rates.get(name, NONE) for name in names]
        return [str(team.threads), f"{team.fp32 / 1e9:.0f}", bf16, *rest, barrier]

    header = ["threads", "float32 GFLOP/s", "bfloat16 GFLOP/s", *(f"{n} GB/s" for n in names)]
    return Table("The machine's limits", [*header, "barrier ns"], [row(team) for team in teams])


def _case_table(results: Sequence[Result]) -> Table:
    present = [name for name in NAMES if any(name in result.seconds for result in results)]
    others = [name for name in present if name != OURS]
    label = {name: name for name in present} | {"onnxruntime": "onnx"}
    header = ["case", *(f"{label[name]} ms" for name in present)]
    for name in others:
        header += [f"{label[name]} / ours"] + ["quartiles"] * (name == THEIRS)
    header += ["of the limit", *(f"{label[name]} MB" for name in present)]

    def row(result: Result) -> list[str]:
        cells = [result.case.name, *(milliseconds(result.seconds.get(name)) for name in present)]
        for name in others:
            ratio = result.ratios.get(name)
            cells.append(f"{ratio.median:.2f}" if ratio else _missing(result, name))
            if name == THEIRS:
                cells.append(f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio else "")
        cells.append(NONE if result.fraction is None else f"{result.fraction:.0%}")
        return cells + [_megabytes(result.memory.get(name)) for name in present]

    return Table("Cases", header, [row(result) for result in results])


def _missing(result: Result, name: str) -> str:
    failed = {name, OURS, "all"} & set(result.errors)
    return "failed" if failed else NONE


def milliseconds(spread: Spread | None) -> str:
    """Return a median time, with three digits or more."""
    if spread is None:
        return NONE
    value = spread.median * 1e3
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _megabytes(memory: Memory | None) -> str:
    return NONE if memory is None else f"{memory.peak_mb:.1f}"


def _latency_table(latency: dict[str, dict[str, float]]) -> Table:
    rows = [
        [cell, *(f"{times[name]:.1f}" for name in (THEIRS, OURS))]
        for cell, times in latency.items()
    ]
    return Table("One step, T = B = 1, H = 64, hot", ["cell", "torch µs", "rnnkern µs"], rows)


def _scaling_table(scaling: Sequence[tuple[int, Result]]) -> Table:
    two = {result.case.name: result for threads, result in scaling if threads == 2}

    def row(threads: int, result: Result) -> list[str]:
        cells = [result.case.name, str(threads)]
        for name in (THEIRS, OURS):
            mine, base = result.seconds.get(name), two[result.case.name].seconds.get(name)
            cells.append(milliseconds(mine))
            cells.append(f"{base.median / mine.median:.2f}" if mine and base else NONE)
        return cells

    header = ["case", "threads", "torch ms", "over 2 threads", "rnnkern ms", "over 2 threads"]
    rows = [row(threads, result) for threads, result in scaling if result.case.name in two]
    return Table("Scaling", header, rows)


def _target_table(outcomes: Sequence[targets.Outcome]) -> Table:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    rows = [
        [
            outcome.group,
            str(outcome.cases),
            number(outcome.wanted_mean),
            number(outcome.mean),
            number(outcome.wanted_worst),
            number(outcome.worst),
            outcome.worst_case or "",
            {True: "yes", False: "NO", None: "not measured"}[outcome.met],
        ]
        for outcome in outcomes
    ]
    header = ["group", "cases", "mean wanted", "reached", "no case under", "worst", "which", "met"]
    return Table("Targets", header, rows)


def _error_table(results: Sequence[Result]) -> Table:
    rows = [
        [result.case.name, name, message]
        for result in results
        for name, message in result.errors.items()
    ]
    return Table("Failures", ["case", "contender", "what happened"], rows)

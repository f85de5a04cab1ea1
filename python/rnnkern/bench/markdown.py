"""A report as Markdown, for ``docs/performance.md``."""

from __future__ import annotations

from rnnkern.bench import environment, limit
from rnnkern.bench.report import Report, Table, tables

_HOW = """\
Times are medians of rounds in which the contenders take turns; "/ ours" is the median of the
rounds' ratios of a contender's time to rnnkern's, so above 1 rnnkern is faster. Before it is
timed, every contender is checked to compute the same numbers. MB is the peak of a call beyond what
stays between calls, with its outputs and gradients, in a process that gives large blocks back to
the system as soon as they are freed. Calls below 1 ms are timed hot, several at once."""


def document(report: Report) -> str:
    """Return the report as Markdown.

    Parameters
    ----------
    report : Report
        What to show.

    Returns
    -------
    str
        Machine, command, how it was measured, and all tables.
    """
    parts = [f"`{report.command}` on {environment.line(report.machine)}.", _HOW]
    if report.roofline is not None:
        parts.append(model())
    parts += [f"**{table.title}**\n\n{_table(table)}" for table in tables(report)]
    return "\n\n".join(parts) + "\n"


def model() -> str:
    """Return the model of the limit, as `rnnkern.bench.limit` states it."""
    return (limit.__doc__ or "").strip()


def _table(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    dashes = "|".join(["---", *["---:"] * (len(table.header) - 1)])
    rows = [line(list(row)) for row in table.rows]
    return "\n".join([line(list(table.header)), f"|{dashes}|", *rows])

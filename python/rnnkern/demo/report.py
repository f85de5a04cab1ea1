"""What was measured -> a table for the terminal and a picture."""

from __future__ import annotations

import io
import statistics
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnnkern.console.errors import require
from rnnkern.demo.train import Comparison, Contender, compare, relative_difference, steady

SAME_AT_START = 1e-3
"""Relative difference of the first losses up to which two models are taken to compute the same."""
_COLORS = ("#b9bdc4", "#c8334a")


@dataclass(frozen=True)
class Report:
    """Everything that the table and the picture show.

    Attributes
    ----------
    contenders : tuple of Contender
        Baseline first, trained and evaluated.
    title : str
        What was trained, in a line.
    unigram_bits : float
        Held-out bits per character of a model that knows character frequencies only.
    """

    contenders: tuple[Contender, Contender]
    title: str
    unigram_bits: float

    @property
    def comparison(self) -> Comparison:
        """How the two compare."""
        return compare(*self.contenders)

    @property
    def agrees(self) -> bool:
        """Whether both models computed the same losses, but for rounding, in the first steps."""
        return self.comparison.start_difference <= SAME_AT_START


def print_table(report: Report) -> None:
    """Print the table of results to stdout, in colour on a terminal."""
    box = require("rich.box")
    console = require("rich.console").Console(highlight=False)
    table = require("rich.table").Table(box=box.SIMPLE_HEAD, pad_edge=False)
    a, b = report.contenders
    table.add_column()
    table.add_column(a.name, justify="right")
    table.add_column(b.name, justify="right", style="bold")
    table.add_column("compared")
    for row in _rows(report):
        table.add_row(*row)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
    ratios = report.comparison.ratios
    low, _, high = _quartiles(ratios)
    print(f"Speed: median of {len(ratios)} rounds; in brackets the middle half of their ratios.")
    if high > 1.3 * low:
        print("       They differ a lot: is the machine busy? OMP_WAIT_POLICY=passive may help.")
    print()


def _rows(report: Report) -> Iterator[tuple[str, str, str, str]]:
    """Name a quantity, give it for both contenders, and compare it."""
    a, b = report.contenders
    found = report.comparison
    start = "equal"
    if found.start_difference > 0:
        verdict = " (rounding)" if report.agrees else ": [bold red]NOT THE SAME[/]"
        start = f"{found.start_difference:.0e} apart{verdict}"
    yield "loss, first step", f"{a.losses[0]:.6f}", f"{b.losses[0]:.6f}", ""
    yield f"  steps 1-{found.first_steps}", "", "", start
    first, second = found.end_losses
    apart = f"{found.end_difference:.2%} apart"
    yield f"loss, last {found.last_steps} steps", f"{first:.4f}", f"{second:.4f}", apart
    unigram = f"unigram model: {report.unigram_bits:.3f}"
    yield "held-out bits/char", f"{a.bits:.3f}", f"{b.bits:.3f}", unigram
    low, middle, high = _quartiles(found.ratios)
    speeds = [f"{statistics.median(steady(contender.speeds)):,.0f}" for contender in (a, b)]
    yield "training chars/s", speeds[0], speeds[1], f"{middle:.2f} x ({low:.2f} to {high:.2f})"


def _quartiles(ratios: Sequence[float]) -> list[float]:
    return statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [*ratios] * 3


def printable(text: str) -> str:
    """Replace control and format characters, which could move a terminal's cursor, by escapes."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") else f"\\x{ord(c):02x}"
        for c in text
    )


def draw(report: Report, path: Path) -> bytes:
    """Draw the picture: loss curves on the left, throughput on the right.

    Parameters
    ----------
    report : Report
        What to show.
    path : Path
        Its suffix chooses the format if Matplotlib knows it, else the format is PNG.

    Returns
    -------
    bytes
        The contents of the picture's file.
    """
    require("matplotlib.backends.backend_agg")
    figure = require("matplotlib.figure").Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(report.title)
    axes = figure.subplot_mosaic(
        [["losses", "speeds"], ["difference", "speeds"]], height_ratios=(3, 1), width_ratios=(2, 1)
    )
    _draw_losses(report, axes["losses"], axes["difference"])
    _draw_speeds(report, axes["speeds"])
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
    suffix = path.suffix[1:].lower()
    data = io.BytesIO()
    kind = suffix if suffix in figure.canvas.get_supported_filetypes() else "png"
    figure.savefig(data, format=kind, dpi=130)
    return data.getvalue()


def _draw_losses(report: Report, losses: Any, difference: Any) -> None:
    """Draw both loss curves, and below them how far they are apart in each step."""
    a, b = report.contenders
    steps = range(1, len(a.losses) + 1)
    for contender, color, width in ((a, _COLORS[0], 4.0), (b, _COLORS[1], 0.9)):
        label = f"{contender.name}, held-out {contender.bits:.3f} bits per character"
        losses.plot(steps, contender.losses, color=color, linewidth=width, label=label)
    losses.set_title("Training loss")
    losses.set_ylabel("nats per character")
    losses.tick_params(labelbottom=False)
    losses.legend(frameon=False)
    apart = [relative_difference(x, y) for x, y in zip(a.losses, b.losses, strict=True)]
    difference.plot(steps, [max(d, 1e-9) for d in apart], ".", color="#444444", markersize=2)
    difference.set_yscale("log")
    difference.set_ylim(1e-9, 1.0)
    difference.set_ylabel("relative\ndifference")
    difference.set_xlabel("step")
    difference.sharex(losses)
    losses.set_xlim(0, len(a.losses) + 1)


def _draw_speeds(report: Report, axis: Any) -> None:
    """Draw the median throughput as bars, and every round as a dot."""
    names = []
    for place, contender in enumerate(report.contenders):
        rounds = steady(contender.speeds)
        median = statistics.median(rounds)
        names.append(f"{contender.name}\n{median:,.0f}")
        axis.bar(place, median, width=0.6, color=_COLORS[place], alpha=0.5)
        # The golden ratio spreads the dots sideways evenly, and the same way every time.
        across = [place + 0.4 * ((k * 0.618034) % 1.0 - 0.5) for k in range(len(rounds))]
        axis.plot(across, rounds, ".", color="#444444", markersize=2)
    ratio = statistics.median(report.comparison.ratios)
    axis.set_title(f"Training throughput: {ratio:.2f} x")
    axis.set_ylabel("characters per second (dots: rounds, bars: medians)")
    axis.set_xticks(range(len(names)), names)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set_ylim(bottom=0)
    axis.margins(x=0.1)

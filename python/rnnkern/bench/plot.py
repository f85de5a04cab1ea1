"""A report as a picture: speed-up of each case on the left, the roofline on the right."""

from __future__ import annotations

import io
from typing import Any

from rnnkern.bench.cases import CELLS, MODES, Case
from rnnkern.bench.contenders import OURS, THEIRS
from rnnkern.bench.report import Report
from rnnkern.bench.result import Result
from rnnkern.console.errors import require

_COLORS = {"lstm": "#c8334a", "gru": "#2f6db5", "rnn": "#3d9a50"}
_MARKERS = {"inference": "o", "training": "s"}
_KINDS = [(cell, mode) for cell in CELLS for mode in MODES]
_GREY = "#666666"


def draw(report: Report) -> bytes:
    """Draw the picture.

    Parameters
    ----------
    report : Report
        What to show.

    Returns
    -------
    bytes
        A PNG file's contents.
    """
    require("matplotlib.backends.backend_agg", "bench")
    results = report.results or [result for _, result in report.scaling]
    shapes = list(dict.fromkeys(result.case.shape for result in results))
    height = max(6.0, 2.0 + 0.5 * len(shapes))
    figure = require("matplotlib.figure", "bench").Figure(
        figsize=(15, height), layout="constrained"
    )
    left, right = figure.subplots(1, 2, sharey=bool(report.scaling))
    machine = report.machine
    versions = machine["versions"]
    figure.suptitle(
        f"rnnkern {versions['rnnkern']} and torch {versions['torch']}: {machine['cpu']}, "
        f"{machine['threads']} threads, ISA {machine['isa']}, {machine['date'][:10]}"
        + (f", commit {machine['commit']}" if machine["commit"] else "")
    )
    if report.scaling:
        _draw_scaling(report, OURS, left)
        _draw_scaling(report, THEIRS, right)
    else:
        _draw_speedups(results, shapes, left)
        _draw_roofline(report, right)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()


def _draw_speedups(results: list[Result], shapes: list[str], axis: Any) -> None:
    """Draw a row a shape, and in it the quartiles of each cell and mode one below the other."""
    for place, (cell, mode) in enumerate(_KINDS):
        chosen = [
            (result.case.shape, result.ratios[THEIRS])
            for result in results
            if (result.case.cell, result.case.mode) == (cell, mode) and THEIRS in result.ratios
        ]
        if not chosen:
            continue
        offset = 0.12 * (place - (len(_KINDS) - 1) / 2)
        middle = [ratio.median for _, ratio in chosen]
        spread = [
            [ratio.median - ratio.low for _, ratio in chosen],
            [ratio.high - ratio.median for _, ratio in chosen],
        ]
        axis.errorbar(
            middle,
            [shapes.index(shape) + offset for shape, _ in chosen],
            xerr=spread,
            fmt=_MARKERS[mode],
            label=f"{CELLS[cell]} {mode}",
            **_style(cell, mode),
            elinewidth=1,
        )
    for row in range(1, len(shapes), 2):
        axis.axhspan(row - 0.5, row + 0.5, color="#f3f3f3", zorder=0)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_xscale("log")
    _plain_ticks(axis.xaxis)
    axis.set_yticks(range(len(shapes)), shapes)
    axis.set_ylim(len(shapes) - 0.5, -0.5)
    axis.set_ylabel("T x B x H")
    axis.set_xlabel("right of 1 rnnkern is faster (bars: quartiles of the rounds)")
    axis.set_title("torch's time / rnnkern's")
    axis.grid(axis="x", which="both", color="#e3e3e3", linewidth=0.6)
    axis.set_axisbelow(True)


def _style(cell: str, mode: str) -> dict[str, Any]:
    filled = _COLORS[cell] if mode == "training" else "white"
    return {"color": _COLORS[cell], "markerfacecolor": filled, "markersize": 5}


def _plain_ticks(axis: Any) -> None:
    """Label a logarithmic x or y axis 0.5, 1, 2, 5, 10, as far as it reaches."""
    ticker = require("matplotlib.ticker", "bench")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(ticker.NullFormatter())


def _draw_roofline(report: Report, axis: Any) -> None:
    """Draw what all threads can do, and what rnnkern's products reach in each case."""
    if report.roofline is None:
        return
    team = report.roofline.whole
    points = [(result, result.flops) for result in report.results if result.flops]
    intensities = [result.intensity for result, _ in points] or [1.0]
    low, high = min(intensities) / 4, max(intensities) * 2
    peaks = [("float32", team.fp32)] + ([("bfloat16", team.bf16)] if team.bf16 else [])
    for name, peak in peaks:
        axis.plot([low, high], [peak / 1e9] * 2, color="black", linewidth=1.2)
        axis.annotate(
            f"{name} peak {peak / 1e9:.0f}",
            (high, peak / 1e9),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
        )
    top = max(peak for _, peak in peaks)
    for level, line in zip(team.levels, ("-", "--", "-.", ":"), strict=False):
        end = max(low, min(high, top / level.bandwidth))
        axis.plot(
            [low, end],
            [low * level.bandwidth / 1e9, end * level.bandwidth / 1e9],
            line,
            color=_GREY,
            linewidth=1,
            label=f"{level.name} {level.bandwidth / 1e9:.0f} GB/s",
        )
    for result, flops in points:
        case = result.case
        marker = "D" if case.dtype == "bfloat16" else _MARKERS[case.mode]
        axis.plot(
            result.intensity, (flops or 0) / 1e9, marker, **_style(case.cell, case.mode), alpha=0.8
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    _plain_ticks(axis.xaxis)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("flops for each byte of recurrent weights")
    axis.set_ylabel("GFLOP/s of the products")
    axis.set_title("Roofline of all threads (diamonds: bfloat16)")
    axis.legend(loc="lower right", fontsize=9)
    axis.grid(which="major", color="#e3e3e3", linewidth=0.6)
    axis.set_axisbelow(True)


def _draw_scaling(report: Report, name: str, axis: Any) -> None:
    """Draw a contender's speed by threads, relative to that with two."""
    times: dict[Case, dict[int, float]] = {}
    for threads, result in report.scaling:
        if name in result.seconds:
            times.setdefault(result.case, {})[threads] = result.seconds[name].median
    labels = set()
    for case, seconds in times.items():
        if 2 not in seconds:
            continue
        label = f"{case.cell} {case.mode}"
        axis.plot(
            list(seconds),
            [seconds[2] / s for s in seconds.values()],
            label=None if label in labels else label,
            marker=_MARKERS[case.mode],
            linewidth=1,
            alpha=0.8,
            **_style(case.cell, case.mode),
        )
        labels.add(label)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    _plain_ticks(axis.yaxis)
    axis.set_xlabel("threads")
    axis.set_ylabel("speed over that of two threads")
    axis.set_title(name)
    axis.grid(color="#e3e3e3", linewidth=0.6)

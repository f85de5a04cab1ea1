"""README, examples and documents are true: the feature table, the code, the file names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import rnnkern
import torch
from rnnkern import functional
from rnnkern.cells import CELLS
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
T, B, I, H, P = 4, 3, 2, 5, 3


def table() -> dict[str, dict[str, str]]:
    """Return the README's cell table as {cell: {column: entry}}."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| cell | modules"))
    rows = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in lines[start:]
        if line.startswith("|")
    ]
    rows = rows[: next((i for i, row in enumerate(rows) if len(row) != len(rows[0])), len(rows))]
    header, _, *body = rows
    return {row[0].strip("`"): dict(zip(header[1:], row[1:], strict=True)) for row in body}


def weights(cell: str, directions: int, projection: bool) -> list[torch.Tensor]:
    G, P_ = CELLS[cell].gates, P if projection else H
    shapes = [(G * H, I), (G * H, P_), (G * H,), (G * H,)] + [(P, H)] * projection
    return [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for _ in range(directions)
        for shape in shapes
    ]


def works(cell: str, feature: str) -> bool:
    """Run the feature; False if the cell refuses it."""
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = torch.tensor([4, 1, 2])
    directions = 2 if feature == "bidirectional" else 1
    w = weights(cell, directions, feature == "projection")
    options: dict[str, torch.Tensor] = {}
    data: torch.Tensor | PackedSequence = x
    if feature == "packed":
        data = pack_padded_sequence(x, lengths, enforce_sorted=False)
    elif feature == "`lengths`":
        options["lengths"] = lengths
    elif feature == "`resets`":
        options["resets"] = torch.rand(T, B) < 0.5
    try:
        y, states = functional.recurrent(cell, data, w, bidirectional=directions == 2, **options)
    except ValueError:
        return False
    y = y.data if isinstance(y, PackedSequence) else y
    assert len(states) == CELLS[cell].states
    first = torch.autograd.grad(y.square().sum(), w, create_graph=True)
    if feature == "double backward":
        second = torch.autograd.grad(sum(g.square().sum() for g in first), w)
        assert all(g.isfinite().all() for g in second)
    return True


def test_every_cell_is_in_the_table() -> None:
    assert set(table()) == set(CELLS)


@pytest.mark.parametrize("cell", CELLS)
def test_features(cell: str) -> None:
    row = table()[cell]
    features = [name for name in row if name != "modules"]
    assert len(features) == 6
    for feature in features:
        assert row[feature] in ("yes", "no")
        assert works(cell, feature) == (row[feature] == "yes"), feature


@pytest.mark.parametrize("cell", CELLS)
def test_modules(cell: str) -> None:
    for expression in re.findall(r"`([^`]+)`", table()[cell]["modules"]):
        name, _, arguments = expression.rstrip(")").partition("(")
        options = dict(a.split("=") for a in arguments.split(",") if a)
        options = {k: {"False": False}.get(v, v.strip('"')) for k, v in options.items()}
        module = getattr(rnnkern, name)(I, H, **options)
        cells = {module._cell_name()}
        if name.startswith("RNN") and not options:
            cells.add("rnn_tanh")
        assert cell in cells


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples(path: Path) -> None:
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "False" not in done.stdout, done.stdout


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")),
    ],
)
def test_files_named_in_documents_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:csrc|python|tests|bench|docs|examples)/[\w./-]+\.\w+)`", text))
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")))
def test_nothing_is_left_to_fill_in(path: Path) -> None:
    assert not re.findall(r"@[A-Z]+@|TODO|TBD", path.read_text(encoding="utf-8"))

"""bench/gpu.py without a GPU: what it makes of errors and of wrong numbers, and what it writes.

Its cases are measured here on the CPU, with clocks that count calls in the place of CUDA's events.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from gpu.flags import tf32
from torch import Tensor, nn

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.py"
TYPES = ("bf16", "fp16", "tf32", "fp32", "default")
FORMS = {
    "plain": (1, False, False),
    "layers": (2, False, False),
    "bidirectional": (1, True, False),
    "packed": (1, False, True),
}
ONE_PACKED = ("packed", "gru", "fp32")
TIMES = {"cudnn_us_a_step": 2.0, "rnnkern_us_a_step": 1.0, "ratio": 2.0}
GOOD = {"mode": "inference", **TIMES, "recurrence_floor_by_call": None, "same_numbers": True}
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def bench(monkeypatch: Patch) -> ModuleType:
    pytest.importorskip("tqdm")
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)  # where dataclasses look
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.cuda, "missing", lambda _: None)
    monkeypatch.setattr(module, "environment", lambda commit: {"commit": commit, "command": "x"})
    monkeypatch.setattr(module, "works", lambda: True)
    return module


@pytest.fixture
def measured(bench: ModuleType, monkeypatch: Patch) -> Iterator[ModuleType]:
    """Let it measure on the CPU, where every call takes 3 µs."""

    def microseconds(call: Callable[[], Any], repeats: int) -> float:
        call()
        return 3.0

    randn = torch.randn
    to = nn.Module.to
    monkeypatch.setattr(bench, "microseconds", microseconds)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda _: True)
    monkeypatch.setattr(torch, "randn", lambda *shape, device, **rest: randn(*shape, **rest))
    monkeypatch.setattr(nn.Module, "to", lambda m, _, dtype: to(m, dtype))
    with tf32(products=False):  # or what a case sets
        yield bench


def run(bench: ModuleType, monkeypatch: Patch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--commit", "abc", *options])
    status: int = bench.main()
    return status


def lines(capsys: Capture, cell: str) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {cell} ")]


# ---- the cases ---------------------------------------------------------------------------------
def test_the_cases_are_every_form_type_and_size(bench: ModuleType) -> None:
    found = list(bench.cases(False))
    sizes = ({128, 256, 512, 768, 1024, 2048}, {1, 16, 64, 256}, {64, 1024})
    wanted = set(itertools.product(FORMS, ("lstm", "gru", "rnn"), TYPES, *sizes))
    assert {(form, c.cell, c.dtype, c.H, c.B, c.T) for form, c in found} == wanted
    assert len(found) == len(set(found)) == len(wanted)
    for form, case in found:
        assert (case.layers, case.bidirectional, case.packed) == FORMS[form]
    assert [form for form, _ in found[: len(found) // 4]] == ["plain"] * (len(found) // 4)


def test_packed_data_has_the_same_lengths_each_time_and_one_of_all_steps(
    measured: ModuleType,
) -> None:
    (case,) = (c for form, c in measured.cases(True) if (form, c.cell, c.dtype) == ONE_PACKED)
    sizes = [measured.data_of(case)[0].batch_sizes for _ in range(2)]
    assert len(sizes[0]) == case.T
    assert torch.equal(*sizes)


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [("tf32", (True, True)), ("fp32", (False, False)), ("default", (True, False))],
)
def test_flags_of_a_type(
    measured: ModuleType, monkeypatch: Patch, dtype: str, flags: tuple[bool, bool]
) -> None:
    found = []

    def modules(case: Any) -> None:
        found.append(
            (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        )
        raise RuntimeError("seen")

    monkeypatch.setattr(measured, "modules", modules)
    measured.rows_of(measured.Case("gru", dtype, 3, 2, 5), 1)
    assert found == [flags]


# ---- a case that fails --------------------------------------------------------------------------
@pytest.mark.parametrize("contender", ["torch.nn", "rnnkern"])
@pytest.mark.parametrize("memory", [True, False], ids=["memory", "other"])
def test_a_case_that_fails_is_a_row(
    bench: ModuleType,
    monkeypatch: Patch,
    tmp_path: Path,
    capsys: Capture,
    contender: str,
    memory: bool,
) -> None:
    """Only rnnkern's own faults fail the run, of which want of memory is none."""
    asked: list[int] = []
    error = torch.OutOfMemoryError("CUDA out of memory") if memory else RuntimeError("a | b\nc")

    def measure(case: Any, rounds: int) -> list[dict[str, Any]]:
        with bench.blaming(contender):
            if case.B == 64:
                raise error
        return [bench.asdict(case) | GOOD]

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "works", lambda: not asked.append(1))
    path = tmp_path / "result.json"
    options = ["--cell", "gru", "--dtype", "bf16", "--json", str(path)]
    status = run(bench, monkeypatch, *options)
    assert status == (contender == "rnnkern" and not memory)
    rows = json.loads(path.read_text())["rows"]
    failed = [row for row in rows if "failed" in row]
    assert {row["B"] for row in failed} == {64}
    assert {row["B"] for row in rows if row not in failed} == {1}
    assert {row["failed"] for row in failed} == {contender}
    assert {row["out_of_memory"] for row in failed} == {memory}
    assert {row["error"] for row in failed} == {str(error).splitlines()[0]}
    assert len(asked) == len(failed) > 1
    said = f"out of memory ({contender})" if memory else f"**{contender} failed**: a / b"
    printed = lines(capsys, "gru")
    assert sum(f"| {said} | | | | |" in line for line in printed) == len(failed)
    assert sum("| inference | 2.00 | 1.00 | 2.00 |" in line for line in printed) == 2
    assert all(line.count("|") == 7 for line in printed)


def test_an_error_of_what_both_share_is_a_row_too(bench: ModuleType, monkeypatch: Patch) -> None:
    def measure(case: Any, rounds: int) -> list[dict[str, Any]]:
        raise RuntimeError("no room for the input")

    monkeypatch.setattr(bench, "measure", measure)
    (row,) = bench.rows_of(next(bench.cases(True))[1], 1)
    assert (row["failed"], row["error"]) == ("the case", "no room for the input")


def test_a_device_that_fails_ends_the_run(
    bench: ModuleType, monkeypatch: Patch, tmp_path: Path, capsys: Capture
) -> None:
    """Its errors stay as long as the process; another one goes on after the case."""
    path = tmp_path / "result.json"
    options = ["--cell", "lstm", "--dtype", "fp32", "--json", str(path)]
    tried: list[Any] = []

    def measure(case: Any, rounds: int) -> list[dict[str, Any]]:
        tried.append(case)
        with bench.blaming("rnnkern"):
            if len(tried) == 3:
                raise RuntimeError("an illegal memory access was encountered")
        return [bench.asdict(case) | GOOD]

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "works", lambda: False)
    assert run(bench, monkeypatch, *options) == 1
    assert len(tried) == len(json.loads(path.read_text())["rows"]) == 3
    assert "works no more" in capsys.readouterr().err
    assert run(bench, monkeypatch, *options, "--resume") == 1  # one row is a fault still
    assert len(tried) == len(set(tried)) > 3
    assert len(json.loads(path.read_text())["rows"]) == len(tried)


def test_a_run_goes_on_in_its_own_surroundings_only(
    bench: ModuleType, monkeypatch: Patch, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"environment": {"commit": "other", "command": "x"}, "rows": []}))
    for options in (["--json", str(path)], []):
        with pytest.raises(SystemExit):
            run(bench, monkeypatch, *options, "--resume")
        assert "--resume" in capsys.readouterr().err


# ---- what is measured ---------------------------------------------------------------------------
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize(
    "form", [{}, {"layers": 2}, {"bidirectional": True}, {"packed": True}], ids=str
)
def test_a_case(measured: ModuleType, cell: str, form: dict[str, Any]) -> None:
    case = measured.Case(cell, "fp32", 8, 3, 5, **form)
    rows = measured.rows_of(case, 3)
    assert [row["mode"] for row in rows] == ["inference", "training"]
    for row in rows:
        assert row["same_numbers"], row
        assert row["cudnn_us_a_step"] == row["rnnkern_us_a_step"] == 3.0 / (5 * case.layers)
        assert row["ratio"] == 1.0
        assert row["recurrence_floor_by_call"] is None
        assert row["largest_difference"] < 1e-5
    assert "largest_gradient_difference" not in rows[0]
    assert rows[1]["largest_gradient_difference"] < 1e-5


def test_the_floor_is_that_of_the_recurrence(measured: ModuleType) -> None:
    inference, training = measured.rows_of(measured.Case("lstm", "tf32", 256, 1, 2), 1)
    assert inference["recurrence_floor_by_call"] == pytest.approx(0.93 / 1.5)
    assert training["recurrence_floor_by_call"] == pytest.approx((0.93 + 0.96) / 1.5)
    assert "whole call" in measured.HEAD
    for word in ("recurrence alone", "whole call"):
        assert word in measured.LEGEND["recurrence_floor_by_call"]


@pytest.mark.parametrize("which", ["outputs", "gradients"])
@pytest.mark.parametrize("by", [0.1, float("nan")])
def test_numbers_that_differ_fail_the_run(
    measured: ModuleType, monkeypatch: Patch, which: str, by: float
) -> None:
    call_of = measured.call_of

    def spoilt(module: nn.Module, data: Any, leaf: Tensor, training: bool) -> Any:
        call = call_of(module, data, leaf, training)
        if "rnnkern" not in type(module).__module__ or training != (which == "gradients"):
            return call
        return lambda: (*(results := call())[:-1], results[-1] + by * results[-1].abs().max())

    monkeypatch.setattr(measured, "call_of", spoilt)
    case = measured.Case("gru", "fp32", 8, 3, 5)
    inference, training = measured.rows_of(case, 1)
    assert inference["same_numbers"] == (which == "gradients")
    assert not training["same_numbers"]
    assert "**results differ**" in measured.as_line(case, training)
    found = inference["largest_difference"], training["largest_gradient_difference"]
    spoiled = found[which == "gradients"]
    assert math.isnan(spoiled) == math.isnan(by)
    assert not spoiled <= measured.TOLERANCE["fp32"]
    assert measured.wrong(training)
    monkeypatch.setattr(measured, "measure", lambda *_: [training])
    assert run(measured, monkeypatch) == 1


def test_differences_are_parts_of_the_largest_entry(bench: ModuleType) -> None:
    wanted = [torch.tensor([0.0, 100.0]), torch.tensor([0.5])]
    assert bench.largest_difference(wanted, wanted) == 0
    found = [torch.tensor([1.0, 100.0]), torch.tensor([0.505])]
    assert bench.largest_difference(found, wanted) == pytest.approx(0.01)
    found[1] = torch.tensor([0.7])
    assert bench.largest_difference(found, wanted) == pytest.approx(0.2)


def test_an_error_tells_whose_it_is(measured: ModuleType, monkeypatch: Patch) -> None:
    case = measured.Case("rnn", "fp32", 8, 3, 5)
    for contender, kind in (("torch.nn", nn.RNN), ("rnnkern", measured.rnnkern.RNN)):
        with monkeypatch.context() as patch:

            def fail(*_: Any) -> Any:
                raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED")

            patch.setattr(kind, "forward", fail)
            (row,) = measured.rows_of(case, 1)
        assert row["failed"] == contender


# ---- what is written ----------------------------------------------------------------------------
def test_the_legend_is_printed_and_written(
    bench: ModuleType, monkeypatch: Patch, tmp_path: Path, capsys: Capture
) -> None:
    monkeypatch.setattr(bench, "measure", lambda case, _: [bench.asdict(case) | GOOD])
    path = tmp_path / "result.json"
    assert run(bench, monkeypatch, "--json", str(path)) == 0
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert written["legend"] == bench.LEGEND
    assert written["environment"]["commit"] == "abc"
    for name, meaning in bench.LEGEND.items():
        assert f"{name}: {meaning}" in printed
    assert bench.HEAD in printed


def test_a_line_of_the_table(bench: ModuleType) -> None:
    _, case = next(bench.cases(True))
    row = bench.asdict(case) | GOOD | {"recurrence_floor_by_call": 0.5, "same_numbers": False}
    wanted = "| inference | 2.00 | 1.00 | 2.00 **results differ** | 0.50 |"
    assert bench.as_line(case, row).endswith(wanted)

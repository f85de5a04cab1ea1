"""bench/gpu.py without a GPU: what it makes of a case that does not fit, and of the others."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("tqdm")
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)  # where dataclasses look
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(module.cuda, "missing", lambda _: None)
    monkeypatch.setattr(module, "environment", lambda commit: {"commit": commit})
    return module


def test_a_case_without_room_is_a_row(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    emptied: list[int] = []

    def measure(case: Any, rounds: int) -> list[dict[str, Any]]:
        if case.B == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        times = {"cudnn_us_a_step": 2.0, "rnnkern_us_a_step": 1.0, "ratio": 2.0}
        row = {"mode": "inference", **times, "share_of_floor": None, "same_numbers": True}
        return [bench.asdict(case) | row]

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    path = tmp_path / "result.json"
    options = ["--quick", "--cell", "gru", "--dtype", "bf16", "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options, "--json", str(path)])
    assert bench.main() == 0
    rows = json.loads(path.read_text())["rows"]
    full = [row for row in rows if row.get("out_of_memory")]
    assert {row["B"] for row in full} == {64}
    assert {row["B"] for row in rows if row not in full} == {1}
    assert len(emptied) == len(full) > 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| gru")]
    assert sum("| out of memory |" in line for line in lines) == len(full)
    assert sum("| inference | 2.00 | 1.00 | 2.00 |" in line for line in lines) == 2


def test_outputs_that_differ_fail_the_run(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(bench.cases(True))
    row = bench.asdict(case) | {"mode": "training", "share_of_floor": 0.5, "same_numbers": False}
    row |= {"cudnn_us_a_step": 2.0, "rnnkern_us_a_step": 1.0, "ratio": 2.0}
    assert bench.as_line(case, row).endswith(
        "| training | 2.00 | 1.00 | 2.00 **outputs differ** | 0.50 |"
    )
    monkeypatch.setattr(bench, "measure", lambda *_: [row])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--commit", "abc"])
    assert bench.main() == 1

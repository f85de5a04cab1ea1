"""``rnnkern bench``: the command on tiny cases, the check, the limit, the targets, refusals."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rnnkern import cli
from rnnkern.bench import cases, command, contenders, limit, report, result, targets
from rnnkern.bench.cases import Case, all_cases, select
from rnnkern.bench.contenders import AbsentError, Contender, Problem, WrongNumbersError, check
from rnnkern.bench.measure import Plan, Spread
from rnnkern.bench.memory import Memory
from rnnkern.bench.result import Result
from rnnkern.bench.roofline import Level, Roofline, Team

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
TINY = Case("lstm", "inference", 3, 2, 8, base=True)
TINIES = [replace(TINY, cell=cell, mode=mode) for cell in cases.CELLS for mode in cases.MODES]


@pytest.fixture
def tiny(monkeypatch: Patch, tmp_path: Path) -> Path:
    """Let the command have tiny cases only, no long measurements, and an empty directory."""
    monkeypatch.setattr(command, "all_cases", lambda: TINIES)
    monkeypatch.setattr(command.roofline, "measure", lambda threads: machine())
    monkeypatch.setattr(command, "hot_microseconds", lambda call: call() and 7.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bench(options: str = "") -> int:
    return cli.main(
        ["bench", *shlex.split("--rounds 1 --pause 0 --threads 1"), *shlex.split(options)]
    )


def machine() -> Roofline:
    """Return a machine with round numbers: two threads are twice as fast as one."""

    def team(n: int) -> Team:
        levels = (Level("L2", 1e6, n * 1e11), Level("DRAM", float("inf"), 2e10))
        return Team(n, n * 1e11, n * 2e11, levels, 1e-6 if n > 1 else 0.0)

    return Roofline((team(1), team(2)))


# ---- the whole command --------------------------------------------------------------------------
def test_it_writes_tables_json_markdown_and_a_picture(tiny: Path, capsys: Capture) -> None:
    assert bench("--contender torch --contender onnxruntime --out out") == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out
    assert err.count("\n") == len(TINIES)
    for words in ("Cases", "Targets", "Machine:", "lstm-training-3x2x8", "not measured"):
        assert words in out
    assert sorted(os.listdir("out")) == ["bench.json", "bench.md", "bench.png"]
    assert Path("out/bench.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(Path("out/bench.json").read_text(encoding="utf-8"))
    assert set(data) == {
        "machine",
        "command",
        "roofline",
        "cases",
        "latency_microseconds",
        "scaling",
        "targets",
    }
    assert data["machine"]["threads"] == 1
    assert data["machine"]["versions"]["torch"] == str(torch.__version__)
    assert [case["name"] for case in data["cases"]] == [case.name for case in TINIES]
    assert data["latency_microseconds"]["gru"] == {"torch": 7.0, "rnnkern": 7.0}
    for case in data["cases"]:
        assert case["errors"] == {}
        assert case["ratios"]["torch"]["median"] > 0
        assert case["rounds"] == 1
        assert {"torch", "rnnkern"} <= set(case["milliseconds"]) == set(case["memory"])
        assert (
            0
            < case["fraction_of_limit"]
            == pytest.approx(case["limit_milliseconds"] / case["milliseconds"]["rnnkern"]["median"])
        )
    text = Path("out/bench.md").read_text(encoding="utf-8")
    tables = [line for line in text.splitlines() if line.startswith("|---")]
    assert len(tables) == 4
    assert "bound from below" in text
    assert f"`{data['command']}`" in text
    assert "--contender torch --contender onnxruntime" in data["command"]


def test_the_best_of_before_and_after_counts(tiny: Path, monkeypatch: Patch) -> None:
    """A machine that others use has worse minutes."""

    def held_up(team: Team, products: float, reading: float) -> Team:
        levels = tuple(replace(one, bandwidth=one.bandwidth / reading) for one in team.levels)
        barrier = team.barrier * reading
        return replace(team, fp32=team.fp32 / products, levels=levels, barrier=barrier)

    found = [
        Roofline(tuple(held_up(team, *by) for team in machine().teams)) for by in ((2, 1), (1, 3))
    ]
    times = [9.0, 7.0, 5.0, 8.0]  # torch's and ours, before and after
    monkeypatch.setattr(command.roofline, "measure", lambda threads: found.pop(0))
    monkeypatch.setattr(command, "hot_microseconds", lambda call: times.pop(0))
    assert bench("--cell lstm --mode inference --contender torch --out .") == 0
    data = json.loads(Path("bench.json").read_text(encoding="utf-8"))
    assert data["roofline"] == json.loads(json.dumps(report._roofline_dict(machine())))
    assert data["latency_microseconds"] == {"lstm": {"torch": 5.0, "rnnkern": 7.0}}
    wanted = limit.seconds(TINY, machine()) * 1e3
    assert data["cases"][0]["limit_milliseconds"] == pytest.approx(wanted)


def test_compile_takes_part(tiny: Path, capsys: Capture) -> None:
    if contenders.compile_missing():
        pytest.skip(contenders.compile_missing())
    assert bench("--cell rnn --mode inference --contender compile") == 0
    assert "compile / ours" in capsys.readouterr().out


def test_without_files_nothing_is_written(tiny: Path, capsys: Capture) -> None:
    assert bench("--cell rnn --mode training --contender torch") == 0
    out, err = capsys.readouterr()
    assert "rnn-training-3x2x8" in out
    assert "gru" not in out.partition("Targets")[0]
    assert err.startswith("[1/1] rnn-training-3x2x8 ")
    assert os.listdir() == []


def test_scaling(tiny: Path, capsys: Capture) -> None:
    assert bench("--scaling --cell rnn --mode inference --out .") == 0
    data = json.loads(Path("bench.json").read_text(encoding="utf-8"))
    assert [row["threads"] for row in data["scaling"]] == list(command.SCALING)
    assert data["cases"] == data["targets"] == []
    assert "over 2 threads" in capsys.readouterr().out


@pytest.mark.parametrize("broken", contenders.NAMES)
def test_a_contender_that_fails_is_a_row_and_the_others_go_on(broken: str, capsys: Capture) -> None:
    def make(problem: Problem, name: str, threads: int) -> Contender:
        made = problem.contender("torch", threads)
        if name != broken:
            return Contender(name, made.call, made.tensors)
        return Contender(name, lambda: 1 / 0, made.tensors)

    found = result.run(TINY, plan=Plan(rounds=1, pause=0), contender=make)
    assert found.errors == {broken: "ZeroDivisionError: division by zero"}
    assert set(found.seconds) == set(contenders.NAMES) - {broken}
    assert broken not in found.ratios
    assert found.ratios or broken == contenders.OURS


def test_a_case_without_memory_is_a_row(monkeypatch: Patch) -> None:
    def refuse(case: Case) -> Problem:
        raise MemoryError("too much")

    monkeypatch.setattr(result, "Problem", refuse)
    found = result.run(TINY, plan=Plan(rounds=1))
    assert found.errors == {"all": "MemoryError: too much"}


def test_a_failure_ends_with_status_1(tiny: Path, monkeypatch: Patch, capsys: Capture) -> None:
    failed = Result(TINY, errors={"rnnkern": "ValueError: no [reason]"})
    monkeypatch.setattr(command.result, "run", lambda case, **_: failed)
    assert bench("--cell lstm --mode training --out .") == 1
    assert "ValueError: no [reason]" in capsys.readouterr().out
    assert json.loads(Path("bench.json").read_text(encoding="utf-8"))["cases"][0]["errors"]


def test_an_interrupted_run_shows_what_it_has(
    tiny: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    real, calls = result.run, []

    def run(case: Case, **options: Any) -> Result:
        calls.append(case)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(case, **options)

    monkeypatch.setattr(command.result, "run", run)
    assert bench("--contender torch") == 130
    assert TINIES[0].name in capsys.readouterr().out


# ---- options ------------------------------------------------------------------------------------
def test_list_and_filters(capsys: Capture) -> None:
    assert cli.main(["bench", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(names) == len(set(names)) == len(all_cases())
    assert cli.main(shlex.split("bench --list --cell gru --mode training --case layers2")) == 0
    assert capsys.readouterr().out == "gru-training-100x32x256-layers2\n"
    assert cli.main(shlex.split("bench --list --quick --case 1x1x64 --case 8x256")) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * 6


@pytest.mark.parametrize(
    "line",
    [
        "--cell transformer",
        "--mode sideways",
        "--case nothing-like-this",
        "--rounds 0",
        "--threads 0",
        "--pause -1",
        "--pause nan",
        "--contender rnnkern",
        "--out=",
        "--out file/under",
    ],
)
def test_wrong_options_are_one_line_and_status_2(line: str, tiny: Path, capsys: Capture) -> None:
    (tiny / "file").write_text("", encoding="ascii")
    assert cli.main(["bench", *shlex.split(line)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rnnkern")
    assert err.count("\n") == 1


def test_a_missing_package_names_the_extra(tiny: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, "rich.table", None)
    assert bench() == 2
    assert "pip install 'rnnkern[bench]'" in capsys.readouterr().err


# ---- cases and contenders -----------------------------------------------------------------------
def test_the_list_of_cases() -> None:
    every = all_cases()
    assert len([case for case in every if case.base]) == 13 * 6
    assert {case.dtype for case in every} == {"float32", "bfloat16"}
    (packed,) = {tuple(case.lengths) for case in every if case.packed}
    assert (min(packed), max(packed), len(packed)) == (10, 200, 32)
    assert sorted(packed, reverse=True) == list(packed)
    assert len(select(every, quick=True)) == len(cases.QUICK_SHAPES) * 6


@pytest.mark.parametrize(
    "case",
    [
        *TINIES,
        replace(TINY, layers=2, bidirectional=True),
        replace(TINY, cell="gru", layers=2),
        replace(TINY, cell="rnn", bidirectional=True),
        replace(TINY, cell="gru", mode="training", T=12, B=4, packed=True),
        replace(TINY, mode="training", proj=4),
        replace(TINY, mode="training", dtype="bfloat16"),
    ],
    ids=lambda case: case.name,
)
def test_contenders_agree(case: Case) -> None:
    problem = Problem(case)
    reference = problem.reference()
    absent = []
    for name in contenders.NAMES:
        if name == "compile":
            continue
        try:
            contender = problem.contender(name, 1)
        except AbsentError:
            absent.append(name)
            continue
        with contenders.grad_mode(case):
            check(contender, contender.call(), reference, case.dtype)
    assert absent in ([], ["onnxruntime"])


def test_onnxruntime_is_optional(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    names = ("onnxruntime", "rnnkern")
    found = result.run(TINY, plan=Plan(rounds=1, pause=0), names=names)
    assert found.errors == {}
    assert set(found.absent) == {"onnxruntime"}
    assert "not installed" in found.absent["onnxruntime"]


@pytest.mark.parametrize("change", ["value", "nan", "shape", "count"])
def test_wrong_numbers_are_refused(change: str) -> None:
    problem = Problem(TINY)
    reference = problem.reference()
    wrong = [tensor.clone() for tensor in reference]
    if change == "shape":
        wrong[1] = wrong[1][:, :1]
    elif change == "count":
        wrong.pop()
    else:
        wrong[1].view(-1)[3] += float("nan") if change == "nan" else 1e-2
    ours = Contender("rnnkern", lambda: wrong, list)
    with pytest.raises(WrongNumbersError):
        check(ours, ours.call(), reference, "float32")


# ---- limit --------------------------------------------------------------------------------------
def test_limit_of_inference_by_hand() -> None:
    # R: 4·64·64 weights of 4 bytes, 65.5 kB; one row takes 32768 flops.
    case = replace(TINY, T=10, B=1, H=64)
    product = 10 * 32768 / 2e11  # by both threads
    alone = 10 * max(32768 / 1e11, 65536 / 1e11)  # two would pay 10 µs for their barriers
    assert limit.seconds(case, machine()) == pytest.approx(product + alone)
    many = replace(case, B=1000)  # rows shared by two threads, which need no barrier
    assert limit.seconds(many, machine()) == pytest.approx(20 * 1000 * 32768 / 2e11)


def test_limit_takes_the_level_that_holds_a_threads_share() -> None:
    # R has 4 MB, 2 MB a thread, in DRAM, where the second thread gains nothing.
    case = replace(TINY, T=100, B=1, H=512)
    flops, size = 2 * 4 * 512 * 512, 4 * 4 * 512 * 512
    assert limit.seconds(case, machine()) == pytest.approx(100 * (flops / 2e11 + size / 2e10))
    # In bfloat16 a share of half the size fits L2 and pays the barrier.
    half = replace(case, dtype="bfloat16", H=350)
    flops, size = 2 * 4 * 350 * 350, 2 * 4 * 350 * 350
    assert limit.seconds(half, machine()) == pytest.approx(
        100 * (flops / 4e11 + min(size / 2e11 + 1e-6, size / 1e11))
    )


def test_limit_of_training_and_packed() -> None:
    plain = replace(TINY, T=20, B=64, H=128, mode="training")
    flops = 2 * 20 * 64 * 4 * 128 * 128
    assert limit.work_of(plain).flops == 6 * flops
    assert limit.seconds(plain, machine()) == pytest.approx(6 * flops / 2e11)
    packed = replace(plain, packed=True)
    share = sum(packed.lengths) / (20 * 64)
    assert limit.work_of(packed).flops == pytest.approx(6 * flops * share)
    assert limit.seconds(packed, machine()) < limit.seconds(plain, machine())


# ---- targets ------------------------------------------------------------------------------------
def with_ratio(case: Case, ratio: float, **fields: Any) -> Result:
    return Result(case, ratios={"torch": Spread(ratio, ratio, ratio)}, **fields)


def test_targets_from_made_up_ratios() -> None:
    one, many = replace(TINY, B=1), replace(TINY, B=8)
    found = {
        outcome.group: outcome
        for outcome in targets.outcomes(
            [
                with_ratio(one, 2.0),
                with_ratio(replace(one, H=9), 8.0),
                with_ratio(many, 1.0),
                with_ratio(replace(many, H=9), 1.2),
                with_ratio(replace(many, base=False), 0.1),
            ],
            {"lstm": 12.0, "gru": 16.0},
        )
    }
    good = found["LSTM inference, B = 1"]
    assert (good.cases, good.met, good.worst_case) == (2, True, one.name)
    assert (good.mean, good.worst) == (pytest.approx(4.0), 2.0)
    bad = found["LSTM inference, B >= 8"]
    assert (bad.cases, bad.met, bad.worst) == (2, False, 1.0)
    assert bad.mean == pytest.approx(1.2**0.5)
    assert found["GRU training"].met is None
    latency = found["one step, T = B = 1, H = 64, µs (at most)"]
    assert (latency.met, latency.worst, latency.worst_case) == (False, 16.0, "gru")


def test_memory_and_limit_targets() -> None:
    case = replace(TINY, mode="training", B=32, H=256)
    measured = Result(
        case,
        seconds={"rnnkern": Spread(2.0, 2.0, 2.0)},
        limit=1.8,
        memory={"torch": Memory(100, 90), "rnnkern": Memory(60, 50)},
    )
    found = {outcome.group: outcome for outcome in targets.outcomes([measured], None)}
    assert found["share of the limit, B >= 8, H >= 128"].worst == pytest.approx(0.9)
    memories = found["training memory, LSTM, torch's / ours"]
    assert (memories.worst, memories.met) == (pytest.approx(1.8), False)
    without = targets.outcomes([measured], None, has_bf16=False)
    assert len(found) - len(without) == 2

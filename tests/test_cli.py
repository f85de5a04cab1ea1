"""The command line: options, exit statuses, and what ``rnnkern info`` says."""

from __future__ import annotations

import io
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable

import pytest
import rnnkern
import torch
from rnnkern import _native, cli
from rnnkern.console import machine
from rnnkern.console.errors import CommandError

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def run_as(patch: Patch, function: Callable[[Namespace], int]) -> int:
    """Run the command line with one command ``x`` that is the function."""
    patch.setattr(cli, "COMMANDS", (cli.Command("x", "a command", lambda _: None, function),))
    return cli.main(["x"])


def raising(error: BaseException) -> Callable[[Namespace], int]:
    def run(args: Namespace) -> int:
        raise error

    return run


def test_info_tells_versions_isa_threads_and_openmp(capsys: Capture) -> None:
    assert cli.main(["info"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["rnnkern"] == rnnkern.__version__
    assert rows["ISA"].split()[0] == _native.isa()
    assert rows["ISAs"] == ", ".join(_native.supported_isas()) + " supported"
    assert rows["threads"].split()[0] == str(torch.get_num_threads())
    assert rows["torch"] == torch.__version__
    assert ("not built" in rows["CUDA"]) is (_native.cuda_module() is None)
    if sys.platform == "linux":
        assert "omp" in rows["OpenMP"]


def test_info_needs_no_optional_package(capsys: Capture, monkeypatch: Patch) -> None:
    for name in ("tqdm", "matplotlib", "rich", "safetensors", "numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


def test_openmp_runtimes_are_found_once_each() -> None:
    def row(path: str) -> str:
        return f"7f00-7f01 r-xp 00000000 08:01 123                        {path}\n"

    gomp, iomp = "/x/torch/lib/libgomp-a34b3233.so.1", "/opt/with space/libiomp5.so"
    others = ["/lib/libgompx.so.1", "/lib/libc.so.6", "[heap]", "/home/libomp/data.bin", ""]
    maps = [row(path) for path in (gomp, gomp + " (deleted)", *others)]
    assert machine.openmp_in(maps) == [gomp]
    assert machine.openmp_in([*maps, row(iomp)]) == [iomp, gomp]


def test_openmp_summary_says_plainly_that_two_are_loaded() -> None:
    assert cli.openmp_summary(["/a/libgomp.so.1"]) == "/a/libgomp.so.1"
    assert cli.openmp_summary([]) == "none loaded"
    assert cli.openmp_summary(None).startswith("unknown")
    two = cli.openmp_summary(["/a/libgomp.so.1", "/b/libomp.so"]).splitlines()
    assert two[0].startswith("2 different runtimes are loaded")
    assert [line.strip() for line in two[1:]] == ["/a/libgomp.so.1", "/b/libomp.so"]


def test_help_and_version(capsys: Capture) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rnnkern {rnnkern.__version__}\n"
    for argv in (["--help"], ["demo", "--help"], ["bench", "--help"], ["info", "--help"]):
        assert cli.main(argv) == 0
        assert "usage: rnnkern" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        "info surplus",
        "demo --hid 8",
        "demo --cell transformer",
        "demo --hidden 0",
        "demo --hidden -3",
        "demo --hidden 1e3",
        "demo --layers 0",
        "demo --steps 0",
        "demo --steps 99999999999",
        "demo --batch x",
        "demo --seq-len 0",
        "demo --threads 0",
        "demo --threads 1000000",
        "demo --seed -1",
        "demo --lr nan",
        "demo --lr 0",
        "demo --temperature 0",
        "demo --temperature inf",
        "demo --length 0",
        "demo --text=",
        "demo --out=",
        f"demo --hidden {'9' * 5000}",
    ],
)
def test_wrong_options_are_one_line_and_status_2(line: str, capsys: Capture) -> None:
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rnnkern: error: ")
    assert err.count("\n") == 1
    assert len(err) < 250


def test_exit_statuses(capsys: Capture, monkeypatch: Patch) -> None:
    assert run_as(monkeypatch, lambda args: 0) == 0
    assert run_as(monkeypatch, lambda args: 1) == 1
    assert capsys.readouterr().err == ""
    assert run_as(monkeypatch, raising(CommandError("the reason"))) == 2
    assert capsys.readouterr().err == "rnnkern x: error: the reason\n"
    assert run_as(monkeypatch, raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "rnnkern x: interrupted\n"


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch: Patch) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        run_as(monkeypatch, raising(RuntimeError("a bug")))


def test_output_without_unicode_escapes_what_it_cannot_write(monkeypatch: Patch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))

    def run(args: Namespace) -> int:
        print("\N{SNOWMAN} x")
        return 0

    assert run_as(monkeypatch, run) == 0
    assert raw.getvalue() == b"\\u2603 x\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rnnkern.cli", "info"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141

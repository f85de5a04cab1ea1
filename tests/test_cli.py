"""The command line: options, exit statuses, and what ``rnnkern info`` says."""

from __future__ import annotations

import io
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import rnnkern
import torch
from cases import cuda_extension
from rnnkern import _native, cli, cuda
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
    assert ("no kernels" in rows["CUDA"]) is (_native.cuda_module() is None)
    if sys.platform == "linux":
        assert "omp" in rows["OpenMP"]


def test_info_needs_no_optional_package(capsys: Capture, monkeypatch: Patch) -> None:
    for name in ("tqdm", "matplotlib", "rich", "safetensors", "numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


def cuda_row(capsys: Capture) -> str:
    assert cli.main(["info"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("CUDA"))
    return row.removeprefix("CUDA").strip()


def gpus(patch: Patch, *names: str) -> None:
    """Let torch find these GPUs, none of which can be used."""
    patch.setattr(torch.cuda, "is_available", lambda: bool(names))
    patch.setattr(torch.cuda, "device_count", lambda: len(names))
    patch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    patch.setattr(torch.cuda, "device", lambda _: nullcontext())


def test_info_tells_why_there_are_no_cuda_kernels(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.delenv("RNNKERN_CUDA_PLAN", raising=False)
    with cuda_extension(None, "this build has none"):
        gpus(monkeypatch)
        assert cuda_row(capsys) == "no kernels: this build has none; torch finds no device"
        gpus(monkeypatch, "A", "B")
        wanted = "; ".join(f"{i}: {'AB'[i]}, the reference runs (no kernels)" for i in range(2))
        assert cuda_row(capsys) == f"no kernels: this build has none; {wanted}"


def test_gpus_that_torch_cannot_use_are_listed(tmp_path: Path, monkeypatch: Patch) -> None:
    gpus(monkeypatch)
    assert machine.gpu_names(tmp_path / "nowhere") == []
    for name, text in (("0000:01:00.0", "Model: \t\t NVIDIA T4\nIRQ: 7\n"), ("0000:02:00.0", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "information").write_text(text)
    assert machine.gpu_names(tmp_path) == ["NVIDIA T4", "0000:02:00.0"]
    gpus(monkeypatch, "NVIDIA T4", "B")
    assert machine.gpu_names(tmp_path) == ["NVIDIA T4", "B"]


def test_info_tells_of_each_gpu_what_runs_there(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_PLAN", "persistent")
    problems = ["cudaErrorInsufficientDriver: too old", ""]
    with cuda_extension(SimpleNamespace(device_problem=problems.__getitem__)):
        gpus(monkeypatch)
        built, pinned = "rnnkern._cuda is built", "plan by RNNKERN_CUDA_PLAN=persistent"
        assert cuda_row(capsys) == f"{built}; torch finds no device ({problems[0]}); {pinned}"
        gpus(monkeypatch, "A", "B")
        reference = f"the reference runs ({problems[0]})"
        assert cuda_row(capsys) == f"{built}; 0: A, {reference}; 1: B, the kernels run; {pinned}"
        monkeypatch.setenv("RNNKERN_CUDA_PLAN", "fast")
        assert cuda_row(capsys).endswith("PLAN=fast, which is not stepwise or persistent")


def test_an_extension_that_does_not_load(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    (tmp_path / f"_cuda{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    monkeypatch.setattr(rnnkern, "__path__", [str(tmp_path), *rnnkern.__path__])
    monkeypatch.delitem(sys.modules, "rnnkern._cuda", raising=False)
    native, why_not = _native.load_cuda.__wrapped__()
    assert native is None
    assert why_not.startswith("rnnkern._cuda cannot be loaded (")
    assert str(tmp_path) in why_not
    with cuda_extension(native, why_not):
        assert f"no kernels: {why_not}" in cuda_row(capsys)
        with pytest.warns(UserWarning, match="cannot be loaded .*; the reference runs instead"):
            assert cuda.missing(0) == why_not


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

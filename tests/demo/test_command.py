"""The demo as a command: the whole run, its outputs, and what it refuses."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import rnnkern
import torch
from demo.conftest import TEXT, Capture, Patch, char_model, demo, refused, small_corpus
from rnnkern import cli
from rnnkern.console import files
from rnnkern.console.errors import CommandError
from rnnkern.demo import corpus, model, report, train
from torch import Tensor, nn


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_demo_reports_draws_saves_and_samples(cell: str, capsys: Capture) -> None:
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    assert demo(f"--cell {cell} --layers 2 --save m.safetensors --out p.png") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert "\r" not in out
    assert all(line == line.rstrip() and len(line) <= 80 for line in out.splitlines()[:12])
    layer = model.CELLS[cell]
    for words in (f"torch.nn.{layer}", f"rnnkern.{layer}", "bits/char", "chars/s", "p.png"):
        assert words in out
    assert "NOT THE SAME" not in out
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir()) == ["m.safetensors", "p.png", "text.txt"]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random_state)

    ours, vocabulary = model.load(Path("m.safetensors"))
    theirs, _ = model.load(Path("m.safetensors"), nn)
    symbols = vocabulary.encode(TEXT[:60]).long().view(-1, 2)
    with torch.no_grad():
        torch.testing.assert_close(ours(symbols)[0], theirs(symbols)[0])

    sampling = ["demo", "--sample-from", "m.safetensors", "--prompt", "the ", "--length", "30"]
    assert cli.main(sampling) == 0
    first = capsys.readouterr()
    assert first.err == ""
    assert first.out.startswith("the ")
    assert len(first.out) == len("the ") + 30 + len("\n")
    assert cli.main(sampling) == 0
    assert capsys.readouterr().out == first.out
    assert cli.main([*sampling, "--seed", "1"]) == 0
    assert capsys.readouterr().out != first.out


def test_demo_learns() -> None:
    text = small_corpus()
    contender = train.Contender("x", char_model(len(text.vocabulary)))
    train.train([contender], text, train.Settings(150, 2, 8, 0.02), lambda steps: None)
    unigram = text.unigram_bits(train.held_out_targets(text, 2)[1:])
    assert 3.0 < unigram < 5.0
    assert train.bits_per_character(contender.model, text, 2) < 0.5 * unigram


class Wrong(nn.LSTM):
    """An LSTM that computes something else."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        y, state = super().forward(x, hx)
        return 1.1 * y, state


class Diverged(nn.LSTM):
    """An LSTM whose output is not finite."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        y, state = super().forward(x, hx)
        return y * math.inf, state


def test_demo_notices_layers_that_compute_something_else(
    capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(rnnkern, "LSTM", Wrong)
    assert demo() == 1
    out, err = capsys.readouterr()
    assert "NOT THE SAME" in out
    assert "different losses" in err


def test_demo_stops_when_a_loss_is_not_finite(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(rnnkern, "LSTM", Diverged)
    assert demo() == 2
    assert "the loss of rnnkern.LSTM is nan at step 1" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["tqdm", "matplotlib", "rich", "safetensors"])
def test_a_missing_package_is_named(package: str, capsys: Capture, monkeypatch: Patch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(capsys, "--save m.safetensors")
    assert f"{package} is missing: pip install 'rnnkern[demo]'" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--out nowhere/p.png", "--out nowhere/p.png: cannot be written: No such file"),
        ("--out .", "it is a directory"),
        ("--out text.txt/p.png", "Not a directory"),
        ("--save nowhere/m.safetensors", "--save nowhere/m.safetensors: cannot be written"),
        (f"--save {'x' * 300}", "File name too long"),
        ("--out text.txt", "--text text.txt: the same file as --out"),
        ("--save text.txt", "--text text.txt: the same file as --save"),
        ("--out both --save ./both", "--save both: the same file as --out"),
    ],
)
def test_bad_outputs_are_refused_before_training(
    options: str, message: str, capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(corpus, "load_corpus", None)
    assert message in refused(capsys, options)
    assert os.listdir() == ["text.txt"]
    assert Path("text.txt").read_text() == TEXT


def test_a_pipe_is_written_to_and_not_replaced() -> None:
    # Not /dev/null: run by root, a mistake in `files` would replace it for the whole system.
    pipe = Path("pipe")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.check_writable(pipe, "--out")
        files.write(pipe, b"data")
        assert pipe.is_fifo()
        assert os.read(reader, 10) == b"data"
    finally:
        os.close(reader)


def test_a_file_is_replaced_whole_or_not_at_all(monkeypatch: Patch) -> None:
    path = Path("file")
    path.write_bytes(b"old")
    Path("link").symlink_to(path)
    files.write(Path("link"), b"new")
    assert path.read_bytes() == b"new"
    assert Path("link").is_symlink()

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CommandError, match="No space left"):
        files.write(path, b"newer")
    assert path.read_bytes() == b"new"
    assert sorted(os.listdir()) == ["file", "link", "text.txt"]


def test_printable_leaves_text_and_disarms_control_characters() -> None:
    assert report.printable("a\tb\n\N{SNOWMAN}") == "a\tb\n\N{SNOWMAN}"
    assert report.printable("\x1b[2J\x9b\r\u202e") == "\\x1b[2J\\x9b\\x0d\\x202e"

"""What the tests of the demo share: an empty directory with a small text, and ways to run it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import rnnkern
from rnnkern import cli
from rnnkern.demo import corpus, model

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
TEXT = "the cat sat on the mat; the dog ate the hat. " * 40
TINY = "--hidden 12 --steps 8 --batch 2 --seq-len 8 --length 30 --threads 1"


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: Patch) -> Path:
    """Work in an empty directory that holds only a small text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def demo(options: str = "") -> int:
    """Run ``rnnkern demo`` on the small text, with sizes that take a fraction of a second."""
    return cli.main(["demo", *shlex.split(TINY), "--text", "text.txt", *shlex.split(options)])


def refused(capsys: Capture, options: str) -> str:
    """Run it, make sure that it says no properly, and return what it says."""
    assert demo(options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rnnkern demo: error: ")
    assert err.count("\n") == 1
    return err


def small_corpus(*, batch: int = 2, seq_len: int = 8) -> corpus.Corpus:
    return corpus.load_corpus(Path("text.txt"), batch=batch, seq_len=seq_len)


def char_model(symbols: int, cell: str = "lstm", layers: int = 1) -> model.CharModel:
    return model.CharModel(rnnkern, cell=cell, symbols=symbols, hidden=12, layers=layers)

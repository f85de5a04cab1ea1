"""Text to symbols: vocabulary, streams, and texts that are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from demo.conftest import Capture, Patch, char_model, refused, small_corpus
from rnnkern.console.errors import CommandError
from rnnkern.demo import corpus, train
from torch import nn


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "No such file"),
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"too little", "10 characters, but --batch 2 and --seq-len 8 need 27"),
        (b"abc" * 100 + b"\xff", "not UTF-8 text: byte 0xff at offset 300"),
        ("text".encode("utf-16") * 100, "not UTF-8 text: byte 0xff at offset 0"),
        ("".join(map(chr, range(0x4E00, 0x4F00))).encode(), "fewer than two repeated"),
    ],
)
def test_bad_texts_are_refused(data: bytes | None, message: str, capsys: Capture) -> None:
    if data is not None:
        Path("bad.txt").write_bytes(data)
    assert message in refused(capsys, "--text bad.txt")


def test_a_directory_or_an_endless_text_is_refused(capsys: Capture, monkeypatch: Patch) -> None:
    assert "Is a directory" in refused(capsys, "--text .")
    monkeypatch.setattr(corpus, "MAX_TEXT", 1 << 20)
    assert "longer than 1 MiB" in refused(capsys, "--text /dev/zero")


@pytest.mark.parametrize(("batch", "seq_len"), [(2, 8), (1, 5), (7, 3), (40, 5)])
def test_the_least_text_named_is_enough_and_one_less_is_not(batch: int, seq_len: int) -> None:
    sizes = {"batch": batch, "seq_len": seq_len}
    Path("bad.txt").write_text("ab")
    with pytest.raises(CommandError) as error:
        corpus.load_corpus(Path("bad.txt"), **sizes)
    least = int(str(error.value).split()[-1])
    Path("bad.txt").write_text(("ab" * least)[:least])
    assert len(corpus.load_corpus(Path("bad.txt"), **sizes).streams(batch)) > seq_len
    Path("bad.txt").write_text(("ab" * least)[: least - 1])
    with pytest.raises(CommandError, match="too short"):
        corpus.load_corpus(Path("bad.txt"), **sizes)


def test_vocabulary_numbers_repeated_characters_and_marks_others() -> None:
    vocabulary = corpus.Vocabulary.of("aab\N{SNOWMAN}b\N{SNOWMAN}c")
    assert vocabulary.characters == "ab\N{SNOWMAN}"
    assert len(vocabulary) == 4
    assert vocabulary.encode("bxa\N{SNOWMAN}c\ud800").tolist() == [2, 0, 1, 3, 0, 0]
    assert vocabulary.encode("").tolist() == []
    assert [vocabulary.decode(k) for k in (1, 3, 0)] == ["a", "\N{SNOWMAN}", "\ufffd"]


def test_unknown_characters_are_paid_in_full() -> None:
    Path("text.txt").write_text("ab" * 500 + "ab\N{SNOWMAN}c" * 7)  # the end is held out
    text = small_corpus()
    flat = char_model(len(text.vocabulary))
    for weight in flat.parameters():
        nn.init.zeros_(weight)
    targets = train.held_out_targets(text, 2)[1:]
    unknown = int((targets == corpus.UNKNOWN).sum())
    assert unknown > 10
    expected = math.log2(3) + unknown / targets.numel() * math.log2(1_112_064 - 2)
    assert train.bits_per_character(flat, text, 2) == pytest.approx(expected, rel=1e-5)
    count = len(text.training)
    known_bits = -math.log2((count / 2 + 1) / (count + 3))
    unknown_bits = math.log2(count + 3) + math.log2(1_112_064 - 2)
    share = unknown / targets.numel()
    expected = share * unknown_bits + (1 - share) * known_bits
    assert text.unigram_bits(targets) == pytest.approx(expected, rel=1e-3)


def test_line_ends_and_byte_order_mark_are_read_away() -> None:
    Path("text.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert corpus.read_text(Path("text.txt")) == "a\nb\nc\n"


def test_standard_library_is_read_sorted_without_tests(tmp_path: Path) -> None:
    for name, text in {
        "b": "b" * 600_000,
        "a": "a" * 600_000,
        "test/c": "c",
        "x/test/d": "d",
    }.items():
        path = tmp_path / "lib" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "lib" / "bad.py").write_bytes(b"\xff")
    assert corpus.standard_library(tmp_path / "lib") == "a" * 600_000 + "b" * 600_000
    with pytest.raises(CommandError, match="--text FILE"):
        corpus.standard_library(tmp_path / "lib" / "x")
    assert "def " in corpus.standard_library()


def test_streams_go_on_where_the_step_before_ended() -> None:
    symbols = torch.arange(23, dtype=torch.int32)
    assert corpus.streams(symbols, 2).t().tolist() == [list(range(11)), list(range(11, 22))]

"""The demo: text to symbols, training in turns, the report, the model file, and every refusal."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import rnnkern
import torch
from rnnkern import cli
from rnnkern.console import files
from rnnkern.console.errors import CommandError
from rnnkern.demo import command, corpus, model, report, train
from torch import Tensor, nn

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


# ---- the whole run ------------------------------------------------------------------------------
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


# ---- text ---------------------------------------------------------------------------------------
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


# ---- training -----------------------------------------------------------------------------------
class Recorder(train.Contender):
    """A contender that only notes what it is given."""

    calls: list[tuple[str, Sequence[int], bool]]

    def step(self, x: Tensor, target: Tensor, learning_rate: float) -> None:
        assert torch.equal(x[1:], target[:-1])
        self.calls.append((self.name, x[:, 0].tolist(), self.state is None))
        self.state = torch.zeros(1)


def test_contenders_take_turns_on_the_same_batches_and_restart_with_the_text() -> None:
    text = corpus.Corpus("", corpus.Vocabulary("ab"), torch.arange(50), torch.arange(9))
    calls: list[Any] = []
    contenders = [Recorder(name, char_model(3)) for name in "pq"]
    for contender in contenders:
        contender.calls = calls
    train.train(contenders, text, train.Settings(4, 2, 8, 0.1), lambda steps: None)
    starts = [0, 8, 16, 0]  # a stream has 25 characters: three steps
    assert [name for name, _, _ in calls] == list("pqqppqqp")
    for name in "pq":
        own = [call[1:] for call in calls if call[0] == name]
        assert own == [(list(range(s, s + 8)), s == 0) for s in starts]
    assert [len(contender.speeds) for contender in contenders] == [4, 4]


def test_state_is_carried_and_cut_from_its_graph() -> None:
    text = small_corpus()
    contender = train.Contender("x", char_model(len(text.vocabulary)))
    train.train([contender], text, train.Settings(2, 2, 8, 0.0), lambda steps: None)
    assert isinstance(contender.state, tuple)
    assert not any(tensor.requires_grad for tensor in contender.state)
    chunk = text.streams(2)[:17]
    logits, _ = contender.model(chunk[:-1])
    whole = nn.functional.cross_entropy(logits.flatten(0, 1), chunk[1:].flatten())
    assert sum(contender.losses) / 2 == pytest.approx(whole.item(), rel=1e-5)


def test_comparison_takes_the_worst_start_and_the_mean_end() -> None:
    a, b = (train.Contender(name, char_model(3)) for name in "ab")
    a.losses, b.losses = [4.0, 2.0] + [1.0] * 98, [4.0, 1.5] + [1.0] * 48 + [1.1] * 50
    a.speeds, b.speeds = [1.0, 10.0, 20.0, 40.0], [9.0, 20.0, 60.0, 40.0]
    found = train.compare(a, b)
    assert (found.first_steps, found.last_steps) == (10, 25)
    assert found.start_difference == 0.25
    assert found.end_losses == pytest.approx((1.0, 1.1))
    assert found.end_difference == pytest.approx(0.1 / 1.1)
    assert found.ratios == [2.0, 3.0, 1.0]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("layers", [1, 3])
def test_weight_count(cell: str, layers: int) -> None:
    found = sum(weight.numel() for weight in char_model(7, cell, layers).parameters())
    assert model.weight_count(cell=cell, symbols=7, hidden=12, layers=layers) == found


def test_sizes_beyond_memory_are_refused(capsys: Capture, monkeypatch: Patch) -> None:
    assert "not enough memory: --hidden 1000000000" in refused(capsys, "--hidden 1000000000")
    assert "not enough memory" in refused(capsys, "--layers 1000000 --hidden 10000")

    def fail(*args: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(command, "_check_memory", fail)
    assert "not enough memory" in refused(capsys, "")


# ---- outputs ------------------------------------------------------------------------------------
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


# ---- model file ---------------------------------------------------------------------------------
def test_sample_follows_the_odds_and_never_draws_the_unknown() -> None:
    sure = char_model(4)
    for weight in sure.parameters():
        nn.init.zeros_(weight)
    with torch.no_grad():
        sure.head.bias.copy_(torch.tensor([9.0, 1.0, 2.0, 1.0]))
    vocabulary = corpus.Vocabulary("abc")

    def drawn(temperature: float) -> str:
        options = {"prompt": "?", "length": 300, "seed": 0}
        return "".join(model.sample(sure, vocabulary, temperature=temperature, **options))

    assert drawn(1e-300) == "b" * 300
    assert set(drawn(1.0)) == set("abc")
    share = math.e / (math.e + 2)
    assert drawn(1.0).count("b") / 300 == pytest.approx(share, abs=0.1)


def saved(**changes: Any) -> bytes:
    """Return a model file, with some tensors or metadata changed or, if None, left out."""
    from safetensors.torch import save

    tensors = dict(char_model(4).state_dict())
    metadata = {
        "format": model.FORMAT,
        "format_version": model.FORMAT_VERSION,
        "cell": "lstm",
        "hidden": "12",
        "layers": "1",
        "vocabulary": json.dumps("abc"),
    }
    for name, value in changes.items():
        where: dict[str, Any] = metadata if name in metadata else tensors
        where[name.replace("__", ".")] = value
    return save(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        {name: text for name, text in metadata.items() if text is not None},
    )


def test_prompt_of_unknown_characters_is_told(capsys: Capture) -> None:
    Path("m").write_bytes(saved())
    assert cli.main(["demo", "--sample-from", "m", "--prompt", "axy", "--length", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("axy")
    assert "does not know 2 of the prompt's characters" in err


@pytest.mark.parametrize("option", ["--text text.txt", "--save x", "--out x"])
def test_sampling_only_refuses_training_options(option: str, capsys: Capture) -> None:
    Path("m").write_bytes(saved())
    assert cli.main(["demo", "--sample-from", "m", *option.split()]) == 2
    assert f"leave out {option.split()[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_truncated_model_files_are_refused(keep: int) -> None:
    Path("m").write_bytes(saved()[:keep])
    with pytest.raises(CommandError, match="damaged, or not a safetensors file"):
        model.load(Path("m"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "not a model that rnnkern demo --save wrote"),
        ({"format_version": "2"}, "format version '2'; this rnnkern reads version 1"),
        ({"cell": "gru"}, "damaged"),
        ({"cell": "x"}, "damaged"),
        ({"hidden": "1000000000"}, "damaged"),
        ({"hidden": "-12"}, "damaged"),
        ({"hidden": "twelve"}, "damaged"),
        ({"layers": "1000000000"}, "damaged"),
        ({"layers": None}, "damaged"),
        ({"vocabulary": json.dumps("ab")}, "damaged"),
        ({"vocabulary": json.dumps("aab")}, "damaged"),
        ({"vocabulary": json.dumps(["a", "b", "c"])}, "damaged"),
        ({"vocabulary": "abc"}, "damaged"),
        ({"vocabulary": "[" * 100_000}, "damaged"),
        ({"head__bias": None}, "damaged"),
        ({"head__bias": torch.zeros(2, 2)}, "damaged"),
        ({"head__bias": torch.full((4,), math.nan)}, "damaged"),
        ({"head__bias": torch.zeros(4, dtype=torch.float64)}, "damaged"),
        ({"surplus": torch.zeros(1)}, "damaged"),
        ({"surplus": torch.zeros(0)}, "damaged"),
    ],
)
def test_foreign_model_files_are_refused(changes: dict[str, Any], message: str) -> None:
    Path("m").write_bytes(saved(**changes))
    with pytest.raises(CommandError, match=message) as error:
        model.load(Path("m"))
    assert "\n" not in str(error.value)


def test_a_missing_model_file_or_a_directory_is_refused(capsys: Capture) -> None:
    assert cli.main(["demo", "--sample-from", "none"]) == 2
    assert capsys.readouterr().err == (
        "rnnkern demo: error: none: cannot be read: No such file or directory\n"
    )
    assert cli.main(["demo", "--sample-from", "."]) == 2
    assert "Is a directory" in capsys.readouterr().err

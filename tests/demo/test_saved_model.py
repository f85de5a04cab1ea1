"""The model file: sampling from it, and files that are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from demo.conftest import Capture, char_model
from rnnkern import cli
from rnnkern.console.errors import CommandError
from rnnkern.demo import corpus, model
from torch import nn


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

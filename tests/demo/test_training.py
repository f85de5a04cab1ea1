"""Contenders in turns, the state that is carried, and the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from demo.conftest import Capture, Patch, char_model, refused, small_corpus
from rnnkern.demo import command, corpus, model, train
from torch import Tensor, nn


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

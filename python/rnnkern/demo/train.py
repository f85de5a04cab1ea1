"""Two models, the same weights, the same batches: truncated BPTT in alternating rounds.

One step of one model, on ``x, target`` of shape ``[L,B]``:

    logits, s = model(x, s)                     s comes from the step before, cut from its graph
    loss = -mean log p(target)                  nats per character
    backward; clip the gradient's norm to 1; Adam with the step's learning rate

The clock runs over these lines only. The models take turns by rounds of a few steps, and swap who
goes first, so that whatever else the machine does strikes both; the ratio of a round compares
neighbours in time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from rnnkern.console.errors import CommandError
from rnnkern.demo.corpus import UNKNOWN, Corpus, streams
from rnnkern.demo.model import CharModel, State, detached

_LARGEST_ROUND = 10  # steps
_EVALUATION = 200_000  # held-out characters that are read, at most
_EVALUATION_CHUNK = 256  # characters of a stream a call


@dataclass(frozen=True)
class Settings:
    """Sizes of a run: training steps, streams B, characters L of a step, highest learning rate."""

    steps: int
    batch: int
    seq_len: int
    learning_rate: float

    @property
    def round_steps(self) -> int:
        """Steps that one model takes before it is the other's turn."""
        return max(1, min(_LARGEST_ROUND, self.steps // 20))

    def rate_at(self, step: int) -> float:
        """Learning rate of a step: rises over the first 5 %, then falls as half a cosine to 5 %."""
        warm_up = max(1, self.steps // 20)
        rise = min(1.0, (step + 1) / warm_up)
        fall = 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * rise * (0.05 + 0.95 * fall)


@dataclass
class Contender:
    """A model in training, and what was measured on it.

    Attributes
    ----------
    name : str
        As the report calls it, e.g. ``"rnnkern.LSTM"``.
    model : CharModel
        Its weights change as it is trained.
    losses : list of float
        Nats per character, one a step.
    speeds : list of float
        Characters per second, one a round.
    bits : float
        Held-out bits per character, after training.
    """

    name: str
    model: CharModel
    losses: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    bits: float = math.nan
    state: State = None

    def __post_init__(self) -> None:
        """Make the optimizer of the model's weights."""
        self.weights = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(self.weights)

    def step(self, x: Tensor, target: Tensor, learning_rate: float) -> None:
        """Take one training step on symbols ``[L,B]``; CommandError if the loss is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        logits, state = self.model(x, self.state)
        loss = cross_entropy(logits.flatten(0, 1), target.flatten())
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.state = detached(state)
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise CommandError(
                f"the loss of {self.name} is {self.losses[-1]} at step {len(self.losses)}; "
                "a lower --lr may help"
            )


def train(
    contenders: Sequence[Contender],
    corpus: Corpus,
    settings: Settings,
    progress: Callable[[int], object],
) -> None:
    """Train all contenders on the same batches; results are left in them.

    Parameters
    ----------
    contenders : sequence of Contender
        With equal weights, if their losses shall be compared.
    corpus : Corpus
        Its training part is read in order, and again from the start when it ends.
    settings : Settings
        Sizes of the run.
    progress : callable
        Called with the number of steps that all contenders have newly taken.

    Raises
    ------
    CommandError
        If a loss is not finite.
    """
    text = corpus.streams(settings.batch)
    per_pass = (len(text) - 1) // settings.seq_len
    turn = list(contenders)
    for first in range(0, settings.steps, settings.round_steps):
        steps = range(first, min(first + settings.round_steps, settings.steps))
        for contender in turn:
            start = time.perf_counter()
            for step in steps:
                at = step % per_pass * settings.seq_len
                if at == 0:
                    contender.state = None
                chunk = text[at : at + settings.seq_len + 1]
                contender.step(chunk[:-1], chunk[1:], settings.rate_at(step))
            seconds = time.perf_counter() - start
            contender.speeds.append(len(steps) * settings.batch * settings.seq_len / seconds)
        turn.reverse()
        progress(len(steps))


def held_out_targets(corpus: Corpus, batch: int) -> Tensor:
    """Cut the held-out part into streams, int64 ``[N,B]``; all but the first row are predicted."""
    symbols = corpus.held_out[:_EVALUATION]
    return streams(symbols, max(1, min(batch, len(symbols) // _EVALUATION_CHUNK)))


def bits_per_character(model: CharModel, corpus: Corpus, batch: int) -> float:
    """Measure a model on the held-out text, each stream read from its start with a carried state.

    Parameters
    ----------
    model : CharModel
        It is left in the mode it was in.
    corpus : Corpus
        At most the first 200,000 characters of its held-out part are read.
    batch : int
        Streams to read side by side, at most.

    Returns
    -------
    float
        Mean of ``-log2 p``; an unknown character is paid in full, see `corpus`.
    """
    text = held_out_targets(corpus, batch)
    nats, state = 0.0, None
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for at in range(0, len(text) - 1, _EVALUATION_CHUNK):
            chunk = text[at : at + _EVALUATION_CHUNK + 1]
            logits, state = model(chunk[:-1], state)
            nats += float(
                cross_entropy(logits.flatten(0, 1), chunk[1:].flatten(), reduction="sum").double()
            )
    model.train(was_training)
    targets = text[1:]
    unknown = int((targets == UNKNOWN).sum())
    return (nats / math.log(2.0) + unknown * corpus.vocabulary.unknown_bits) / targets.numel()


@dataclass(frozen=True)
class Comparison:
    """How two contenders compare; the first one is the baseline.

    Attributes
    ----------
    first_steps : int
        Steps looked at for `start_difference`: 10, or all if there are fewer.
    start_difference : float
        Largest relative difference of their losses in these steps: rounding, if all is well.
    last_steps : int
        Steps averaged for `end_losses`: 50, or a quarter of all.
    end_losses : tuple of float
        Mean loss of each over these steps.
    ratios : list of float
        Speed of the second over speed of the first, one a round; without the first of four rounds
        or more, which pays for starting threads and filling caches.
    """

    first_steps: int
    start_difference: float
    last_steps: int
    end_losses: tuple[float, float]
    ratios: list[float]

    @property
    def end_difference(self) -> float:
        """Relative difference of the smoothed losses at the end."""
        return relative_difference(*self.end_losses)


def relative_difference(a: float, b: float) -> float:
    """Return ``|a - b|`` over the larger of both."""
    return abs(a - b) / (max(abs(a), abs(b)) or 1.0)


def steady(speeds: Sequence[float]) -> Sequence[float]:
    """Leave out the first round, which warms up, if three others are left."""
    return speeds[1:] if len(speeds) >= 4 else speeds


def compare(baseline: Contender, other: Contender) -> Comparison:
    """Compare the losses and speeds of two trained contenders."""
    first = min(10, len(baseline.losses))
    last = max(1, min(50, len(baseline.losses) // 4))
    pairs = list(zip(baseline.losses, other.losses, strict=True))
    return Comparison(
        first,
        max(relative_difference(a, b) for a, b in pairs[:first]),
        last,
        (statistics.fmean(baseline.losses[-last:]), statistics.fmean(other.losses[-last:])),
        [b / a for a, b in zip(steady(baseline.speeds), steady(other.speeds), strict=True)],
    )

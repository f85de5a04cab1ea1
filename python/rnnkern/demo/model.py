"""The character model and its file: embedding -> recurrent layers -> linear.

    e_t = E[c_t]        (y_t, s_t) = rnn(e_t, s_t-1)        p(c_t+1) = softmax(A y_t + a)

The recurrent layers come from torch.nn or from rnnkern; since both have the same ``state_dict``,
one set of weights, and one saved file, serves either.

A saved model is a safetensors file: the ``state_dict`` (embedding.weight, rnn.*, head.*) and, as
metadata, ``format``, ``format_version``, ``cell``, ``hidden``, ``layers`` and ``vocabulary`` (a
JSON string).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import rnnkern
from rnnkern.console.errors import CommandError, require
from rnnkern.console.files import reason, write
from rnnkern.demo.corpus import UNKNOWN, Vocabulary

State = Tensor | tuple[Tensor, Tensor] | None
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
FORMAT = "rnnkern-demo-character-model"
FORMAT_VERSION = "1"
_LARGEST_EMBEDDING = 64


class CharModel(nn.Module):
    """A character language model.

    Parameters
    ----------
    library : module
        ``torch.nn`` or ``rnnkern``: where the recurrent layers come from.
    cell : {"lstm", "gru", "rnn"}
        Kind of recurrent layer.
    symbols : int
        Size V of the vocabulary.
    hidden, layers : int
        Units of a layer, and number of layers.
    """

    def __init__(
        self, library: ModuleType, *, cell: str, symbols: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        width = min(_LARGEST_EMBEDDING, hidden)
        self.cell = cell
        self.embedding = nn.Embedding(symbols, width)
        self.rnn = getattr(library, CELLS[cell])(width, hidden, num_layers=layers)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, symbols: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Map symbols ``[T,B]`` and a state to logits ``[T,B,V]`` and the state after them."""
        y, state = self.rnn(self.embedding(symbols), state)
        return self.head(y), state


def weight_count(*, cell: str, symbols: int, hidden: int, layers: int) -> int:
    """Count the weights that a `CharModel` of these sizes would have."""
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[cell]
    width = min(_LARGEST_EMBEDDING, hidden)
    first = gates * hidden * (width + hidden + 2)
    others = gates * hidden * (hidden + hidden + 2)
    return symbols * width + first + (layers - 1) * others + symbols * (hidden + 1)


def detached(state: State) -> State:
    """Cut a state from the graph that made it, so that backpropagation stops there."""
    if state is None:
        return None
    return state.detach() if isinstance(state, Tensor) else (state[0].detach(), state[1].detach())


def sample(
    model: CharModel,
    vocabulary: Vocabulary,
    *,
    prompt: str,
    length: int,
    temperature: float,
    seed: int,
) -> Iterator[str]:
    """Write on from a prompt, one character at a time.

    Parameters
    ----------
    model, vocabulary
        A trained model and the numbering it was trained with.
    prompt : str
        Read first, and not repeated in the result. An empty one counts as a new line.
    length : int
        Characters to draw.
    temperature : float
        The logits are divided by it: near 0 the likeliest character, 1 the model's own odds.
    seed : int
        Of the random numbers; the same seed draws the same text.

    Yields
    ------
    str
        One character; never the unknown one.
    """
    generator = torch.Generator().manual_seed(seed)
    symbols = vocabulary.encode(prompt or "\n").long().unsqueeze(1)
    state: State = None
    for _ in range(length):
        with torch.inference_mode():
            logits, state = model(symbols, state)
            last = logits[-1].double()
            last[:, UNKNOWN] = -torch.inf
            odds = torch.softmax((last - last.max()) / temperature, dim=-1)
            symbols = torch.multinomial(odds, 1, generator=generator)
        yield vocabulary.decode(int(symbols))


def save(path: Path, model: CharModel, vocabulary: Vocabulary) -> None:
    """Write a model file; CommandError if the system refuses."""
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "cell": model.cell,
        "hidden": str(model.head.in_features),
        "layers": str(model.rnn.num_layers),
        "vocabulary": json.dumps(vocabulary.characters),
    }
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write(path, require("safetensors.torch").save(tensors, metadata))


def load(path: Path, library: ModuleType = rnnkern) -> tuple[CharModel, Vocabulary]:
    """Read a model file that `save` wrote.

    Parameters
    ----------
    path : Path
        The file.
    library : module
        ``rnnkern`` or ``torch.nn``: where the recurrent layers shall come from.

    Returns
    -------
    CharModel, Vocabulary
        The model in evaluation mode, and its numbering of characters.

    Raises
    ------
    CommandError
        If the file cannot be read, is damaged, or is not such a model.
    """
    safetensors = require("safetensors")
    tensors: dict[str, Tensor] = {}
    try:
        with open(path, "rb"):
            pass  # the system's own words for a missing file, a directory, a lack of rights
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == FORMAT:
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError:
        raise CommandError(f"{path}: damaged, or not a safetensors file") from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: cannot be read: {reason(error)}") from None
    if metadata.get("format") != FORMAT:
        raise CommandError(f"{path}: not a model that rnnkern demo --save wrote")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise CommandError(
            f"{path}: format version {metadata.get('format_version')!r:.40}; this rnnkern reads "
            f"version {FORMAT_VERSION}"
        )
    try:
        return _rebuild(metadata, tensors, library)
    except (KeyError, TypeError, ValueError, RuntimeError, UnicodeError):
        raise CommandError(f"{path}: damaged: its weights and its description differ") from None


def _rebuild(
    metadata: dict[str, Any], tensors: dict[str, Tensor], library: ModuleType
) -> tuple[CharModel, Vocabulary]:
    """Build the model that a file describes; a mismatch raises before anything is allocated."""
    characters = json.loads(metadata["vocabulary"])
    if not isinstance(characters, str):
        raise TypeError("vocabulary")
    vocabulary = Vocabulary(characters)
    hidden, layers = int(metadata["hidden"]), int(metadata["layers"])
    sizes = {"cell": metadata["cell"], "symbols": len(vocabulary), "hidden": hidden}
    found = sum(tensor.numel() for tensor in tensors.values())
    if min(hidden, layers) < 1 or weight_count(layers=layers, **sizes) != found:
        raise ValueError("sizes")
    if not all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values()):
        raise ValueError("weights")
    model = CharModel(library, layers=layers, **sizes)
    model.load_state_dict(tensors)
    return model.eval(), vocabulary

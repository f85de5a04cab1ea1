"""Text -> symbols: what is read, how characters are numbered, how the text is cut into streams.

A vocabulary numbers the characters that make up at least 1e-5 of the training text (and occur
twice); number 0 stands for every other character. An unknown character is never free: in bits per
character it costs the model's bits for number 0, and the bits to tell which one of all other
Unicode characters it is,

    bits(unknown) = -log2 p(0) + log2(1 112 064 - known characters).

The training text is cut into B equally long streams that are read side by side, L characters a
step, so that the state carried from one step to the next belongs to the characters just before:

    stream 0   |--- step 0 ---|--- step 1 ---| ...         inputs  [L,B] = streams[s   : s+L  ]
    stream 1   |--- step 0 ---|--- step 1 ---| ...         targets [L,B] = streams[s+1 : s+L+1]
"""

from __future__ import annotations

import math
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rnnkern.console.errors import CommandError
from rnnkern.console.files import reason

UNKNOWN = 0
HELD_OUT_SHARE = 20  # one part in so many
MIN_STDLIB = 1_000_000  # characters
MAX_TEXT = 256 * 1024 * 1024  # bytes
_UNICODE = 0x110000  # code points, of which 2048 are surrogates and no characters
_SKIPPED = frozenset(
    # Tests, code of others, and the tables of code pages, which are no text to learn from.
    ("test", "tests", "idlelib", "encodings", "site-packages", "dist-packages", "__pycache__")
)


class Vocabulary:
    """The numbering of characters: 0 is unknown, ``characters[k - 1]`` is number k.

    Parameters
    ----------
    characters : str
        The known characters, each once.

    Raises
    ------
    ValueError
        If there is none, or one occurs twice.
    """

    def __init__(self, characters: str) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise ValueError("a vocabulary needs characters, each of them once")
        self.characters = characters
        self._table = torch.zeros(_UNICODE, dtype=torch.int32)
        self._table[_code_points(characters).long()] = torch.arange(
            1, len(characters) + 1, dtype=torch.int32
        )

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        """Build the vocabulary of a training text; CommandError if too few characters repeat."""
        counts = torch.bincount(_code_points(text))
        known = torch.nonzero(counts >= max(2.0, 1e-5 * len(text))).flatten()
        if len(known) < 2:
            raise CommandError("the text has fewer than two repeated characters to learn from")
        return cls("".join(map(chr, known.tolist())))

    def __len__(self) -> int:
        """Count the numbers, the one for unknown characters included."""
        return len(self.characters) + 1

    @property
    def unknown_bits(self) -> float:
        """Bits that name one of the characters that are not in the vocabulary."""
        return math.log2(_UNICODE - 2048 - len(self.characters))

    def encode(self, text: str) -> Tensor:
        """Return the numbers of a text's characters, int32 ``[len(text)]``."""
        return self._table.index_select(0, _code_points(text))

    def decode(self, symbol: int) -> str:
        """Return the character of a number; U+FFFD for the unknown one."""
        return "\N{REPLACEMENT CHARACTER}" if symbol == UNKNOWN else self.characters[symbol - 1]


@dataclass(frozen=True)
class Corpus:
    """A text, numbered and split.

    Attributes
    ----------
    source : str
        Where the text comes from, in words.
    vocabulary : Vocabulary
        Built from the training part only.
    training, held_out : Tensor
        int32 ``[N]``: the text without its last twentieth, and that last twentieth.
    """

    source: str
    vocabulary: Vocabulary
    training: Tensor
    held_out: Tensor

    @property
    def sizes(self) -> str:
        """The sizes of the text and of its parts, in words."""
        return (
            f"{len(self.training) + len(self.held_out):,} characters, "
            f"{len(self.vocabulary) - 1:,} different; the last {len(self.held_out):,} are held out"
        )

    def streams(self, batch: int) -> Tensor:
        """Cut the training part into `batch` streams: int64 ``[N // batch, batch]``."""
        return streams(self.training, batch)

    def unigram_bits(self, targets: Tensor) -> float:
        """Bits per character if only the frequencies of the training part were known.

        Parameters
        ----------
        targets : Tensor
            Numbers of the characters to be predicted, any shape.

        Returns
        -------
        float
            Mean of ``-log2((count + 1) / (N + V))``, unknown characters paid in full.
        """
        counts = torch.bincount(self.training, minlength=len(self.vocabulary)).double() + 1
        bits = -torch.log2(counts / counts.sum())
        bits[UNKNOWN] += self.vocabulary.unknown_bits
        return float(bits[targets.long()].mean())


def streams(symbols: Tensor, batch: int) -> Tensor:
    """Cut ``[N]`` symbols into `batch` streams side by side, int64 ``[N // batch, batch]``."""
    length = len(symbols) // batch
    return symbols[: batch * length].view(batch, length).t().long().contiguous()


def load_corpus(path: Path | None, *, batch: int, seq_len: int) -> Corpus:
    """Read a text and prepare it for training.

    Parameters
    ----------
    path : Path or None
        A UTF-8 file; None takes the source files of Python's standard library.
    batch, seq_len : int
        Streams and characters of one training step; they set how much text is the least.

    Returns
    -------
    Corpus
        Numbered and split.

    Raises
    ------
    CommandError
        If the text cannot be read or decoded, or is too short.
    """
    text = standard_library() if path is None else read_text(path)
    name = _stdlib_name() if path is None else str(path)
    held = max(len(text) // HELD_OUT_SHARE, seq_len + 1)
    if len(text) - held < batch * (seq_len + 1):
        least = batch * (seq_len + 1)
        least += max(seq_len + 1, (least - 1) // (HELD_OUT_SHARE - 1))
        raise CommandError(
            f"{name}: too short: {len(text):,} characters, but --batch {batch} and --seq-len "
            f"{seq_len} need {least:,}"
        )
    training = text[:-held]
    vocabulary = Vocabulary.of(training)
    symbols = vocabulary.encode(text)
    return Corpus(name, vocabulary, symbols[:-held], symbols[-held:])


def read_text(path: Path) -> str:
    """Read a UTF-8 file, any line ends; CommandError if it cannot be read, is empty or too long."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TEXT + 1)
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: cannot be read: {reason(error)}") from None
    if len(data) > MAX_TEXT:
        raise CommandError(f"{path}: longer than {MAX_TEXT >> 20} MiB; give a part of it")
    if not data.strip():
        raise CommandError(f"{path}: empty: there is no text in it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CommandError(
            f"{path}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start:,}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def standard_library(root: Path | None = None) -> str:
    """Read the source files of Python's standard library, sorted by name, one after the other.

    Parameters
    ----------
    root : Path, optional
        Its directory; by default the running interpreter's.

    Returns
    -------
    str
        At least 1,000,000 characters.

    Raises
    ------
    CommandError
        If there is less: a zipped or stripped-down Python.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts[:-1]):
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError):
                continue  # bad on purpose, or not ours to read: there is enough without it
    text = "".join(texts)
    if len(text) < MIN_STDLIB:
        raise CommandError(
            f"only {len(text):,} characters of the standard library's source are in {root}, "
            f"{MIN_STDLIB:,} are needed: name a text with --text FILE"
        )
    return text


def _stdlib_name() -> str:
    return f"the standard library of Python {sys.version_info.major}.{sys.version_info.minor}"


def _code_points(text: str) -> Tensor:
    """Return the code points of a text, int32 ``[len(text)]``; lone surrogates pass."""
    if not text:
        return torch.zeros(0, dtype=torch.int32)
    data = text.encode(f"utf-32-{'le' if sys.byteorder == 'little' else 'be'}", "surrogatepass")
    return torch.frombuffer(bytearray(data), dtype=torch.int32)

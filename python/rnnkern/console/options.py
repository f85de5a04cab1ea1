"""Options that several commands have, and types for argparse that say what they want."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rnnkern.console.machine import cpu_count


def add_threads(parser: argparse._ActionsContainer) -> None:
    """Declare ``--threads``."""
    parser.add_argument(
        "--threads",
        type=count(max(16, 4 * cpu_count())),
        metavar="N",
        help="CPU threads (default: torch's own choice)",
    )


def number(
    convert: Callable[[str], Any], valid: Callable[[Any], bool], wanted: str
) -> Callable[[str], Any]:
    """Return an argparse type that takes valid numbers, and tells for others what was wanted."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not valid(value):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {wanted}")
        return value

    return parse


def count(most: int) -> Callable[[str], Any]:
    """Return an argparse type for a whole number from 1 to `most`."""
    return number(int, lambda value: 1 <= value <= most, f"a whole number from 1 to {most:,}")


def path(text: str) -> Path:
    """Take a file's name, as an argparse type."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a file name")
    return Path(text)

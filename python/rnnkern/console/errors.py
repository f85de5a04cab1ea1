"""One-line errors for the user of the command line, and imports that may be missing."""

from __future__ import annotations

import importlib
from typing import Any


class CommandError(Exception):
    """An error to be shown as one line on stderr, with exit status 2 and no traceback."""


def require(module: str, extra: str = "demo") -> Any:
    """Import an optional dependency of a command.

    Parameters
    ----------
    module : str
        Dotted name of the module, e.g. ``"rich.table"``.
    extra : str
        The extra of this package that brings it.

    Returns
    -------
    module
        The imported module.

    Raises
    ------
    CommandError
        If it cannot be imported; the message names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise CommandError(f"{package} is missing: pip install 'rnnkern[{extra}]'") from None

"""Output files: checked before the work starts, written in one piece when it is done."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from rnnkern.console.errors import CommandError


def reason(error: Exception) -> str:
    """Return the plain reason of an ``OSError`` (``"Permission denied"``), or any error's text."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def check_writable(path: Path, option: str) -> None:
    """Make sure that `write` will be able to write a file, without touching it.

    Parameters
    ----------
    path : Path
        The file to be written later.
    option : str
        The option that named it, for the message.

    Raises
    ------
    CommandError
        If it is a directory, or cannot be created or replaced.
    """
    try:
        if _is_plain_or_new(path):
            target = Path(os.path.realpath(path))
            if target.exists() and not os.access(target, os.W_OK):
                raise PermissionError(0, "the file is write-protected")
            with tempfile.TemporaryFile(dir=target.parent):
                pass
        elif path.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        elif not os.access(path, os.W_OK):
            raise PermissionError(0, "Permission denied")
    except (OSError, ValueError) as error:
        raise CommandError(f"{option} {path}: cannot be written: {reason(error)}") from None


def write(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or all of the new one, never a part.

    Devices and pipes (``/dev/null``) are written to as they are.

    Parameters
    ----------
    path : Path
        The file to write; a symbolic link is followed.
    data : bytes
        Everything it shall hold.

    Raises
    ------
    CommandError
        If the system refuses (disk full, directory gone).
    """
    try:
        if not _is_plain_or_new(path):
            path.write_bytes(data)
            return
        target = Path(os.path.realpath(path))
        part = target.parent / f".rnnkern-{os.getpid()}.part"
        try:
            part.write_bytes(data)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"{path}: cannot be written: {reason(error)}") from None


def _is_plain_or_new(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return True

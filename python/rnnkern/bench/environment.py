"""Where a measurement was made: machine, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import rnnkern
from rnnkern import _native
from rnnkern.console import machine

_PACKAGE = Path(__file__).parents[1]


def describe() -> dict[str, Any]:
    """Return what the results depend on, for all outputs.

    Returns
    -------
    dict
        ``cpu``, ``cores``, ``threads``, ``isa``, ``versions``, ``commit`` (None outside a
        checkout), ``date``.
    """
    return {
        "cpu": machine.cpu_name(),
        "cores": machine.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _native.isa(),
        "versions": {
            "torch": str(torch.__version__),
            "rnnkern": rnnkern.__version__,
            "onnxruntime": _version("onnxruntime"),
            "python": platform.python_version(),
            "os": platform.platform(),
        },
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def line(described: dict[str, Any]) -> str:
    """Return it as one line."""
    versions = ", ".join(f"{name} {v}" for name, v in described["versions"].items() if v)
    commit = f", commit {described['commit']}" if described["commit"] else ""
    return (
        f"{described['cpu']}, {described['cores']} CPUs, {described['threads']} threads, "
        f"ISA {described['isa']}; {versions}{commit}; {described['date']}"
    )


def commit(folder: Path = _PACKAGE) -> str | None:
    """Return the commit of the checkout that this package, or the working directory, lies in.

    An installed package does not know its commit: then it is that of the working directory, if
    that is a checkout of rnnkern.
    """
    for place in (folder, Path.cwd()):
        found = _git(place, "rev-parse", "--show-toplevel")
        if found and (Path(found) / "python" / "rnnkern" / "bench").is_dir():
            changed = "+changes" if _git(place, "status", "--porcelain", "-uno") else ""
            name = _git(place, "rev-parse", "--short=12", "HEAD")
            return f"{name}{changed}" if name else None
    return None


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

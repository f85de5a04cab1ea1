"""The native extension modules, and what they say of themselves.

Import torch before this module: torch's wheel brings its own OpenMP runtime, and the CPU kernels
then share it instead of loading a second one.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from typing import Any

from rnnkern import _cpu

__all__ = ["_cpu", "cuda_module", "isa", "load_cuda", "select_isa", "supported_isas"]

_WHY_NOT_BUILT = "no CUDA compiler was found, or RNNKERN_CUDA=OFF was set, when it was built"


def isa() -> str:
    """Return the name of the ISA the CPU kernels run with."""
    name: str = _cpu.isa()
    return name


def supported_isas() -> list[str]:
    """Return the ISAs this CPU can run, slowest first."""
    names: list[str] = _cpu.supported_isas()
    return names


def select_isa(name: str) -> None:
    """Run the CPU kernels of another ISA from now on (as ``RNNKERN_ISA`` does at import).

    Raises
    ------
    ValueError
        If the name is unknown or this CPU does not support it; the message lists the supported
        ones.
    """
    _cpu.select_isa(name)


def allow_oversubscription(allow: bool) -> None:
    """Let teams have more threads than there are CPUs (for tests: it makes nothing faster)."""
    _cpu.allow_oversubscription(allow)


def sleep_at_once(on: bool) -> None:
    """Let threads that wait for others of their team sleep without watching first (for tests)."""
    _cpu.sleep_at_once(on)


def cuda_module() -> Any:
    """Return the module of the CUDA kernels, or None if there is none or it cannot be loaded."""
    return load_cuda()[0]


@lru_cache
def load_cuda() -> tuple[Any, str]:
    """Return the module of the CUDA kernels, or None and why there is none."""
    if importlib.util.find_spec("rnnkern._cuda") is None:
        return None, f"this build has no CUDA kernels ({_WHY_NOT_BUILT})"
    try:
        return importlib.import_module("rnnkern._cuda"), ""
    except ImportError as error:
        return None, f"rnnkern._cuda cannot be loaded ({error})"

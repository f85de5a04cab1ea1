"""How much memory a call needs at its peak, beyond what the process holds before it.

Linux keeps the highest resident size of a process and lets it be reset. Free memory that the C
library keeps is given back before, so that a call cannot hide in it.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Memory:
    """The memory of a call.

    Attributes
    ----------
    peak_mb : float
        The most it needs at once, beyond what stays between calls, in MB (10^6 bytes).
    beyond_mb : float
        The same without its outputs, and without the gradients in training.
    """

    peak_mb: float
    beyond_mb: float


def measure(call: Callable[[], Any], given: int, tries: int = 3) -> Memory | None:
    """Measure a call's memory.

    Parameters
    ----------
    call : callable
        It was called before.
    given : int
        Bytes of all outputs and gradients.
    tries : int
        Calls; the median counts, as other threads may allocate meanwhile.

    Returns
    -------
    Memory or None
        None where the system does not tell.
    """
    gc.collect()
    peaks = [_peak(call) for _ in range(tries)]
    known = sorted(peak for peak in peaks if peak is not None)
    if not known:
        return None
    peak = known[len(known) // 2]
    return Memory(peak / 1e6, max(0, peak - given) / 1e6)


def _peak(call: Callable[[], Any]) -> int | None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        call()
        after = _status("VmHWM")
    except (OSError, AttributeError, TypeError):  # not Linux, not glibc, or not allowed
        return None
    return None if before is None or after is None else max(0, after - before)


def _status(name: str) -> int | None:
    text = (_PROCESS / "status").read_text(encoding="ascii", errors="replace")
    match = re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None

"""How much memory a call needs at its peak, beyond what the process holds before it.

Linux keeps the highest resident size of a process and lets it be reset. Free memory that the C
library keeps is given back before, so that a call cannot hide in it.

Contenders are measured in a process of their own, whose C library gives every large block back to
the system as soon as it is freed. Otherwise what is resident also depends on the holes that
earlier calls left in its heap, of this contender and of others: in one process, the same call
varied by a fifth.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rnnkern.bench.cases import Case
from rnnkern.bench.contenders import Problem, grad_mode

_LARGE = 64 << 10
"""Bytes from which on a block is given back by itself."""
_MMAP_THRESHOLD = -3  # of mallopt, in glibc
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


class Process:
    """Where the memory of contenders is measured; started when it is first asked.

    It is a context manager, at whose end the process is gone.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def measure(self, case: Case, name: str, threads: int) -> Memory | None:
        """Measure one call of a contender.

        Parameters
        ----------
        case : Case
            What it runs.
        name : str
            One of `rnnkern.bench.contenders.NAMES`, and one that can run it.
        threads : int
            On how many threads.

        Returns
        -------
        Memory or None
            None where the system does not tell, lets no such process start, or ends it for want of
            memory.
        """
        try:
            if self._pool is None:
                spawn = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_start)
            found = self._pool.submit(_measure, case, name, threads)
        except (BrokenProcessPool, OSError, ImportError, NotImplementedError):
            # It ended since it was last asked, or cannot be started: the last two, no semaphores.
            self._end()
            return None
        try:
            return found.result()
        except BrokenProcessPool:
            self._end()
            return None

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    with suppress(AttributeError, OSError, TypeError):  # not glibc: nor does `_peak` find anything
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)


def _measure(case: Case, name: str, threads: int) -> Memory | None:
    torch.set_num_threads(threads)
    problem = Problem(case)
    with grad_mode(case):
        made = problem.contender(name, threads, keeps=False)
        given = sum(tensor.nbytes for tensor in made.tensors(made.call()))
        if case.mode == "training":  # y, which is computed but not returned
            given += problem.dy.nbytes
        found = measure(made.call, given)
    torch.compiler.reset()  # what was compiled for this case serves no other
    return found


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

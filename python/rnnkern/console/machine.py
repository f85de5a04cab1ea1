"""What the operating system tells about this machine and this process."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

import torch

_OPENMP = re.compile(r"/lib(?:gomp|iomp5|omp5?)\b[^/]*\.(?:so|dylib)[^/]*$")


def cpu_name() -> str:
    """Return the processor's name, e.g. ``"AMD EPYC 9R14"``, or its architecture if that is all."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        cpuinfo = ""
    match = re.search(r"^model name\s*:\s*(\S.*)$", cpuinfo, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def cpu_count() -> int:
    """Return the number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpu_names(folder: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Return the names of the NVIDIA GPUs here, also of those that torch finds no way to use.

    Parameters
    ----------
    folder : Path
        Where Linux's driver describes them, one folder for each.
    """
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names = []
    for path in sorted(folder.glob("*/information")):
        match = re.search(r"^Model:\s*(\S.*)$", path.read_text(errors="replace"), re.MULTILINE)
        names.append(match.group(1).strip() if match else path.parent.name)
    return names


def available_memory() -> int | None:
    """Return the bytes of memory that can still be allocated, or None where that is not known.

    The lower one of what Linux calls available and what is left of the control group's limit.
    """
    amounts = []
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace")
        match = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo, re.MULTILINE)
        if match:
            amounts.append(int(match.group(1)) * 1024)
    except OSError:
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = (group / "memory.current").read_text(encoding="ascii")
            amounts.append(max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        pass
    return min(amounts) if amounts else None


def openmp_in(maps: Iterable[str]) -> list[str]:
    """Find the OpenMP runtimes in a listing of the form of ``/proc/self/maps``.

    Parameters
    ----------
    maps : iterable of str
        Its lines.

    Returns
    -------
    list of str
        Paths of the libraries, sorted, each file once however many names lead to it.
    """
    paths = set()
    for line in maps:
        fields = line.rstrip("\n").split(maxsplit=5)
        path = fields[5].removesuffix(" (deleted)") if len(fields) == 6 else ""
        if _OPENMP.search(path):
            paths.add(os.path.realpath(path))
    return sorted(paths)


def openmp_runtimes() -> list[str] | None:
    """Return the paths of the OpenMP runtimes in this process, or None where that is not known."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            return openmp_in(maps)
    except OSError:
        return None

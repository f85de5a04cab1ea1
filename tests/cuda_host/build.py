"""Compiles csrc/cuda, unmodified, as host C++ against the shim in this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NAME = "_cuda_host"
SHIM = [HERE / "fibers.cpp", HERE / "runtime.cpp"]


def build(folder: Path, *flags: str) -> Path:
    """Compile and link the module `NAME` in `folder`; return its path.

    Raises
    ------
    RuntimeError
        If the compiler fails; the message is its output.
    """
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "bind" / "cuda.cpp"]
    target = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    return link([*sources, *SHIM], target, flags)


def build_probe(folder: Path, *flags: str) -> Path:
    """Compile and link the kernels that test the shim itself, for ctypes; as `build`."""
    return link([HERE / "probe.cu", *SHIM], folder / "probe.so", flags)


def build_cublas(folder: Path, *flags: str) -> Path:
    """Compile and link what stands for cuBLAS, for ctypes; as `build`."""
    return link([HERE / "cublas.cpp"], folder / "cublas.so", flags)


def link(sources: Sequence[Path], target: Path, flags: Sequence[str]) -> Path:
    """Compile what has no object file beside `target` yet, and link all; return `target`.

    A target that is there already stays: another process may have loaded it.
    """
    if target.exists():
        return target
    compiler = os.environ.get("CXX") or shutil.which("g++") or "clang++"
    includes = [HERE / "include", ROOT / "csrc", pybind11.get_include()]
    includes += [sysconfig.get_path("include")]
    options = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    options += [
        "-U_FORTIFY_SOURCE"
    ]  # which takes a jump from one fiber's stack to another's for a fault
    options += ["-Wno-unknown-pragmas", "-Wno-clobbered", "-Wno-maybe-uninitialized"]
    options += [f"-DRNNKERN_CUDA_MODULE={NAME}", *flags]
    options += [f"-I{path}" for path in includes]

    def compile_one(source: Path) -> str:
        made = target.parent / f"{source.stem}.o"
        if not made.exists():
            run([compiler, *options, "-x", "c++", "-c", str(source), "-o", str(made)])
        return str(made)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    run([compiler, "-shared", *flags, *objects, "-o", str(target)])
    return target


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    if done.stderr:
        sys.stderr.write(done.stderr)


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), *sys.argv[2:]))

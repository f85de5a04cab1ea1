"""Compiles csrc/cuda, unmodified, as host C++ against the shim in this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NAME = "_cuda_host"


def build(folder: Path, *flags: str) -> Path:
    """Compile and link the module `NAME` in `folder`; return its path.

    Raises
    ------
    RuntimeError
        If the compiler fails; the message is its output.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or "clang++"
    includes = [HERE / "include", ROOT / "csrc", pybind11.get_include()]
    includes += [sysconfig.get_path("include")]
    options = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    options += ["-Wno-unknown-pragmas", "-Wno-clobbered", "-Wno-maybe-uninitialized"]
    options += [f"-DRNNKERN_CUDA_MODULE={NAME}", *flags]
    options += [f"-I{path}" for path in includes]
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "bind" / "cuda.cpp"]
    sources += [HERE / "shim.cpp"]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        run([compiler, *options, "-x", "c++", "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    module = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    run([compiler, "-shared", *flags, *objects, "-o", str(module)])
    return module


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    if done.stderr:
        sys.stderr.write(done.stderr)


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), *sys.argv[2:]))

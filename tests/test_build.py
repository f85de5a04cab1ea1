"""RNNKERN_CUDA, the build's switch for the CUDA kernels: CMake configures, nothing compiles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA = ("CUDACXX", "CUDA_HOME", "CUDA_PATH")


def without_compilers_of_cuda() -> str:
    """Return PATH without the folders of what CMake would take for a CUDA compiler."""
    folders = os.environ["PATH"].split(os.pathsep)
    kept = [f for f in folders if not any(shutil.which(n, path=f) for n in ("nvcc", "clang++"))]
    return os.pathsep.join(kept)


def tool(*names: str, path: str | None = None) -> str:
    """Return the first of these programs that there is."""
    found = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
    if found is None:
        pytest.skip(f"no {' or '.join(names)}")
    return found


def configure(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Configure a build without a CUDA compiler in sight; its output is one text."""
    cmake, path = tool("cmake"), without_compilers_of_cuda()
    tool("ninja", "make", path=path)
    own = {name: value for name, value in os.environ.items() if name not in CUDA}
    own |= {"PATH": path, "CXX": os.environ.get("CXX") or tool("g++", "clang++")}
    command = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    # Set, and false: the search, which knows /usr/local/cuda, is over.
    command += ["-DRNNKERN_NVCC=OFF", *options]
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=own | environment,
    )


def told(done: subprocess.CompletedProcess[str]) -> str:
    """Return what CMake said, without its line breaks."""
    return " ".join(done.stdout.split())


def test_off_has_no_cuda_kernels(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DRNNKERN_CUDA=OFF")
    assert done.returncode == 0, done.stdout
    assert "CUDA" not in told(done)
    command = [tool("cmake"), "--build", str(tmp_path), "--target", "help"]
    targets = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "_cpu" in targets
    assert "cuda" not in targets


def test_on_without_a_compiler_says_where_it_looked(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DRNNKERN_CUDA=ON")
    assert done.returncode != 0
    assert "RNNKERN_CUDA=ON, but no CUDA compiler was found. Looked for nvcc in PATH," in told(done)
    assert all(name in told(done) for name in CUDA)


@pytest.mark.parametrize("switch", ["ON", "AUTO"])
def test_a_compiler_that_does_not_exist_is_named(tmp_path: Path, switch: str) -> None:
    done = configure(tmp_path, f"-DRNNKERN_CUDA={switch}", CUDACXX="/nowhere/nvcc")
    assert (done.returncode != 0) is (switch == "ON")
    assert "CUDACXX names /nowhere/nvcc, which does not exist." in told(done)
    if switch == "AUTO":
        assert "No CUDA kernels: " in told(done)


def test_the_switch_has_three_positions(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DRNNKERN_CUDA=YES")
    assert done.returncode != 0
    assert "RNNKERN_CUDA: expected AUTO, ON or OFF, got YES" in told(done)

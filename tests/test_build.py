"""The build's switches for the CUDA kernels: CMake configures, or chooses, and nothing compiles."""

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


# ---- architectures ------------------------------------------------------------------------------
WITHOUT_GPU = "80;90a-real"


def program(path: Path, text: str) -> Path:
    """Write a shell script that can be run."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def chosen(folder: Path, smi: str | None, archs: str = "", known: str = "80 86 89 90 120") -> str:
    """Return what is chosen where `nvidia-smi` is such a script, or missing."""
    list_known = f'test "$*" = --list-gpu-arch && printf "compute_%s\\n" {known}'
    options = [
        f"-DCMAKE_CUDA_COMPILER={program(folder / 'nvcc', list_known)}",
        f"-DRNNKERN_CUDA_ARCHS={archs}",
    ]
    if smi is not None:
        program(folder / "nvidia-smi", smi)
    script = folder / "choose.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.20)\n"
        f'include("{ROOT}/csrc/cuda/archs.cmake")\n'
        'message("chosen: ${RNNKERN_CUDA_ARCHS}")\n'
    )
    done = subprocess.run(
        [tool("cmake"), *options, "-P", str(script)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": str(folder)},
    )
    (found,) = done.stderr.splitlines()  # and no warning
    return found.removeprefix("chosen: ")


def gpus(*capabilities: str) -> str:
    """Return an `nvidia-smi` that sees these, one a line."""
    asked = "--query-gpu=compute_cap --format=csv,noheader"
    return f'test "$*" = "{asked}" && printf "%s\\n" {" ".join(capabilities)}'


@pytest.mark.parametrize(
    "smi",
    [
        None,
        "exit 9",
        "echo 8.0; exit 9",
        "echo No devices were found",
        "echo '[N/A]'",
        "exit 0",
    ],
    ids=str,
)
def test_architectures_where_no_gpu_is_seen(tmp_path: Path, smi: str | None) -> None:
    assert chosen(tmp_path, smi) == WITHOUT_GPU


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (["8.0"], "80-real"),
        (["9.0"], "90a-real"),
        (["12.0"], "120-real"),
        (["8.6", "9.0"], "86-real;90a-real"),
        (["8.0", "8.0", "8.9", "8.0"], "80-real;89-real"),
        (["7.0"], WITHOUT_GPU),  # older than the kernels support
        (["6.1", "8.9", "7.2"], "89-real"),
        (["7.5"], WITHOUT_GPU),  # older than this compiler supports
        (["13.0"], WITHOUT_GPU),  # newer than it knows: PTX
        (["8.0", "13.0"], "80"),
        (["13.0", "9.0", "12.0", "14.0"], "90a-real;120-real;80"),
        (["8.8"], WITHOUT_GPU),  # not known, but what is built for 8.0 runs there
        (["8.8", "9.0"], "90a-real;80"),
        (["8.0", "8.8"], "80"),
        (["7.5", "8.9"], "89-real"),
    ],
    ids=str,
)
def test_architectures_of_the_machine_s_gpus(tmp_path: Path, found: list[str], wanted: str) -> None:
    assert chosen(tmp_path, gpus(*found)) == wanted


def test_architectures_of_a_gpu_depend_on_the_compiler(tmp_path: Path) -> None:
    assert chosen(tmp_path, gpus("7.5", "8.0"), known="75 80") == "75-real;80-real"
    assert chosen(tmp_path, gpus("9.0"), known="80 90 90a") == "90a-real"
    assert chosen(tmp_path, gpus("8.0"), known="") == WITHOUT_GPU


@pytest.mark.parametrize("archs", ["90", "75-real", "86-real;89-real", "native"])
def test_architectures_that_are_given(tmp_path: Path, archs: str) -> None:
    assert chosen(tmp_path, gpus("8.0"), archs=archs) == archs


def test_architectures_of_wheels(tmp_path: Path) -> None:
    wanted = "80;86-real;89-real;90a-real;120-real"
    assert chosen(tmp_path, gpus("8.0"), archs="wheels") == wanted

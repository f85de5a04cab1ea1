"""Check what nvcc makes of csrc/cuda: spilled registers, tensor cores, read-only loads, libraries.

    python .ci/cuda_check.py                for the architectures of a build without a GPU
    python .ci/cuda_check.py --all          for every architecture that wheels carry, and the oldest
    python .ci/cuda_check.py --list         also print the registers of each kernel
    python .ci/cuda_check.py --built KEPT   the installed module's libraries and the PTX that its
                                            build kept there (nvcc --keep), whose spills are the
                                            build's to show; the benchmark; PTX for the oldest
    python .ci/cuda_check.py --nvcc         print the compiler, or nothing, and check nothing

Needs nvcc, where CMake finds it; without it, nothing is checked and the exit status is 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FEW = ("80", "90a")
WHEELS = re.search(r"wheel_archs ([^)]*)", (ROOT / "csrc/cuda/archs.cmake").read_text())
assert WHEELS is not None
OLDEST = "75"
ALL = (OLDEST, *(name.removesuffix("-real") for name in WHEELS[1].split()))
TENSOR_TYPES = ("float16", "bfloat16", "float32")
OLDEST_TENSOR_TYPES = ("float16",)
TYPES = (*TENSOR_TYPES, "float64")
PERSISTENT = ("forward_sequence", "backward_sequence")
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<spilled>\d+) bytes spill stores.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    """Return the compiler that CMake would take."""
    places = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    found = (shutil.which("nvcc", path=str(Path(place) / "bin")) for place in places if place)
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or next(filter(None, found), None)


def nvcc(*arguments: str) -> str:
    """Run the compiler and return what it says."""
    command = [
        find_nvcc() or "nvcc",
        "-std=c++17",
        "-O3",
        "-fmad=false",
        f"-I{ROOT / 'csrc'}",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stderr


def compile_one(source: Path, architecture: str, folder: Path) -> list[re.Match[str]]:
    """Compile one file for one architecture; return a match for each kernel."""
    target = folder / f"{source.stem}.{architecture}.o"
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    said = nvcc("-gencode", code, "-Xptxas", "-v", "-c", str(source), "-o", str(target))
    target.unlink()
    return list(KERNEL.finditer(said))


def make_ptx(source: Path, architecture: str, folder: Path) -> Path:
    """Compile one file to PTX for one architecture."""
    target = folder / f"{source.stem}.compute_{architecture}.ptx"
    nvcc(f"-arch=compute_{architecture}", "-ptx", str(source), "-o", str(target))
    return target


def read_ptx(target: Path) -> tuple[int, list[str]]:
    """Return how many kernels the PTX of a type's file has, and what is wrong in it.

    TensorProduct must use mma, where there are tensor cores for the type. Stages of one kernel read
    what other blocks wrote in the stage before: through the read-only cache they might not see it.
    So do the steps of a persistent kernel, whose blocks tell each other by a release and an
    acquire.
    """
    kind, text = target.name.split(".")[0], target.read_text()
    head, *entries = re.split(r"\.entry ", text)
    name = {e: e.split("(", 1)[0] for e in entries}
    faults = [f"{name[e]}: read-only loads" for e in entries if "ld.global.nc" in e]
    for kernel in PERSISTENT:
        persistent = [e for e in entries if kernel in name[e]]
        for word in ("red.release.gpu", "ld.acquire.gpu"):
            faults += [f"{name[e]}: no {word}" for e in persistent if word not in e]
        if not persistent:
            faults.append(f"no {kernel}")
    oldest = re.search(rf"^\.target sm_{OLDEST}\b", head, re.MULTILINE)
    if kind not in (OLDEST_TENSOR_TYPES if oldest else TENSOR_TYPES):
        return len(entries), faults
    tensor = [e for e in entries if "TensorProduct" in name[e]]
    if not tensor:
        faults.append("no kernel with TensorProduct at all")
    faults += [f"{name[e]}: no tensor cores" for e in tensor if "mma.sync" not in e]
    return len(entries), faults


def find_kept(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the PTX of each type's file that a build kept, and which types have none."""
    kept = {kind: sorted(folder.glob(f"{kind}.*ptx")) for kind in TYPES}
    missing = [f"{folder}: no {kind}.*ptx of nvcc --keep" for kind in TYPES if not kept[kind]]
    return [path for paths in kept.values() for path in paths], missing


def read_libraries() -> list[str]:
    """Return what is wrong in how the installed module is linked.

    It has CUDA's runtime in it and nothing else of CUDA, the driver included: it is imported where
    there is none of that.
    """
    spec = importlib.util.find_spec("rnnkern._cuda")
    if spec is None or spec.origin is None:
        return ["rnnkern._cuda: not installed"]
    command = ["readelf", "--dynamic", spec.origin]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", said)
    faults = [f"{spec.origin}: needs {name}" for name in needed if re.match("lib(cu|nv)", name)]
    return faults if needed else [f"{spec.origin}: no libraries found in\n{said}"]


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--built", type=Path, metavar="KEPT")
    parser.add_argument("--nvcc", action="store_true")
    options = parser.parse_args()
    if options.nvcc:
        print(find_nvcc() or "")
        return 0
    if find_nvcc() is None:
        print("no nvcc: the CUDA kernels are not compiled here")
        return 0
    architectures = ALL if options.all else FEW
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    sources = [*([] if options.built else kernels), ROOT / "bench" / "gpu_floor.cu"]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        jobs = {
            (s, a): pool.submit(compile_one, s, a, folder) for a in architectures for s in sources
        }
        compiled = () if options.built else architectures
        made = [
            pool.submit(make_ptx, s, a, folder)
            for s in kernels
            if s.stem in TYPES
            for a in {*compiled, OLDEST}
            if a != OLDEST or s.stem in OLDEST_TENSOR_TYPES
        ]
        ptx = [job.result() for job in made]
        wrong, read, count = [], 0, 0
        if options.built:
            kept, wrong = find_kept(options.built)
            ptx += kept
            wrong += read_libraries()
        for target in ptx:
            kernels_read, faults = read_ptx(target)
            read += kernels_read
            wrong += [f"{target.name}: {fault}" for fault in faults]
        for (source, architecture), job in jobs.items():
            for kernel in job.result():
                count += 1
                where = f"sm_{architecture} {source.stem} {kernel['name']}"
                if options.list:
                    print(f"{kernel['registers']:>4} registers  {where}")
                if kernel["spilled"] != "0":
                    wrong.append(f"{where}: spills {kernel['spilled']} bytes")
    for line in wrong:
        print(line, file=sys.stderr)
    where = ", ".join(f"sm_{architecture}" for architecture in architectures)
    print(f"{count} kernels compiled for {where}, {read} read as PTX: {len(wrong)} faults")
    return 1 if wrong or count == 0 or read == 0 else 0


if __name__ == "__main__":
    sys.exit(main())

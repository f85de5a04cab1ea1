"""Add the example cell of CONTRIBUTING.md to a copy of the tree, by its three edits, and test it.

Usage, in the root of the repository: python .ci/worked_example.py FOLDER. All is written to FOLDER.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

COPIED = ("csrc", "python", "tests", "CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml")


def main(folder: Path) -> None:
    """Copy, edit, install beside the real package (unoptimised: it compiles in seconds), test."""
    tree, site = folder / "tree", folder / "site"
    tree.mkdir(parents=True)
    for name in COPIED:
        copy = shutil.copytree if Path(name).is_dir() else shutil.copy
        copy(name, tree / name)
    add_cell(tree, Path("CONTRIBUTING.md").read_text(encoding="utf-8"))
    options = ["--config-settings=cmake.build-type=Debug", f"--target={site}"]
    options += ["--config-settings=cmake.define.RNNKERN_CUDA=OFF"]  # half the time
    run("pip", "install", "--quiet", "--no-deps", *options, str(tree))
    run("pytest", "-k", "mgu", "tests/kernels", "tests/ops", cwd=tree, PYTHONPATH=str(site))


def add_cell(tree: Path, text: str) -> None:
    """Make the three edits that `text` shows in its code blocks."""
    header, row = re.findall(r"^```cpp\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    reference, _ = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    include, entry = row.split("\n\n")
    (tree / "csrc/cells/mgu.h").write_text(header, encoding="utf-8")
    registry = tree / "csrc/cells/registry.h"
    rows = (
        registry.read_text(encoding="utf-8")
        .rstrip()
        .replace("\n\n#define", f"\n{include}\n\n#define")
    )
    registry.write_text(f"{rows} \\\n{entry}", encoding="utf-8")
    references = tree / "python/rnnkern/reference.py"
    cells, scan, rest = references.read_text(encoding="utf-8").partition("def scan(")
    references.write_text(f"{cells}{reference}\n\n{scan}{rest}", encoding="utf-8")


def run(module: str, *arguments: str, cwd: Path | None = None, **environment: str) -> None:
    """Run a module of this Python; end with its status if that is not 0."""
    command = [sys.executable, "-m", module, *arguments]
    status = subprocess.run(command, cwd=cwd, env=os.environ | environment, check=False).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

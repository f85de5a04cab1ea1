"""Where the tests marked for every device run: what a GPU adds, without having one."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from cases import run_python

HERE = Path(__file__).parent
MODULES = {
    "parity/test_modes.py": True,
    "parity/test_errors.py": True,
    "kernels/test_isa.py": False,
}
COLLECT = """
    import sys

    import pytest
    import torch
    from rnnkern import _native

    torch.cuda.is_available = lambda: sys.argv[1] == "GPU"
    _native.cuda_module = lambda: object()
    sys.exit(pytest.main(sys.argv[2:]))
"""


@cache
def collected(gpu: str, expression: str) -> tuple[str, ...]:
    """Return the tests of MODULES, in order, that `-m expression` selects; gpu: "GPU" or none."""
    done = run_python(
        COLLECT,
        gpu,
        *(str(HERE / name) for name in MODULES),
        *("-c", str(HERE.parent / "pyproject.toml"), "-o", "addopts=--import-mode=importlib"),
        *("--collect-only", "-q", "-p", "no:cacheprovider", "-m", expression),
    )
    assert done.returncode in (0, pytest.ExitCode.NO_TESTS_COLLECTED), done.stdout + done.stderr
    return tuple(line for line in done.stdout.splitlines() if "::" in line)


def test_without_a_gpu_nothing_is_for_one() -> None:
    assert collected("", "gpu") == ()


def test_a_gpu_leaves_the_tests_of_the_cpu_as_they_are() -> None:
    assert collected("GPU", "not gpu") == collected("", "not gpu")


def test_a_gpu_adds_each_test_of_the_marked_modules_but_those_of_the_cpu() -> None:
    added = collected("GPU", "gpu")
    assert all("[cuda" in test for test in added)
    twins = [test.replace("[cuda-", "[", 1).replace("[cuda]", "") for test in added]
    alone = "costs_nothing", "weights_cost_nothing", "malformed_state_for_packed_input"
    wanted = [
        test
        for test in collected("", "not gpu")
        if any(name in test for name, twice in MODULES.items() if twice)
        and not any(name in test for name in alone)
    ]
    assert sorted(twins) == sorted(wanted)

"""The cases of ``rnnkern bench`` under pytest-benchmark, which keeps and compares histories.

    pytest -n 0 bench/test_layers.py --benchmark-only -k "rnnkern and 100x32x256"
    pytest -n 0 bench/test_layers.py --benchmark-only --benchmark-autosave
    pytest -n 0 bench/test_layers.py --benchmark-only --benchmark-compare

Contenders run one after the other here: to compare them, use ``rnnkern bench``, which lets them
take turns. RNNKERN_BENCH_THREADS sets the number of threads; the default is torch's choice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rnnkern.bench.cases import Case, all_cases
from rnnkern.bench.contenders import NAMES, AbsentError, Problem, check, grad_mode

pytest.importorskip("pytest_benchmark")


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("RNNKERN_BENCH_THREADS", before)))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_layer(case: Case, name: str, threads: int, benchmark: Any) -> None:
    problem = Problem(case)
    try:
        contender = problem.contender(name, threads)
    except AbsentError as reason:
        pytest.skip(str(reason))
    benchmark.group = case.name
    benchmark.extra_info["threads"] = threads
    with grad_mode(case):
        check(contender, contender.call(), problem.reference(), case.dtype)
        benchmark(contender.call)
    torch.compiler.reset()

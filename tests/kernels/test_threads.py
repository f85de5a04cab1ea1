"""Threads: equal bits for every team, several callers at once, and forked children."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import rnnkern
import torch
from cases import (
    KERNELS,
    Case,
    Results,
    assert_identical,
    assert_matches,
    build,
    evaluate,
    expected,
    feature_cases,
    run_python,
    use_isa,
)
from rnnkern import _native, cpu
from rnnkern.cells import CELLS
from rnnkern.console import machine

COUNTS = (1, 2, 3, 4, 7)

# Sizes at which the plans of COUNTS split directions, rows, units, and rows and units at once, and
# one with a helper.
SIZES = (
    {"T": 6, "B": 3, "H": 192},
    {"T": 5, "B": 17, "H": 70, "D": 2},
    {"T": 6, "B": 1, "H": 192, "D": 2},
    {"T": 4, "B": 6, "H": 130},
)
HELPED = (
    {"T": 300, "B": 1, "H": 40},
    {"T": 300, "B": 1, "H": 33, "D": 2, "I": 200},
    {"T": 300, "B": 4, "H": 64},
)
LSTM_PROJECTED = ({"T": 5, "B": 5, "H": 200, "P": 150, "D": 2}, {"T": 6, "B": 1, "H": 192, "P": 70})
LSTM_PROJECTED_HELPED = ({"T": 300, "B": 1, "H": 40, "P": 24},)


@pytest.fixture(autouse=True)
def _more_threads_than_cpus() -> Iterator[None]:
    """Lift the cap of the team at the number of CPUs, so that any machine runs every plan."""
    _native.allow_oversubscription(True)
    yield
    _native.allow_oversubscription(False)
    _native.sleep_at_once(False)


def sized_cases(cell: str) -> list[Case]:
    sizes = SIZES + (LSTM_PROJECTED if cell == "lstm" else ())
    cases = [Case(cell, I=9, **s) for s in sizes]
    cases += [Case(cell, T=9, B=7, I=70, H=192, D=2)]
    cases += [Case(cell, T=8, B=16, I=40, H=33)]  # W in pieces, and threads that split rows
    cases += [Case(cell, T=1, B=4, I=192, H=192)]  # nothing packed
    # The more gates, the fewer steps a chunk has: with these, a helper has a chunk to make.
    pair = {"T": 1200 // max(2, CELLS[cell].gates), "B": 2, "H": 32, "D": 2}
    helped = (*HELPED, pair) + (LSTM_PROJECTED_HELPED if cell == "lstm" else ())
    for layout in ("padded", "batch_first"):
        cases += [Case(cell, **{"I": 40, **s}, layout=layout) for s in helped]
    for more in (
        {"layout": "packed_unsorted", "resets": True, "reset_state": True},
        {"layout": "batch_first", "lengths": True, "resets": True, "reset_state": True},
        {"lengths": True, "bias": False},
    ):
        cases += [Case(cell, I=9, **s, **more) for s in sizes]
    return cases


def plan_of(case: Case, threads: int, backward: bool, dtype: torch.dtype) -> tuple[int, ...]:
    P = case.P or case.H
    index = CELLS[case.cell].index
    plan = cpu.KERNELS[dtype].plan(
        index,
        threads,
        *(case.T, case.B, case.H, P, case.D, case.I),
        backward,
        case.packed or case.lengths,
    )
    return (*(plan[f"{what}_groups"] for what in ("direction", "row", "unit")), plan["helpers"])


def run_all(cases: list[Case], dtype: torch.dtype) -> list[Results]:
    """Run training and inference of every case, from the same seed."""
    torch.manual_seed(1)
    results = []
    for case in cases:
        args = build(case, dtype)
        results.append(evaluate(args))
        with torch.no_grad():
            results.append(evaluate(args))
    return results


@pytest.mark.parametrize("cell", CELLS)
def test_the_sizes_reach_every_kind_of_plan(cell: str) -> None:
    for backward in (False, True):
        plans, helped_rows = set(), set()
        for isa, dtype in KERNELS:
            with use_isa(isa):
                for case, threads in itertools.product(sized_cases(cell), COUNTS):
                    plan = plan_of(case, threads, backward, dtype)
                    plans.add(plan)
                    helped_rows |= {case.B} if plan[-1] else set()
        for group in range(3):
            assert any(plan[group] > 1 for plan in plans), sorted(plans)
        assert any(d > 1 and r * u > 1 for d, r, u, _ in plans), sorted(plans)
        assert any(r > 1 and u > 1 for _, r, u, _ in plans), sorted(plans)
        assert any(d * r * u == max(COUNTS) for d, r, u, _ in plans), sorted(plans)
        assert {d for d, _, _, helpers in plans if helpers} == {1, 2}, sorted(plans)
        if CELLS[cell].gates > 1 and not backward:  # else steps are too cheap at these sizes
            assert any(r * u > 1 for _, r, u, helpers in plans if helpers), sorted(plans)
            assert helped_rows == {1, 2, 4}


@pytest.mark.parametrize(("isa", "dtype"), KERNELS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_the_team(cell: str, isa: str, dtype: torch.dtype) -> None:
    """Every output and gradient, in training and inference."""
    cases = sized_cases(cell)
    with use_isa(isa):
        torch.set_num_threads(1)
        wanted = run_all(cases, dtype)
        for threads in COUNTS[1:]:
            torch.set_num_threads(threads)
            # Awake, threads without a CPU of their own spin in each other's time.
            _native.sleep_at_once(threads > machine.cpu_count())
            for i, found in enumerate(run_all(cases, dtype)):
                assert_identical(found, wanted[i], f"{cases[i // 2]}, {threads} threads")


@pytest.mark.parametrize("asleep", [False, True], ids=["awake", "asleep"])
def test_a_team_computes_what_the_reference_does(asleep: bool) -> None:
    """However its threads wait for each other."""
    torch.set_num_threads(7)
    _native.sleep_at_once(asleep)
    for cell in CELLS:
        args = build(Case(cell, T=4, B=6, H=70, I=9, D=2, lengths=True, resets=True))
        assert_matches(evaluate(args), expected(args), dtype=torch.float64)


# ---- several callers ----------------------------------------------------------------------------
@pytest.mark.parametrize("threads", [1, 3])
def test_python_threads_at_once(threads: int) -> None:
    torch.set_num_threads(threads)
    cases = feature_cases(T=6, B=5, H=70)
    arguments = [build(case, torch.float32) for case in cases]
    wanted = [evaluate(args) for args in arguments]
    start = threading.Barrier(4)

    def work(offset: int) -> list[tuple[int, Results]]:
        torch.set_num_threads(threads)  # OpenMP keeps the number per thread
        start.wait(timeout=60)
        order = [(i * 7 + offset * 5) % len(cases) for i in range(len(cases))]
        return [(i, evaluate(arguments[i])) for i in order]

    with ThreadPoolExecutor(4) as pool:
        for part in pool.map(work, range(4)):
            for i, found in part:
                assert_identical(found, wanted[i])


def test_one_module_shared_by_python_threads() -> None:
    module = rnnkern.LSTM(5, 40, num_layers=2, bidirectional=True)
    inputs = [torch.randn(7, 3, 5) for _ in range(8)]
    wanted = [module(x)[0].detach() for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda x: module(x)[0].detach(), inputs))
            assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_kernels_release_the_interpreter(pass_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another Python thread goes on while a long kernel runs."""
    progress, inside = [0], []
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            progress[0] += 1
            time.sleep(0)

    def watched(*args: Any) -> Any:
        before = progress[0]
        results = native(*args)
        inside.append(progress[0] - before)
        return results

    native = getattr(_native._cpu.Stack, pass_)
    monkeypatch.setattr(_native._cpu.Stack, pass_, watched)
    torch.set_num_threads(1)
    counter = threading.Thread(target=count)
    counter.start()
    try:
        y, _ = rnnkern.GRU(1, 64)(torch.randn(30_000, 1, 1))
        y[-1].sum().backward()
    finally:
        done.set()
        counter.join()
    assert len(inside) == 1
    assert inside[0] > 10  # none or one if the kernel held the lock


# ---- the pool, and forked children --------------------------------------------------------------
FORK = """
    import os, sys, warnings
    warnings.simplefilter("ignore")  # Python 3.12 warns of forking with threads
    import torch
    import rnnkern

    rnnkern._native.allow_oversubscription(True)
    torch.manual_seed(0)
    torch.set_num_threads(4)
    module = rnnkern.LSTM(8, 192, bidirectional=True)
    x = torch.randn(30, 5, 8)

    def step():
        module.zero_grad()
        y, _ = module(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in module.parameters())]

    assert rnnkern.explain(module, x).threads > 1, rnnkern.explain(module, x)
    wanted = step()
    large = rnnkern.GRU(128, 256)
    several = torch.randn(10, 5, 128)
    with torch.no_grad():
        wanted_large = large(several)[0]
"""
OS_FORK = """
    def child(depth):
        torch.set_num_threads(1)
        assert all(map(torch.equal, step(), wanted))
        torch.set_num_threads(4)  # the pool did not survive, whatever the child asks for
        assert rnnkern.explain(module, x).threads == 1
        with torch.no_grad():
            torch.testing.assert_close(large(several)[0], wanted_large)
            torch.set_num_threads(1)
            assert torch.equal(module(x)[0], wanted[0])
        if depth:
            fork(depth - 1)

    def fork(depth):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                child(depth)
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0

    fork(1)
    fork(0)
    assert all(map(torch.equal, step(), wanted))  # and the parent still has its team
    assert rnnkern.explain(module, x).threads > 1
"""
POOL = """
    def threads_alive():
        return len(os.listdir("/proc/self/task"))

    torch.set_num_threads(1)
    torch.get_num_threads = lambda: 11  # torch's own pool is of 4
    rnnkern.plain.connect()
    before = threads_alive()
    assert rnnkern.explain(module, x).threads > 4, rnnkern.explain(module, x)
    step()
    assert threads_alive() > before, "the team is granted no threads: nothing here tests any"
"""
DATA_LOADER = """
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            with torch.no_grad():
                return module(x)[0]

    if __name__ == "__main__":
        loader = torch.utils.data.DataLoader(
            Data(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        for y in loader:
            assert torch.equal(y, wanted[0])
"""


def run_script(script: str) -> None:
    """Run FORK and `script` in a new process; a hang ends at the timeout, as a failure."""
    done = run_python(textwrap.dedent(FORK) + textwrap.dedent(script))
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in Linux's /proc")
def test_a_team_has_its_threads() -> None:
    run_script(POOL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("script", [OS_FORK, DATA_LOADER], ids=["os_fork", "data_loader"])
def test_forked_children(script: str) -> None:
    run_script(script)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPUs")
def test_bound_threads_do_not_shrink_the_team() -> None:
    """OMP_PROC_BIND binds the calling thread to one CPU; the team is still the machine's."""
    code = """
        import torch, rnnkern
        torch.set_num_threads(2)
        x = torch.randn(20, 16, 256)
        module = rnnkern.LSTM(256, 256)
        module(x)
        assert rnnkern.explain(module, x).threads == 2, rnnkern.explain(module, x)
    """
    environment = {**os.environ, "OMP_PROC_BIND": "true"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr

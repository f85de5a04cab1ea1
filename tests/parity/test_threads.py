"""One module used by several Python threads at once, and by forked workers after the parent."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from pairs import CELLS, LAYERS, Run, assert_same_run, pair, random_packed, random_state, run
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

layers = pytest.mark.parametrize("name", LAYERS)
both_kinds = pytest.mark.parametrize("name", LAYERS + CELLS)
pytestmark = pytest.mark.timeout(120)
WORKERS = 4


def inputs(module: nn.Module) -> list[Tensor]:
    """Make inputs of several sizes, small ones (one thread) and large ones (the whole team)."""
    if isinstance(module, nn.RNNCellBase):
        return [torch.randn(rows, 33) for rows in (1, 7, 64) for _ in range(4)]
    shapes = [(1, 1), (7, 3), (40, 16), (20, 33)]
    return [torch.randn(*shape, 33) for shape in shapes for _ in range(3)]


@both_kinds
def test_inference_from_several_threads(name: str) -> None:
    theirs, ours = pair(name, 33, 65)
    xs = inputs(theirs)

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            result = ours(x)
        return result if isinstance(result, Tensor) else result[0]

    alone = [call(x) for x in xs]
    with ThreadPoolExecutor(WORKERS) as pool:
        together = list(pool.map(call, xs * 4))
    for index, found in enumerate(together):
        assert torch.equal(found, alone[index % len(xs)])
    expected = theirs(xs[-1])
    expected = expected if isinstance(expected, Tensor) else expected[0]
    assert_close(alone[-1], expected, kind="output")


@both_kinds
def test_training_from_several_threads(name: str) -> None:
    theirs, ours = pair(name, 33, 65)
    xs = inputs(theirs)
    weights = list(ours.parameters())

    def gradients(x: Tensor) -> list[Tensor]:
        result = ours(x)
        y = result if isinstance(result, Tensor) else result[0]
        return list(torch.autograd.grad(y.pow(2).mean(), weights))

    alone = [gradients(x) for x in xs]
    with ThreadPoolExecutor(WORKERS) as pool:
        together = list(pool.map(gradients, xs * 2))
    for index, found in enumerate(together):
        for actual, expected in zip(found, alone[index % len(xs)], strict=True):
            assert_close(actual, expected, kind="gradient")


@layers
def test_threads_of_different_modules_and_forms(name: str) -> None:
    modules = [pair(name, 33, size, bidirectional=size > 20)[1] for size in (7, 33, 65)]
    packed = [random_packed([3, 9, 5, 9], 33) for _ in range(4)]

    def call(job: tuple[nn.Module, Any]) -> Run:
        return run(job[0], job[1], backward=False)

    jobs = [(module, p) for module in modules for p in packed]
    alone = [call(job) for job in jobs]
    with ThreadPoolExecutor(WORKERS) as pool:
        for actual, expected in zip(pool.map(call, jobs * 3), alone * 3, strict=True):
            assert_same_run(actual, expected)


@layers
def test_a_thread_inherits_no_mode(name: str) -> None:
    ours = pair(name, 3, 4)[1]
    x = torch.randn(5, 2, 3)
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: ours(x)[0].requires_grad).result()
        assert not ours(x)[0].requires_grad


@layers
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_counts_agree(name: str, threads: int) -> None:
    made = pair(name, 33, 65, 2, bidirectional=True)
    x, hx = torch.randn(20, 17, 33), random_state(made[0], 17)
    expected = run(made[0], x, hx)
    torch.set_num_threads(threads)
    assert_same_run(run(made[1], x, hx), expected)


class Encoded(Dataset[tuple[Tensor, Tensor]]):
    """Runs the module in the worker, forward and backward, as feature extraction does."""

    def __init__(self, module: nn.Module, xs: list[Tensor]) -> None:
        self.module = module
        self.xs = xs

    def __len__(self) -> int:
        return len(self.xs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        y = self.module(self.xs[index])[0]
        (gradient,) = torch.autograd.grad(y.pow(2).sum(), [self.module.weight_hh_l0])
        return y.detach(), gradient


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@layers
def test_forked_workers_after_the_parent_used_it(name: str) -> None:
    theirs, ours = pair(name, 33, 65)
    xs = [torch.randn(40, 16, 33) for _ in range(6)]
    expected = [Encoded(theirs, xs)[index] for index in range(len(xs))]
    before = Encoded(ours, xs)[0]  # starts the parent's team of threads
    loader = DataLoader(
        Encoded(ours, xs),
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
        timeout=60,
    )
    for (y, gradient), (wanted, wanted_gradient) in zip(loader, expected, strict=True):
        assert_close(y, wanted, kind="output")
        assert_close(gradient, wanted_gradient, kind="gradient")
    after = Encoded(ours, xs)[0]  # and the parent's team still works
    assert torch.equal(after[0], before[0])

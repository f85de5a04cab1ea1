"""What is queued now and runs later or elsewhere: graphs of packed data, threads, two devices.

Every test runs on the CPU too, where a graph is the call itself, so that it is known to be right
where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import rnnkern
import torch
from cases import cuda_extension
from gpu.flags import tf32
from rnnkern import cuda
from rnnkern._native import load_cuda
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

pytestmark = pytest.mark.timeout(120)
# The last two have steps of two stages, which are cooperative launches.
MODULES: dict[str, Callable[..., nn.Module]] = {
    "LSTM": rnnkern.LSTM,
    "GRU": rnnkern.GRU,
    "RNN": rnnkern.RNN,
    "GRU-reset-before": partial(rnnkern.GRU, reset_after=False),
    "LSTM-projected": partial(rnnkern.LSTM, proj_size=24),
}
modules = pytest.mark.parametrize("name", MODULES)
THREADS = 4


def results(module: nn.Module, data: Tensor | PackedSequence, training: bool) -> list[Tensor]:
    """Return output and states, and in training the gradients of all weights."""
    return results_of(module, list(module.parameters()), data, training)


def results_of(
    call: Callable[..., Any],
    weights: list[nn.Parameter],
    data: Tensor | PackedSequence,
    training: bool,
) -> list[Tensor]:
    """Return the same of what calls a module with these weights."""
    with torch.set_grad_enabled(training):
        y, states = call(data)
        found = [y.data if isinstance(y, PackedSequence) else y]
        found += states if isinstance(states, tuple) else [states]
        if training:
            loss = sum(t.square().sum() for t in found)
            found += torch.autograd.grad(loss, weights)
        return [t.detach() for t in found]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    assert all(map(torch.equal, found, wanted))


# ---- graphs -------------------------------------------------------------------------------------
def recorded(device: str, call: Callable[[], list[Tensor]]) -> tuple[Callable[[], Any], Any]:
    """Return what repeats a call, and the tensors that it writes each time."""
    if device == "cpu":
        kept = call()

        def repeat() -> None:
            for to, t in zip(kept, call(), strict=True):
                to.copy_(t)

        return repeat, kept
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd's own set-up may not be captured
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    return graph.replay, kept


@modules
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("ordered", [False, True], ids=["any_order", "sorted"])
def test_packed_data_in_a_graph(device: str, name: str, training: bool, ordered: bool) -> None:
    """The sizes of steps lie on the host, which reads them while the graph is captured."""
    module = MODULES[name](16, 32, 2, bidirectional=True).to(device)
    lengths = torch.tensor([9, 7, 7, 1] if ordered else [7, 1, 9, 7])
    x = torch.randn(9, 4, 16).to(device)
    data = pack_padded_sequence(x, lengths, enforce_sorted=ordered)
    assert data.batch_sizes.device.type == "cpu"
    repeat, kept = recorded(device, lambda: results(module, data, training))
    for _ in range(3):
        data.data.copy_(torch.randn(data.data.shape))
        repeat()
        assert_same(kept, results(module, data, training))


@modules
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_lengths_and_resets_in_a_graph(device: str, name: str, training: bool) -> None:
    """They lie on the device, and every replay reads what is there then."""
    module = MODULES[name](16, 32, 2, bidirectional=True).to(device)
    x = torch.randn(9, 4, 16).to(device)
    lengths = torch.tensor([9, 7, 0, 1], device=device)
    resets = (torch.rand(9, 4) < 0.3).to(device)
    call = partial(module, lengths=lengths, resets=resets)
    weights = list(module.parameters())
    repeat, kept = recorded(device, lambda: results_of(call, weights, x, training))
    for changed in ([1, 9, 3, 7], [0, 2, 9, 9]):
        x.copy_(torch.randn(9, 4, 16))
        lengths.copy_(torch.tensor(changed))
        resets.copy_(torch.rand(9, 4) < 0.3)
        repeat()
        assert_same(kept, results_of(call, weights, x, training))


def test_a_graph_of_more_steps_than_a_launch_brings_over(device: str) -> None:
    """The persistent kernel gets the sizes of 224 steps at a time, in its arguments."""
    module = rnnkern.LSTM(8, 16).to(device)
    lengths = torch.tensor([500, 250, 1])
    data = pack_padded_sequence(torch.randn(500, 3, 8).to(device), lengths)
    repeat, kept = recorded(device, lambda: results(module, data, False))
    data.data.copy_(torch.randn(data.data.shape))
    lengths.zero_()
    repeat()
    assert_same(kept, results(module, data, False))


# ---- threads and devices ------------------------------------------------------------------------
def of_its_own(device: str) -> AbstractContextManager[object]:
    """Make a stream of its own current, on a GPU."""
    return nullcontext() if device == "cpu" else torch.cuda.stream(torch.cuda.Stream(device))


def together(calls: list[Callable[[], list[Tensor]]], device: str, repeats: int) -> Iterator[Any]:
    """Run every call in a thread of its own, on a stream of its own; yield the results of each."""
    ready = Barrier(len(calls))

    def run(call: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
        ready.wait()
        with of_its_own(device):
            found = [call() for _ in range(repeats)]
            if device != "cpu":
                torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(len(calls)) as pool:
        yield from pool.map(run, calls)


@modules
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_calls_from_several_threads(device: str, name: str, training: bool) -> None:
    """One module, with nothing known of the device yet; products exact against matmul's flag."""
    module = MODULES[name](24, 48, bidirectional=True).to(device)
    xs = [torch.randn(20, B, 24).to(device) for B in (1, 3, 8, 17)[:THREADS]]
    calls = [partial(results, module, x, training) for x in xs]
    with tf32(products=True):
        wanted = [call() for call in calls]
        if device != "cpu":
            torch.cuda.synchronize()
        with cuda_extension(*load_cuda()):
            for found, alone in zip(together(calls, device, 5), wanted, strict=True):
                for one in found:
                    assert_same(one, alone)
        assert torch.backends.cuda.matmul.allow_tf32


@modules
def test_two_devices_at_once(device: str, name: str) -> None:
    """From one thread in turns, and from a thread for each; on the CPU it is there twice."""
    places = ["cpu", "cpu"]
    if device != "cpu":
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU")
        places = ["cuda:0", "cuda:1"]
        assert all(cuda.missing(i) is None for i in range(2))
    calls = []
    for place in places:
        module = MODULES[name](24, 48, 2).to(place)
        calls.append(partial(results, module, torch.randn(30, 8, 24).to(place), True))
    wanted = [call() for call in calls]
    assert all(t.device == torch.device(p) for p, w in zip(places, wanted, strict=True) for t in w)
    for _ in range(5):
        for found, alone in zip([call() for call in calls], wanted, strict=True):
            assert_same(found, alone)
    for found, alone in zip(together(calls, "cpu", 5), wanted, strict=True):
        for one in found:
            assert_same(one, alone)
    assert device == "cpu" or torch.cuda.current_device() == 0

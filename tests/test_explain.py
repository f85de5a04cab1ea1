"""rnnkern.explain: it tells the path that a call takes, and every reason for the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import rnnkern
import torch
from cases import BFLOAT16_ISAS, use_isa
from rnnkern import _native, cpu
from rnnkern.cells import CELLS
from torch import nn
from torch.nn.utils.rnn import pack_sequence

GROUPS = ("direction_groups", "row_groups", "unit_groups")
MODULES = {
    "lstm": (rnnkern.LSTM, {}),
    "gru": (rnnkern.GRU, {}),
    "gru_reset_before": (rnnkern.GRU, {"reset_after": False}),
    "rnn_tanh": (rnnkern.RNN, {}),
    "rnn_relu": (rnnkern.RNN, {"nonlinearity": "relu"}),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    kind, options = MODULES[name]
    told = rnnkern.explain(kind(3, 40, bidirectional=True, **options), torch.randn(5, 2, 3))
    assert isinstance(told, rnnkern.Explanation)
    assert (told.cell, told.backend, told.reason) == (name, "cpu", "")
    assert told.isa == _native.isa()
    assert told.dtype == told.compute_dtype == torch.float32
    assert set(told.plan) == {"forward", "backward"}
    assert 1 <= told.threads <= torch.get_num_threads()
    for plan in told.plan.values():
        directions, rows, units = (plan[group] for group in GROUPS)
        assert plan["threads"] == directions * (rows * units + plan["helpers"])
        assert plan["step_microseconds"] > 0
    assert name in str(told)
    assert "cpu kernel" in str(told)
    assert _native.isa() in str(told)


def test_packed_data_have_no_helper(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: _native.allow_oversubscription(False))
    _native.allow_oversubscription(True)
    torch.set_num_threads(2)
    x = torch.randn(600, 40)
    for data, helpers in ((x.unsqueeze(1), 1), (pack_sequence([x]), 0)):
        told = rnnkern.explain(rnnkern.LSTM(40, 40), data)
        assert [plan["helpers"] for plan in told.plan.values()] == [helpers] * 2
        assert ("whole chunks" in str(told)) == bool(helpers)


@pytest.mark.parametrize("kind", [rnnkern.LSTMCell, rnnkern.GRUCell, rnnkern.RNNCell])
def test_cells(kind: type[nn.RNNCellBase]) -> None:
    for x in (torch.randn(4, 3), torch.randn(3)):
        told = rnnkern.explain(kind(3, 5), x)
        assert told.backend == "cpu"
        assert (
            told.cell
            == {"LSTMCell": "lstm", "GRUCell": "gru", "RNNCell": "rnn_tanh"}[kind.__name__]
        )


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_isa(isa: str) -> None:
    with use_isa(isa):
        assert rnnkern.explain(rnnkern.GRU(3, 5), torch.randn(5, 2, 3)).isa == isa


def test_unknown_isa() -> None:
    before = _native.isa()
    with pytest.raises(ValueError, match="sse5") as error:
        _native.select_isa("sse5")
    assert all(name in str(error.value) for name in _native.supported_isas())
    assert _native.isa() == before


@pytest.mark.parametrize("backward", [False, True])
def test_the_plan_is_that_of_the_call(backward: bool, request: pytest.FixtureRequest) -> None:
    """Every form of the same input leads to the same sizes, and so to the same plan."""
    request.addfinalizer(lambda: _native.allow_oversubscription(False))
    _native.allow_oversubscription(True)
    torch.set_num_threads(4)
    label = "backward" if backward else "forward"
    told = rnnkern.explain(rnnkern.LSTM(3, 192), torch.randn(9, 5, 3)).plan[label]
    assert told["threads"] > 1
    first = rnnkern.explain(rnnkern.LSTM(3, 192, batch_first=True), torch.randn(5, 9, 3))
    assert first.plan[label] == told
    packed = pack_sequence([torch.randn(9, 3)] * 5)
    assert rnnkern.explain(rnnkern.LSTM(3, 192), packed).plan[label] == told
    one = rnnkern.explain(rnnkern.LSTM(3, 192), torch.randn(9, 3)).plan[label]
    assert one == rnnkern.explain(rnnkern.LSTM(3, 192), torch.randn(9, 1, 3)).plan[label]
    double = rnnkern.explain(
        rnnkern.LSTM(3, 192, dtype=torch.float64), torch.randn(9, 5, 3).double()
    )
    assert double.plan[label]["step_microseconds"] > told["step_microseconds"]
    torch.set_num_threads(1)
    alone = rnnkern.explain(rnnkern.LSTM(3, 192), torch.randn(9, 5, 3))
    assert alone.threads == 1
    assert "1 thread(s)" in str(alone)


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_types(isa: str) -> None:
    module, x = rnnkern.LSTM(3, 5), torch.randn(4, 2, 3)
    bfloat16 = torch.bfloat16 if isa in BFLOAT16_ISAS else torch.float32
    with use_isa(isa):
        for dtype, computed in ((torch.bfloat16, bfloat16), (torch.float16, torch.float32)):
            told = rnnkern.explain(module.to(dtype), x.to(dtype))
            assert (told.backend, told.dtype, told.compute_dtype) == ("cpu", dtype, computed)
            assert ("computed in float32" in str(told)) == (computed != dtype)
            with torch.autocast("cpu", dtype=dtype):
                told = rnnkern.explain(rnnkern.LSTM(3, 5), x)
            assert (told.backend, told.dtype, told.compute_dtype) == ("cpu", x.dtype, computed)
        told = rnnkern.explain(module.double(), x.double())
        assert told.dtype == told.compute_dtype == torch.float64


def count_kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that gets the type of the data at every call of a forward kernel."""
    calls: list[Any] = []

    def watched(run: Callable[..., None], dtype: torch.dtype) -> Callable[..., None]:
        def call(*args: Any) -> None:
            calls.append(dtype)
            run(*args)

        return call

    for dtype, native in list(cpu.KERNELS.items()):
        patched = native._replace(forward=watched(native.forward, dtype))
        monkeypatch.setitem(cpu.KERNELS, dtype, patched)

    def forward(stack: Any, input: torch.Tensor, *others: Any) -> Any:
        done = run(stack, input, *others)
        if done is not None:
            calls.append(input.dtype)
        return done

    run = _native._cpu.Stack.forward
    monkeypatch.setattr(_native._cpu.Stack, "forward", forward)
    return calls


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_it_tells_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs where it says so, and does not where it says the reference does."""
    calls = count_kernel_calls(monkeypatch)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64):
        module, x = rnnkern.RNN(3, 5).to(dtype), torch.randn(4, 2, 3).to(dtype)
        told = rnnkern.explain(module, x)
        calls.clear()
        module(x)
        assert bool(calls) == (told.backend == "cpu"), (dtype, told)
        assert calls in ([], [told.compute_dtype])
    assert told.backend == "reference"
    assert "complex64" in told.reason
    assert told.reason in str(told)
    assert (told.threads, told.isa, told.plan) == (0, "", {})

    def inside(x: torch.Tensor) -> torch.Tensor:
        told.append(rnnkern.explain(module, x))
        return module(x)[0]

    module, told = rnnkern.RNN(3, 5), []
    calls.clear()
    torch.func.vmap(inside)(torch.randn(2, 4, 2, 3))
    assert bool(calls) == (told[0].backend == "cpu")


def test_other_devices_run_the_reference() -> None:
    class Elsewhere:
        device = torch.device("xpu")
        dtype = torch.float32

    from rnnkern.layers import missing_kernel

    reason = missing_kernel(Elsewhere(), CELLS["lstm"], False)  # type: ignore[arg-type]
    assert reason is not None
    assert "xpu" in reason


@pytest.mark.parametrize("wrong", [nn.LSTM(3, 5), nn.Linear(3, 5), None, rnnkern.LSTM])
def test_only_our_modules_explain(wrong: Any) -> None:
    with pytest.raises(TypeError, match="module"):
        rnnkern.explain(wrong, torch.randn(4, 2, 3))


def test_an_empty_batch() -> None:
    assert rnnkern.explain(rnnkern.LSTM(7, 9), torch.randn(5, 0, 7)).backend == "cpu"

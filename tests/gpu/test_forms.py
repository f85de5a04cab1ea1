"""What rnnkern has beside torch's modules, on a device: functions, convert, the other GRU.

Every test runs on the CPU too, so that it is known to be right where there is no GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import rnnkern
import torch
from pairs import assert_device_parity, random_packed, random_state, run
from rnnkern import eager, functional, layers
from rnnkern.cells import CELLS
from tolerances import assert_close
from torch import Tensor, nn

WIDE = (torch.float64, torch.float32)
NARROW = (torch.float16, torch.bfloat16)
# What each function is called with of its own, and the module that does the same.
FORMS: dict[str, tuple[Callable[..., Any], Any, dict[str, Any]]] = {
    "lstm": (functional.lstm, rnnkern.LSTM, {}),
    "gru": (functional.gru, rnnkern.GRU, {}),
    "gru_reset_before": (functional.gru, rnnkern.GRU, {"reset_after": False}),
    "rnn_tanh": (functional.rnn, rnnkern.RNN, {}),
    "rnn_relu": (functional.rnn, rnnkern.RNN, {"nonlinearity": "relu"}),
}


# ---- functions ----------------------------------------------------------------------------------
def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in tensors(part)]


@pytest.mark.parametrize("cell", FORMS)
@pytest.mark.parametrize("dtype", [*WIDE, *NARROW], ids=str)
def test_functions_are_the_modules(device: str, cell: str, dtype: torch.dtype) -> None:
    """Bit for bit, outputs and gradients."""
    function, kind, own = FORMS[cell]
    module = kind(5, 7, 2, bidirectional=True, **own).to(device, dtype)
    weights = list(module.parameters())
    x = torch.randn(6, 4, 5).to(device, dtype)
    hx, reset = (to_device(random_state(module, 4), device) for _ in range(2))
    features = {
        "lengths": torch.tensor([6, 0, 2, 3], device=device),
        "resets": (torch.rand(6, 4) < 0.4).to(device),
        "reset_state": reset,
    }
    found = tensors(function(x, weights, hx, num_layers=2, bidirectional=True, **own, **features))
    wanted = tensors(module(x, hx, **features))
    assert {t.device.type for t in found} == {device}
    assert all(map(torch.equal, found, wanted))
    grads = [
        torch.autograd.grad(sum(t.square().sum() for t in r), weights) for r in (found, wanted)
    ]
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("cell", FORMS)
def test_any_cell_by_name(device: str, cell: str) -> None:
    """Against the same function on the CPU."""
    module = FORMS[cell][1](5, 7, dtype=torch.float64, **FORMS[cell][2])
    weights = [w.detach() for w in module.parameters()]
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    states = tuple(torch.randn(1, 4, 7, dtype=torch.float64) for _ in range(CELLS[cell].states))
    wanted = functional.recurrent(cell, x, weights, states)
    there = [w.to(device) for w in weights]
    found = functional.recurrent(cell, x.to(device), there, tuple(s.to(device) for s in states))
    for f, w in zip(tensors(found), tensors(wanted), strict=True):
        assert f.device.type == device
        assert_close(f.cpu(), w, kind="output")


def to_device(state: Any, device: str) -> Any:
    return state.to(device) if isinstance(state, Tensor) else tuple(s.to(device) for s in state)


# ---- convert ------------------------------------------------------------------------------------
class Tagger(nn.Module):
    """A model of the usual form."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(3, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.blocks = nn.ModuleList([nn.GRU(10, 7, batch_first=True), nn.RNN(7, 4)])
        self.step = nn.LSTMCell(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.encoder(x)
        for block in self.blocks:
            y, _ = block(y)
        h, c = self.step(y[:, -1])
        return torch.cat([h, c], -1)


@pytest.mark.parametrize("first", ["move", "convert"])
def test_convert(device: str, first: str) -> None:
    model = Tagger().double()
    theirs = copy.deepcopy(model)
    x = torch.randn(3, 6, 3, dtype=torch.float64)
    if first == "move":
        ours = rnnkern.convert(model.to(device))
    else:
        ours = rnnkern.convert(model).to(device)
    assert type(ours.encoder) is rnnkern.LSTM
    assert type(ours.step) is rnnkern.LSTMCell
    results = []
    for module, data in ((ours, x.to(device)), (theirs, x)):
        y = module(data)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    for k, (found, wanted) in enumerate(zip(*results, strict=True)):
        assert found.device.type == device
        assert_close(found.cpu(), wanted, kind="gradient" if k else "output")


# ---- the GRU that torch has not -----------------------------------------------------------------
class ByReference(rnnkern.GRU):
    """The reset-before GRU by plain torch operations."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "missing_kernel", lambda *_: "it is asked for")
            patch.setattr(eager, "run", lambda *_: None)
            return super().forward(*args, **kwargs)


def reset_before(dtype: torch.dtype, **options: Any) -> tuple[nn.Module, nn.Module]:
    theirs = ByReference(8, 24, reset_after=False, dtype=dtype, **options)
    ours = rnnkern.GRU(8, 24, reset_after=False, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_the_reference_is_plain_torch() -> None:
    theirs, _ = reset_before(torch.float64)
    y, _ = theirs(torch.randn(6, 3, 8, dtype=torch.float64))
    assert "rnnkern" not in str(y.grad_fn).lower()


@pytest.mark.parametrize("dtype", [*WIDE, *NARROW], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "batch_first": True},
        {"num_layers": 2, "bidirectional": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_the_reset_before_gru(
    device: str, dtype: torch.dtype, options: dict[str, Any], given: bool
) -> None:
    made = reset_before(dtype, **options)
    x = torch.randn((3, 6, 8) if options.get("batch_first") else (6, 3, 8)).to(dtype)
    hx = random_state(made[0], 3) if given else None
    deep = "num_layers" in options
    assert_device_parity(made, device, x, hx, deep=deep)
    packed = random_packed([3, 6, 1], 8, dtype=dtype)
    assert_device_parity(made, device, packed, hx, deep=deep)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("where", ["host", "device"])
def test_the_reset_before_gru_with_features(device: str, dtype: torch.dtype, where: str) -> None:
    theirs, ours = reset_before(dtype, bidirectional=True)
    x, resets = torch.randn(6, 4, 8, dtype=dtype), torch.rand(6, 4) < 0.4
    steer = {"lengths": torch.tensor([6, 0, 2, 3]), "resets": resets}
    exact = copy.deepcopy(theirs).double()
    wanted = run(exact, x.double(), call=lambda x: exact(x, **steer))
    place = device if where == "device" else "cpu"
    there = {name: t.to(place) for name, t in steer.items()}
    ours.to(device)
    found = run(ours, x.to(device), call=lambda x: ours(x, **there))
    for key, value in wanted.outputs.items():
        own = found.outputs[key].cpu().double()
        assert_close(own, value, kind="output", dtype=dtype, name=key)
    for key, gradient in wanted.grads.items():
        given = found.grads[key]
        assert given is not None
        assert gradient is not None
        assert_close(given.cpu().double(), gradient, kind="gradient", dtype=dtype, name=key)

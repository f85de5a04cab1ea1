"""The two ways from a module to the kernels, and modules to send along both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import rnnkern
import torch
from cases import KERNELS
from rnnkern import eager
from torch import Tensor, nn

DTYPES = sorted({dtype for _, dtype in KERNELS}, key=str)
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("GRU", {"reset_after": False}),
    ("RNN", {"nonlinearity": "relu"}),
    ("LSTM", {"proj_size": 3, "bidirectional": True, "num_layers": 2}),
    ("GRU", {"batch_first": True, "num_layers": 3, "bias": False}),
    ("RNN", {"bidirectional": True, "dropout": 0.5, "num_layers": 2}),
]


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Record of every call whether it went the short way."""
    taken: list[bool] = []
    run = eager.run

    def spy(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        taken.append(result is not None)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(eager, "run", spy)
        yield taken


@contextlib.contextmanager
def general_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(eager, "run", lambda *_, **__: None)
        yield


def flat(result: Any) -> dict[str, Tensor]:
    y, states = result
    states = states if isinstance(states, tuple) else (states,)
    return {"y": y, **{f"state{k}": s for k, s in enumerate(states)}}


def made(name: str, options: dict[str, Any], dtype: torch.dtype) -> tuple[nn.Module, Any, Any]:
    module = getattr(rnnkern, name)(7, 9, **options, dtype=dtype).eval()
    rows = module.num_layers * (2 if module.bidirectional else 1)
    shape = (3, 5, 7) if module.batch_first else (5, 3, 7)
    x = torch.randn(shape, dtype=dtype)
    h = torch.randn(rows, 3, module.proj_size or 9, dtype=dtype)
    hx = (h, torch.randn(rows, 3, 9, dtype=dtype)) if name == "LSTM" else h
    return module, x, hx

"""RNNKERN_ISA pins the instruction set at import, and anything it cannot pin is an error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import BFLOAT16_ISAS, use_isa
from rnnkern import LSTM, _native
from tolerances import assert_close


def imported_with(value: str) -> subprocess.CompletedProcess[str]:
    code = "import rnnkern; print(rnnkern._native.isa())"
    environment = {**os.environ, "RNNKERN_ISA": value}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_pinned(isa: str) -> None:
    done = imported_with(isa)
    assert done.stdout.strip() == isa, done.stderr


def test_empty_means_the_best() -> None:
    assert imported_with("").stdout.strip() == _native.supported_isas()[-1]


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "sse", "baseline,avx2"])
def test_unknown(isa: str) -> None:
    done = imported_with(isa)
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert f"RNNKERN_ISA: '{isa}'" in message
    assert all(name in message for name in _native.supported_isas())
    with pytest.raises(ValueError, match="supported"):
        _native.select_isa(isa)


def test_the_isas_are_different_code_and_agree() -> None:
    assert _native.supported_isas()[0] == "baseline"
    module, x = LSTM(33, 70), torch.randn(9, 5, 33)
    found = {}
    for isa in _native.supported_isas():
        with use_isa(isa):
            found[isa] = module(x)[0]
    for y in found.values():
        assert_close(y, found["baseline"], kind="output")
    bits = {isa: y.detach().numpy().tobytes() for isa, y in found.items()}
    for isa in set(found) - {"baseline"}:  # fma rounds once where the baseline rounds twice
        assert bits[isa] != bits["baseline"]


@pytest.mark.skipif(len(BFLOAT16_ISAS) < 2, reason="one way at most to products of bfloat16")
def test_amx_sums_in_another_order() -> None:
    module, x = LSTM(300, 70).bfloat16(), torch.randn(9, 33, 300).bfloat16()
    wanted = module.double()(x.double())[0]
    module.bfloat16()
    found = []
    for isa in BFLOAT16_ISAS:
        with use_isa(isa):
            weights = torch.autograd.grad(module(x)[0].float().square().sum(), module.weight_ih_l0)
            found.append((module(x)[0], *weights))
        assert_close(found[-1][0].double(), wanted, kind="output", dtype=torch.bfloat16)
    assert any(not torch.equal(one, other) for one, other in zip(*found, strict=True))

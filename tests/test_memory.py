"""Memory: inference needs nothing that grows with the number of steps but its output."""

from __future__ import annotations

import sys

import pytest
from cases import run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# The peak of a call beyond its outputs, in MB. The weights of a layer packed for the kernel take
# 0.13 MB, the steps that are in work some hundred kB, and one more of the 100,000 rows of 64
# values that come in and go out 25.6 MB.
SCRIPT = """
    import sys
    import torch
    import rnnkern
    from rnnkern.bench import memory

    torch.set_num_threads(2)
    layers, batch_first = int(sys.argv[1]), sys.argv[2] == "True"
    x = torch.randn((1, 100_000, 64) if batch_first else (100_000, 1, 64))
    for cell in (rnnkern.LSTM, rnnkern.GRU, rnnkern.RNN):
        module = cell(64, 64, num_layers=layers, batch_first=batch_first)
        with torch.no_grad():
            module(x)
            found = memory.measure(lambda: module(x), given=x.nbytes)
        print("unknown" if found is None else found.beyond_mb)
"""


@pytest.mark.parametrize(("layers", "batch_first"), [(1, False), (1, True), (3, False), (3, True)])
def test_inference_over_a_hundred_thousand_steps(layers: int, batch_first: bool) -> None:
    result = run_python(SCRIPT, str(layers), str(batch_first))
    assert result.returncode == 0, result.stderr
    lstm, gru, rnn = result.stdout.split()
    if "unknown" in (lstm, gru, rnn):
        pytest.skip("the system does not tell")
    assert float(lstm) < 8
    assert float(gru) < 8
    assert float(rnn) < 8

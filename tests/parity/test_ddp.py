"""DistributedDataParallel over gloo: two processes give the gradients of one process."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rnnkern
import torch
from tolerances import assert_close
from torch import nn

WORKER = Path(__file__).with_name("ddp_worker.py")
LIMIT = 100  # seconds until the processes are given up

specification = importlib.util.spec_from_file_location("ddp_worker", WORKER)
assert specification is not None
assert specification.loader is not None
ddp_worker = importlib.util.module_from_spec(specification)
specification.loader.exec_module(ddp_worker)


def run_workers(library: str, folder: Path) -> None:
    """Start the two processes in a session of their own, so that none outlives the limit."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, str(WORKER), library, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"the processes hang:\n{process.communicate()[0]}")
    assert process.returncode == 0, output


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this build of torch has no gloo",
)
@pytest.mark.timeout(LIMIT + 60)
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    theirs, ours = ddp_worker.Model(nn), ddp_worker.Model(rnnkern)
    x = torch.randn(5, 6, 3)
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    torch.save(x, tmp_path / "batch.pt")
    ours.load_state_dict(theirs.state_dict())
    expected = ddp_worker.train(theirs, x)
    alone = ddp_worker.train(ours, x)

    run_workers("rnnkern", tmp_path)
    assert list(alone) == list(expected)
    for variant in ddp_worker.VARIANTS:
        found = torch.load(tmp_path / f"grads_{variant}.pt")
        assert list(found) == list(expected)
        for key, wanted in expected.items():
            assert_close(alone[key], wanted, kind="gradient", name=key)
            assert_close(found[key], wanted, kind="gradient", name=f"{variant}: {key}")

"""Program of the DDP test: two processes, each with half of the batch, write rank 0's gradients.

Usage: ddp_worker.py LIBRARY DIRECTORY, where LIBRARY is torch.nn or rnnkern. Reads model.pt
(weights) and batch.pt from the directory; writes grads_<variant>.pt there.
"""

from __future__ import annotations

import importlib
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

WORLD = 2
STEPS = 2
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket_views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
}


class Model(nn.Module):
    """All six modules in one, so that one start of two processes tests them all."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        options: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
        self.lstm = library.LSTM(3, 4, **options, proj_size=2)
        self.gru = library.GRU(4, 4, **options)
        self.rnn = library.RNN(8, 4, nonlinearity="relu")
        self.lstm_cell = library.LSTMCell(4, 4)
        self.gru_cell = library.GRUCell(4, 4)
        self.rnn_cell = library.RNNCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(self.gru(self.lstm(x)[0])[0])[0][-1]
        return self.rnn_cell(self.gru_cell(self.lstm_cell(y)[0]))


def train(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Take STEPS steps on the mean loss; return the gradients of the last."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
    return {
        key.removeprefix("module."): weight.grad.clone()
        for key, weight in model.named_parameters()
        if weight.grad is not None
    }


def work(rank: int, library: str, directory: str) -> None:
    """Train as one of WORLD processes."""
    folder = Path(directory)
    store = f"file://{folder / 'store'}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    x = torch.load(folder / "batch.pt").chunk(WORLD, dim=1)[rank]
    for variant, options in VARIANTS.items():
        model = Model(importlib.import_module(library))
        model.load_state_dict(torch.load(folder / "model.pt"))
        grads = train(DistributedDataParallel(model, **options), x)
        if rank == 0:
            torch.save(grads, folder / f"grads_{variant}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1], sys.argv[2]), nprocs=WORLD)

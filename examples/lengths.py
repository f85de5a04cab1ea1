"""Rows of different length: give `lengths`, in any order; nothing needs to be sorted or packed."""

import rnnkern
import torch

torch.manual_seed(0)
lengths = torch.tensor([5, 0, 9, 2])
x = torch.randn(4, 9, 3)  # [B,T,I]; what stands beyond a row's length does not matter
rnn = rnnkern.LSTM(3, 6, bidirectional=True, batch_first=True)
y, (h, c) = rnn(x, lengths=lengths)

print("y is zero beyond the lengths:", bool((y[0, 5:] == 0).all() and (y[3, 2:] == 0).all()))
print(
    "h is each row's last state:  ",
    torch.equal(h[0, 2], y[2, 8, :6]),
    torch.equal(h[0, 0], y[0, 4, :6]),
)
alone, _ = rnn(x[0, :5])  # row 0 by itself, unbatched
print("same as the row alone:       ", torch.allclose(alone, y[0, :5], atol=1e-6))

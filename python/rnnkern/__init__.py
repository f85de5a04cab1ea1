"""Fused LSTM, GRU and Elman RNN kernels, drop-in for ``torch.nn``'s recurrent modules."""

import torch  # noqa: F401  first, so that its OpenMP runtime is the one the kernels share

from rnnkern import functional
from rnnkern.convert import convert
from rnnkern.explain import Explanation, explain
from rnnkern.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Explanation",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "convert",
    "explain",
    "functional",
]

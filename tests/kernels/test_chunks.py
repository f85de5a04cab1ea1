"""Sizes that the kernels cut into chunks, of input products and gradients, and into pieces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import rnnkern
import torch
from cases import (
    BFLOAT16_ISAS,
    ISAS,
    Case,
    assert_identical,
    assert_matches,
    build,
    evaluate,
    expected,
    use_isa,
)
from rnnkern import _native
from tolerances import assert_close
from torch import nn

CELLS = ("lstm", "gru", "gru_reset_before", "rnn_tanh")
# Rows enough for several chunks, of which the last is short; H = 100 makes x of inference wide.
SIZES = ({"T": 130, "B": 5, "I": 7, "H": 33}, {"T": 300, "B": 1, "I": 20, "H": 100})


def cases() -> list[Case]:
    found = []
    for cell in CELLS:
        for sizes in SIZES:
            found += [
                Case(cell, D=2, **sizes),
                Case(cell, layout="batch_first", **sizes),
                Case(cell, layout="batch_first", D=2, lengths=True, **sizes),
                Case(cell, layout="packed_unsorted", resets=True, reset_state=True, D=2, **sizes),
                Case(cell, lengths=True, resets=True, **sizes),
            ]
    found += [Case("lstm", P=9, D=2, lengths=True, **SIZES[0])]
    found += [Case("lstm", P=9, layout="packed", **SIZES[0])]
    found += [Case("lstm", T=300, B=1, I=2, H=100, P=3)]  # no factor is as wide as that of dW_hr
    return found


@pytest.fixture(autouse=True)
def _more_threads_than_cpus() -> Iterator[None]:
    before = torch.get_num_threads()
    _native.allow_oversubscription(True)
    yield
    _native.allow_oversubscription(False)
    torch.set_num_threads(before)


BEST = [(ISAS[-1], torch.float32), (ISAS[-1], torch.float64)]
BEST += [(isa, torch.bfloat16) for isa in BFLOAT16_ISAS or ISAS[-1:]]  # or cast to float32
# A chunk of one step has more rows than the sums of outer products take at a time, 256.
WIDE = tuple(
    Case(cell, T=2, B=B, I=20, H=33, D=2, layout=layout)
    for cell, B, layout in (
        ("lstm", 300, "packed_unsorted"),
        ("gru", 513, "padded"),
        ("gru_reset_before", 300, "batch_first"),
    )
)
# Weights that are asked for ahead: input weights beyond any cache near a core, and 7 steps in
# chunks of 3; input weights beyond an L2 of 1 or 2 MiB that has room for 256 rows of x.
LARGE = (Case("lstm", T=7, B=70, I=1024, H=640), Case("lstm", T=5, B=70, I=600, H=256))


# The most rows of which W is packed in pieces, more pieces than one a thread with a short last one;
# one row more.
ONE_CHUNK = (
    Case("lstm", T=128, B=1, I=70, H=100, D=2),
    Case("gru", layout="batch_first", T=42, B=3, I=150, H=100, lengths=True),
    Case("rnn_tanh", layout="packed", T=25, B=5, I=150, H=200),
    Case("gru", layout="batch_first", T=43, B=3, I=150, H=100),
)
# Two chunks of 51 steps and one of a single step, which may write where that before it ended.
ONE_MORE_STEP = tuple(
    Case(cell, layout=layout, T=103, B=5, I=7, H=33, D=2)
    for cell in CELLS
    for layout in ("padded", "batch_first", "packed")
)
TWO_CHAINS = Case("lstm", T=300, B=1, I=20, H=64)  # of each sum, and units split


@pytest.mark.parametrize(
    "case", [*cases(), *WIDE, *LARGE, *ONE_CHUNK, *ONE_MORE_STEP, TWO_CHAINS], ids=str
)
@pytest.mark.parametrize(("isa", "dtype"), BEST, ids=str)
def test_chunks(case: Case, isa: str, dtype: torch.dtype) -> None:
    args = build(case, dtype)
    with use_isa(isa):
        torch.set_num_threads(1)
        found = evaluate(args)
        assert_matches(found, expected(args), dtype=dtype)
        for threads in (2, 7):
            torch.set_num_threads(threads)
            assert_identical(evaluate(args), found)


@pytest.mark.parametrize(
    "case", [*(c for c in cases() if not c.resets), *LARGE, *ONE_CHUNK], ids=str
)
def test_inference_in_chunks_equals_training(case: Case) -> None:
    args = build(case, torch.float32)
    wanted = torch.ops.rnnkern.layer(*args, True)[:3]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = torch.ops.rnnkern.layer(*args, False)[:3]
        assert all(map(torch.equal, found, wanted))


# Chunks of 64 steps of 4 rows; and of 128 steps of one row, whose products a helper makes.
@pytest.mark.parametrize(
    ("T", "B", "H"),
    [(64 * 64, 4, 2), (64 * 64 + 1, 4, 2), (65 * 64, 4, 2), (128 * 64, 4, 2), (128 * 65, 1, 8)],
)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_sums_of_more_chunks_than_a_piece_has(name: str, T: int, B: int, H: int) -> None:
    sizes = {"input_size": 3, "hidden_size": H, "bidirectional": B > 1, "dtype": torch.float64}
    theirs, ours = getattr(nn, name)(**sizes), getattr(rnnkern, name)(**sizes)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, 3, dtype=torch.float64)
    dy = torch.randn(T, B, 4 if B > 1 else H, dtype=torch.float64)
    wanted = torch.autograd.grad(theirs(x)[0], list(theirs.parameters()), dy)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = torch.autograd.grad(ours(x)[0], list(ours.parameters()), dy)
        for (key, _), f, w in zip(ours.named_parameters(), found, wanted, strict=True):
            assert_close(f, w, kind="gradient", name=key)

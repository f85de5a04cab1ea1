"""Bad input raises a Python exception that names the argument, and never crashes the process."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import rnnkern
import torch
from cases import Case, build, run_op, run_python
from rnnkern import functional
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

T, B, I, H = 6, 4, 3, 5
CLEAR = (ValueError, RuntimeError, TypeError, MemoryError)


# ---- modules ------------------------------------------------------------------------------------
def lengths_of(*values: float, **options: Any) -> Tensor:
    return torch.tensor(values, **options)


BAD_LENGTHS = {
    "float": lengths_of(6.0, 5.0, 4.0, 3.0),
    "bool": lengths_of(True, True, False, True),
    "complex": lengths_of(6, 5, 4, 3, dtype=torch.complex64),
    "too_many": lengths_of(6, 5, 4, 3, 2),
    "too_few": lengths_of(6, 5, 4),
    "none": lengths_of(),
    "matrix": lengths_of(6, 5, 4, 3).unsqueeze(0),
    "number": torch.tensor(6),
    "negative": lengths_of(6, -1, 4, 3),
    "too_large": lengths_of(6, 7, 4, 3),
    "huge": lengths_of(6, 2**62, 4, 3),
    "wraps_int32": lengths_of(6, 2**32 + 1, 4, 3),
    "most_negative": lengths_of(6, -(2**63), 4, 3),
    "meta": torch.ones(B, dtype=torch.int64, device="meta"),
    "list": [6, 5, 4, 3],
}
BAD_RESETS = {
    "float": torch.zeros(T, B),
    "uint8": torch.zeros(T, B, dtype=torch.uint8),
    "int": torch.zeros(T, B, dtype=torch.int64),
    "transposed": torch.zeros(B, T, dtype=torch.bool),
    "one_step_short": torch.zeros(T - 1, B, dtype=torch.bool),
    "vector": torch.zeros(T, dtype=torch.bool),
    "three_dimensions": torch.zeros(T, B, 1, dtype=torch.bool),
    "empty": torch.zeros(0, dtype=torch.bool),
    "meta": torch.zeros(T, B, dtype=torch.bool, device="meta"),
    "list": [[False] * B] * T,
}
modules = pytest.mark.parametrize("kind", [rnnkern.LSTM, rnnkern.GRU, rnnkern.RNN])


@modules
@pytest.mark.parametrize("name", BAD_LENGTHS)
def test_lengths(kind: type[nn.RNNBase], name: str) -> None:
    with pytest.raises(CLEAR, match="lengths"):
        kind(I, H, bidirectional=True)(torch.randn(T, B, I), lengths=BAD_LENGTHS[name])


@modules
@pytest.mark.parametrize("name", BAD_RESETS)
def test_resets(kind: type[nn.RNNBase], name: str) -> None:
    with pytest.raises(CLEAR, match="resets"):
        kind(I, H)(torch.randn(T, B, I), resets=BAD_RESETS[name])


@modules
def test_arguments_that_exclude_each_other(kind: type[nn.RNNBase]) -> None:
    module = kind(I, H)
    x, state = torch.randn(T, B, I), torch.zeros(1, B, H)
    reset_state: Any = (state, state) if kind is rnnkern.LSTM else state
    with pytest.raises(ValueError, match="reset_state"):
        module(x, reset_state=reset_state)
    packed = pack_sequence([torch.randn(3, I), torch.randn(2, I)])
    with pytest.raises(ValueError, match="lengths"):
        module(packed, lengths=torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="resets"):
        module(packed, resets=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="lengths"):
        module(x[:, 0], lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match="resets"):
        module(x[:, 0], resets=torch.zeros(T, 1, dtype=torch.bool))
    with pytest.raises(CLEAR, match="resets"):
        kind(I, H, batch_first=True)(x.transpose(0, 1), resets=torch.zeros(T, B, dtype=torch.bool))


@modules
def test_reset_state_of_the_wrong_form(kind: type[nn.RNNBase]) -> None:
    module, x = kind(I, H), torch.randn(T, B, I)
    resets = torch.zeros(T, B, dtype=torch.bool)

    def form(state: Tensor) -> Any:
        return (state, state) if kind is rnnkern.LSTM else state

    good = torch.zeros(1, B, H)
    module(x, resets=resets, reset_state=form(good))
    wrong: list[Any] = [
        good if kind is rnnkern.LSTM else (good, good),
        form(good[0]),
        form(torch.zeros(2, B, H)),
        form(torch.zeros(1, B, H + 1)),
        form(torch.zeros(1, 1, H)),
        form(good.double()),
        form(good.to("meta")),
        form(good.long()),
        "zero",
    ]
    for reset_state in wrong:
        with pytest.raises(CLEAR, match=r"reset_state|reset_h|hidden tensors"):
            module(x, resets=resets, reset_state=reset_state)


def test_proj_size_shapes_the_reset_state() -> None:
    module, x = rnnkern.LSTM(I, H, proj_size=2), torch.randn(T, B, I)
    resets = torch.zeros(T, B, dtype=torch.bool)
    h, c = torch.zeros(1, B, 2), torch.zeros(1, B, H)
    module(x, resets=resets, reset_state=(h, c))
    for wrong in ((c, h), (c, c), (h, h)):
        with pytest.raises(ValueError, match="reset_state"):
            module(x, resets=resets, reset_state=wrong)


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(cell: str) -> None:
    module = getattr(rnnkern, cell)(I, H)
    for wrong in (
        torch.randn(2, 2, I),
        torch.randn(2, I + 1),
        torch.randn(()),
        torch.ones(2, I, dtype=torch.int64),
    ):
        with pytest.raises(CLEAR):
            module(wrong)


# ---- sizes --------------------------------------------------------------------------------------
@modules
def test_sizes_that_cannot_be_allocated(kind: type[nn.RNNBase]) -> None:
    with pytest.raises((RuntimeError, MemoryError)):
        kind(4, 10**9)
    steps = torch.zeros(1, 1, I).expand(10**13, B, I)
    with pytest.raises((RuntimeError, MemoryError)):
        kind(I, H)(steps)
    rows = torch.zeros(1, 1, I).expand(1, 10**13, I)
    with pytest.raises((RuntimeError, MemoryError)):
        kind(I, H)(rows)


def test_weights_that_cannot_be_packed() -> None:
    size, zero = 10**13, torch.zeros(1)
    args = build(Case("rnn_tanh", B=1), torch.float32)
    huge = args._replace(
        h0=zero.expand(1, 1, size),
        w_ih=zero.expand(size, 4),
        w_hh=zero.expand(size, size) if size**2 < 2**63 else zero.expand(size, 1),
        b_ih=None,
        b_hh=None,
    )
    with pytest.raises(CLEAR):
        run_op(huge)


SCARCE = """
    import resource, sys
    import torch
    import rnnkern

    torch.set_num_threads(1)
    rnnkern.RNN(4, 4)(torch.randn(2, 1, 4))[0].sum().backward()  # whatever loads on first use
    module = rnnkern.RNN(4, 6000)  # its weights are 144 MB, and so is the kernel's copy
    x = torch.randn(8, 1, 4)
    y = module(x)[0] if sys.argv[1] == "backward" else None
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + 64 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        y.sum().backward() if y is not None else module(x)
    except (MemoryError, RuntimeError) as error:
        print("raised", type(error).__name__)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's RLIMIT_AS")
@pytest.mark.parametrize("step", ["forward", "backward"])
def test_no_memory_left_for_the_kernel(step: str) -> None:
    done = run_python(SCARCE, step)
    assert done.stdout.startswith("raised"), done.stderr


# ---- the functional form ------------------------------------------------------------------------
def test_functional_form() -> None:
    x, state = torch.randn(T, B, I), torch.zeros(1, B, H)
    good = [torch.randn(3 * H, I), torch.randn(3 * H, H), torch.randn(3 * H), torch.randn(3 * H)]
    functional.gru(x, good, state)
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("weights", (x, good[:3]), {}),
        ("weights", (x, [*good, good[0]]), {}),
        ("weights", (x, good), {"num_layers": 2}),
        ("weights", (x, good), {"bidirectional": True}),
        ("weights", (x, good), {"bias": False}),
        ("weights", (x, []), {}),
        ("num_layers", (x, good), {"num_layers": 0}),
        ("dropout", (x, good), {"dropout": 1.5}),
        ("dropout", (x, good), {"dropout": float("nan")}),
        ("input", (x[0, 0], good), {}),
        ("input", (x.unsqueeze(0), good), {}),
        ("w_ih", (x, [good[0][:, 1:], *good[1:]]), {}),
        ("w_hh|w_ih", (x, [good[0], good[1][1:], *good[2:]]), {}),
        ("b_ih", (x, [*good[:2], good[2][1:], good[3]]), {}),
        ("b_hh", (x, [*good[:3], good[3][1:]]), {}),
        ("w_ih", (x, [t.double() for t in good]), {}),
        ("w_hh", (x, [good[0], good[1].half(), *good[2:]]), {}),
        ("w_hh", (x, [good[0], good[1][:, :0], *good[2:]]), {}),
        (r"weights\[3\]", (x, [*good[:3], None]), {}),
        (r"weights\[0\]", (x, [good[0].numpy(), *good[1:]]), {}),
        ("input", (x.numpy(), good), {}),
        ("states", (x, good, state[:, :2]), {}),
        ("states", (x, good, state[:, :, :2]), {}),
        ("states", (x, good, state.double()), {}),
        ("states", (x, good, torch.zeros(2, B, H)), {}),
        ("states", (x, good, state[0]), {}),
        ("states", (x[:, 0], good, state), {}),
        ("num_layers", (x, good), {"num_layers": 1.0}),
        ("dropout", (x, good), {"dropout": "a"}),
    ]
    for match, arguments, options in wrong:
        with pytest.raises(CLEAR, match=match):
            functional.gru(*arguments, **options)
    two = [*good, torch.randn(3 * H, H), *good[1:]]
    functional.gru(x, two, torch.zeros(2, B, H), num_layers=2)
    for layers in (1, 3, 4):
        with pytest.raises(CLEAR, match=r"h0|states|hx"):
            functional.gru(x, two, torch.zeros(layers, B, H), num_layers=2)
    with pytest.raises(ValueError, match="nonlinearity"):
        functional.rnn(x, good, nonlinearity="sigmoid")
    with pytest.raises(ValueError, match="cell"):
        functional.recurrent("elman", x, good)
    with pytest.raises(ValueError, match="states"):
        functional.recurrent("gru", x, good, (state, state))
    with pytest.raises(ValueError, match=r"states|reset_state"):
        functional.recurrent(
            "gru", x, good, resets=torch.zeros(T, B, dtype=torch.bool), reset_states=(state, state)
        )


# ---- NaN ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "RNN_RELU"])
def test_nan_weights_propagate_as_in_torch(name: str, bidirectional: bool, value: float) -> None:
    """One bad weight at a time: the outputs are NaN and infinite where torch's are."""
    kind = name.removesuffix("_RELU")
    options: dict[str, Any] = {"nonlinearity": "relu"} if kind != name else {}
    theirs = getattr(nn, kind)(I, H, bidirectional=bidirectional, **options)
    ours = getattr(rnnkern, kind)(I, H, bidirectional=bidirectional, **options)
    x = torch.randn(T, B, I)
    for key, weight in theirs.named_parameters():
        for row in (0, H - 1, weight.shape[0] - 1):
            with torch.no_grad():
                before = weight[row].clone()
                weight[row] = value
                ours.load_state_dict(theirs.state_dict())
                (y, state), (y_theirs, state_theirs) = ours(x), theirs(x)
                weight[row] = before
            assert_close(y, y_theirs, kind="output", name=f"{key}[{row}]")
            pairs = [(state, state_theirs)]
            pairs = list(zip(state, state_theirs, strict=True)) if kind == "LSTM" else pairs
            for found, wanted in pairs:
                assert_close(found, wanted, kind="output", name=f"{key}[{row}], state")
            assert not bool(y_theirs.isfinite().all()) or value == float("inf")


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"])
def test_nan_input_stays_in_its_row(cell: str) -> None:
    args = build(Case(cell, T=T, B=B, D=2))
    y, *finals = run_op(args)
    data = args.input.clone()
    data[2, 1] = float("nan")
    y_nan, *finals_nan = run_op(args._replace(input=data))
    others = torch.tensor([b for b in range(B) if b != 1])
    assert bool(y_nan[:, 1].isnan().any(-1).all())  # one direction or the other, at every step
    assert torch.equal(y_nan[:, others], y[:, others])
    for found, wanted in zip(finals_nan, finals, strict=True):
        assert bool(found[:, 1].isnan().all())
        assert torch.equal(found[:, others], wanted[:, others])


@pytest.mark.parametrize(
    "lengths", [[-3, 6, 1, 1], [7, 6, 1, 1], [3], [3.5, 2.0, 1.0, 1.0]], ids=str
)
def test_lengths_where_the_reference_runs(lengths: list[float]) -> None:
    module, x = rnnkern.GRU(I, H), torch.randn(T, B, I)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(CLEAR, match="lengths"):
        module(x, lengths=torch.tensor(lengths))


@pytest.mark.parametrize("shape", [(T, 1), (B, T), (T,), (T, B, 1)], ids=str)
def test_resets_where_the_reference_runs(shape: tuple[int, ...]) -> None:
    module, x = rnnkern.GRU(I, H), torch.randn(T, B, I)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(CLEAR, match="resets"):
        module(x, resets=torch.zeros(shape, dtype=torch.bool))

"""Random configurations over all features: results against torch and the float64 reference."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import rnnkern
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rnnkern import eager, reference
from rnnkern.cells import CELLS
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

# The same examples in every run, so that a failure is a change in the code and not in the draw.
PROFILE = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# Cells with a module; one that only the registry knows is compared in tests/kernels.
DRAWN = ("rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before")
FULL = (torch.float32, torch.float64)
OURS = {"lstm": rnnkern.LSTM, "gru": rnnkern.GRU, "gru_reset_before": rnnkern.GRU}
THEIRS: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU}


@dataclass(frozen=True)
class Config:
    """One drawn call; None stands for an argument that is left out."""

    cell: str
    T: int
    B: int | None  # None: unbatched
    I: int
    H: int
    P: int
    layers: int
    bidirectional: bool
    batch_first: bool
    bias: bool
    dtype: torch.dtype
    lengths: list[int] | None
    packed: bool
    sorted: bool
    hx: bool
    resets: bool
    reset_state: bool
    needs: frozenset[str]  # of input, hx, weights, reset_state
    strided: bool
    training: bool
    dropout: float  # 0, or 1: what it drops must not be left to chance here
    general: bool  # never go the short way of rnnkern.eager
    seed: int

    @property
    def directions(self) -> int:
        """Directions a layer."""
        return 2 if self.bidirectional else 1


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Draw a valid configuration."""
    cell = draw(st.sampled_from(DRAWN))
    T = draw(st.integers(1, 7))
    B = draw(st.one_of(st.none(), st.integers(1, 6)))
    H = draw(st.sampled_from([1, 2, 3, 5, 8, 17, 33]))
    P = draw(st.integers(1, H - 1)) if cell == "lstm" and H > 1 and draw(st.booleans()) else 0
    packed = B is not None and draw(st.booleans())
    lengths = None
    if B is not None and (packed or draw(st.booleans())):
        lengths = draw(st.lists(st.integers(1 if packed else 0, T), min_size=B, max_size=B))
    resets = draw(st.booleans())
    return Config(
        cell=cell,
        T=T,
        B=B,
        I=draw(st.sampled_from([1, 2, 3, 7, 16])),
        H=H,
        P=P,
        layers=draw(st.integers(1, 3)),
        bidirectional=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([*FULL, *FULL, torch.bfloat16, torch.float16])),
        lengths=lengths,
        packed=packed,
        sorted=draw(st.booleans()),
        hx=draw(st.booleans()),
        resets=resets,
        reset_state=resets and draw(st.booleans()),
        needs=draw(st.frozensets(st.sampled_from(["input", "hx", "weights", "reset_state"]))),
        strided=draw(st.booleans()),
        training=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.0, 1.0])),
        general=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@dataclass
class Call:
    """The tensors of one configuration."""

    x: Tensor  # [T,B,I], time-major whatever the layout
    hx: tuple[Tensor, ...] | None
    resets: Tensor | None  # [T,B]
    reset_state: tuple[Tensor, ...] | None
    lengths: Tensor | None
    weights: dict[str, Tensor]

    def leaves(self, needs: frozenset[str], dtype: torch.dtype) -> Call:
        """Return fresh copies in `dtype` that require the gradients `needs` names."""

        def leaf(t: Tensor, group: str) -> Tensor:
            return t.detach().to(dtype, copy=True).requires_grad_(group in needs)

        def states(ts: tuple[Tensor, ...] | None, group: str) -> tuple[Tensor, ...] | None:
            return None if ts is None else tuple(leaf(t, group) for t in ts)

        return dataclasses.replace(
            self,
            x=leaf(self.x, "input"),
            hx=states(self.hx, "hx"),
            reset_state=states(self.reset_state, "reset_state"),
            weights={k: leaf(v, "weights") for k, v in self.weights.items()},
        )

    def named(self) -> dict[str, Tensor]:
        """Return every leaf by name."""
        named = {"input": self.x} | self.weights
        for group in ("hx", "reset_state"):
            named |= {f"{group}[{i}]": t for i, t in enumerate(getattr(self, group) or ())}
        return named


def module_of(c: Config, kind: type[nn.RNNBase], **more: Any) -> nn.RNNBase:
    options: dict[str, Any] = {"proj_size": c.P} if c.P else {}
    if c.cell.startswith("rnn"):
        options["nonlinearity"] = c.cell.removeprefix("rnn_")
    return kind(
        c.I,
        c.H,
        num_layers=c.layers,
        bias=c.bias,
        batch_first=c.batch_first,
        bidirectional=c.bidirectional,
        dtype=c.dtype,
        dropout=c.dropout if c.layers > 1 else 0.0,
        **options,
        **more,
    ).train(c.training)


def draw_call(c: Config, module: nn.RNNBase) -> Call:
    B = 1 if c.B is None else c.B
    lengths = c.lengths
    if c.packed and c.sorted and lengths is not None:
        lengths = sorted(lengths, reverse=True)

    def states() -> tuple[Tensor, ...]:
        widths = (c.P or c.H, c.H)[: CELLS[c.cell].states]
        return tuple(torch.randn(c.layers * c.directions, B, w) for w in widths)

    return Call(
        x=torch.randn(c.T, B, c.I),
        hx=states() if c.hx else None,
        resets=torch.rand(c.T, B) < 0.3 if c.resets else None,
        reset_state=states() if c.reset_state else None,
        lengths=None if lengths is None else torch.tensor(lengths),
        weights={k: v.detach().clone() for k, v in module.named_parameters()},
    )


# ---- three ways to run it -----------------------------------------------------------------------
def by_module(c: Config, module: nn.RNNBase, call: Call, ours: bool) -> tuple[Tensor, ...]:
    """Run a module; returns padded, time-major, batched results."""
    x, hx, resets, reset = call.x, call.hx, call.resets, call.reset_state
    if c.packed and c.lengths and resets is not None:
        resets = resets[: max(c.lengths)]  # a PackedSequence is as long as its longest row
    if c.strided:  # the same values in memory that is not contiguous
        x = torch.stack([x, x], -1)[..., 1]
        resets = None if resets is None else torch.stack([resets, resets], -1)[..., 0]
    unbatched = c.B is None
    if unbatched:
        x, resets = x.squeeze(1), None if resets is None else resets.squeeze(1)
        hx, reset = (None if s is None else tuple(t.squeeze(1) for t in s) for s in (hx, reset))
    elif c.batch_first:
        x, resets = x.transpose(0, 1), None if resets is None else resets.t()
    form = (lambda s: s) if CELLS[c.cell].states == 2 else (lambda s: s[0])
    options: dict[str, Any] = {"resets": resets} if ours else {}
    if ours and reset is not None:
        options["reset_state"] = form(reset)
    data: Any = x
    if c.packed:
        data = pack_padded_sequence(
            x, call.lengths, batch_first=c.batch_first, enforce_sorted=c.sorted
        )
    elif ours:
        options["lengths"] = call.lengths
    arguments = (data,) if hx is None else (data, form(hx))
    y, finals = torch.func.functional_call(module, call.weights, arguments, options)
    if isinstance(y, PackedSequence):
        y, _ = pad_packed_sequence(y, total_length=c.T)
    elif unbatched:
        y = y.unsqueeze(1)
    elif c.batch_first:
        y = y.transpose(0, 1)
    finals = finals if isinstance(finals, tuple) else (finals,)
    return y, *(f.unsqueeze(1) if unbatched else f for f in finals)


def by_reference(c: Config, call: Call) -> tuple[Tensor, ...]:
    """Run the reference's single layers one on the other."""
    D, B = c.directions, call.x.shape[1]
    data, finals = call.x, []
    for k in range(c.layers):
        directions = []
        for suffix in ("", "_reverse")[:D]:
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            directions.append(tuple(call.weights.get(f"{n}_l{k}{suffix}") for n in names))
        if k > 0 and c.training and c.dropout:
            data = data * 0
        rows = slice(k * D, k * D + D)
        widths = (c.P or c.H, c.H)[: CELLS[c.cell].states]
        zero = tuple(data.new_zeros(D, B, w) for w in widths)
        data, final = reference.layer(
            c.cell,
            data,
            zero if call.hx is None else tuple(s[rows] for s in call.hx),
            directions,
            lengths=call.lengths,
            resets=call.resets,
            reset=None if call.reset_state is None else tuple(s[rows] for s in call.reset_state),
        )
        finals.append(final)
    return data, *(torch.cat(s) for s in zip(*finals, strict=True))


def results_of(call: Call, outputs: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    """Return outputs and gradients by name, of a loss that weighs every output differently."""
    results: dict[str, Tensor | None] = dict(zip(("y", "hn", "cn"), outputs, strict=False))
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
    differentiable = [(t, w) for t, w in zip(outputs, weights, strict=True) if t.requires_grad]
    if differentiable:
        torch.autograd.backward(*zip(*differentiable, strict=True))
    return results | {f"d{name}": leaf.grad for name, leaf in call.named().items()}


def compare(
    found: dict[str, Tensor | None], wanted: dict[str, Tensor | None], dtype: torch.dtype
) -> None:
    assert found.keys() == wanted.keys()
    for name, w in wanted.items():
        f = found[name]
        assert f is None or w is None or f.shape == w.shape, name
        if f is None or w is None:  # a gradient that is zero may be absent
            for some in (f, w):
                assert some is None or not bool(some.any()), name
            continue
        kind = "gradient" if name.startswith("d") else "output"
        assert_close(f.detach().double(), w.detach().double(), kind=kind, dtype=dtype, name=name)


@PROFILE
@given(configs())
def test_every_configuration(c: Config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if c.general:
            patch.setattr(eager, "run", lambda *_, **__: None)
        check(c)


def check(c: Config) -> None:
    torch.manual_seed(c.seed)
    more = {"reset_after": False} if c.cell == "gru_reset_before" else {}
    module = module_of(c, OURS.get(c.cell, rnnkern.RNN), **more)
    drawn = draw_call(c, module)

    call = drawn.leaves(c.needs, c.dtype)
    outputs = by_module(c, module, call, ours=True)
    assert all(t.dtype == c.dtype for t in outputs)
    ours = results_of(call, outputs)
    for name, leaf in call.named().items():
        assert leaf.requires_grad or ours[f"d{name}"] is None, name

    exact = drawn.leaves(c.needs, torch.float64)
    compare(ours, results_of(exact, by_reference(c, exact)), c.dtype)

    torch_has_it = (
        c.dtype in FULL
        and not c.resets
        and c.cell != "gru_reset_before"
        and (c.packed or not c.lengths)
    )
    if torch_has_it:
        own = drawn.leaves(c.needs, c.dtype)
        theirs = module_of(c, THEIRS.get(c.cell, nn.RNN))
        compare(ours, results_of(own, by_module(c, theirs, own, ours=False)), c.dtype)

    with torch.no_grad():
        inferred = by_module(c, module, drawn.leaves(frozenset(), c.dtype), ours=True)
    for name, value in zip(("y", "hn", "cn"), inferred, strict=False):
        trained = ours[name]
        assert trained is not None
        assert torch.equal(value, trained.detach()), name

"""The operators called with what no module would pass: they raise, and never crash the process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, build, cast, cotangents, run_op, run_python
from rnnkern.ops import DIFFERENTIABLE, LayerInputs
from torch import Tensor

pytestmark = pytest.mark.usefixtures("every_device")
T, B, H = 6, 4, 5
CLEAR = ("ValueError", "RuntimeError", "TypeError", "MemoryError", "NotImplementedError")
Change = Callable[[LayerInputs], LayerInputs]


def setting(**changes: Any) -> Change:
    """Replace arguments; a function is applied to what stands there."""

    def change(args: LayerInputs) -> LayerInputs:
        values = {k: v(getattr(args, k)) if callable(v) else v for k, v in changes.items()}
        return args._replace(**values)

    return change


def zeros(*shape: int) -> Callable[[Any], Tensor]:
    """Return what puts zeros in an argument's place, on the device that is the default then."""
    return lambda _: torch.zeros(shape, dtype=torch.float64)


PADDED = Case("lstm", T=T, B=B, H=40, D=2, resets=True, reset_state=True)
PACKED = Case("lstm", T=T, B=B, H=40, layout="packed_unsorted")
GRU = Case("gru", T=T, B=B, H=40, resets=True, reset_state=True)
PROJECTED = Case("lstm", T=T, B=B, H=40, P=7, D=2)
# Without units on one side of the projection, in all that has them.
NO_P = setting(
    h0=zeros(2, B, 0),
    **{f"w_hh{d}": zeros(160, 0) for d in ("", "_reverse")},
    **{f"w_hr{d}": zeros(0, 40) for d in ("", "_reverse")},
)
NO_H = setting(
    c0=zeros(2, B, 0),
    **{f"w_ih{d}": zeros(0, 4) for d in ("", "_reverse")},
    **{f"w_hh{d}": zeros(0, 7) for d in ("", "_reverse")},
    **{f"b_{b}{d}": zeros(0) for b in ("ih", "hh") for d in ("", "_reverse")},
    **{f"w_hr{d}": zeros(7, 0) for d in ("", "_reverse")},
)
# (case, name in the message, change)
HOSTILE_FORWARD: dict[str, tuple[Case, str, Change]] = {
    "cell": (PADDED, "cell", setting(cell="elman")),
    "input_2d": (PADDED, "input", setting(input=lambda t: t[0])),
    "input_batch": (PADDED, "input|h0", setting(input=lambda t: t[:, 1:])),
    "input_features": (PADDED, "w_ih|input", setting(input=lambda t: t[..., 1:])),
    "h0_2d": (PADDED, "h0", setting(h0=lambda t: t[0])),
    "h0_three_directions": (PADDED, "h0", setting(h0=zeros(3, B, 40))),
    "h0_batch": (PADDED, "h0|input", setting(h0=zeros(2, 5000, 40))),
    "h0_width": (PADDED, "h0|w_", setting(h0=zeros(2, B, 5000))),
    "h0_no_width": (PADDED, "h0|w_", setting(h0=zeros(2, B, 0))),
    "c0_missing": (PADDED, "c0", setting(c0=None)),
    "c0_shape": (PADDED, "c0", setting(c0=zeros(2, B, 1))),
    "c0_superfluous": (GRU, "c0", setting(c0=zeros(1, B, 40))),
    "w_ih_shape": (PADDED, "w_ih", setting(w_ih=lambda t: t[1:])),
    "w_hh_shape": (PADDED, "w_hh", setting(w_hh=lambda t: t[:, 1:])),
    "w_hh_1d": (PADDED, "w_hh", setting(w_hh=lambda t: t.flatten())),
    "b_ih_shape": (PADDED, "b_ih", setting(b_ih=lambda t: t[1:])),
    "b_hh_shape": (PADDED, "b_hh", setting(b_hh=zeros(1))),
    "w_ih_reverse_missing": (PADDED, "h0|w_ih_reverse", setting(w_ih_reverse=None)),
    "w_hh_reverse_missing": (PADDED, "w_hh_reverse", setting(w_hh_reverse=None)),
    "reverse_of_other_shape": (PADDED, "w_hh_reverse", setting(w_hh_reverse=zeros(160, 1))),
    "w_hr_for_gru": (GRU, "w_hr", setting(w_hr=zeros(40, 40))),
    "w_hr_in_one_direction": (PROJECTED, "w_hr", setting(w_hr_reverse=None)),
    "w_hr_shape": (PROJECTED, "w_hr|w_ih", setting(w_hr=zeros(7, 4000))),
    "w_hr_to_no_units": (PROJECTED, "w_hr: expected [P, H] of at least 1 each, got [0, 40]", NO_P),
    "w_hr_of_no_units": (PROJECTED, "w_hr: expected [P, H] of at least 1 each, got [7, 0]", NO_H),
    "w_hr_1d": (PROJECTED, "w_hr", setting(w_hr=zeros(40))),
    "w_hr_reverse_shape": (PROJECTED, "w_hr_reverse", setting(w_hr_reverse=zeros(7, 4))),
    "reset_h_shape": (PADDED, "reset_h", setting(reset_h=zeros(2, 1, 40))),
    "reset_h_missing": (PADDED, "reset_h|reset_c", setting(reset_h=None)),
    "reset_c_missing": (PADDED, "reset_h|reset_c", setting(reset_c=None)),
    "reset_c_superfluous": (GRU, "reset_c", setting(reset_c=zeros(1, B, 40))),
    "resets_shape": (PADDED, "resets", setting(resets=lambda t: t.t())),
    "resets_dtype": (PADDED, "resets", setting(resets=lambda t: t.to(torch.uint8))),
    "one_float32": (PADDED, "w_hh", setting(w_hh=lambda t: t.float())),
    "integers": (GRU, "input", lambda a: cast(a, torch.int64)),
    "booleans": (GRU, "input", lambda a: cast(a, torch.bool)),
    "complex": (GRU, "input", lambda a: cast(a, torch.complex64)),
    "no_steps": (PADDED, "sequence length", setting(input=lambda t: t[:0])),
    "w_hh_on_meta": (PADDED, "w_hh", setting(w_hh=lambda t: t.to("meta"))),
    "lengths_on_meta": (PADDED, "lengths", setting(lengths=torch.ones(B, device="meta").long())),
    "resets_on_meta": (PADDED, "resets", setting(resets=lambda t: t.to("meta"))),
    "packed_lengths": (PACKED, "lengths", setting(lengths=torch.ones(B, dtype=torch.int64))),
    "packed_batch_first": (PACKED, "batch_first", setting(batch_first=True)),
    "packed_3d": (PACKED, "input", setting(input=lambda t: t.unsqueeze(0))),
    "packed_row_missing": (PACKED, "batch_sizes", setting(input=lambda t: t[1:])),
    "batch_sizes_too_large": (PACKED, "batch_sizes", setting(batch_sizes=lambda t: t * 1000)),
    "batch_sizes_growing": (PACKED, "batch_sizes", setting(batch_sizes=lambda t: t.flip(0))),
    "batch_sizes_negative": (PACKED, "batch_sizes", setting(batch_sizes=lambda t: -t)),
    "batch_sizes_zero": (PACKED, "batch_sizes", setting(batch_sizes=lambda t: t * 0)),
    "batch_sizes_overflow": (
        PACKED,
        "batch_sizes",
        setting(batch_sizes=torch.tensor([B, 2**62, 2**62, 2**62, 2**62, 1])),
    ),
    "batch_sizes_float": (PACKED, "batch_sizes", setting(batch_sizes=lambda t: t.double())),
    "batch_sizes_0d": (PACKED, "batch_sizes", setting(batch_sizes=torch.tensor(B))),
    "batch_sizes_2d": (PACKED, "batch_sizes", setting(batch_sizes=lambda t: t.unsqueeze(1))),
    "batch_sizes_empty": (PACKED, "", setting(batch_sizes=lambda t: t[:0])),
    "batch_sizes_on_meta": (PACKED, "batch_sizes", setting(batch_sizes=lambda t: t.to("meta"))),
    "order_out_of_range": (PACKED, "order", setting(order=lambda t: t + 10**9)),
    "order_negative": (PACKED, "order", setting(order=lambda t: t - 1)),
    "order_twice_the_same": (PACKED, "order", setting(order=lambda t: t * 0)),
    "order_short": (PACKED, "order", setting(order=lambda t: t[1:])),
    "order_float": (PACKED, "order", setting(order=lambda t: t.double())),
    "order_on_meta": (PACKED, "order", setting(order=lambda t: t.to("meta"))),
}
# (case, name in the message, changes to layer_backward's own arguments)
HOSTILE_BACKWARD: dict[str, tuple[Case, str, dict[str, Any]]] = {
    **{
        f"{name}_{kind}": (GRU, name, {name: change})
        for name in ("gates", "h_prev", "saved")
        for kind, change in {
            "float32": lambda t: t.float(),
            "float16": lambda t: t.half(),
            "bool": lambda t: t.bool(),
            "on_meta": lambda t: t.to("meta"),
            "short": lambda t: t.flatten()[:1].reshape((1,) * t.dim()),
            "empty": lambda t: t.new_empty(0),
            "expanded": lambda t: t.flatten()[0].expand(t.shape),
            "transposed": lambda t: t.mT.contiguous().mT,
        }.items()
    },
    "h_prev_missing": (GRU, "h_prev", {"h_prev": lambda t: t[..., :0]}),
    "h_prev_too_wide": (PADDED, "h_prev", {"h_prev": lambda t: t.new_zeros(2, T * B, 41)}),
    "dy_2d": (PADDED, "dy", {"dy": lambda t: t.flatten(0, 1)}),
    "dy_1d": (PADDED, "dy", {"dy": lambda t: t.flatten()}),
    "dy_swapped": (PADDED, "dy", {"dy": lambda t: t.reshape(B, T, -1)}),
    "dy_swapped_and_transposed": (
        Case("rnn_tanh", T=2, B=30_000),
        "dy",
        {"dy": lambda t: t.reshape(3, 20_000, -1).transpose(0, 1)},
    ),
    "dy_short": (PADDED, "dy", {"dy": lambda t: t[1:]}),
    "dy_on_meta": (PADDED, "dy", {"dy": lambda t: t.to("meta")}),
    "dy_packed_3d": (PACKED, "dy", {"dy": lambda t: t.unsqueeze(0)}),
    "dhn_shape": (PADDED, "dhn", {"dhn": lambda t: t[:1]}),
    "dcn_shape": (PADDED, "dcn", {"dcn": lambda t: t[..., 1:]}),
    "mask_short": (PADDED, "", {"output_mask": [True]}),
    "mask_empty": (PADDED, "", {"output_mask": []}),
    "mask_long": (PADDED, "", {"output_mask": [True] * 40}),
}


def forward_call(name: str) -> None:
    case, _, change = HOSTILE_FORWARD[name]
    run_op(change(build(case)))


def backward_arguments(args: LayerInputs) -> dict[str, Any]:
    y, hn, cn, gates, h_prev, saved = torch.ops.rnnkern.layer(*args, True)
    dy, dhn, dcn = cotangents((y, hn, cn))
    return {
        "gates": gates,
        "h_prev": h_prev,
        "saved": saved,
        "dy": dy,
        "dhn": dhn,
        "dcn": None if args.c0 is None else dcn,
        "output_mask": [True] * len(DIFFERENTIABLE),
    }


def backward_call(name: str) -> None:
    case, _, changes = HOSTILE_BACKWARD[name]
    args = build(case)
    own = backward_arguments(args)
    own |= {k: v(own[k]) if callable(v) else v for k, v in changes.items()}
    torch.ops.rnnkern.layer_backward(*args, *own.values())


CALLS = {f"forward:{name}": functools.partial(forward_call, name) for name in HOSTILE_FORWARD}
CALLS |= {f"backward:{name}": functools.partial(backward_call, name) for name in HOSTILE_BACKWARD}


def report_calls(first: int, device: str) -> None:
    """Make every call from the first-th on, on the device, and print what came of each."""
    for index, (name, call) in enumerate(CALLS.items()):
        if index < first:
            continue
        torch.manual_seed(0)
        print(f"\n{name}\t", end="", flush=True)
        try:
            with torch.device(device):
                call()
            if device == "cuda":
                torch.cuda.synchronize()  # what a kernel did wrong is this call's error
            print("returned", flush=True)
        except Exception as error:  # what it is matters to the test that reads this
            text = f"{type(error).__name__}\t{error}"
            print(text.replace("\n", " "), flush=True)


@functools.cache
def outcomes(device: str) -> dict[str, str]:
    """Make all CALLS in another process, and in a new one from the next call on when it dies."""
    found: dict[str, str] = {}
    while len(found) < len(CALLS):
        done = run_python(
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from test_hostile_calls import report_calls\n"
            "report_calls(int(sys.argv[2]), sys.argv[3])",
            str(Path(__file__).parent),
            str(len(found)),
            device,
        )
        lines = [line for line in done.stdout.splitlines() if "\t" in line]
        assert lines, done.stderr
        found |= dict(line.split("\t", 1) for line in lines)
        if done.returncode != 0:
            found[list(found)[-1]] = f"died with status {done.returncode}"
    return found


@pytest.mark.parametrize("name", CALLS)
def test_operators(name: str) -> None:
    pass_, _, key = name.partition(":")
    table: dict[str, Any] = HOSTILE_FORWARD if pass_ == "forward" else HOSTILE_BACKWARD
    kind, _, message = outcomes(torch.get_default_device().type)[name].partition("\t")
    assert kind in CLEAR, (kind, message)
    names = table[key][1].split("|")
    assert any(word in message for word in names), message


# ---- odd, but right -----------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64], ids=str)
def test_packed_metadata_of_other_types_and_strides(dtype: torch.dtype) -> None:
    args = build(PACKED)
    assert args.batch_sizes is not None
    assert args.order is not None
    wanted = run_op(args)
    for name in ("batch_sizes", "order"):
        value = getattr(args, name).to(dtype)
        for form in (value, torch.stack([value, value + 100], 1)[:, 0]):
            found = run_op(args._replace(**{name: form}))
            for f, w in zip(found, wanted, strict=True):
                assert torch.equal(f, w)


def test_any_strides_are_right() -> None:
    """Expanded, transposed and sliced tensors in every place give what contiguous ones give."""
    args = build(Case("lstm", T=T, B=B, H=H, P=2, D=2, resets=True, reset_state=True))
    wanted = run_op(args)
    gradients = backward_arguments(args)
    back = torch.ops.rnnkern.layer_backward(*args, *gradients.values())

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, t + 1], -1)[..., 0]

    changes: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        (name, strided) for name in (*DIFFERENTIABLE, "resets") if getattr(args, name) is not None
    ]
    changes = [(n, c if n != "resets" else lambda t: t.t().contiguous().t()) for n, c in changes]
    for name, change in changes:
        other = args._replace(**{name: change(getattr(args, name))})
        for found, want in zip(run_op(other), wanted, strict=True):
            assert torch.equal(found, want), name
        found_back = torch.ops.rnnkern.layer_backward(*other, *gradients.values())
        for found, want in zip(found_back, back, strict=True):
            assert torch.equal(found, want), name
    for name, change in (
        ("dy", strided),
        ("dy", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
        ("dhn", strided),
        ("dcn", lambda t: t.mT.contiguous().mT),
    ):
        other = gradients | {name: change(gradients[name])}
        found_back = torch.ops.rnnkern.layer_backward(*args, *other.values())
        for found, want in zip(found_back, back, strict=True):
            assert torch.equal(found, want), name
    for name in ("dy", "dhn", "dcn"):  # one number, expanded, as sum().backward() makes it
        one = torch.ones((), dtype=torch.float64).expand(gradients[name].shape)
        pair = [
            torch.ops.rnnkern.layer_backward(*args, *(gradients | {name: g}).values())
            for g in (one, one.contiguous())
        ]
        for found, want in zip(*pair, strict=True):
            assert torch.equal(found, want), name

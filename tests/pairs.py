"""Pairs of modules, torch's and ours with equal weights, run side by side and compared."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import rnnkern
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
NARROW = (torch.float16, torch.bfloat16)

State: TypeAlias = Tensor | tuple[Tensor, Tensor] | None
View: TypeAlias = Callable[[Tensor], Tensor]


# ---- building -----------------------------------------------------------------------------------
def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """(torch.nn's module, rnnkern's module), built by the same call, with equal weights."""
    theirs = getattr(nn, name)(*args, **kwargs)
    ours = getattr(rnnkern, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def state_shapes(module: Any, batch: int | None) -> list[tuple[int, ...]]:
    """Shapes of the states of a layer or a cell: h, or h and c; batch None means unbatched."""
    rows = () if batch is None else (batch,)
    if isinstance(module, nn.RNNCellBase):
        shape = (*rows, module.hidden_size)
        return [shape, shape] if "LSTM" in type(module).__name__ else [shape]
    depth = module.num_layers * (2 if module.bidirectional else 1)
    cell = (depth, *rows, module.hidden_size)
    hidden = (depth, *rows, module.proj_size or module.hidden_size)
    return [hidden, cell] if module.mode == "LSTM" else [hidden]


def random_state(module: nn.Module, batch: int | None, dtype: torch.dtype | None = None) -> State:
    """Return an initial state of `module`, normal, of the dtype of its weights by default."""
    kind = dtype or next(module.parameters()).dtype
    states = [torch.randn(shape).to(kind) for shape in state_shapes(module, batch)]
    return states[0] if len(states) == 1 else (states[0], states[1])


def random_packed(
    lengths: Sequence[int], features: int, *, dtype: torch.dtype = torch.float32
) -> PackedSequence:
    """Pack sequences of these lengths, in this order; sorted_indices only when not sorted."""
    padded = torch.randn(max(lengths), len(lengths), features).to(dtype)
    in_order = list(lengths) == sorted(lengths, reverse=True)
    on_host = torch.tensor(lengths, device="cpu")  # where torch wants lengths
    return pack_padded_sequence(padded, on_host, enforce_sorted=in_order)


# ---- running ------------------------------------------------------------------------------------
@dataclass
class Run:
    """Named results of one forward and backward pass: outputs and gradients."""

    outputs: dict[str, Tensor]
    grads: dict[str, Tensor | None] = field(default_factory=dict)


def outputs_of(module: nn.Module, result: Any) -> dict[str, Tensor]:
    """Name the tensors a call returned: output, h_n and c_n of a layer, h_n and c_n of a cell."""
    if isinstance(module, nn.RNNCellBase):
        first, state = None, result
    else:
        assert type(result) is tuple, type(result)
        first, state = result
    named: dict[str, Tensor] = {}
    if first is not None:
        named["output"] = first.data if isinstance(first, PackedSequence) else first
    if isinstance(state, Tensor):
        return named | {"h_n": state}
    assert type(state) is tuple, type(state)
    return named | {"h_n": state[0], "c_n": state[1]}


def weighted_sum(tensors: Sequence[Tensor]) -> Tensor:
    """Return a loss whose gradient differs in every entry, and the same for equal shapes."""
    generator = torch.Generator("cpu").manual_seed(20)
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for tensor in tensors:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        drawn = torch.randn(real.shape, generator=generator, device="cpu")
        weight = drawn.to(real.device, real.dtype)
        total = total + (real * weight).sum().double()
    return total


def _leaf(tensor: Tensor, wanted: bool) -> Tensor:
    return tensor.detach().clone().requires_grad_(wanted)


def run(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx: State = None,
    *,
    view: View | None = None,
    needs: Sequence[str] = ("input", "hx"),
    backward: bool = True,
    loss_on: Sequence[str] | None = None,
    call: Callable[..., Any] | None = None,
) -> Run:
    """Call `module` on fresh leaves and return what it computes, with every gradient.

    Parameters
    ----------
    input, hx : the arguments; they are copied, so that a pair never shares a graph.
    view : applied to the copy of the input before the call (transposes, slices, expansions);
        the gradient is that of the copy.
    needs : which of "input" and "hx" require a gradient.
    backward : False computes outputs only.
    loss_on : names of the outputs the loss reads. Default: all.
    call : what to call instead of `module` itself: `module` compiled, say.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    leaf = _leaf(data, "input" in needs)
    x: Any = view(leaf) if view is not None else leaf
    if isinstance(input, PackedSequence):
        x = PackedSequence(x, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
    states = [] if hx is None else list(hx) if isinstance(hx, tuple) else [hx]
    states = [_leaf(state, "hx" in needs) for state in states]
    state: Any = tuple(states) if isinstance(hx, tuple) else states[0] if states else None

    module.zero_grad(set_to_none=True)
    function = module if call is None else call
    result = function(x) if hx is None else function(x, state)
    outputs = outputs_of(module, result)
    done = Run({name: tensor.detach() for name, tensor in outputs.items()})
    if not backward:
        return done
    weighted_sum([outputs[name] for name in loss_on or outputs]).backward()
    done.grads["input"] = leaf.grad
    done.grads.update({f"hx[{i}]": state.grad for i, state in enumerate(states)})
    done.grads.update({name: weight.grad for name, weight in module.named_parameters()})
    return done


# ---- comparing ----------------------------------------------------------------------------------
def strides_that_matter(tensor: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions longer than 1; of an empty tensor none can be told apart."""
    if tensor.numel() == 0:
        return ()
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(stride for size, stride in pairs if size > 1)


def assert_same_layout(actual: Tensor, expected: Tensor, name: str) -> None:
    """Fail unless shape, dtype and strides agree: the same .view() works, in the same order."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} for {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} for {expected.dtype}"
    a, e = strides_that_matter(actual), strides_that_matter(expected)
    assert a == e, f"{name}: strides {actual.stride()} for {expected.stride()}"


def assert_same_run(
    ours: Run, theirs: Run, *, dtype: torch.dtype | None = None, layout: bool = True
) -> None:
    """Fail unless both runs gave the same outputs and gradients, and None at the same places."""
    assert list(ours.outputs) == list(theirs.outputs)
    for name, expected in theirs.outputs.items():
        if layout:
            assert_same_layout(ours.outputs[name], expected, name)
        assert_close(ours.outputs[name], expected, kind="output", dtype=dtype, name=name)
    assert list(ours.grads) == list(theirs.grads)
    for name, wanted in theirs.grads.items():
        found = ours.grads[name]
        assert (found is None) == (wanted is None), f"gradient of {name}: {found} for {wanted}"
        if found is not None and wanted is not None:
            assert_close(found, wanted, kind="gradient", dtype=dtype, name=name)


def assert_parity(
    pair: tuple[nn.Module, nn.Module],
    input: Tensor | PackedSequence,
    hx: State = None,
    *,
    dtype: torch.dtype | None = None,
    layout: bool = True,
    call: Callable[..., Any] | None = None,
    **options: Any,
) -> tuple[Run, Run]:
    """Run torch's module and ours (by `call`) on the same arguments, and compare; see `run`."""
    theirs, ours = pair
    expected = run(theirs, input, hx, **options)
    actual = run(ours, input, hx, call=call, **options)
    assert_same_run(actual, expected, dtype=dtype, layout=layout)
    return expected, actual


# ---- on a device ---------------------------------------------------------------------------------
def to(value: Any, device: Any, dtype: torch.dtype | None = None) -> Any:
    """Move a tensor, packed sequence or state, and convert it."""
    if value is None:
        return None
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        return tuple(to(v, device, dtype) for v in value)
    return value.to(device=device, dtype=dtype or value.data.dtype)


def on_cpu(done: Run) -> Run:
    """Return the same results on the CPU."""
    grads = {key: None if t is None else t.cpu() for key, t in done.grads.items()}
    return Run({key: t.cpu() for key, t in done.outputs.items()}, grads)


def assert_device_parity(
    pair: tuple[nn.Module, nn.Module],
    device: str,
    input: Any,
    hx: Any = None,
    *,
    deep: bool = False,
    smooth: bool = False,
    **options: Any,
) -> None:
    """Compare ours on the device with torch's module on the CPU in float64; see `run`.

    With `deep`, what is rounded to 16 bits between layers makes the outputs as far off as a
    gradient may be. With `smooth`, nothing comes near relu's kink, and its gradients are compared
    in every type.
    """
    theirs, ours = pair
    dtype = next(ours.parameters()).dtype
    ours.to(device)
    # Rounded to 16 bits, a pre-activation may lie on the other side of relu's kink.
    relu = getattr(ours, "nonlinearity", "tanh") == "relu" and dtype in NARROW and not smooth
    options["backward"] = options.get("backward", True) and not relu
    wanted = run(copy.deepcopy(theirs).double(), *to((input, hx), "cpu", torch.float64), **options)
    found = run(ours, *to((input, hx), device), **options)
    assert all(t.device.type == device and t.dtype == dtype for t in found.outputs.values())
    found = on_cpu(found)
    assert list(found.outputs) == list(wanted.outputs)
    assert list(found.grads) == list(wanted.grads)
    for key, value in wanted.outputs.items():
        kind = "gradient" if deep else "output"
        assert_close(found.outputs[key].double(), value, kind=kind, dtype=dtype, name=key)
    for key, gradient in wanted.grads.items():
        own = found.grads[key]
        assert (own is None) == (gradient is None), key
        if own is not None and gradient is not None:
            assert_close(own.double(), gradient, kind="gradient", dtype=dtype, name=key)


# ---- failing alike ------------------------------------------------------------------------------
@dataclass
class Outcome:
    """What a call did: its value or its exception, and the warnings on the way."""

    value: Any = None
    error: Exception | None = None
    warned: list[tuple[type[Warning], str]] = field(default_factory=list)

    def __str__(self) -> str:
        if self.error is None:
            return "no error"
        return f"{type(self.error).__name__}: {self.error}"


def outcome(call: Callable[[], Any]) -> Outcome:
    """Call, and record instead of raising."""
    done = Outcome()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            done.value = call()
        except Exception as error:
            done.error = error
    done.warned = [(warning.category, str(warning.message)) for warning in caught]
    return done


def assert_same_error(ours: Outcome, theirs: Outcome) -> None:
    """Fail unless torch raised, and ours raised the same type with the same text."""
    assert theirs.error is not None, "torch accepts this: the test is wrong"
    assert ours.error is not None, f"torch raises {theirs}, ours accepts"
    assert type(ours.error) is type(theirs.error), f"ours {ours}; torch {theirs}"
    assert str(ours.error) == str(theirs.error)


def assert_same_error_kind(ours: Outcome, theirs: Outcome) -> None:
    """As `assert_same_error`; of a TypeError and the like, which Python words, the type only."""
    if isinstance(theirs.error, (RuntimeError, ValueError)):
        assert_same_error(ours, theirs)
        return
    assert theirs.error is not None, "torch accepts this: the test is wrong"
    assert type(ours.error) is type(theirs.error), f"ours {ours}; torch {theirs}"

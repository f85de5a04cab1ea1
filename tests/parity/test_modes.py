"""Autograd modes: eval, no_grad, inference, freezing, retained graphs, anomaly mode, hooks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from pairs import (
    CELLS,
    LAYERS,
    assert_parity,
    assert_same_error,
    outcome,
    outputs_of,
    pair,
    random_packed,
    random_state,
    weighted_sum,
)
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("every_device")
layers = pytest.mark.parametrize("name", LAYERS)
both_kinds = pytest.mark.parametrize("name", LAYERS + CELLS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def sample(module: nn.Module) -> Tensor:
    dtype = next(module.parameters()).dtype
    return torch.randn((2, 3) if isinstance(module, nn.RNNCellBase) else (5, 2, 3)).to(dtype)


def loss_of(module: nn.Module, *args: Any) -> Tensor:
    return weighted_sum(list(outputs_of(module, module(*args)).values()))


def assert_same_grads(made: tuple[nn.Module, nn.Module]) -> None:
    for (key, wanted), (_, found) in zip(*(m.named_parameters() for m in made), strict=True):
        assert (found.grad is None) == (wanted.grad is None), key
        if wanted.grad is not None and found.grad is not None:
            assert_close(found.grad, wanted.grad, kind="gradient", name=key)


# ---- train, eval, no_grad, inference_mode -------------------------------------------------------
@both_kinds
def test_backward_in_eval_mode(name: str) -> None:
    options = {"dropout": 0.5, "num_layers": 2} if name in LAYERS else {}
    made = pair(name, 3, 4, **options)
    for module in made:
        module.eval()
    assert_parity(made, sample(made[0]), random_state(made[0], 2))


@both_kinds
def test_no_grad(name: str) -> None:
    made = pair(name, 3, 4)
    with torch.no_grad():
        assert_parity(made, sample(made[0]), random_state(made[0], 2), backward=False)
        result = made[1](sample(made[0]))
    for tensor in outputs_of(made[1], result).values():
        assert not tensor.requires_grad
        assert not tensor.is_inference()


@both_kinds
def test_inference_mode(name: str) -> None:
    made = pair(name, 3, 4)
    x = sample(made[0])
    with torch.inference_mode():
        expected, found = (outputs_of(module, module(x)) for module in made)
    for key, wanted in expected.items():
        assert_close(found[key], wanted, kind="output", name=key)
        assert found[key].is_inference()
        assert not found[key].requires_grad
    assert_parity(made, x)  # and training goes on


@both_kinds
def test_inference_tensors_cannot_be_trained_on(name: str) -> None:
    made = pair(name, 3, 4)
    with torch.inference_mode():
        x = sample(made[0]) * 1
    theirs, ours = (outcome(lambda m=module: m(x)) for module in made)
    assert_same_error(ours, theirs)
    with torch.no_grad():
        expected, found = (outputs_of(module, module(x)) for module in made)
    for key, wanted in expected.items():
        assert_close(found[key], wanted, kind="output", name=key)


@both_kinds
def test_grad_enabled_inside_no_grad(name: str) -> None:
    made = pair(name, 3, 4)
    with torch.no_grad(), torch.enable_grad():
        assert_parity(made, sample(made[0]))


# ---- freezing -----------------------------------------------------------------------------------
@both_kinds
def test_a_frozen_module_passes_gradients_through(name: str) -> None:
    made = pair(name, 3, 4)
    for module in made:
        module.requires_grad_(False)
    _, actual = assert_parity(made, sample(made[0]), random_state(made[0], 2))
    assert all(actual.grads[key] is None for key, _ in made[1].named_parameters())
    y = outputs_of(made[1], made[1](sample(made[1])))
    assert not any(tensor.requires_grad for tensor in y.values())


def allocated_bytes(loss: Tensor) -> int:
    """Memory that the backward pass of `loss` asks for: a gradient not computed needs none.

    Allocation by allocation: the sums of operators count what is freed in them against it.
    """
    with torch.profiler.profile(profile_memory=True) as profile:
        loss.backward()
    events = profile.profiler.kineto_results.events()
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")


@pytest.mark.cpu_only("on a GPU what cuBLAS works in, and rounding to blocks, count too")
@layers
def test_frozen_weights_cost_nothing(name: str) -> None:
    # float64: in float32 torch's own LSTM runs in oneDNN, which computes every gradient.
    for module in pair(name, 32, 32, 2, dtype=torch.float64):
        x = torch.randn(6, 3, 32, dtype=torch.float64)
        costs, sizes = [], []
        for frozen in ("nothing", "weight_ih_l1", "weight"):
            for key, weight in module.named_parameters():
                weight.requires_grad_(frozen not in key)
            module.zero_grad()
            costs.append(allocated_bytes(loss_of(module, x)))
            sizes.append(sum(w.nbytes for w in module.parameters() if not w.requires_grad))
        for saved, size in zip(costs[1:], sizes[1:], strict=True):
            assert costs[0] - saved >= size


@pytest.mark.cpu_only("on a GPU what cuBLAS works in, and rounding to blocks, count too")
@layers
def test_no_input_gradient_costs_nothing(name: str) -> None:
    for module in pair(name, 64, 16, dtype=torch.float64):
        costs = []
        for wanted in (True, False):
            x = torch.randn(6, 3, 64, dtype=torch.float64, requires_grad=wanted)
            module.zero_grad()
            costs.append(allocated_bytes(loss_of(module, x)))
        assert costs[0] - costs[1] >= x.nbytes


# ---- graphs -------------------------------------------------------------------------------------
@both_kinds
@DTYPES
def test_retain_graph(name: str, dtype: torch.dtype) -> None:
    made = pair(name, 3, 4, dtype=dtype)
    x = sample(made[0])
    for module in made:
        loss = loss_of(module, x)
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_grads(made)


@both_kinds
def test_a_second_backward_without_retain_graph(name: str) -> None:
    found = []
    for module in pair(name, 3, 4):
        loss = loss_of(module, sample(module))
        loss.backward()
        found.append(outcome(loss.backward))
    assert_same_error(found[1], found[0])


@both_kinds
def test_accumulation_over_calls(name: str) -> None:
    made = pair(name, 3, 4)
    batches = [sample(made[0]) for _ in range(3)]
    for module in made:
        for x in batches:
            loss_of(module, x).backward()
        kept = [weight.grad for weight in module.parameters()]
        loss_of(module, batches[0]).backward()
        assert all(g is w.grad for g, w in zip(kept, module.parameters(), strict=True))
    assert_same_grads(made)


@both_kinds
def test_one_graph_over_several_calls(name: str) -> None:
    made = pair(name, 3, 3)
    x = sample(made[0])
    results = []
    for module in made:
        leaf = x.clone().requires_grad_()
        state = None
        for _ in range(3):
            result = module(leaf) if state is None else module(leaf, state)
            state = result[1] if name in LAYERS else result
        weighted_sum(state if isinstance(state, tuple) else [state]).backward()
        results.append(leaf.grad)
    assert_close(results[1], results[0], kind="gradient")
    assert_same_grads(made)


@both_kinds
def test_truncated_bptt(name: str) -> None:
    made = pair(name, 3, 4)
    chunks = [sample(made[0]) for _ in range(3)]
    for module in made:
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        state: Any = random_state(module, 2)
        state = torch.utils._pytree.tree_map(torch.zeros_like, state)
        for x in chunks:
            state = torch.utils._pytree.tree_map(Tensor.detach, state)
            result = module(x, state)
            state = result[1] if name in LAYERS else result
            optimizer.zero_grad()
            weighted_sum(list(outputs_of(module, result).values())).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
    assert_parity(made, sample(made[0]))


@both_kinds
def test_gradients_of_gradients(name: str) -> None:
    made = pair(name, 3, 4, dtype=torch.float64)
    leaves = [sample(made[0]).requires_grad_()]
    leaves.append(leaves[0].detach().clone().requires_grad_())
    for module, leaf in zip(made, leaves, strict=True):
        wanted = [leaf, *module.parameters()]
        grads = torch.autograd.grad(loss_of(module, leaf), wanted, create_graph=True)
        torch.cat([grad.flatten() for grad in grads]).pow(2).sum().backward()
    assert_close(leaves[1].grad, leaves[0].grad, kind="gradient")
    assert_same_grads(made)


@both_kinds
@DTYPES
@pytest.mark.parametrize("which", ["y", "h"])
def test_results_changed_in_place(name: str, dtype: torch.dtype, which: str) -> None:
    # torch's float32 LSTM refuses a changed output; what torch accepts must be accepted and right.
    made = pair(name, 3, 4, dtype=dtype)
    x = sample(made[0])
    tried = []
    for module in made:

        def change_and_go_back(module: nn.Module = module) -> None:
            named = outputs_of(module, module(x))
            changed = named["output"] if which == "y" and name in LAYERS else named["h_n"]
            changed.mul_(2.0)
            weighted_sum(list(named.values())).backward()

        tried.append(outcome(change_and_go_back))
    if tried[0].error is None:
        assert tried[1].error is None, str(tried[1])
        assert_same_grads(made)
    elif tried[1].error is not None:
        assert "modified by an inplace operation" in str(tried[1].error)


CHANGES: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "recurrent weight": lambda module, x, h: module.weight_hh_l0,
    "input weight": lambda module, x, h: module.weight_ih_l0,
    "input": lambda module, x, h: x,
    "state": lambda module, x, h: h,
}


@layers
@pytest.mark.parametrize("what", CHANGES)
def test_arguments_changed_before_backward_are_noticed(name: str, what: str) -> None:
    found = []
    for module in pair(name, 3, 4):
        x, hx = sample(module), random_state(module, 2)
        first = hx[0] if isinstance(hx, tuple) else hx
        leaf = x.clone().requires_grad_(what == "input weight")
        loss = loss_of(module, leaf, hx)
        with torch.no_grad():
            CHANGES[what](module, leaf, first).mul_(2.0)  # type: ignore[arg-type]
        found.append(outcome(loss.backward))
    for did in found:
        assert type(did.error) is RuntimeError
        assert "modified by an inplace operation" in str(did.error)


@layers
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("steps", [1, 5])
def test_results_share_no_memory(name: str, grad: bool, steps: int) -> None:
    module = pair(name, 3, 4, 2)[1]
    x, hx = torch.randn(steps, 2, 3), random_state(module, 2)
    with torch.set_grad_enabled(grad):
        named = outputs_of(module, module(x, hx))
    given: list[Any] = list(hx) if isinstance(hx, tuple) else [hx]
    tensors = [x, *given, *named.values(), *module.parameters()]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
    for (_, end), (start, _) in pairwise(spans):
        assert end <= start


# ---- anomaly mode, checkpoints, hooks -----------------------------------------------------------
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:Error detected in")
@both_kinds
def test_anomaly_mode(name: str) -> None:
    made = pair(name, 3, 4)
    x = sample(made[0])
    with torch.autograd.detect_anomaly():
        assert_parity(made, x)
        x.view(-1)[0] = float("nan")
        for module in made:
            with pytest.raises(RuntimeError, match="returned nan values in its"):
                loss_of(module, x.clone().requires_grad_()).backward()


@both_kinds
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(name: str, reentrant: bool) -> None:
    options = {"dropout": 0.5, "num_layers": 2} if name in LAYERS else {}
    made = pair(name, 3, 4, **options)
    x, grads = sample(made[0]), []
    for module in made:
        torch.manual_seed(4)
        leaf = x.clone().requires_grad_()
        result = checkpoint(module, leaf, use_reentrant=reentrant)
        weighted_sum(list(outputs_of(module, result).values())).backward()
        grads.append(leaf.grad)
    assert_close(grads[1], grads[0], kind="gradient")
    assert_same_grads(made)


@both_kinds
def test_saved_tensor_hooks(name: str) -> None:
    made = pair(name, 3, 4)
    x = sample(made[0])
    for module in made:
        packed: list[int] = []

        def pack(tensor: Tensor, packed: list[int] = packed) -> Tensor:
            packed.append(tensor.numel())
            return tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(module, x)
        loss.backward()
        assert sum(packed) > x.numel()
    assert_same_grads(made)


@both_kinds
def test_hooks_of_modules(name: str) -> None:
    traces = []
    x = sample(pair(name, 3, 4)[0])
    for module in pair(name, 3, 4):
        seen: list[Any] = []
        module.register_forward_pre_hook(lambda m, args, s=seen: s.append(("pre", len(args))))
        module.register_forward_hook(lambda m, a, r, s=seen: s.append(("post", type(r).__name__)))
        module.register_full_backward_pre_hook(lambda m, g, s=seen: s.append(("bpre", len(g))))
        module.register_full_backward_hook(
            lambda m, gi, go, s=seen: s.append(("back", len(gi), len(go), gi[0].shape))
        )
        result = module(x.clone().requires_grad_())
        first = result[0] if isinstance(result, tuple) else result
        first.sum().backward()
        traces.append(seen)
    assert traces[1] == traces[0]


@both_kinds
def test_hooks_of_tensors(name: str) -> None:
    made = pair(name, 3, 4)
    x = sample(made[0])
    counts = []
    for module in made:
        fired: list[str] = []
        for key, weight in module.named_parameters():
            weight.register_hook(lambda g, k=key, f=fired: f.append(k) or g * 3.0)
            weight.register_post_accumulate_grad_hook(lambda w, f=fired: f.append("done"))
        named = outputs_of(module, module(x))
        for tensor in named.values():
            tensor.register_hook(lambda g, f=fired: f.append("result"))
            tensor.retain_grad()
        weighted_sum(list(named.values())).backward()
        assert all(tensor.grad is not None for tensor in named.values())
        counts.append(sorted(fired))
    assert counts[1] == counts[0]
    assert_same_grads(made)


@layers
def test_modes_with_packed_input(name: str) -> None:
    made = pair(name, 3, 4, 2, bidirectional=True)
    packed = random_packed([2, 5, 1], 3)
    for module in made:
        module.eval()
    assert_parity(made, packed)
    with torch.no_grad():
        assert_parity(made, packed, backward=False)
    for module in made:
        module.requires_grad_(False)
    _, actual = assert_parity(made, packed, random_state(made[0], 3))
    assert actual.grads["input"] is not None

"""torch.func: functional_call, grad, vmap, forward-mode AD, and batched gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pairs import CELLS, LAYERS, assert_parity, outputs_of, pair, random_state
from tolerances import Kind, assert_close
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

layers = pytest.mark.parametrize("name", LAYERS)
both_kinds = pytest.mark.parametrize("name", LAYERS + CELLS)
pytestmark = [
    pytest.mark.usefixtures("every_device"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because"),
]


def sample(module: nn.Module) -> Tensor:
    dtype = next(module.parameters()).dtype
    return torch.randn((2, 3) if isinstance(module, nn.RNNCellBase) else (5, 2, 3)).to(dtype)


def first(result: Any) -> Tensor:
    """Return the tensor that comes first: y, or h of a cell."""
    return result if isinstance(result, Tensor) else result[0]


def assert_all_close(found: dict[str, Tensor], wanted: dict[str, Tensor], kind: Kind) -> None:
    assert list(found) == list(wanted)
    for key, expected in wanted.items():
        assert_close(found[key], expected, kind=kind, name=key)


# ---- functional_call ----------------------------------------------------------------------------
@both_kinds
@pytest.mark.parametrize("part", ["all", "one"])
def test_functional_call(name: str, part: str) -> None:
    made = pair(name, 3, 4)
    x = sample(made[0])
    assert_parity(made, x)
    values = {key: torch.randn_like(w) for key, w in made[0].named_parameters()}
    if part == "one":
        values = {key: value for key, value in values.items() if key.startswith("weight_hh")}
    grads, results = [], []
    for module in made:
        leaves = {key: value.clone().requires_grad_() for key, value in values.items()}
        results.append(first(functional_call(module, leaves, (x,))))
        found = torch.autograd.grad(results[-1].pow(2).sum(), list(leaves.values()))
        grads.append(dict(zip(leaves, found, strict=True)))
    assert_close(results[1], results[0], kind="output")
    assert_all_close(grads[1], grads[0], "gradient")
    assert_parity(made, x)  # the module's own weights are back


@both_kinds
def test_functional_call_on_a_skeleton(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    x, weights = sample(theirs), dict(theirs.named_parameters())
    empty = copy.deepcopy(ours).to("meta")
    found = functional_call(empty, weights, (x,))
    assert_all_close(outputs_of(ours, found), outputs_of(theirs, theirs(x)), "output")


@both_kinds
def test_functional_call_ties_weights(name: str) -> None:
    key = "weight_hh" if name in CELLS else "weight_hh_l0"
    results = []
    x = torch.randn((2, 3) if name in CELLS else (5, 2, 3))
    for module in (nn.Sequential(part) for part in pair(name, 3, 4)):
        shared = module.get_parameter(f"0.{key}").detach().mul(0.5).requires_grad_()
        result = first(functional_call(module, {f"0.{key}": shared}, (x,)))
        results.append(torch.autograd.grad(result.sum(), shared)[0])
    assert_close(results[1], results[0], kind="gradient")


# ---- grad and vmap ------------------------------------------------------------------------------
@both_kinds
def test_grad(name: str) -> None:
    made = pair(name, 3, 4)
    x = sample(made[0])
    weights = {key: w.detach().clone() for key, w in made[0].named_parameters()}
    grads = [
        grad(lambda w, m=module: first(functional_call(m, w, (x,))).pow(2).sum())(weights)
        for module in made
    ]
    assert_all_close(grads[1], grads[0], "gradient")


@both_kinds
@pytest.mark.parametrize("given", [False, True])
def test_vmap_over_inputs(name: str, given: bool) -> None:
    # torch's own layers and LSTMCell have no batching rule: compare with a loop over them.
    theirs, ours = pair(name, 3, 4)
    xs = torch.stack([sample(theirs) for _ in range(3)])
    if not given:
        found = vmap(ours)(xs)
        expected = [theirs(x) for x in xs]
    else:
        states: list[Any] = [random_state(theirs, 2) for _ in range(3)]
        if isinstance(states[0], tuple):
            stacked: Any = tuple(torch.stack(parts) for parts in zip(*states, strict=True))
        else:
            stacked = torch.stack(states)
        found = vmap(ours)(xs, stacked)
        expected = [theirs(x, state) for x, state in zip(xs, states, strict=True)]
    for index, wanted in enumerate(expected):
        one = {key: value[index] for key, value in outputs_of(ours, found).items()}
        assert_all_close(one, outputs_of(theirs, wanted), "output")


@both_kinds
@pytest.mark.parametrize("in_dim", [1, -1])
def test_vmap_over_another_dimension(name: str, in_dim: int) -> None:
    theirs, ours = pair(name, 3, 4)
    xs = torch.stack([sample(theirs) for _ in range(3)])
    found = first(vmap(ours, in_dims=in_dim)(xs.movedim(0, in_dim)))
    for index, x in enumerate(xs):
        assert_close(found[index], first(theirs(x)), kind="output")


@both_kinds
def test_ensemble(name: str) -> None:
    models = [pair(name, 3, 4) for _ in range(3)]
    x = sample(models[0][0])
    weights, buffers = stack_module_state([ours for _, ours in models])
    skeleton = copy.deepcopy(models[0][1]).to("meta")

    def call(w: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return first(functional_call(skeleton, (w, b), (x,)))

    found = vmap(call)(weights, buffers)
    for index, (theirs, _) in enumerate(models):
        assert_close(found[index], first(theirs(x)), kind="output")


@both_kinds
def test_gradients_per_sample(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    xs = torch.stack([sample(theirs) for _ in range(3)])
    weights = {key: w.detach() for key, w in ours.named_parameters()}

    def loss(w: dict[str, Tensor], x: Tensor) -> Tensor:
        return first(functional_call(ours, w, (x,))).pow(2).sum()

    found = vmap(grad(loss), in_dims=(None, 0))(weights, xs)
    for index, x in enumerate(xs):
        theirs.zero_grad()
        first(theirs(x)).pow(2).sum().backward()
        expected = {key: w.grad for key, w in theirs.named_parameters() if w.grad is not None}
        one = {key: value[index] for key, value in found.items()}
        assert_all_close(one, expected, "gradient")


# ---- Jacobians and forward-mode AD, which torch's modules support in float64 --------------------
TRANSFORMS = {
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "jvp": lambda f, x: torch.stack(jvp(f, (x,), (x.cos(),))),
    "hessian": lambda f, x: hessian(lambda v: f(v).pow(2).sum())(x),
    "vectorized jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "hvp": lambda f, x: torch.autograd.functional.hvp(lambda v: f(v).pow(2).sum(), x, x.cos())[1],
}


def theirs_on_host(made: tuple[nn.Module, nn.Module], x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Return each module with its input: torch's fused cells of a GPU have no forward mode."""
    return [(made[0].cpu(), x.cpu()), (made[1], x)]


@both_kinds
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(name: str, transform: str) -> None:
    made = pair(name, 3, 4, dtype=torch.float64)
    found = [
        TRANSFORMS[transform](lambda v, m=module: first(m(v)), x)
        for module, x in theirs_on_host(made, sample(made[0]))
    ]
    assert_close(found[1].cpu(), found[0], kind="gradient")


@both_kinds
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap", "vmap of grad"])
def test_transforms_under_compile(name: str, transform: str) -> None:
    """Of ours alone: torch.compile takes torch's own modules only where a switch says so."""
    module = pair(name, 3, 4, dtype=torch.float64)[1]

    def f(v: Tensor) -> Tensor:
        return first(module(v))

    gradient = grad(lambda x: f(x).pow(2).sum())
    function = {
        "jvp": lambda x: TRANSFORMS["jvp"](f, x),
        "grad": gradient,
        "vmap": lambda x: vmap(f)(torch.stack([x, x.cos()])),
        "vmap of grad": lambda x: vmap(gradient)(torch.stack([x, x.cos()])),
    }[transform]
    x = sample(module)
    # Not dynamic: torch cannot map a linear layer over sizes that it does not know.
    compiled, plain = (
        torch.compile(g, backend="aot_eager", fullgraph=True, dynamic=False) for g in (function, f)
    )
    assert_close(compiled(x), function(x), kind="gradient")
    assert_close(plain(x), f(x), kind="output")


def test_a_compiled_frame_that_opens_a_dual_level() -> None:
    module = pair("GRUCell", 3, 4, dtype=torch.float64)[1]

    def tangent(x: Tensor) -> Tensor | None:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(module(forward_ad.make_dual(x, x.cos()))).tangent

    x = sample(module)
    found, wanted = torch.compile(tangent, backend="aot_eager")(x), tangent(x)
    assert found is not None
    assert wanted is not None
    assert_close(found, wanted, kind="gradient")


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", LAYERS)
def test_a_tangent_for_the_backward_of_an_ordinary_call_is_refused(name: str) -> None:
    """Its kernels would lose it; torch's own modules answer."""
    module, x = pair(name, 3, 4)[1], torch.randn(5, 2, 3, requires_grad=True)
    y = first(module(x))
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.randn_like(y), torch.randn_like(y))
        with pytest.raises(NotImplementedError, match="layer_backward has no forward-mode deriv"):
            torch.autograd.grad(y, x, dy, retain_graph=True)
    dy = torch.randn_like(y)
    with pytest.raises(NotImplementedError, match="layer_backward has no forward-mode deriv"):
        jvp(lambda u: torch.autograd.grad(y, x, u, retain_graph=True)[0], (dy,), (dy,))
    torch.autograd.grad(y, x, torch.ones_like(y))


@both_kinds
def test_jacobian_in_single_precision(name: str) -> None:
    made = pair(name, 3, 4)
    found = [
        jacrev(lambda v, m=module: first(m(v)))(x)
        for module, x in theirs_on_host(made, sample(made[0]))
    ]
    assert_close(found[1].cpu(), found[0], kind="gradient")


@both_kinds
def test_batched_output_gradients(name: str) -> None:
    made = pair(name, 3, 4)
    found = []
    for module, x in theirs_on_host(made, sample(made[0])):
        leaf = x.clone().requires_grad_()
        y = first(module(leaf))
        directions = torch.stack([torch.ones_like(y), y.detach().cos()])
        found.append(torch.autograd.grad(y, leaf, directions, is_grads_batched=True)[0])
    assert_close(found[1].cpu(), found[0], kind="gradient")

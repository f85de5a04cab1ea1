"""torch.func, torch.compile, frozen weights, and forward calls that saved nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import rnnkern
import torch
from cases import (
    Case,
    assert_identical,
    assert_matches,
    build,
    cotangents,
    evaluate,
    feature_cases,
    leaves,
    run_op,
)
from rnnkern import functional
from rnnkern.cells import CELLS
from rnnkern.fallback import reference_layer
from rnnkern.functional import recurrent
from rnnkern.ops import DIFFERENTIABLE, LayerInputs
from tolerances import assert_close
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, vjp, vmap

DTYPE = torch.float64
cells = pytest.mark.parametrize("cell", CELLS)


def weights_for(cell: str, I: int, H: int, directions: int = 1) -> list[Tensor]:
    G = CELLS[cell].gates
    shapes = [(G * H, I), (G * H, H), (G * H,), (G * H,)] * directions
    return [torch.randn(shape, dtype=DTYPE) * 0.4 for shape in shapes]


def outputs(cell: str, x: Tensor, weights: Sequence[Tensor], **options: Any) -> Tensor:
    return recurrent(cell, x, weights, **options)[0]


# ---- torch.func ---------------------------------------------------------------------------------
@cells
def test_vmap_over_inputs(cell: str) -> None:
    weights, x = weights_for(cell, 3, 4, 2), torch.randn(5, 6, 2, 3, dtype=DTYPE)
    mapped = vmap(lambda v: outputs(cell, v, weights, bidirectional=True))(x)
    looped = torch.stack([outputs(cell, v, weights, bidirectional=True) for v in x])
    assert_close(mapped, looped, kind="output")


@cells
def test_vmap_over_lengths(cell: str) -> None:
    weights, x = weights_for(cell, 3, 4, 2), torch.randn(3, 6, 2, 3, dtype=DTYPE)
    lengths = torch.tensor([[6, 2], [1, 1], [3, 0]])

    def run(v: Tensor, own: Tensor) -> Tensor:
        return outputs(cell, v, weights, bidirectional=True, lengths=own)

    looped = torch.stack([run(v, own) for v, own in zip(x, lengths, strict=True)])
    assert_close(vmap(run)(x, lengths), looped, kind="output")


@cells
def test_vmap_over_weights_and_states(cell: str) -> None:
    """An ensemble: every model has its own weights and state, all see the same input."""
    x = torch.randn(6, 2, 3, dtype=DTYPE)
    models = [weights_for(cell, 3, 4) for _ in range(3)]
    stacked = [torch.stack(w) for w in zip(*models, strict=True)]
    states = tuple(torch.randn(1, 3, 2, 4, dtype=DTYPE) for _ in range(CELLS[cell].states))
    lengths = torch.tensor([6, 2])

    def one(weights: Sequence[Tensor], own: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y, finals = recurrent(cell, x, weights, own, lengths=lengths)
        return y, *finals

    mapped = vmap(one, in_dims=(0, 1), out_dims=1)(stacked, states)
    looped = [one(w, tuple(s[:, k] for s in states)) for k, w in enumerate(models)]
    for found, parts in zip(mapped, zip(*looped, strict=True), strict=True):
        assert_close(found, torch.stack(parts, 1), kind="output")


@cells
def test_per_sample_gradients(cell: str) -> None:
    weights, x = weights_for(cell, 3, 4), torch.randn(5, 6, 1, 3, dtype=DTYPE)
    resets = torch.zeros(6, 1, dtype=torch.bool)
    resets[3] = True

    def loss(w: Sequence[Tensor], v: Tensor) -> Tensor:
        return outputs(cell, v, w, resets=resets).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for k, sample in enumerate(x):
        own = [w.clone().requires_grad_() for w in weights]
        wanted = torch.autograd.grad(loss(own, sample), own)
        for f, w in zip(found, wanted, strict=True):
            assert_close(f[k], w, kind="gradient")


@cells
def test_jacobian(cell: str) -> None:
    weights, x = weights_for(cell, 2, 3), torch.randn(4, 1, 2, dtype=DTYPE)
    found = jacrev(lambda v: outputs(cell, v, weights))(x)
    y = outputs(cell, x.requires_grad_(), weights)
    rows = [torch.autograd.grad(v, x, retain_graph=True)[0] for v in y.flatten()]
    assert_close(found.reshape(len(rows), *x.shape), torch.stack(rows), kind="gradient")
    later = found[0, 0, :, 1:]  # the first step knows nothing of the others
    assert bool((later == 0).all())


@cells
def test_gradient_of_gradient(cell: str) -> None:
    weights, x = weights_for(cell, 2, 3), torch.randn(4, 2, 2, dtype=DTYPE)

    def penalty(v: Tensor) -> Tensor:
        inner = grad(lambda u: outputs(cell, u, weights).sin().sum())(v)
        return inner.square().sum()

    own = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(outputs(cell, own, weights).sin().sum(), own, create_graph=True)
    (wanted,) = torch.autograd.grad(first.square().sum(), own)
    assert_close(grad(penalty)(x), wanted, kind="gradient")


@cells
def test_vjp_agrees_with_autograd(cell: str) -> None:
    """Every gradient of a call with all features, by torch.func and by autograd."""
    args = build(Case(cell, D=2, lengths=True, resets=True, reset_state=True))
    names = [name for name in DIFFERENTIABLE if getattr(args, name) is not None]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        own = args._replace(**dict(zip(names, tensors, strict=True)))
        weights = [t for direction in own.directions for t in direction if t is not None]
        states, reset = (
            tuple(t for t in pair if t is not None)
            for pair in ((own.h0, own.c0), (own.reset_h, own.reset_c))
        )
        y, finals = recurrent(
            cell,
            own.input,
            weights,
            states,
            bidirectional=True,
            lengths=own.lengths,
            resets=own.resets,
            reset_states=reset,
        )
        return y, *finals

    results, pull = vjp(function, *(getattr(args, name) for name in names))
    found = {f"d{n}": g for n, g in zip(names, pull(tuple(cotangents(results))), strict=True)}
    wanted = {name: g for name, g in evaluate(args).items() if name.startswith("d")}
    assert_matches(found, wanted, dtype=DTYPE)


def test_modules_under_functional_call() -> None:
    """An ensemble of modules, as torch.func's own tutorial builds it."""
    models = [rnnkern.LSTM(3, 4, dtype=DTYPE) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(models)
    x = torch.randn(5, 2, 3, dtype=DTYPE)

    def one(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return functional_call(models[0], (p, b), (x,))[0]

    found = vmap(one)(params, buffers)
    assert_close(found, torch.stack([m(x)[0] for m in models]), kind="output")


# ---- what is saved, and what is asked for -------------------------------------------------------
@pytest.mark.parametrize("case", feature_cases(T=4, B=3, I=3, H=4), ids=str)
def test_a_call_that_saved_nothing_has_gradients(case: Case) -> None:
    args = build(case)
    assert_matches(evaluate(args, lambda a: run_op(a, save=False)), evaluate(args), dtype=DTYPE)


@cells
@pytest.mark.parametrize("save", [False, True])
def test_saving_changes_no_bit(cell: str, save: bool) -> None:
    args = build(Case(cell, T=6, D=2, lengths=True, resets=True))
    y, hn, cn, gates, h_prev, saved = torch.ops.rnnkern.layer(*args, save)
    keeps_h_prev = args.input.is_cuda or not CELLS[cell].recovers  # in float64
    assert [t.numel() > 0 for t in (gates, h_prev)] == [save, save and keeps_h_prev]
    assert (saved.numel() > 0) == (save and CELLS[cell].saved > 0)
    other = torch.ops.rnnkern.layer(*args, not save)
    for found, wanted in zip((y, hn, cn), other[:3], strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("case", feature_cases(T=4, B=3, I=3, H=4), ids=str)
def test_each_gradient_alone(case: Case) -> None:
    """One tensor requires a gradient, the others are frozen: it gets the same, they get none."""
    args = build(case)
    everything = evaluate(args)
    for name in DIFFERENTIABLE:
        if getattr(args, name) is None:
            continue
        found = evaluate(args, needs=[name])
        assert {key for key in found if key.startswith("d")} == {f"d{name}"}
        assert_identical(found, {key: everything[key] for key in found})


@cells
def test_masked_gradients_are_not_computed(cell: str) -> None:
    args = build(Case(cell, D=2))
    _, _, _, *kept = torch.ops.rnnkern.layer(*args, True)
    dy = torch.randn(5, 3, 10, dtype=DTYPE)
    for name in DIFFERENTIABLE:
        mask = [other == name for other in DIFFERENTIABLE]
        values = torch.ops.rnnkern.layer_backward(*args, *kept, dy, None, None, mask)
        for other, value in zip(DIFFERENTIABLE, values, strict=True):
            present = other == name and getattr(args, name) is not None
            assert value.shape == (getattr(args, name).shape if present else (0,)), other


@cells
def test_inputs_and_gradients_are_not_written_to(cell: str) -> None:
    args = leaves(build(Case(cell, D=2, lengths=True, resets=True, reset_state=True)))
    before = [t.detach().clone() if isinstance(t, Tensor) else t for t in args]
    results = run_op(args)
    weights = cotangents(results)
    copies = [w.clone() for w in weights]
    torch.autograd.backward(results, weights, retain_graph=True)
    first = {
        n: getattr(args, n).grad.clone() for n in DIFFERENTIABLE if getattr(args, n) is not None
    }
    torch.autograd.backward(results, weights)
    for name, gradient in first.items():  # the second pass over the same graph adds the same again
        assert torch.equal(getattr(args, name).grad, 2 * gradient), name
    for tensor, copy in zip([*args, *weights], [*before, *copies], strict=True):
        if isinstance(tensor, Tensor):
            assert torch.equal(tensor, copy)


# ---- torch.compile ------------------------------------------------------------------------------
def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@cells
def test_compiled_training_with_lengths_and_resets(cell: str) -> None:
    H, states = 4, CELLS[cell].states

    def loss(
        x: Tensor,
        weights: list[Tensor],
        hx: tuple[Tensor, ...],
        lengths: Tensor,
        resets: Tensor,
        reset: tuple[Tensor, ...],
    ) -> Tensor:
        y, finals = recurrent(
            cell,
            x,
            weights,
            hx,
            num_layers=2,
            bidirectional=True,
            lengths=lengths,
            resets=resets,
            reset_states=reset,
        )
        return y.sin().sum() + sum(s.square().sum() for s in finals)

    fast = compiled(loss, dynamic=True)
    for T, B in ((5, 3), (7, 4), (3, 2)):
        tensors = [
            torch.randn(T, B, 3, dtype=DTYPE),
            *weights_for(cell, 3, H, 2),
            *weights_for(cell, 2 * H, H, 2),
            *(torch.randn(4, B, H, dtype=DTYPE) for _ in range(2 * states)),
        ]
        for t in tensors:
            t.requires_grad_()
        x, rest = tensors[0], tensors[1:]
        weights, hx, reset = rest[:16], tuple(rest[16 : 16 + states]), tuple(rest[16 + states :])
        structure = (torch.randint(0, T + 1, (B,)), torch.rand(T, B) < 0.3)
        arguments = (x, weights, hx, *structure, reset)
        found, wanted = fast(*arguments), loss(*arguments)
        assert_close(found, wanted, kind="output")
        for f, w in zip(*(torch.autograd.grad(v, tensors) for v in (found, wanted)), strict=True):
            assert_close(f, w, kind="gradient")


def test_one_graph_serves_all_sizes() -> None:
    module = rnnkern.GRU(3, 4, num_layers=2, dtype=DTYPE)
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fast = torch.compile(
        lambda x, lengths, resets: module(x, lengths=lengths, resets=resets)[0],
        fullgraph=True,
        dynamic=True,
        backend=counting,
    )
    for T, B in ((5, 6), (9, 4), (12, 7), (3, 2)):
        x = torch.randn(T, B, 3, dtype=DTYPE)
        lengths, resets = torch.randint(0, T + 1, (B,)), torch.rand(T, B) < 0.3
        assert torch.equal(fast(x, lengths, resets), module(x, lengths=lengths, resets=resets)[0])
    assert len(graphs) == 1


@pytest.mark.parametrize("batch_first", [False, True])
def test_compiled_module_with_resets(batch_first: bool) -> None:
    module = rnnkern.LSTM(3, 4, proj_size=2, batch_first=batch_first, bidirectional=True)
    x, resets = torch.randn(5, 2, 3), torch.rand(5, 2) < 0.4
    reset = (torch.randn(2, 5 if batch_first else 2, 2), torch.randn(2, 5 if batch_first else 2, 4))

    def run(v: Tensor) -> tuple[Tensor, ...]:
        y, (h, c) = module(v, resets=resets, reset_state=reset)
        return y, h, c

    for found, wanted in zip(compiled(run)(x), run(x), strict=True):
        assert torch.equal(found, wanted)
        assert found.stride() == wanted.stride()


def test_double_backward_is_the_references() -> None:
    """A gradient penalty, as in WGAN-GP (Gulrajani et al. 2017)."""
    args = leaves(build(Case("lstm", lengths=True)))

    def penalty(own: LayerInputs, function: Callable[..., tuple[Tensor, ...]]) -> Tensor:
        (gradient,) = torch.autograd.grad(
            function(own)[0].square().sum(), own.input, create_graph=True
        )
        return gradient.square().sum()

    found = torch.autograd.grad(penalty(args, run_op), args.w_hh)
    wanted = torch.autograd.grad(penalty(args, reference_layer), args.w_hh)
    assert_close(found[0], wanted[0], kind="gradient")


@cells
@pytest.mark.parametrize("name", ["input", "w_hh"])
def test_the_operator_refuses_a_tangent(cell: str, name: str) -> None:
    """Its kernels would lose it."""
    args = build(Case(cell))
    wanted = run_op(args)
    with forward_ad.dual_level():
        t = getattr(args, name)
        dual = args._replace(**{name: forward_ad.make_dual(t, t.cos())})
        with pytest.raises(NotImplementedError, match="rnnkern::layer has no forward-mode deriv"):
            run_op(dual)
        assert all(map(torch.equal, run_op(args), wanted))  # without one, it runs


def test_functional_form_is_traceable() -> None:
    weights = [t.float() for t in weights_for("lstm", 3, 4)]

    class Net(torch.nn.Module):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            y, (h, _) = functional.lstm(x, weights, lengths=lengths)
            return y.sum(0) + h[0]

    x, lengths = torch.randn(5, 2, 3), torch.tensor([5, 1])
    exported = torch.export.export(Net(), (x, lengths))
    other = torch.randn(5, 2, 3)
    assert torch.equal(exported.module()(other, lengths), Net()(other, lengths))

"""torch.compile without graph breaks or needless recompiling, torch.export and torch.jit.trace."""

from __future__ import annotations

import io
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rnnkern
import torch
from pairs import (
    CELLS,
    LAYERS,
    assert_parity,
    assert_same_run,
    outputs_of,
    pair,
    random_packed,
    random_state,
    run,
)
from tolerances import assert_close
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

layers = pytest.mark.parametrize("name", LAYERS)
both_kinds = pytest.mark.parametrize("name", LAYERS + CELLS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attributes? self"),
    pytest.mark.timeout(120),
]


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """The aot_eager backend (forward and backward graphs, no code generation), counting its calls.

    One compilation may call it more than once, so the tests ask after which sizes calls stop.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.calls += 1
        return lookup_backend("aot_eager")(graph, inputs)


def compiled(module: nn.Module, backend: Any = "aot_eager", **options: Any) -> Callable[..., Any]:
    """Compile `module` as one graph: any break in it is an error."""
    return torch.compile(module, fullgraph=True, backend=backend, **options)


def sample(module: nn.Module, steps: int = 5, batch: int = 2) -> Tensor:
    return torch.randn((batch, 3) if isinstance(module, nn.RNNCellBase) else (steps, batch, 3))


# ---- torch.compile ------------------------------------------------------------------------------
@both_kinds
@pytest.mark.parametrize("given", [False, True])
def test_one_graph_forward_and_backward(name: str, given: bool) -> None:
    theirs, ours = pair(name, 3, 4)
    hx = random_state(theirs, 2) if given else None
    assert_parity((theirs, ours), sample(theirs), hx, call=compiled(ours))


@layers
@pytest.mark.parametrize("batch_first", [False, True])
def test_deep_bidirectional(name: str, batch_first: bool) -> None:
    theirs, ours = pair(name, 3, 4, 2, bidirectional=True, batch_first=batch_first)
    assert_parity((theirs, ours), torch.randn(5, 2, 3), call=compiled(ours))


def test_projection() -> None:
    theirs, ours = pair("LSTM", 3, 4, 2, proj_size=2, bidirectional=True)
    hx = random_state(theirs, 2)
    assert_parity((theirs, ours), torch.randn(5, 2, 3), hx, call=compiled(ours))


@layers
def test_unbatched(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    assert_parity((theirs, ours), torch.randn(5, 3), call=compiled(ours))


@layers
@pytest.mark.parametrize("mode", ["eval", "no_grad", "frozen", "double", "autocast"])
def test_modes(name: str, mode: str) -> None:
    theirs, ours = pair(name, 3, 4, 2)
    x = torch.randn(5, 2, 3)
    for module in (theirs, ours):
        module.train(mode != "eval").requires_grad_(mode != "frozen")
        if mode == "double":
            module.double()
    if mode == "double":
        x = x.double()
    call = compiled(ours)
    if mode == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            expected = run(theirs, x, backward=False).outputs
            found = run(ours, x, backward=False, call=call).outputs
        for key, wanted in expected.items():
            assert_close(found[key], wanted, kind="output", dtype=torch.bfloat16, name=key)
        return
    with torch.set_grad_enabled(mode != "no_grad"):
        assert_parity((theirs, ours), x, backward=mode != "no_grad", call=call)


@both_kinds
@pytest.mark.parametrize("training", [True, False])
def test_dynamic_sizes_need_one_graph(name: str, training: bool) -> None:
    theirs, ours = pair(name, 3, 4)
    counting, compilations = Counting(), []
    call = compiled(ours, counting, dynamic=True)
    for steps, batch in ((5, 2), (9, 2), (9, 6), (33, 7), (6, 3)):
        with torch.set_grad_enabled(training):
            x = sample(theirs, steps, batch)
            assert_parity((theirs, ours), x, backward=training, call=call)
        compilations.append(counting.calls)
    assert compilations[0] >= 1
    assert len(set(compilations)) == 1, "another size compiled anew"


@both_kinds
def test_sizes_become_dynamic_by_themselves(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    counting, compilations = Counting(), []
    call = compiled(ours, counting)
    for steps, batch in ((5, 2), (7, 4), (9, 6), (33, 8), (12, 3)):
        assert_parity((theirs, ours), sample(theirs, steps, batch), call=call)
        compilations.append(counting.calls)
    # The first size is compiled as a constant, the second as any size.
    assert compilations[0] < compilations[1] == compilations[-1]


@layers
def test_marked_dimensions(name: str) -> None:
    theirs, ours = pair(name, 3, 4, batch_first=True)
    counting, compilations = Counting(), []
    call = compiled(ours, counting)
    with torch.no_grad():
        for batch, steps in ((5, 2), (7, 4), (9, 6)):
            x = torch.randn(batch, steps, 3)
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
            assert_close(call(x)[0], theirs(x)[0], kind="output")
            compilations.append(counting.calls)
    assert len(set(compilations)) == 1


@layers
def test_dropout_under_compile_is_seeded(name: str) -> None:
    ours = pair(name, 3, 64, 2, dropout=0.5)[1]
    x, call, results = torch.randn(5, 2, 3), compiled(ours), []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        results.append(run(ours, x, call=call))
    assert_same_run(results[1], results[0])
    assert not torch.equal(results[2].outputs["output"], results[0].outputs["output"])


class Tagger(nn.Module):
    """What a user compiles: an embedding, a recurrent layer, a head."""

    def __init__(self, library: Any, name: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 3)
        self.core = getattr(library, name)(3, 4, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.core(self.embed(ids))[0])


def train(
    model: nn.Module, call: Callable[[Tensor], Tensor], batches: list[Tensor]
) -> Iterator[float]:
    """Yield the loss before each step."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for ids in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(call(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        yield loss.item()


@layers
def test_training_a_model_over_batches_of_all_sizes(name: str) -> None:
    theirs, ours = Tagger(nn, name), Tagger(rnnkern, name)
    ours.load_state_dict(theirs.state_dict())
    counting, compilations = Counting(), []
    shapes = ((2, 5), (3, 7), (4, 9), (6, 4), (2, 5))
    batches = [torch.randint(11, shape) for shape in shapes]
    call = compiled(ours, counting, dynamic=True)
    losses = zip(train(theirs, theirs, batches), train(ours, call, batches), strict=True)
    for expected, found in losses:
        assert found == pytest.approx(expected, abs=1e-4)
        compilations.append(counting.calls)
    assert len(set(compilations)) == 1


def inductor_can_build() -> bool:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return shutil.which("g++") is not None and header.exists()


@pytest.mark.skipif(not inductor_can_build(), reason="inductor needs g++ and Python's C headers")
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_inductor(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    call = compiled(ours, "inductor", dynamic=True)
    assert_parity((theirs, ours), sample(theirs), call=call)
    assert_parity((theirs, ours), sample(theirs, 9, 6), call=call)


@layers
def test_weights_changed_after_compiling(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    x, call = sample(theirs), compiled(ours)
    assert_parity((theirs, ours), x, call=call)
    for module in (theirs, ours):
        torch.manual_seed(3)
        module.reset_parameters()
    assert_parity((theirs, ours), x, call=call)
    for module in (theirs, ours):
        module.weight_hh_l0 = nn.Parameter(torch.full_like(module.weight_hh_l0, 0.1))
    assert_parity((theirs, ours), x, call=call)


class Lengths(nn.Module):
    """Packs inside the compiled region; torch itself leaves the graph for that."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(self.core(packed)[0])[0]


@layers
def test_packed_input_may_break_the_graph_but_is_right(name: str) -> None:
    theirs, ours = pair(name, 3, 4, 2, bidirectional=True)
    x, lengths = torch.randn(6, 3, 3), torch.tensor([2, 6, 4])
    expected = Lengths(theirs)(x, lengths)
    found = torch.compile(Lengths(ours), backend="aot_eager")(x, lengths)
    assert_close(found, expected, kind="output")
    packed = random_packed([2, 6, 4], 3)
    call = torch.compile(ours, backend="aot_eager")
    assert_close(call(packed)[0].data, theirs(packed)[0].data, kind="output")


# ---- torch.export -------------------------------------------------------------------------------
def assert_same_results(call: Callable[..., Any], theirs: nn.Module, *args: Any) -> None:
    expected = outputs_of(theirs, theirs(*args))
    found = outputs_of(theirs, call(*args))
    for key, wanted in expected.items():
        assert_close(found[key], wanted, kind="output", name=key)


@both_kinds
@pytest.mark.parametrize("strict", [False, True])
def test_export(name: str, strict: bool) -> None:
    theirs, ours = pair(name, 3, 4)
    x, hx = sample(theirs), random_state(theirs, 2)
    for args in ((x,), (x, hx)):
        program = torch.export.export(ours, args, strict=strict)
        assert set(program.state_dict) == set(theirs.state_dict())
        assert_same_results(program.module(), theirs, *args)


@layers
@pytest.mark.parametrize("batch_first", [False, True])
def test_export_with_dynamic_sizes(name: str, batch_first: bool) -> None:
    theirs, ours = pair(name, 3, 4, 2, bidirectional=True, batch_first=batch_first)
    sizes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(ours, (torch.randn(5, 2, 3),), dynamic_shapes=sizes)
    for shape in ((5, 2, 3), (9, 4, 3), (33, 7, 3)):
        assert_same_results(program.module(), theirs, torch.randn(shape))


@both_kinds
def test_export_saved_loaded_and_decomposed(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    x = sample(theirs)
    program = torch.export.export(ours.eval(), (x,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    assert_same_results(torch.export.load(buffer).module(), theirs, x)
    assert_same_results(program.run_decompositions().module(), theirs, x)


# ---- torch.jit.trace ----------------------------------------------------------------------------
@both_kinds
@pytest.mark.parametrize("given", [False, True])
def test_trace(name: str, given: bool) -> None:
    theirs, ours = pair(name, 3, 4)

    def arguments(steps: int, batch: int) -> tuple[Any, ...]:
        x = sample(theirs, steps, batch)
        return (x, random_state(theirs, batch)) if given else (x,)

    traced = torch.jit.trace(ours, arguments(5, 2))
    for steps, batch in ((5, 2), (9, 4), (1, 1)):
        assert_same_results(traced, theirs, *arguments(steps, batch))


@both_kinds
def test_trace_trains_and_survives_saving(name: str) -> None:
    options = {"num_layers": 2, "bidirectional": True} if name in LAYERS else {}
    theirs, ours = pair(name, 3, 4, **options)
    x = sample(theirs)
    traced = torch.jit.trace(ours, (x,))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    assert_same_results(loaded, theirs, sample(theirs, 7, 3))
    for call in (theirs, traced):
        results = outputs_of(theirs, call(x)).values()
        torch.cat([result.flatten() for result in results]).pow(2).sum().backward()
    for key, weight in theirs.named_parameters():
        assert_close(ours.get_parameter(key).grad, weight.grad, kind="gradient", name=key)

"""On a real GPU: `pytest -m gpu`. Skipped where there is none.

Values are compared with the reference in float64 on the CPU and with torch's own modules (cuDNN);
what the host shim cannot show (streams, graphs, memory, repeated runs) is tested here alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import rnnkern
import torch
from cases import (
    Case,
    Results,
    assert_identical,
    assert_matches,
    build,
    clear_of_kink,
    evaluate,
    expected,
    feature_cases,
    first_rows,
    on_device,
    run_op,
    same_bits,
)
from pairs import random_packed, run
from rnnkern import cuda
from rnnkern.arguments import LayerInputs
from rnnkern.cells import CELLS
from tolerances import assert_close
from torch import Tensor, nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("kernels"),
]
# The last two have steps of two stages, which are cooperative launches.
MODULES: dict[str, Callable[..., nn.Module]] = {
    "LSTM": rnnkern.LSTM,
    "GRU": rnnkern.GRU,
    "RNN": rnnkern.RNN,
    "GRU-reset-before": partial(rnnkern.GRU, reset_after=False),
    "LSTM-projected": partial(rnnkern.LSTM, proj_size=24),
}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SIZES = [(1, 1), (3, 7), (17, 33), (3, 96), (64, 256)]


def on_gpu(args: LayerInputs) -> LayerInputs:
    """Move everything but batch_sizes, which torch keeps on the host."""
    return on_device(args, "cuda")


def on_cpu(results: Results) -> Results:
    return {name: t.cpu() for name, t in results.items()}


def sized(B: int, H: int) -> list[Case]:
    return [c for c in feature_cases(T=6, B=B, I=5, H=H) if not c.P or H > 2]


@pytest.mark.usefixtures("each_plan")
@pytest.mark.parametrize("case", [c for size in SIZES for c in sized(*size)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_reference(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "uses_tf32", lambda T: False)
    args = clear_of_kink(build(case, dtype))
    assert_matches(on_cpu(evaluate(on_gpu(args))), expected(args), dtype=dtype)


@pytest.mark.usefixtures("each_plan")
@pytest.mark.parametrize("case", sized(17, 33), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_repeat_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    args = on_gpu(build(case, dtype))
    first = evaluate(args)
    for _ in range(20):
        assert_identical(evaluate(args), first)


@pytest.mark.parametrize(("cell", "projects"), [*((cell, 0) for cell in CELLS), ("lstm", 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 512), (64, 1024), (200, 512), (16, 2048)], ids=str)
def test_both_plans_have_the_same_bits(
    cell: str,
    projects: int,
    dtype: torch.dtype,
    size: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many blocks and steps, where a fault in the exchange is likely to show.

    In the largest layers, but for the Elman cells, weights are streamed on most devices.
    """
    B, H = size
    case = Case(cell, T=100, B=B, I=5, H=H, P=projects * (H // 2 + 1), lengths=True, resets=True)
    args = on_gpu(build(case, dtype))
    monkeypatch.setenv("RNNKERN_CUDA_PLAN", "stepwise")
    wanted = evaluate(args)
    monkeypatch.setenv("RNNKERN_CUDA_PLAN", "persistent")
    for _ in range(3):
        assert_identical(evaluate(args), wanted)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_rows_of_its_block(cell: str, dtype: torch.dtype) -> None:
    """One input feature and no bias: the product in front of the kernels is exact."""
    case = Case(cell, B=17, I=1, H=96, D=2, resets=True, reset_state=True, bias=False)
    args = on_gpu(build(case, dtype))
    for found, wanted in zip(run_op(first_rows(args, 8)), run_op(args), strict=True):
        assert same_bits(found, wanted[:, :8])


@pytest.mark.parametrize("sizes", [("gru_reset_before", 0), ("lstm", 1000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_tiles_than_the_device_has_room_for(
    sizes: tuple[str, int], dtype: torch.dtype
) -> None:
    """Steps of two stages, whose grid the device holds at once: 1,024 tiles, or 256 of 8 rows."""
    cell, P = sizes
    args = build(Case(cell, T=3, B=128, I=1, H=2048, P=P, D=2, bias=False), dtype)
    for found, wanted in zip(states(first_rows(args, 8)), states(args), strict=True):
        assert wanted.isfinite().all()
        assert same_bits(found, wanted[:, :8])


def states(args: LayerInputs) -> tuple[Tensor, ...]:
    """Return the outputs and the gradient of h0, behind which there is no product of torch."""
    own = on_gpu(args)
    h0 = own.h0.requires_grad_()
    outputs = run_op(own)
    return (*outputs, *torch.autograd.grad(outputs[0].sum(), h0))


@pytest.mark.usefixtures("each_plan")
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_no_call_waits_for_the_device(name: str, dtype: torch.dtype, packed: bool) -> None:
    module = MODULES[name](16, 32, 2, bidirectional=True).to("cuda", dtype)
    data: Any = torch.randn(9, 4, 16, device="cuda", dtype=dtype, requires_grad=True)
    steer: dict[str, Tensor] = {"resets": torch.rand(9, 4, device="cuda") < 0.3}
    if packed:
        data = random_packed([9, 3, 1, 5], 16, dtype=dtype).to("cuda")
    else:
        steer["lengths"] = torch.tensor([9, 3, 0, 5], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, _ = module(data, **steer)
        (y.data if packed else y).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("each_plan")
@pytest.mark.parametrize("name", MODULES)
def test_in_a_cuda_graph(name: str) -> None:
    module = MODULES[name](16, 32).cuda()
    x = torch.randn(7, 4, 16, device="cuda")
    with torch.no_grad():
        module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = module(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, module(x)[0])


@pytest.mark.usefixtures("each_plan")
@pytest.mark.parametrize("name", MODULES)
def test_training_in_a_cuda_graph(name: str) -> None:
    module = MODULES[name](16, 32).cuda()
    x = torch.randn(7, 4, 16, device="cuda")

    def step() -> None:
        module(x)[0].square().sum().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd's own set-up may not be captured
        step()
    torch.cuda.current_stream().wait_stream(side)
    module.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    captured = [p.grad for p in module.parameters()]
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        found = [g.clone() for g in captured if g is not None]
        assert len(found) == len(captured)
        module.zero_grad(set_to_none=True)
        step()
        for f, p in zip(found, module.parameters(), strict=True):
            assert p.grad is not None
            assert torch.equal(f, p.grad)


@pytest.mark.usefixtures("each_plan")
@pytest.mark.parametrize("name", MODULES)
def test_two_streams_at_once(name: str) -> None:
    module = MODULES[name](64, 128).cuda()
    xs = [torch.randn(50, 16, 64, device="cuda") for _ in range(4)]
    with torch.no_grad():
        wanted = [module(x)[0] for x in xs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in xs]
        found = []
        for _ in range(10):
            found.clear()
            for stream, x in zip(streams, xs, strict=True):
                with torch.cuda.stream(stream):
                    found.append(module(x)[0])
            torch.cuda.synchronize()
            assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("name", MODULES)
def test_compile(name: str) -> None:
    """By inductor: outputs and all gradients."""
    torch._dynamo.reset()
    module = MODULES[name](16, 32).to("cuda", torch.float64)
    compiled = torch.compile(module, fullgraph=True)
    for T in (5, 8):
        x = torch.randn(T, 4, 16, device="cuda", dtype=torch.float64)
        wanted, found = run(module, x), run(module, x, call=compiled)
        for key, value in wanted.outputs.items():
            assert_close(found.outputs[key], value, kind="output", name=key)
        for key, gradient in wanted.grads.items():
            own = found.grads[key]
            assert own is not None
            assert gradient is not None
            assert_close(own, gradient, kind="gradient", name=key)


def test_wrong_lengths_make_their_row_nan() -> None:
    module = rnnkern.LSTM(3, 5).cuda()
    x = torch.randn(4, 3, 3, device="cuda")
    y, (h, c) = module(x, lengths=torch.tensor([4, 9, 2], device="cuda"))
    assert y[:, 1].isnan().all()
    assert h[:, 1].isnan().all()
    assert c[:, 1].isnan().all()
    assert not y[:, 0::2].isnan().any()


@pytest.mark.usefixtures("each_plan")
def test_more_steps_than_cudnn_takes() -> None:
    """Forward and backward, against the same module on the CPU."""
    module = rnnkern.GRU(1, 3, dtype=torch.float64)
    x = torch.randn(70_000, 1, 1, dtype=torch.float64)
    wanted = run(module, x)
    wanted.grads = {key: None if g is None else g.clone() for key, g in wanted.grads.items()}
    found = run(module.cuda(), x.cuda())
    for key, value in wanted.outputs.items():
        assert_close(found.outputs[key].cpu(), value, kind="output", name=key)
    for key, gradient in wanted.grads.items():
        own = found.grads[key]
        assert own is not None
        assert gradient is not None
        assert_close(own.cpu(), gradient, kind="gradient", name=key)


def test_out_of_memory_leaves_a_usable_process() -> None:
    module = rnnkern.LSTM(8, 1024).cuda()
    _, total = torch.cuda.mem_get_info()  # what is free may be more by the time of the call
    steps = total // (4 * 4096 * 64) + 1
    with pytest.raises(torch.OutOfMemoryError):
        module(torch.empty(steps, 64, 8, device="cuda"))
    gc.collect()
    torch.cuda.empty_cache()
    module(torch.randn(3, 2, 8, device="cuda"))
    torch.cuda.synchronize()


def test_ddp_on_one_gpu(tmp_path: Any) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    backend = "nccl" if torch.distributed.is_nccl_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        module = rnnkern.LSTM(8, 16, 2, bidirectional=True).cuda()
        x = torch.randn(5, 3, 8, device="cuda")
        module(x)[0].square().sum().backward()
        wanted = [p.grad for p in module.parameters()]
        module.zero_grad(set_to_none=True)
        parallel = nn.parallel.DistributedDataParallel(module, device_ids=[0])
        parallel(x)[0].square().sum().backward()
        for p, gradient in zip(module.parameters(), wanted, strict=True):
            assert p.grad is not None
            assert gradient is not None
            assert torch.equal(p.grad, gradient)
    finally:
        torch.distributed.destroy_process_group()


def test_explain() -> None:
    x = torch.randn(5, 3, 8, device="cuda", dtype=torch.bfloat16)
    found = rnnkern.explain(rnnkern.LSTM(8, 16).to("cuda", torch.bfloat16), x)
    assert found.backend == "cuda"
    assert "cuda kernel" in str(found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_second_device() -> None:
    module = rnnkern.GRU(8, 16).to("cuda:1")
    x = torch.randn(5, 3, 8, device="cuda:1")
    found = module(x)[0]
    torch.testing.assert_close(found.cpu(), module.cpu()(x.cpu())[0], rtol=0, atol=2e-3)


def test_host_tensors_that_steer_the_steps() -> None:
    args = build(Case("lstm", T=6, B=4, lengths=True, resets=True, reset_state=True), torch.float64)
    moved = on_gpu(args)._replace(lengths=args.lengths, resets=args.resets)
    assert_matches(on_cpu(evaluate(moved)), expected(args), dtype=torch.float64)


def test_host_tensors_that_steer_the_steps_cannot_be_captured() -> None:
    module = rnnkern.LSTM(3, 5).cuda()
    x = torch.randn(6, 4, 3, device="cuda")
    steer = {"lengths": torch.tensor([6, 2, 1, 5]), "resets": torch.rand(6, 4) < 0.4}
    with torch.no_grad():
        module(x, **steer)
        for name, value in steer.items():
            with (
                pytest.raises(RuntimeError, match=f"{name}: expected on cuda:0 while"),
                torch.cuda.graph(torch.cuda.CUDAGraph()),
            ):
                module(x, **{name: value})
        module(x, **steer)


def test_pinned_tensors_that_steer_may_be_overwritten_after_the_call() -> None:
    module = rnnkern.LSTM(3, 5).cuda()
    x = torch.randn(6, 4, 3, device="cuda")
    lengths, resets = torch.tensor([6, 2, 0, 5]), torch.rand(6, 4) < 0.4
    wanted = module(x, lengths=lengths, resets=resets)[0]
    pinned = lengths.pin_memory(), resets.pin_memory()
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # until the device comes to the copies
    found = module(x, lengths=pinned[0], resets=pinned[1])[0]
    pinned[0].fill_(6)
    pinned[1].logical_not_()
    assert torch.equal(found, wanted)


def test_double_backward_with_resets_on_the_host() -> None:
    args = build(Case("gru", T=4, B=2, resets=True, reset_state=True), torch.float64)
    moved = on_gpu(args)._replace(resets=args.resets)
    x = moved.input.requires_grad_()
    y = torch.ops.rnnkern.layer(*moved, True)[0]
    (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.isfinite().all()


def test_the_operator_under_autocast_keeps_its_types() -> None:
    args = on_gpu(build(Case("lstm", T=4, B=2), torch.float32))
    wanted = evaluate(args)
    with torch.autocast("cuda", torch.bfloat16):
        assert_identical(evaluate(args), wanted)

"""What is told of CUDA tensors, and the types autocast gives there, without a GPU.

The tensors are fake ones, which have a device and no data; a stand-in takes the place of the
extension module, and writes down what it is asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import rnnkern
import torch
from cases import cuda_extension
from rnnkern import cuda
from rnnkern.cells import CELLS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence

pytestmark = pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN")
STEPWISE = {
    "kind": "stepwise",
    "tensor_cores": False,
    "rows_of_a_block": 8,
    "wide_blocks": False,
    "blocks_of_a_group": 0,
    "groups": 0,
    "resident_bytes": 0,
    "streamed_bytes": 0,
}
PERSISTENT = STEPWISE | {
    "kind": "persistent",
    "tensor_cores": True,
    "rows_of_a_block": 32,
    "blocks_of_a_group": 4,
    "groups": 2,
    "resident_bytes": 4096,
}
NARROW = pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
MODULES: dict[str, Any] = {
    "lstm": rnnkern.LSTM,
    "lstm_projected": partial(rnnkern.LSTM, proj_size=2),
    "gru": rnnkern.GRU,
    "gru_reset_before": partial(rnnkern.GRU, reset_after=False),
    "rnn_tanh": rnnkern.RNN,
    "rnn_relu": partial(rnnkern.RNN, nonlinearity="relu"),
    "lstm_cell": rnnkern.LSTMCell,
    "gru_cell": rnnkern.GRUCell,
    "rnn_cell": rnnkern.RNNCell,
}


class Extension(SimpleNamespace):
    """A stand-in for rnnkern._cuda, with a plan and what it has to say against the device."""

    def __init__(
        self, plan: dict[str, Any] | None = None, device: str = "", cooperation: str = ""
    ) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.device_problem = lambda _: device
        self.cooperation_problem = lambda _: cooperation
        for name in ("float64", "float32", "float16", "bfloat16"):
            setattr(self, f"plan_{name}", partial(self._plan, name, plan or STEPWISE))

    def _plan(self, name: str, plan: dict[str, Any], *args: Any) -> dict[str, dict[str, Any]]:
        self.asked.append((name, *args))
        return {"forward": plan, "backward": plan | {"wide_blocks": True, "streamed_bytes": 512}}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Let tensors be made on a GPU that is not there; no gradients, which would look for it."""
    monkeypatch.delenv("RNNKERN_CUDA_PLAN", raising=False)
    monkeypatch.setattr(cuda, "uses_tf32", lambda T: False)
    for kind in (nn.RNNBase, nn.RNNCellBase):  # torch draws their weights, and cannot there
        monkeypatch.setattr(kind, "reset_parameters", lambda _: None)
    with torch.no_grad():
        yield FakeTensorMode(allow_non_fake_inputs=True)


def made(gpu: FakeTensorMode, name: str, *shape: int, **options: Any) -> tuple[Any, Tensor]:
    """Return a module of 3 features and 40 units, and data, both on the GPU."""
    dtype = options.get("dtype", torch.float32)
    with gpu:
        module = MODULES[name](3, 40, device="cuda", **options)
        return module, torch.empty(*shape, device="cuda", dtype=dtype)


@contextmanager
def autocast(device: str, narrow: torch.dtype) -> Iterator[None]:
    """Do what torch.autocast does, which refuses to for a GPU that is not there."""
    before = torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, narrow)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)
        torch.set_autocast_dtype(device, before)


# ---- what is told -------------------------------------------------------------------------------
def test_a_launch_for_each_step(gpu: FakeTensorMode) -> None:
    module, x = made(gpu, "lstm", 7, 2, 3)
    with cuda_extension(native := Extension()):
        told = rnnkern.explain(module, x)
    assert (told.cell, told.backend, told.reason) == ("lstm", "cuda", "")
    assert (told.dtype, told.compute_dtype) == (torch.float32, torch.float32)
    assert (told.isa, told.threads) == ("", 0)
    assert str(told).splitlines() == [
        "lstm: cuda kernel, float32",
        "  forward: one launch a step, fused multiply-adds, 8 rows of 16 units a block",
        "  backward: one launch a step, fused multiply-adds, 8 rows of up to 64 units a block",
    ]
    assert native.asked == [
        ("float32", CELLS["lstm"].index, (0, 0, 0, False, False), (2, 40, 1, 0))
    ]


def test_one_launch_for_all_steps(gpu: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_PLAN", "persistent")
    module, x = made(gpu, "gru", 7, 2, 3, dtype=torch.bfloat16)
    with cuda_extension(native := Extension(PERSISTENT)):
        told = rnnkern.explain(module, x)
    one = "one launch for all steps, tensor cores, 32 rows of"
    rest = "2 group(s) a direction of 4 block(s), 4096 bytes of weights in each"
    assert str(told).splitlines() == [
        "gru: cuda kernel, bfloat16",
        f"  forward: {one} 16 units a block at a time; {rest}",
        f"  backward: {one} up to 64 units a block at a time; {rest}, 512 streamed at every step",
    ]
    assert told.plan["forward"] == PERSISTENT
    assert native.asked[0][:3] == ("bfloat16", CELLS["gru"].index, (0, 0, 0, False, True))


def test_every_form_of_the_data_has_its_sizes(gpu: FakeTensorMode) -> None:
    """B, H, D and P."""
    sizes = []
    with cuda_extension(native := Extension()):
        rnnkern.explain(*made(gpu, "lstm_projected", 5, 7, 3, bidirectional=True, batch_first=True))
        rnnkern.explain(*made(gpu, "rnn_tanh", 7, 3))
        rnnkern.explain(*made(gpu, "gru", 7, 0, 3))
        module, rows = made(gpu, "gru_reset_before", 6, 3)
        rnnkern.explain(module, PackedSequence(rows, torch.tensor([3, 2, 1])))
        rnnkern.explain(*made(gpu, "lstm_cell", 4, 3))
        rnnkern.explain(*made(gpu, "gru_cell", 3))
        sizes = [asked[-1] for asked in native.asked]
    assert sizes == [
        *((5, 40, 2, 2), (1, 40, 1, 0), (1, 40, 1, 0), (3, 40, 1, 0)),
        *((4, 40, 1, 0), (1, 40, 1, 0)),
    ]


# ---- the reference, and why ---------------------------------------------------------------------
@pytest.mark.parametrize("name", MODULES)
def test_a_build_without_kernels(gpu: FakeTensorMode, name: str) -> None:
    module, x = made(gpu, name, 7, 3)
    with cuda_extension(None, "this build has none"):
        with pytest.warns(UserWarning, match="^rnnkern: this build has none; the reference runs"):
            told = rnnkern.explain(module, x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is told once
            assert rnnkern.explain(module, x) == told
    assert (told.backend, told.reason, told.plan) == ("reference", "this build has none", {})
    assert str(told) == (f"{told.cell}: reference (torch operations), because this build has none")


def test_a_device_without_kernels(gpu: FakeTensorMode) -> None:
    module, x = made(gpu, "lstm", 7, 2, 3)
    problem = "cudaErrorNoKernelImageForDevice: no kernel image"
    reason = f"the CUDA kernels do not run on device 0 ({problem})"
    with cuda_extension(Extension(device=problem)), pytest.warns(UserWarning, match="do not run"):
        told = rnnkern.explain(module, x)
    assert str(told) == f"lstm: reference (torch operations), because {reason}"


def test_a_device_without_cooperative_launches(gpu: FakeTensorMode) -> None:
    """Steps of one stage run there."""
    native = Extension(cooperation="cudaErrorNotSupported: no cooperative launches")
    with cuda_extension(native), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        for name in MODULES:
            told = rnnkern.explain(*made(gpu, name, 7, 3))
            two_stages = name in ("gru_reset_before", "lstm_projected")
            assert told.backend == ("reference" if two_stages else "cuda"), name
            assert ("because device 0 has no cooperative launches" in str(told)) == two_stages
    assert sum("the reference runs instead" in str(w.message) for w in caught) == 1


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_a_type_without_kernels(gpu: FakeTensorMode) -> None:
    module, x = made(gpu, "lstm", 7, 2, 3, dtype=torch.complex64)
    with cuda_extension(Extension()):
        told = rnnkern.explain(module, x)
    assert told.backend == "reference"
    assert "torch.complex64" in told.reason


def test_want_of_memory_is_no_reason_for_the_reference(gpu: FakeTensorMode) -> None:
    module, x = made(gpu, "lstm", 7, 2, 3)
    with cuda_extension(Extension(device="cudaErrorMemoryAllocation: out of memory")):
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match="device 0: cudaErrorMemoryAlloc"):
                rnnkern.explain(module, x)


# ---- autocast -----------------------------------------------------------------------------------
@NARROW
@pytest.mark.parametrize("name", MODULES)
def test_autocast_is_told(gpu: FakeTensorMode, name: str, narrow: torch.dtype) -> None:
    module, x = made(gpu, name, 7, 3)
    with cuda_extension(native := Extension()), autocast("cuda", narrow):
        told = rnnkern.explain(module, x)
    words = str(narrow).removeprefix("torch.")
    assert (told.dtype, told.compute_dtype) == (torch.float32, narrow)
    assert str(told).startswith(f"{told.cell}: cuda kernel, float32, computed in {words}\n")
    assert [asked[0] for asked in native.asked] == [words]


@NARROW
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_all_results_are_of_autocast_s_type(
    gpu: FakeTensorMode, name: str, narrow: torch.dtype, given: torch.dtype
) -> None:
    """Output and states, h and c: on the CPU some of torch's are wide, and so are ours."""
    cell = name.endswith("_cell")
    module, _ = made(gpu, name, 1)
    with gpu:
        rows = torch.empty(6, 3, device="cuda", dtype=given)
        padded = torch.empty(6, 2, 3, device="cuda", dtype=given)
    forms: list[Any] = [rows]
    if not cell:
        forms += [padded, PackedSequence(rows, torch.tensor([3, 2, 1]))]
    with cuda_extension(Extension()), autocast("cuda", narrow):
        for data in forms:
            results = tensors(module(data))
            assert {t.dtype for t in results} == {narrow}
            assert {t.device.type for t in results} == {"cuda"}
            assert len(results) == (not cell) + 1 + name.startswith("lstm")


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [t for r in result for t in tensors(r)]


@NARROW
def test_autocast_leaves_double_alone(gpu: FakeTensorMode, narrow: torch.dtype) -> None:
    module, x = made(gpu, "lstm", 7, 2, 3, dtype=torch.float64)
    with cuda_extension(native := Extension()), autocast("cuda", narrow):
        told = rnnkern.explain(module, x)
        assert {t.dtype for t in tensors(module(x))} == {torch.float64}
    assert told.dtype == told.compute_dtype == torch.float64
    assert native.asked[0][0] == "float64"


def test_autocast_for_the_cpu_leaves_a_gpu_alone(gpu: FakeTensorMode) -> None:
    module, x = made(gpu, "lstm", 7, 2, 3)
    with cuda_extension(Extension()), autocast("cpu", torch.bfloat16):
        told = rnnkern.explain(module, x)
        assert {t.dtype for t in tensors(module(x))} == {torch.float32}
    assert told.dtype == told.compute_dtype == torch.float32


def test_autocast_for_a_gpu_leaves_the_cpu_alone() -> None:
    module, x = rnnkern.LSTM(3, 5), torch.randn(4, 2, 3)
    wanted = tensors(module(x))
    with autocast("cuda", torch.float16):
        assert rnnkern.explain(module, x).compute_dtype == torch.float32
        assert all(map(torch.equal, tensors(module(x)), wanted))

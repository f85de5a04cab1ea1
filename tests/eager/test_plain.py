"""What tensors are plain, asked in both ways: only those have an address that a kernel can read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import rnnkern
import torch
from cases import KERNELS
from rnnkern import cpu, eager, plain
from torch import Tensor, nn

DTYPES = sorted({dtype for _, dtype in KERNELS}, key=str)


class Subclass(Tensor):
    """A type whose operators may do anything."""


@pytest.fixture(params=["DLPack", "older torch"])
def asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ask and make tensors in both ways where they are; torch before 2.10 has one."""
    if request.param == "older torch":
        monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu", raising=False)
        plain.connect(exchange=False)
    elif not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("torch before 2.10")
    yield
    monkeypatch.undo()
    plain.connect()


def fits(weight: Tensor) -> bool:
    """Return whether the kernels can read a weight [3,4] as it is."""
    stack = cpu.stack("rnn_tanh", 4, 3, 0, 1, False, False, False)
    dtype = weight.dtype if weight.dtype in DTYPES else torch.float32
    others = torch.zeros(2, 1, 4, dtype=dtype), torch.zeros(3, 3, dtype=dtype)
    return stack.fits(others[0], None, [weight, others[1]])


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_tensors(dtype: torch.dtype) -> None:
    assert fits(torch.zeros(3, 4, dtype=dtype))
    assert fits(nn.Parameter(torch.zeros(3, 4, dtype=dtype)))
    assert fits(torch.zeros(9, 4, dtype=dtype)[2:5])
    stack = cpu.stack("rnn_tanh", 1, 1, 0, 1, False, False, False)
    one = torch.zeros(8, dtype=dtype)[::8].expand(1).as_strided((1, 1, 1), (7, 5, 3))
    assert stack.fits(one, None, [torch.zeros(1, 1, dtype=dtype)] * 2)


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_the_same_results_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = getattr(rnnkern, name)(4, 3, 2, bidirectional=True)
    x = torch.randn(5, 2, 4, requires_grad=True)

    def results() -> list[Tensor]:
        y = module(x)[0]
        with torch.no_grad():
            inferred = module(x)[0]
        return [inferred, y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])]

    found = results()
    with monkeypatch.context() as patch:
        patch.setattr(eager, "run", lambda *_: None)
        assert all(map(torch.equal, found, results()))


def dead_wrapper() -> Tensor:
    """Return a tensor that has left a transform of torch.func."""
    box = []
    torch.func.grad(lambda x: box.append(x * 2) or x.sum())(torch.zeros(3, 4))  # type: ignore[func-returns-value]
    return box[0]


def without_memory() -> Tensor:
    t = torch.zeros(3, 4)
    t.untyped_storage().resize_(0)
    return t


NOT_PLAIN: dict[str, Callable[[], Tensor]] = {
    "another type": lambda: torch.zeros(3, 4, dtype=torch.int32),
    "as wide": lambda: torch.zeros(3, 4, dtype=torch.float64).view(torch.complex64),
    "another shape": lambda: torch.zeros(4, 3),
    "fewer dimensions": lambda: torch.zeros(12),
    "in columns": lambda: torch.zeros(4, 3).t(),
    "expanded": lambda: torch.zeros(4).expand(3, 4),
    "every second row": lambda: torch.zeros(6, 4)[::2],
    "a negative view": lambda: torch._neg_view(torch.zeros(3, 4)),
    "a subclass": lambda: torch.zeros(3, 4).as_subclass(Subclass),
    "elsewhere": lambda: torch.zeros(3, 4, device="meta"),
    "zeros without storage": lambda: torch._efficientzerotensor((3, 4)),
    "sparse": lambda: torch.zeros(3, 4).to_sparse(),
    "a dead wrapper": dead_wrapper,
    "without memory": without_memory,
}


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_other_tensors_do_not_fit(kind: str) -> None:
    assert fits(torch.zeros(3, 4))
    assert not fits(NOT_PLAIN[kind]())


@pytest.mark.usefixtures("asked")
def test_batches_of_gradients_go_the_general_way() -> None:
    """They are of the type Tensor, and have no memory."""
    module, x = rnnkern.GRU(4, 3), torch.randn(5, 2, 4, requires_grad=True)
    y, several = module(x)[0], torch.randn(6, 5, 2, 3)
    (found,) = torch.autograd.grad(y, x, several, is_grads_batched=True, retain_graph=True)
    for f, dy in zip(found, several, strict=True):
        torch.testing.assert_close(f, torch.autograd.grad(y, x, dy, retain_graph=True)[0])

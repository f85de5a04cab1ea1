"""Where tensors are, asked in both ways: only those have an address that a kernel can read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import KERNELS
from rnnkern import plain
from torch import Tensor, nn

DTYPES = sorted({dtype for _, dtype in KERNELS}, key=str)


class Subclass(Tensor):
    """A type whose operators may do anything."""


@pytest.fixture(params=["DLPack", "attributes"])
def asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask tensors in both ways where they are; torch before 2.10 has one."""
    if request.param == "attributes":
        monkeypatch.setattr(plain, "_EXCHANGE", None)
    elif plain._EXCHANGE is None:
        pytest.skip("torch before 2.10")


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addresses_of_plain_tensors(dtype: torch.dtype) -> None:
    a, b = torch.zeros(3, 1, 4, dtype=dtype), nn.Parameter(torch.zeros(5, dtype=dtype))
    none = torch.zeros(0, 4, dtype=dtype)
    shapes = ((3, 1, 4), (5,), (0, 4))
    found = plain.addresses([a, b, none], dtype, shapes)
    assert found == (a.data_ptr(), b.data_ptr(), 0)
    view = torch.zeros(9, 4, dtype=dtype)[2:5].unsqueeze(1)
    assert plain.addresses([view], dtype, shapes[:1]) == (view.data_ptr(),)
    one = torch.zeros(8, dtype=dtype)[::8].expand(1).as_strided((1, 1, 1), (7, 5, 3))
    assert plain.addresses([one], dtype, ((1, 1, 1),)) == (one.data_ptr(),)


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
def test_other_tensors_have_no_address(kind: str) -> None:
    t = NOT_PLAIN[kind]()
    assert plain.addresses([t], torch.float32, ((3, 4),)) is None
    good = torch.zeros(3, 4)
    assert plain.addresses([good, t, good], torch.float32, ((3, 4),) * 3) is None

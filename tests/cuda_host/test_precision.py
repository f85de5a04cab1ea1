"""Where float32 is multiplied in TF32, and that exactness is asked of torch's products too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Case, build, leaves
from cuda_host.conftest import Host
from ops.test_opcheck import backward_arguments
from rnnkern import cuda, cuda_precision
from rnnkern.cuda_precision import allows_tf32, exact_products, uses_tf32
from torch.utils._python_dispatch import TorchDispatchMode

MATMUL = torch.backends.cuda.matmul
needs_both_flags = pytest.mark.skipif(
    not hasattr(MATMUL, "fp32_precision"), reason="torch has one flag before 2.9"
)


def by_old_flag() -> None:
    MATMUL.allow_tf32 = True


def by_medium() -> None:
    torch.set_float32_matmul_precision("medium")


def by_new_flag() -> None:
    MATMUL.fp32_precision = "tf32"


def by_general_flag() -> None:
    torch.backends.fp32_precision = "tf32"


WAYS = [
    by_old_flag,
    by_medium,
    pytest.param(by_new_flag, marks=needs_both_flags),
    pytest.param(by_general_flag, marks=needs_both_flags),
]
ways = pytest.mark.parametrize("allow", WAYS)


@pytest.fixture(autouse=True)
def _torch_s_flags() -> Iterator[None]:
    """Leave them as torch has them by default."""
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(MATMUL, "fp32_precision"):
        for settings in (torch.backends, MATMUL, torch.backends.mkldnn.matmul):
            settings.fp32_precision = "none"


def flags() -> list[Any]:
    """Return what torch says of its products; it raises where its own flags disagree."""

    def told(ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except RuntimeError:
            return "torch's flags disagree"

    old = [told(lambda: MATMUL.allow_tf32), told(torch.get_float32_matmul_precision)]
    if not hasattr(MATMUL, "fp32_precision"):
        return old
    return [*old, MATMUL.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]


# ---- the recurrence -----------------------------------------------------------------------------
def test_tf32_in_both_of_torch_s_ways_to_say_so() -> None:
    for allowed, precision in ((True, "tf32"), (False, "ieee"), (False, "none")):
        assert allows_tf32(SimpleNamespace(fp32_precision=precision)) is allowed
        assert allows_tf32(SimpleNamespace(allow_tf32=allowed)) is allowed
    assert allows_tf32(MATMUL) is False  # torch's default
    assert allows_tf32(torch.backends.cudnn.rnn) is True


@pytest.mark.parametrize("layers", [False, True], ids=["cudnn_exact", "cudnn_tf32"])
@pytest.mark.parametrize("products", [False, True], ids=["matmul_exact", "matmul_tf32"])
@pytest.mark.parametrize("cudnn", ["available", "disabled", "missing"])
def test_tf32_where_torch_uses_it(
    layers: bool, products: bool, cudnn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allows(settings: Any) -> bool:
        return products if settings is MATMUL else layers

    monkeypatch.setattr(cuda_precision, "allows_tf32", allows)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", cudnn != "disabled")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: cudnn != "missing")
    by_cudnn = cudnn == "available"
    assert uses_tf32(T=9) == (layers if by_cudnn else products)
    assert uses_tf32(T=1) == (layers and products if by_cudnn else products)


# ---- the products around it ---------------------------------------------------------------------
class Products(TorchDispatchMode):
    """Whether torch allowed TF32 at each product."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed: list[bool] = []

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), options: Any = None) -> Any:
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.allowed.append(allows_tf32(MATMUL))
        return function(*args, **(options or {}))


@pytest.mark.parametrize("exact", [True, False], ids=["cudnn_exact", "cudnn_tf32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@ways
def test_products_are_exact_where_the_recurrence_is(
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
    allow: Callable[[], None],
    exact: bool,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(cuda, "uses_tf32", lambda T: not exact)
    args = build(Case("gru", D=2), dtype)
    backward = backward_arguments(leaves(args))
    allow()
    before = flags()
    with Products() as products, torch.no_grad():  # outside of the operators, which hide them
        cuda.run("layer", 0, (*args, True))
        cuda.run("layer_backward", 0, backward)
    assert len(products.allowed) > 4
    assert set(products.allowed) == {dtype == torch.float64 or not exact}
    assert flags() == before


@ways
def test_the_last_of_several_calls_restores_the_flag(allow: Callable[[], None]) -> None:
    allow()
    before = flags()
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(exact_products(True))
        second.enter_context(exact_products(True))
        for done in (first, second):
            assert not allows_tf32(MATMUL)
            assert MATMUL.allow_tf32 is False  # which raises if torch's flags disagree
            done.close()
    assert allows_tf32(MATMUL)
    assert flags() == before


def test_what_is_exact_already_stays_as_it_is() -> None:
    before = flags()
    with exact_products(True):
        assert flags() == before
    assert flags() == before


@ways
def test_threads_leave_the_flag_as_it_was(allow: Callable[[], None]) -> None:
    allow()
    before, together = flags(), Barrier(4)

    def call(_: int) -> bool:
        together.wait()
        exact = True
        for _ in range(200):
            with exact_products(True):
                exact &= not allows_tf32(MATMUL)
        return exact

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(4)))
    assert flags() == before
    with pytest.raises(KeyError), exact_products(True):
        raise KeyError
    assert flags() == before

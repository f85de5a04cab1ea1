from typing import Any

def cells() -> list[dict[str, Any]]: ...
def isa() -> str: ...
def supported_isas() -> list[str]: ...
def select_isa(name: str) -> None: ...
def in_forked_child() -> bool: ...
def allow_oversubscription(allow: bool) -> None: ...
def forward_float32(
    cell: int,
    threads: int,
    sequence: tuple[Any, ...],
    sizes: tuple[Any, ...],
    training: bool,
    directions: tuple[Any, ...],
) -> None: ...
def backward_float32(
    cell: int,
    threads: int,
    sequence: tuple[Any, ...],
    sizes: tuple[Any, ...],
    directions: tuple[Any, ...],
) -> None: ...
def plan_float32(
    cell: int, threads: int, T: int, B: int, H: int, P: int, D: int, backward: bool
) -> dict[str, Any]: ...

forward_float64 = forward_float32
backward_float64 = backward_float32
plan_float64 = plan_float32

def linear_float32(
    threads: int, N: int, K: int, O: int, a: int, w: int, b: int, out: int
) -> None: ...
def outer_float32(
    threads: int, N: int, O: int, a: int, lda: int, sum: int, factors: tuple[Any, ...]
) -> None: ...

linear_float64 = linear_float32
outer_float64 = outer_float32

def roofline(
    quantity: str, threads: int, bytes: int, repeats: int
) -> tuple[float, float, int] | None: ...

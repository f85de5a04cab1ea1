from typing import Any

def cells() -> list[dict[str, Any]]: ...
def isa() -> str: ...
def supported_isas() -> list[str]: ...
def select_isa(name: str) -> None: ...
def computes_bfloat16() -> bool: ...
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
    cell: int, threads: int, T: int, B: int, H: int, P: int, D: int, I: int, backward: bool
) -> dict[str, Any]: ...

forward_float64 = forward_float32
backward_float64 = backward_float32
plan_float64 = plan_float32
forward_bfloat16 = forward_float32
backward_bfloat16 = backward_float32
plan_bfloat16 = plan_float32

def padded_forward_float32(
    cell: int,
    threads: int,
    T: int,
    B: int,
    I: int,
    H: int,
    P: int,
    D: int,
    layers: int,
    bias: bool,
    batch_first: bool,
    read: tuple[int, ...],
    written: tuple[int, ...],
) -> None: ...
def padded_backward_float32(
    cell: int,
    threads: int,
    T: int,
    B: int,
    I: int,
    H: int,
    P: int,
    D: int,
    bias: bool,
    batch_first: bool,
    dy_batch_first: bool,
    read: tuple[int, ...],
    written: tuple[int, ...],
) -> None: ...

padded_forward_float64 = padded_forward_float32
padded_backward_float64 = padded_backward_float32
padded_forward_bfloat16 = padded_forward_float32
padded_backward_bfloat16 = padded_backward_float32

def roofline(
    quantity: str, threads: int, bytes: int, repeats: int
) -> tuple[float, float, int] | None: ...
def reads_exchange_api(exchange_api: Any) -> bool: ...
def addresses(
    exchange_api: Any,
    tensors: list[Any],
    types: tuple[type, ...],
    code: int,
    bits: int,
    shapes: tuple[tuple[int, ...], ...],
) -> tuple[int, ...] | None: ...

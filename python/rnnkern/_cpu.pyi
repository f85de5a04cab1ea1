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

def infer_float32(
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
    input: int,
    y: int,
    h0: int,
    c0: int,
    hn: int,
    cn: int,
    weights: tuple[int, ...],
) -> None: ...

infer_float64 = infer_float32
infer_bfloat16 = infer_float32

def roofline(
    quantity: str, threads: int, bytes: int, repeats: int
) -> tuple[float, float, int] | None: ...

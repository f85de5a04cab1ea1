from collections.abc import Sequence
from typing import Any

def cells() -> list[dict[str, Any]]: ...
def isa() -> str: ...
def supported_isas() -> list[str]: ...
def select_isa(name: str) -> None: ...
def computes_bfloat16() -> bool: ...
def allow_oversubscription(allow: bool) -> None: ...
def sleep_at_once(on: bool) -> None: ...
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
    cell: int,
    threads: int,
    T: int,
    B: int,
    H: int,
    P: int,
    D: int,
    I: int,
    backward: bool,
    ragged: bool,
) -> dict[str, Any]: ...

forward_float64 = forward_float32
backward_float64 = backward_float32
plan_float64 = plan_float32
forward_bfloat16 = forward_float32
backward_bfloat16 = backward_float32
plan_bfloat16 = plan_float32

def roofline(
    quantity: str, threads: int, bytes: int, repeats: int
) -> tuple[float, float, int] | None: ...
def use_torch(
    exchange: Any, functions: dict[str, Any], dtypes: tuple[Any, ...], watchers: tuple[Any, ...]
) -> None: ...

class Stack:
    def __init__(
        self,
        cell: int,
        I: int,
        H: int,
        P: int,
        layers: int,
        directions: int,
        bias: bool,
        batch_first: bool,
    ) -> None: ...
    @property
    def cell(self) -> int: ...
    @property
    def H(self) -> int: ...
    @property
    def P(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def directions(self) -> int: ...
    @property
    def bias(self) -> bool: ...
    @property
    def batch_first(self) -> bool: ...
    def layer(self, index: int) -> Stack: ...
    def fits(self, input: Any, states: Any, weights: Sequence[Any]) -> bool: ...
    def infer(self, input: Any, states: Any, weights: Sequence[Any]) -> tuple[Any, ...] | None: ...
    def forward(
        self, input: Any, states: Any, weights: Sequence[Any]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...] | None] | None: ...
    def backward(
        self, saved: tuple[Any, ...], dy: Any, dhn: Any, dcn: Any, needs: tuple[bool, ...]
    ) -> tuple[Any, ...] | None: ...

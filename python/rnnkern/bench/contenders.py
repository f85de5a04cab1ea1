"""Who runs a case: torch eager, torch.compile of it, onnxruntime, rnnkern; and that they agree."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkern
from rnnkern.bench import onnx_graph
from rnnkern.bench.cases import CELLS, Case

NAMES = ("torch", "compile", "onnxruntime", "rnnkern")
OURS, THEIRS = "rnnkern", "torch"
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
"""Largest difference of a number from the reference's, relative to the tensor's largest number.

The reference is torch's float32 module. bfloat16 numbers are 2^-9 apart to begin with, and torch
rounds the state in every step and the weights' gradients in every sum.
"""


class WrongNumbersError(Exception):
    """A contender does not compute what the reference computes."""


class AbsentError(Exception):
    """A contender cannot take part in a case; the message says why."""


@dataclass(frozen=True)
class Contender:
    """Something that runs a case.

    Attributes
    ----------
    name : str
        One of `NAMES`.
    call : callable
        What is timed.
    tensors : callable
        Takes what `call` returned: the tensors to compare.
    """

    name: str
    call: Callable[[], Any]
    tensors: Callable[[Any], list[Tensor]]


class Problem:
    """Weights and data of a case, the same for all contenders and in every run.

    Attributes
    ----------
    case : Case
        The case.
    module : nn.Module
        torch's module with the weights.
    input : Tensor or PackedSequence
        [T,B,H], or packed; its data require a gradient in training.
    dy : Tensor
        The gradient of the output, of its data's shape.
    """

    def __init__(self, case: Case) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            dtype = getattr(torch, case.dtype)
            self.case = case
            self.module = _module(nn, case).to(dtype)
            x = torch.randn(case.T, case.B, case.features)
            self.input = _input(case, x.to(dtype))
            width = case.state_width * case.directions
            dy = torch.randn(case.T, case.B, width) / sum(case.rows)
            self.dy = _data(_input(case, dy.to(dtype))).detach()

    def contender(self, name: str, threads: int, *, keeps: bool = True) -> Contender:
        """Return a contender.

        Parameters
        ----------
        name : str
            One of `NAMES`.
        threads : int
            Threads of onnxruntime; the others have torch's number.
        keeps : bool
            Whether onnxruntime may keep memory from one call for the next, as it does by default.
            Its peak can only be seen if it does not.

        Raises
        ------
        AbsentError
            If it cannot take part.
        """
        if name == "onnxruntime":
            session = onnx_session(self, threads, keeps)
            assert isinstance(self.input, Tensor)
            feed = {"x": self.input.detach().numpy()}
            return Contender(name, lambda: session.run(None, feed), onnx_graph.tensors)
        module: Any = self.module
        if name == OURS:
            module = _module(rnnkern, self.case).to(next(module.parameters()).dtype)
            module.load_state_dict(self.module.state_dict())
        elif name == "compile":
            reason = compile_missing()
            if reason:
                raise AbsentError(reason)
            module = torch.compile(module)
        return _of_module(name, module, self)

    def reference(self) -> list[Tensor]:
        """Return what all contenders shall compute, by torch's module in float32."""
        problem = copy.copy(self)
        problem.module = copy.deepcopy(self.module).float()
        problem.dy = self.dy.float()
        old = self.input
        data = _data(old).detach().float()
        data.requires_grad_(self.case.mode == "training")
        problem.input = old._replace(data=data) if isinstance(old, PackedSequence) else data
        contender = problem.contender(THEIRS, 1)
        with grad_mode(self.case):
            return contender.tensors(contender.call())


def check(contender: Contender, result: Any, reference: Sequence[Tensor], dtype: str) -> None:
    """Compare what a contender computed with the reference.

    Parameters
    ----------
    contender : Contender
        Who computed it.
    result : object
        What its `call` returned.
    reference : sequence of Tensor
        From `Problem.reference`.
    dtype : str
        A key of `TOLERANCE`.

    Raises
    ------
    WrongNumbersError
        If a tensor has another shape or other numbers; the message names the first such one.
    """
    tensors = contender.tensors(result)
    if len(tensors) != len(reference):
        raise WrongNumbersError(f"{len(tensors)} tensors, expected {len(reference)}")
    for index, (got, wanted) in enumerate(zip(tensors, reference, strict=True)):
        if got.shape != wanted.shape:
            shapes = f"{tuple(got.shape)}, expected {tuple(wanted.shape)}"
            raise WrongNumbersError(f"tensor {index} has shape {shapes}")
        scale = float(wanted.abs().max())
        error = float((got.float() - wanted).abs().max())
        if not error <= TOLERANCE[dtype] * scale:  # not >: an error that is nan fails too
            raise WrongNumbersError(
                f"tensor {index} is off by {error:.1e}, its largest number being {scale:.1e}"
            )


def compile_missing() -> str:
    """Say why torch.compile cannot run here, or return an empty string."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if not any(name and shutil.which(name) for name in compilers):
        return "torch.compile needs a C++ compiler"
    return ""


def onnx_session(problem: Problem, threads: int, keeps: bool) -> Any:
    """Return an onnxruntime session of a case.

    Raises
    ------
    AbsentError
        If onnx or onnxruntime is not installed, or does not know such a layer.
    """
    case = problem.case
    for there, what in (
        (case.mode == "training", "training"),
        (case.packed, "packed sequences"),
        (case.proj > 0, "projections"),
        (case.dtype != "float32", case.dtype),
    ):
        if there:
            raise AbsentError(f"onnxruntime has no {what}")
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise AbsentError(f"{package} is not installed")
    return onnx_graph.session(problem.module, case, threads, keeps)


def _module(library: Any, case: Case) -> nn.Module:
    options: dict[str, Any] = {"proj_size": case.proj} if case.proj else {}
    module: nn.Module = getattr(library, CELLS[case.cell])(
        case.features,
        case.H,
        num_layers=case.layers,
        bidirectional=case.bidirectional,
        **options,
    )
    return module


def grad_mode(case: Case) -> AbstractContextManager[Any]:
    """Return what a case's calls run in: ``no_grad`` in inference, entered once around them all."""
    return torch.no_grad() if case.mode == "inference" else nullcontext()


def _input(case: Case, x: Tensor) -> Tensor | PackedSequence:
    wanted = case.mode == "training"
    if not case.packed:
        return x.requires_grad_(wanted)
    packed = pack_padded_sequence(x, torch.tensor(case.lengths))
    return packed._replace(data=packed.data.requires_grad_(wanted))


def _data(value: Tensor | PackedSequence) -> Tensor:
    return value.data if isinstance(value, PackedSequence) else value


def _of_module(name: str, module: nn.Module, problem: Problem) -> Contender:
    """Make the contender that calls a module, forward or forward and backward."""
    if problem.case.mode == "inference":
        return Contender(name, lambda: module(problem.input), lambda result: list(_outputs(result)))

    # The original's parameters: torch.compile's wrapper shares them.
    wanted = [_data(problem.input), *module.parameters()]

    def training() -> Any:
        return torch.autograd.grad(_data(module(problem.input)[0]), wanted, problem.dy)

    return Contender(name, training, list)


def _outputs(result: Any) -> Iterator[Tensor]:
    """Yield y and the final states of what a module returned."""
    y, hidden = result
    yield _data(y)
    yield from hidden if isinstance(hidden, tuple) else (hidden,)

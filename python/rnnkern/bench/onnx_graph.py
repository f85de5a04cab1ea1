"""torch's recurrent modules as ONNX graphs, for onnxruntime.

ONNX has torch's cells with other orders of the gates, a direction axis in the middle of the output,
[T,D,B,H], and one node a layer. Outputs: y, then h (and c) of all layers, [layers·D,B,H].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rnnkern.bench.cases import CELLS, GATES, Case
from rnnkern.console.errors import require

_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}
"""Places of ONNX's gates among torch's: i o f c among i f g o, z r h among r z n."""
_OPSET, _IR = 17, 8  # old enough for every onnxruntime of these years


def tensors(result: list[Any]) -> list[Tensor]:
    """Return what a session returned, as tensors."""
    return [torch.from_numpy(array) for array in result]


def session(module: nn.Module, case: Case, threads: int, keeps: bool = True) -> Any:
    """Return an onnxruntime session that computes what a module computes.

    Parameters
    ----------
    module : nn.Module
        torch's module, float32.
    case : Case
        Its sizes.
    threads : int
        Threads of the session.
    keeps : bool
        Whether it keeps memory from one call for the next.

    Returns
    -------
    onnxruntime.InferenceSession
        It takes ``{"x": [T,B,I]}``.
    """
    onnxruntime = require("onnxruntime", "bench")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = keeps
    options.log_severity_level = 3  # errors only
    # Else its threads spin on for longer than the pause, on the CPUs of the next contender, whose
    # time doubles; its own time is the same.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        graph(module, case).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def graph(module: nn.Module, case: Case) -> Any:
    """Return the ONNX model of a module."""
    helper, numpy_helper = require("onnx.helper", "bench"), require("onnx.numpy_helper", "bench")
    nodes: list[Any] = []
    constants: dict[str, Tensor] = (
        {"shape": torch.tensor([0, 0, -1])} if case.bidirectional else {"axis": torch.tensor([1])}
    )
    states = ("h", "c") if case.cell == "lstm" else ("h",)
    source = "x"
    for layer in range(case.layers):
        constants |= {f"{name}{layer}": value for name, value in _weights(module, case, layer)}
        nodes.append(
            helper.make_node(
                CELLS[case.cell],
                [source, f"W{layer}", f"R{layer}", f"B{layer}"],
                [f"Y{layer}", *(f"{state}{layer}" for state in states)],
                hidden_size=case.H,
                direction="bidirectional" if case.bidirectional else "forward",
                **({"linear_before_reset": 1} if case.cell == "gru" else {}),
            )
        )
        source = "y" if layer == case.layers - 1 else f"y{layer}"
        nodes += _flatten(helper, f"Y{layer}", source, case.bidirectional)
    for state in states:
        parts = [f"{state}{layer}" for layer in range(case.layers)]
        nodes.append(helper.make_node("Concat", parts, [state], axis=0))
    sizes = {"x": (case.T, case.B, case.features), "y": (case.T, case.B, case.directions * case.H)}
    sizes |= dict.fromkeys(states, (case.layers * case.directions, case.B, case.H))
    values = {
        name: helper.make_tensor_value_info(name, require("onnx", "bench").TensorProto.FLOAT, size)
        for name, size in sizes.items()
    }
    made = helper.make_graph(
        nodes,
        case.name,
        [values["x"]],
        [values[name] for name in ("y", *states)],
        [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()],
    )
    opset = helper.make_opsetid("", _OPSET)
    model = helper.make_model(made, opset_imports=[opset], ir_version=_IR)
    require("onnx.checker", "bench").check_model(model)
    return model


def _flatten(helper: Any, source: str, target: str, bidirectional: bool) -> list[Any]:
    """Return the nodes [T,D,B,H] -> [T,B,D·H]."""
    if not bidirectional:
        return [helper.make_node("Squeeze", [source, "axis"], [target])]
    return [
        helper.make_node("Transpose", [source], [f"{source}t"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", [f"{source}t", "shape"], [target]),
    ]


def _weights(module: nn.Module, case: Case, layer: int) -> list[tuple[str, Tensor]]:
    """Return a layer's W [D,G·H,I], R [D,G·H,H] and B [D,2·G·H], gates in ONNX's order."""
    state = {name: value.detach() for name, value in module.state_dict().items()}
    suffixes = [f"_l{layer}", f"_l{layer}_reverse"][: case.directions]

    def stacked(name: str) -> Tensor:
        parts = []
        for suffix in suffixes:
            gates = state[name + suffix].chunk(GATES[case.cell])
            parts.append(torch.cat([gates[place] for place in _ORDER[case.cell]]))
        return torch.stack(parts)

    biases = torch.cat([stacked("bias_ih"), stacked("bias_hh")], 1)
    return [("W", stacked("weight_ih")), ("R", stacked("weight_hh")), ("B", biases)]

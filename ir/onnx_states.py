"""Recurrent states that a file has as inputs and outputs, so that its caller can carry them on.

A training sample is a whole sequence that starts from nothing, so such inputs are bound to zero,
and the last states are left out of the outputs. Both are told.
"""

from __future__ import annotations

from math import prod

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from .onnx_scopes import STANDARD_DOMAINS, subgraphs

_RECURRENT = ("GRU", "LSTM", "RNN")
#: Operands of these that are initial states; their results from 1 on are the last states.
_INITIAL = (5, 6)
#: Operators that hand on what operand 0 holds.
_MOVING = ("Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
#: States of more elements fit no device.
_LARGEST = 2**24


def bind_states(proto: ModelProto, batch: int) -> tuple[str, ...]:
    """Bind inputs that are initial states alone to zero; drop outputs that are last states alone.

    Files whose initial states are no inputs, or that would be left without an input or an output,
    stay as they are.

    Args:
        proto: The model; changed in place.
        batch: What unknown dimensions are bound to.

    Returns:
        What has been done, in words for the report.
    """
    graph = proto.graph
    if any(True for n in graph.node for _ in subgraphs(n)):
        return ()  # subgraphs may read what their node doesn't name
    weights = {t.name for t in graph.initializer}
    inputs = [v for v in graph.input if v.name not in weights]
    bound = [v for v in inputs if v.name in _leading_to_states(proto) and _shape(v, batch)]
    if not bound or len(bound) == len(inputs):
        return ()
    for v in bound:
        zeros = np.zeros(_shape(v, batch), np.float32)
        graph.initializer.append(numpy_helper.from_array(zeros, v.name))
    note = f"initial states {', '.join(v.name for v in bound)} are bound to zero"
    last = _last_states(proto)
    kept = [v for v in graph.output if v.name not in last]
    if kept and len(kept) < len(graph.output):
        dropped = ", ".join(v.name for v in graph.output if v.name in last)
        note += f", last states {dropped} are left out"
        del graph.output[:]
        graph.output.extend(kept)
    return (note,)


def _is(node: NodeProto, operators: tuple[str, ...]) -> bool:
    return node.op_type in operators and node.domain in STANDARD_DOMAINS


def _leading_to_states(proto: ModelProto) -> set[str]:
    """Values that nothing reads but as an initial state."""
    readers: dict[str, list[tuple[NodeProto, int]]] = {}
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, i))
    found: set[str] = set()
    outputs = {v.name for v in proto.graph.output}

    def leads(name: str) -> bool:
        return name not in outputs and all(
            (_is(n, _RECURRENT) and i in _INITIAL)
            or (_is(n, _MOVING) and i == 0 and found.issuperset(filter(None, n.output)))
            for n, i in readers[name]
        )

    for node in reversed(proto.graph.node):  # readers stand behind what they read
        found.update(o for o in node.output if o in readers and leads(o))
    return found | {v.name for v in proto.graph.input if v.name in readers and leads(v.name)}


def _last_states(proto: ModelProto) -> set[str]:
    """Values that hold last states and nothing else."""
    found: set[str] = set()
    for node in proto.graph.node:
        data = node.input if node.op_type == "Concat" else node.input[:1]
        if _is(node, _RECURRENT):
            found.update(filter(None, node.output[1:]))
        elif _is(node, ("Concat", *_MOVING)) and data and found.issuperset(data):
            found.update(node.output)
    return found


def _shape(v: ValueInfoProto, batch: int) -> tuple[int, ...]:
    """The shape of a float input; empty where it can't be bound."""
    tensor = v.type.tensor_type
    if not v.type.HasField("tensor_type") or tensor.elem_type != TensorProto.FLOAT:
        return ()
    shape = tuple(d.dim_value if d.dim_value > 0 else batch for d in tensor.shape.dim)
    return shape if prod(shape) <= _LARGEST else ()

"""Inputs of bool: run-time inputs are numbers, so what reads a mask reads it behind a Cast."""

from __future__ import annotations

from onnx import ModelProto, TensorProto, helper

from .graph import unique_name
from .onnx_scopes import rename_reads, value_names


def numbers_for_flags(proto: ModelProto) -> None:
    """Let inputs of bool be float32, whose numbers other than 0 are true.

    Args:
        proto: The model; changed in place.
    """
    graph = proto.graph
    stored = {t.name for t in graph.initializer}
    taken = set(value_names(graph))
    names: dict[str, str] = {}
    for v in graph.input:
        tensor = v.type.tensor_type
        if v.name not in stored and tensor.elem_type == TensorProto.BOOL:
            tensor.elem_type = TensorProto.FLOAT
            names[v.name] = unique_name(f"{v.name}/flags", taken)
            taken.add(names[v.name])
    if not names:
        return
    nodes = list(graph.node)
    for node in nodes:
        rename_reads(node, names)
    casts = [
        helper.make_node("Cast", [name], [flags], name=flags, to=TensorProto.BOOL)
        for name, flags in names.items()
    ]
    del graph.node[:]
    graph.node.extend([*casts, *nodes])

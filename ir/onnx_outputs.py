"""Which outputs of a file are read: ``--keep-output`` leaves the others out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx import ModelProto

from .errors import UsageError
from .onnx_scopes import reads


def keep_outputs(proto: ModelProto, path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Leave all other outputs out of a model, with the nodes and inputs that they alone need.

    What is left out is not looked at any more: it may hold what can't be read.

    Args:
        proto: The model; changed in place.
        path: What messages call it.
        names: Outputs to keep; empty: all, and the model stays as it is.

    Returns:
        What has been left out, in words for the report.

    Raises:
        UsageError: There is no such output.
    """
    graph = proto.graph
    known = [v.name for v in graph.output]
    if unknown := [n for n in names if n not in known]:
        raise UsageError(
            f"--keep-output: {path} has no output {unknown[0]}; it has {', '.join(known)}"
        )
    dropped = [n for n in known if n not in names]
    if not names or not dropped:
        return ()
    outputs = [v for v in graph.output if v.name in names]
    wanted, nodes = set(names), []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(reads(node))
            nodes.append(node)
    inputs = [v for v in graph.input if v.name in wanted]
    unread = [v.name for v in graph.input if v.name not in wanted]
    for field, kept in ((graph.node, nodes[::-1]), (graph.input, inputs), (graph.output, outputs)):
        del field[:]
        field.extend(kept)
    notes = f"outputs {', '.join(dropped)} are left out"
    stored = {t.name for t in graph.initializer}
    if lost := [n for n in unread if n not in stored]:
        notes += f", and inputs {', '.join(lost)} with them"
    return (notes,)

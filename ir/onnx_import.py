"""Import of an ONNX model: file -> forward graph, node by node.

Conversion never stops at the first obstacle. The result of a rejected node gets a placeholder of
the type that onnx inferred, so that everything behind it is judged as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .errors import GraphError
from .file_loss import part_loss, take_head
from .graph import Attr, Graph, TensorType, Value
from .head import replace_head
from .import_options import PLAIN, ImportOptions
from .lite_residual import add_lite_residuals
from .lora import add_adapters
from .obstacles import Obstacle, report_obstacles
from .onnx_convert import Conversion, RejectedError, Rule, Site
from .onnx_file import SHAPING, FileNode, ModelFile, load_file
from .onnx_fold import INCONSISTENT
from .onnx_integers import POSITIONS, limit_of, span_of_result
from .onnx_ops import RULES
from .onnx_quantize import add_input, integers_kept, spread
from .passes import clean
from .surgery import rename

#: Operators that move elements of operand 0, whatever these are.
_MOVES = (*SHAPING, "Gather", "GatherElements", "GatherND")
#: Types that results have in the file -> in the graph; integers of other nodes may be constants
#: once an obstacle before them is gone, those of operators that are not supported are not.
_REAL = {"f32": "f32"}
_RESULTS = {**_REAL, "i32": "i32", "i64": "i32", "bits": "bits"}


def import_model(path: Path, options: ImportOptions = PLAIN) -> Graph:
    """Read a model file as a forward graph; a loss at its end is parted off (``Graph.loss``).

    Inputs and outputs keep the names, number and layout that they have in the file. A quantized
    model becomes a graph of real numbers with ``Graph.quantization``; its int8 inputs stay i8
    (uint8: 128 less), its 8-bit outputs become the real numbers that they mean, and boolean outputs
    1 and 0.

    Args:
        path: An ``.onnx`` file, opset 8 to the newest of the installed onnx.
        options: How it is imported.

    Raises:
        UsageError: The path is missing, a folder or unreadable, or the options don't fit it.
        UnsupportedModelError: Lists everything in the model that can't be planned.
    """
    graph = graph_of(load_file(path, options), path, options)
    finish(graph, options)
    return graph


def graph_of(file: ModelFile, path: Path, options: ImportOptions = PLAIN) -> Graph:
    """The cleaned forward graph of a model that has been read.

    Args:
        file: The model.
        path: What messages call it.
        options: As in ``import_model``; dimensions are bound already.

    Raises:
        UnsupportedModelError: Lists everything in the model that can't be planned.
    """
    conversion = convert(file)
    if conversion.obstacles:
        raise report_obstacles(path, conversion.obstacles)
    clean(conversion.graph, fold_batchnorm=options.folds)
    return conversion.graph


def finish(graph: Graph, options: ImportOptions) -> None:
    """Make a cleaned graph one that is trained: its loss apart, its head replaced, with adapters.

    Raises:
        UnsupportedModelError: The loss can't be parted off, the head not replaced, or no layer or
            block can have an adapter.
        UsageError: The rank of adapters is too large.
    """
    part_loss(graph)
    if options.head is not None:
        replace_head(graph, options.head)
        take_head(graph)
    if options.lora is not None:
        add_adapters(graph, options.lora)
    if options.lite_residual is not None:
        add_lite_residuals(graph, options.lite_residual)


def convert(file: ModelFile) -> Conversion:
    """Convert all nodes that can be; the obstacles stand in the result."""
    conversion = Conversion(file, Graph(file.name), obstacles=list(file.obstacles))
    conversion.graph.notes = file.notes
    for name, type_ in file.inputs.items():
        if type_ is not None:
            add_input(conversion, name, type_)
            limit = limit_of(file, name) if type_.dtype == "i32" else None
            if limit is not None:
                conversion.spans[name] = (-limit, limit - 1)
        else:
            conversion.values[name] = None
    for node in file.nodes:
        _convert_node(conversion, node)
    for name in file.outputs:
        if name in file.constants or name not in conversion.values:  # a tensor that can't be read
            reason = "does not depend on any input"
            conversion.obstacles.append(Obstacle(name, "output", reason))
            continue
        value = conversion.values[name]
        if value is None:
            if name in conversion.empty:
                conversion.obstacles.append(Obstacle(name, "output", "has no elements"))
            continue
        if value.type.dtype == "bits":
            value = _numbers(conversion, value, name)
        free = value.producer is not None and value not in conversion.graph.outputs
        if free and name not in conversion.graph.values:
            rename(conversion.graph, value, name)
        conversion.graph.outputs.append(value)
    spread(conversion.graph)
    return conversion


def _numbers(conversion: Conversion, condition: Value, name: str) -> Value:
    """A boolean output as 1 and 0."""
    graph = conversion.graph
    if condition.name == name and f"{name}/condition" not in graph.values:
        rename(graph, condition, f"{name}/condition")
    attrs: dict[str, Attr] = {"on": 1.0, "off": 0.0}
    operands = (condition, None, None)
    node = graph.add_node("Where", operands, attrs, name=f"{name}/real", outputs=[name])
    conversion.order.append(node.name)
    return node.out


def _convert_node(conversion: Conversion, node: FileNode) -> None:
    """Convert a node, or note why not and put placeholders in the place of its results."""
    graph, file = conversion.graph, conversion.file
    begin = len(graph.nodes)
    try:
        rule = RULES.get(node.op) if not node.domain else None
        if node.kept:
            raise RejectedError(node.kept)
        if rule is not None and node.unknown:
            names = ", ".join(node.unknown)
            raise RejectedError(f"has no attribute {names} in opset {file.opset}")
        if rule is None:
            domain = f" of the domain {node.domain}" if node.domain else ""
            raise RejectedError(f"the operator{domain} is not supported")
        operands = [i for i in node.inputs if i]
        known = file.constants.keys() | conversion.empty
        if any(i not in known and conversion.values.get(i) is None for i in operands):
            _placeholders(conversion, node, _REAL)  # the reason is reported where it arose
            return
        stored, span = integers_kept(conversion, node), span_of_result(conversion, node)
        made = _converted(conversion, node, rule)
        results = made if isinstance(made, tuple) else (made,)
        if more := [o for o in node.outputs[len(results) :] if o]:
            raise RejectedError(f"has no result that could be {', '.join(more)}")
    except (RejectedError, GraphError) as e:
        for leftover in graph.nodes[begin:]:
            for v in leftover.outputs:
                del graph.values[v.name]
                graph.quantization.pop(v.name, None)
        del graph.nodes[begin:]
        reason = str(e).removeprefix(f"node {node.name} ({node.op}): ")
        conversion.obstacles = [  # onnx's own words for the same thing are vaguer
            o
            for o in conversion.obstacles
            if o.where != node.name or not o.reason.startswith(INCONSISTENT)
        ]
        conversion.obstacles.append(Obstacle(node.name, node.op, reason))
        conversion.order.append(node.name)
        _placeholders(conversion, node, _RESULTS if rule is None else _REAL)
        return
    conversion.order += [n.name for n in graph.nodes[begin:]]
    for out, result in zip(node.outputs, results, strict=False):
        conversion.values[out] = result
        if result is None:
            conversion.empty.add(out)
            continue
        if span is not None and (node.op not in POSITIONS or result.type.dtype == "i32"):
            conversion.spans[out] = span
        if stored is not None:
            conversion.stored[out] = stored
            graph.quantization.setdefault(result.name, stored.quant)
        new = result.producer is not None and result.producer in graph.nodes[begin:]
        if out and new and result.name != out and out not in graph.values:
            rename(graph, result, out)


def _converted(
    conversion: Conversion, node: FileNode, rule: Rule
) -> Value | tuple[Value | None, ...]:
    """What stands for the results. Conditions move as numbers, 1 and 0."""
    site, name = Site(conversion, node), node.inputs[0] if node.inputs else ""
    flags = conversion.values.get(name)
    if node.op not in _MOVES or flags is None or flags.type.dtype != "bits":
        return rule(site)
    values: dict[str, Attr] = {"on": 1.0, "off": 0.0}
    numbers = site.emit("Where", (flags, None, None), values, "numbers")
    conversion.values[name] = numbers
    try:
        made = rule(site)
    finally:
        conversion.values[name] = flags
    zero = conversion.constant(f"{node.name}/0", np.zeros((), np.float32))
    results: list[Value | None] = []
    for v in made if isinstance(made, tuple) else (made,):
        if v is None or v is numbers:
            results.append(v and flags)
            continue
        off = site.emit("Equal", (v, zero), None, "off")
        results.append(site.emit("Not", (off,), None, "on"))
    return tuple(results)


def _placeholders(
    conversion: Conversion, node: FileNode, dtypes: Mapping[str, str]
) -> None:
    """Results that stand for those of a node that was not converted, where their type is known."""
    for out in filter(None, node.outputs):
        type_ = conversion.file.types.get(out)
        known: Value | None = None
        real = node.op != "QuantizeLinear"  # its result has a meaning only by its parameters
        dtype = dtypes.get(type_.dtype) if type_ and real else None
        if type_ and dtype and out not in conversion.graph.values:
            known = conversion.graph.add_state(out, TensorType(type_.shape, dtype))
        conversion.values[out] = known

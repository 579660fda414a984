"""From the bytes of a model file to a structurally sound ONNX graph, or one clear line why not.

Only what the later stages rely on is checked: the file parses, the opset is known, every value is
defined once and before it is read, external data lie inside the model's folder, and the weights
are finite. Everything that is wrong with single tensors is collected, not only the first.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper, version_converter

from .errors import ModelWarning, UnsupportedModelError, UsageError
from .graph import Array
from .obstacles import Obstacle, report_obstacles
from .onnx_external import MAX_FILE_BYTES, all_tensors, load_external
from .onnx_scopes import STANDARD_DOMAINS, all_graphs, all_nodes, reads

#: Oldest opset whose operators have today's broadcasting rules.
MIN_OPSET = 8


def read_proto(path: Path) -> ModelProto:
    """Parse a model file.

    Raises:
        UsageError: The path is missing, a folder or unreadable.
        UnsupportedModelError: Not an ONNX model, too large, or external data that can't be read.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a folder, not an ONNX file")
    if path.exists() and not path.is_file():  # a device may never end
        raise UsageError(f"{path}: is a device or a pipe, not an ONNX file")
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UnsupportedModelError(
                f"{path}: {size} bytes; an ONNX file holds at most {MAX_FILE_BYTES} bytes,"
                " and no microcontroller holds such a model"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except OSError as e:
        raise UsageError(f"{path}: can't be read: {e.strerror or e}") from None
    if not data:
        raise UnsupportedModelError(f"{path}: the file is empty")
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception:  # the protobuf runtimes raise different classes, none of them public in onnx
        raise UnsupportedModelError(
            f"{path}: not an ONNX model, or truncated ({size} bytes)"
        ) from None
    if not proto.graph.node and not proto.graph.output:
        raise UnsupportedModelError(f"{path}: not an ONNX model: it has no nodes and no outputs")
    try:
        damaged = any(not isinstance(text, str) for text in _texts(proto))
    except UnicodeDecodeError:  # some protobuf runtimes decode late and raise, others give bytes
        damaged = True
    if damaged:
        raise UnsupportedModelError(f"{path}: damaged: a name is not UTF-8 text")
    if obstacles := load_external(proto, path):
        raise report_obstacles(path, obstacles)
    return proto


def at_known_opset(proto: ModelProto, path: Path) -> tuple[ModelProto, int]:
    """The model and the version of its standard operator set; older than 8 is converted to 8.

    One that is newer than the installed onnx knows is read as the newest, with a ``ModelWarning``.

    Raises:
        UnsupportedModelError: Old and not convertible.
    """
    newest = int(onnx.defs.onnx_opset_version())
    versions = [int(o.version) for o in proto.opset_import if o.domain in STANDARD_DOMAINS]
    if versions:
        version = versions[0]
    else:  # the newest operator set of the time of the file format
        table = onnx.helper.OP_SET_ID_VERSION_MAP
        known = [v for (d, v), ir in table.items() if d == "ai.onnx" and ir <= proto.ir_version]
        version = int(max([MIN_OPSET, *known]))
        proto.opset_import.append(onnx.helper.make_opsetid("", version))
    if version < MIN_OPSET:
        try:
            return version_converter.convert_version(proto, MIN_OPSET), MIN_OPSET
        except Exception as e:  # the converter raises RuntimeError, ValueError and its own classes
            reason = str(e).strip().splitlines()[-1].split("failed: ")[-1]
            raise UnsupportedModelError(
                f"{path}: opset {version} is older than {MIN_OPSET} and onnx.version_converter"
                f" can't convert it ({reason}); export again with opset {MIN_OPSET} or newer"
            ) from None
    if version > newest:
        text = (
            f"{path}: opset {version} is newer than {newest}, the newest of the installed onnx"
            f" {onnx.__version__}, and read as if it were {newest}; operators may have changed"
        )
        warnings.warn(ModelWarning(text), stacklevel=2)
        for o in proto.opset_import:
            if o.domain in STANDARD_DOMAINS:
                o.version = newest
        version = newest
    return proto, version


def known_attributes(op: str, opset: int) -> frozenset[str] | None:
    """Attributes of a standard operator; None where the installed onnx doesn't know it."""
    try:
        return frozenset(onnx.defs.get_schema(op, opset).attributes)
    except onnx.defs.SchemaError:
        return None


def check_structure(proto: ModelProto, path: Path) -> None:
    """Every value is defined once and before its first use.

    Raises:
        UnsupportedModelError: Lists all violations; a cycle is named by its nodes.
    """
    graph = proto.graph
    producer: dict[str, int] = {}
    found: list[Obstacle] = []
    given = {v.name: "an input" for v in graph.input}
    if len(given) < len(graph.input):
        names = [v.name for v in graph.input]
        twice = sorted({n for n in names if names.count(n) > 1})
        found += [Obstacle(n, "input", "is declared twice") for n in twice]
    given |= {t.name: "an initializer" for t in graph.initializer}
    given |= {t.values.name: "an initializer" for t in graph.sparse_initializer}
    for i, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in given:
                reason = f"computes {name}, which is {given[name]}"
                found.append(Obstacle(node_name(node, i), node.op_type, reason))
            if name in producer:
                first = node_name(graph.node[producer[name]], producer[name])
                reason = f"computes {name}, which {first} computes already"
                found.append(Obstacle(node_name(node, i), node.op_type, reason))
            producer.setdefault(name, i)
    defined = set(given)
    for i, node in enumerate(graph.node):
        for name in reads(node):
            if name in defined:
                continue
            if name not in producer:
                reason = f"reads {name}, which nothing computes"
            elif cycle := _cycle(graph.node, producer, i):
                reason = f"is part of the cycle {' -> '.join(cycle)}"
            else:
                later = node_name(graph.node[producer[name]], producer[name])
                reason = f"reads {name} before node {later} computes it; sort the nodes"
            found.append(Obstacle(node_name(node, i), node.op_type, reason))
        defined.update(filter(None, node.output))
    for v in graph.output:
        if v.name not in defined:
            found.append(Obstacle(v.name, "output", "nothing computes it"))
    if not graph.output:
        found.append(Obstacle(graph.name or path.stem, "graph", "it has no outputs"))
    if found:
        raise report_obstacles(path, found)


def node_name(node: NodeProto, index: int) -> str:
    """The node's name, or its operator and position where the file gives none."""
    return node.name or f"{node.op_type}_{index}"


def read_initializers(proto: ModelProto) -> tuple[dict[str, Array], list[Obstacle]]:
    """Initializers as arrays, and those that can't be used.

    Infinite scalars and -inf pass: they occur as bounds and masks, which folding or a rule removes.
    """
    arrays: dict[str, Array] = {}
    found: list[Obstacle] = []
    for sparse in proto.graph.sparse_initializer:
        reason = "sparse tensors are not supported; export dense weights"
        found.append(Obstacle(sparse.values.name, "initializer", reason))
    for t in proto.graph.initializer:
        try:
            if t.data_type == TensorProto.STRING:
                raise ValueError("holds strings")
            if t.name in arrays:
                raise ValueError("is defined twice")
            a = tensor_array(t)
            if a.dtype.kind == "f" and not np.isfinite(a).all():
                nan, inf = int(np.isnan(a).sum()), int(np.isinf(a).sum())
                if nan or (a.size > 1 and (a == np.inf).any()):
                    raise ValueError(f"holds {nan} NaN and {inf} infinite of {a.size} values")
            arrays[t.name] = a
        except ValueError as e:
            found.append(Obstacle(t.name, "initializer", str(e).splitlines()[0]))
    return arrays, found


def tensor_array(t: TensorProto) -> Array:
    """Data of a tensor.

    Raises:
        ValueError: The element type is unknown, or the data do not fit the shape.
    """
    if t.data_type == TensorProto.UNDEFINED or t.data_type not in TensorProto.DataType.values():
        raise ValueError(f"has the unknown element type {t.data_type}")
    if any(d < 0 for d in t.dims):  # NumPy takes -1 for whatever fits
        raise ValueError(f"can't be read as {list(t.dims)}: a dimension is negative")
    try:
        return numpy_helper.to_array(t)
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"can't be read as {list(t.dims)}: {e}") from None


def _cycle(nodes: Sequence[NodeProto], producer: dict[str, int], start: int) -> list[str]:
    """Names of the nodes on a way from ``start`` back to itself; empty if there is none."""
    parent: dict[int, int] = {}
    todo = [start]
    while todo:
        i = todo.pop()
        for name in reads(nodes[i]):
            j = producer.get(name)
            if j is None or j in parent:
                continue
            parent[j] = i
            if j == start:
                chain = [j]
                while (i := parent[chain[-1]]) != start:
                    chain.append(i)
                return [node_name(nodes[k], k) for k in [*chain, start]]
            todo.append(j)
    return []


def _texts(proto: ModelProto) -> Iterator[str]:
    """Every text that later stages read."""
    graph = proto.graph
    yield graph.name
    for node in all_nodes(graph):
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (a.name for a in node.attribute)
    yield from (t.name for g in all_graphs(graph) for t in g.initializer)
    yield from (o.domain for o in proto.opset_import)
    for v in (v for g in all_graphs(graph) for v in (*g.input, *g.output)):
        yield v.name
        yield from (d.dim_param for d in v.type.tensor_type.shape.dim)
    for t in all_tensors(proto):
        yield from (text for e in t.external_data for text in (e.key, e.value))

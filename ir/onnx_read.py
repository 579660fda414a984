"""From the bytes of a model file to a structurally sound ONNX graph, or one clear line why not.

Only what the later stages rely on is checked: the file parses, the opset is known, every value is
defined once and before it is read, external data lie inside the model's folder, and the weights
are finite. Everything that is wrong with single tensors is collected, not only the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, inliner, numpy_helper, version_converter

from .errors import UnsupportedModelError, UsageError
from .graph import Array

#: Protocol buffers cannot hold more than this.
MAX_FILE_BYTES = 2**31 - 1
#: Oldest opset whose operators have today's broadcasting rules.
MIN_OPSET = 8
#: Names of the standard operator set.
STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Obstacle:
    """One reason why a model can't be planned.

    Attributes:
        where: Node, input or initializer name.
        op: Operator type; for things that are not nodes what it is, as "initializer".
        reason: What is wrong, and the way out where there is one.
    """

    where: str
    op: str
    reason: str


def report_obstacles(path: Path, obstacles: Sequence[Obstacle]) -> UnsupportedModelError:
    """The error that lists all obstacles; nodes with the same reason share a line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for o in obstacles:
        names = groups.setdefault((o.op, o.reason), [])
        if o.where not in names:
            names.append(o.where)
    lines = [f"{', '.join(names)} ({op}): {reason}" for (op, reason), names in groups.items()]
    if len(lines) == 1:
        return UnsupportedModelError(f"{path}: {lines[0]}")
    count = len({(o.where, o.op) for o in obstacles})
    return UnsupportedModelError(
        f"{path}: {count} obstacles; the model must be exported without them:\n  "
        + "\n  ".join(lines)
    )


def read_proto(path: Path) -> ModelProto:
    """Parse a model file.

    Raises:
        UsageError: The path is missing, a folder or unreadable.
        UnsupportedModelError: Not an ONNX model, too large, or external data that can't be read.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a folder, not an ONNX file")
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
    _load_external(proto, path)
    return inliner.inline_local_functions(proto) if proto.functions else proto


def at_known_opset(proto: ModelProto, path: Path) -> tuple[ModelProto, int]:
    """The model and the version of its standard operator set; older than 8 is converted to 8.

    Raises:
        UnsupportedModelError: Newer than the installed onnx knows, or old and not convertible.
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
            reason = str(e).strip().splitlines()[-1]
            raise UnsupportedModelError(
                f"{path}: opset {version} is older than {MIN_OPSET} and onnx.version_converter"
                f" can't convert it ({reason}); export again with opset {MIN_OPSET} or newer"
            ) from None
    if version > newest:
        raise UnsupportedModelError(
            f"{path}: opset {version} is newer than {newest}, the newest of the installed onnx"
            f" {onnx.__version__}; update onnx or export with opset {newest}"
        )
    return proto, version


def check_structure(proto: ModelProto, path: Path) -> None:
    """Every value is defined once and before its first use.

    Raises:
        UnsupportedModelError: Lists all violations; a cycle is named by its nodes.
    """
    graph = proto.graph
    producer: dict[str, int] = {}
    found: list[Obstacle] = []
    for i, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in producer:
                first = node_name(graph.node[producer[name]], producer[name])
                reason = f"computes {name}, which {first} computes already"
                found.append(Obstacle(node_name(node, i), node.op_type, reason))
            producer.setdefault(name, i)
    defined = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    defined |= {t.values.name for t in graph.sparse_initializer}
    for i, node in enumerate(graph.node):
        for name in filter(None, node.input):
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

    Infinite scalars pass: they occur as bounds and masks, which folding removes.
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
            a = numpy_helper.to_array(t)
            if a.dtype.kind == "f" and not np.isfinite(a).all():
                nan, inf = int(np.isnan(a).sum()), int(np.isinf(a).sum())
                if nan or a.size > 1:
                    raise ValueError(f"holds {nan} NaN and {inf} infinite of {a.size} values")
            arrays[t.name] = a
        except (ValueError, TypeError) as e:
            found.append(Obstacle(t.name, "initializer", str(e).splitlines()[0]))
    return arrays, found


def _cycle(nodes: Sequence[NodeProto], producer: dict[str, int], start: int) -> list[str]:
    """Names of the nodes on a way from ``start`` back to itself; empty if there is none."""
    parent: dict[int, int] = {}
    todo = [start]
    while todo:
        i = todo.pop()
        for name in nodes[i].input:
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


def _tensors(proto: ModelProto) -> Iterator[TensorProto]:
    yield from proto.graph.initializer
    for node in proto.graph.node:
        for a in node.attribute:
            if a.type == onnx.AttributeProto.TENSOR:
                yield a.t
            yield from a.tensors


def _load_external(proto: ModelProto, path: Path) -> None:
    """Read tensors that are stored beside the model.

    Raises:
        UnsupportedModelError: A data file is missing, too short or outside the model's folder.
    """
    found: list[Obstacle] = []
    folder = path.parent.resolve()
    total = 0
    for t in _tensors(proto):
        if t.data_location != TensorProto.EXTERNAL:
            continue
        entries = {e.key: e.value for e in t.external_data}
        location = entries.get("location", "")
        file = (folder / location).resolve()
        try:
            if not location or not file.is_relative_to(folder) or file == folder:
                raise ValueError(f"external data {location!r} lie outside the model's folder")
            if not file.is_file():
                raise ValueError(f"external data file {location!r} is missing in {folder}")
            size, offset = file.stat().st_size, int(entries.get("offset", 0))
            length = int(entries.get("length", size - offset))
            if offset < 0 or length < 0 or offset + length > size:
                raise ValueError(
                    f"external data file {location!r} has {size} bytes, not {offset + length}"
                )
            total += length
            if total > MAX_FILE_BYTES:
                raise ValueError(f"external data exceed {MAX_FILE_BYTES} bytes")
            with file.open("rb") as f:
                f.seek(offset)
                t.raw_data = f.read(length)
            t.data_location = TensorProto.DEFAULT
            del t.external_data[:]
        except (ValueError, OSError) as e:
            found.append(Obstacle(t.name, "initializer", str(e)))
    if found:
        raise report_obstacles(path, found)

"""Tensors that a model keeps in files beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from .obstacles import Obstacle
from .onnx_scopes import all_graphs, all_nodes

#: Protocol buffers cannot hold more than this.
MAX_FILE_BYTES = 2**31 - 1


def all_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Initializers and tensors in node attributes, those of subgraphs included."""
    for graph in all_graphs(proto.graph):
        yield from graph.initializer
    for _, _, t in attribute_tensors(proto.graph):
        yield t


def attribute_tensors(
    graph: GraphProto,
) -> Iterator[tuple[NodeProto, AttributeProto, TensorProto]]:
    """Tensors in attributes with their node, those of subgraphs included."""
    for node in all_nodes(graph):
        for a in list(node.attribute):
            for t in (*((a.t,) if a.type == AttributeProto.TENSOR else ()), *a.tensors):
                yield node, a, t


def external_files(path: Path) -> list[Path]:
    """Files beside a readable model that hold some of its tensors, relative to its folder."""
    proto = ModelProto()
    proto.ParseFromString(path.read_bytes())
    external = [t for t in all_tensors(proto) if t.data_location == TensorProto.EXTERNAL]
    places = {e.value for t in external for e in t.external_data if e.key == "location"}
    return sorted(Path(place) for place in places)


def load_external(proto: ModelProto, path: Path) -> list[Obstacle]:
    """Read tensors that are stored beside the model into it.

    Returns:
        Tensors whose file is missing, too short, too large or outside the model's folder.
    """
    found: list[Obstacle] = []
    folder = path.parent.resolve()
    total = 0
    for t in all_tensors(proto):
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
    return found

"""A model file written again: the same file but for what is replaced, noted and added."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
from onnx import (
    AttributeProto,
    ModelProto,
    StringStringEntryProto,
    TensorProto,
    ValueInfoProto,
    numpy_helper,
)

from .graph import Array, Node
from .onnx_external import all_tensors
from .onnx_file import unique_names
from .onnx_insert import insert
from .onnx_read import read_proto, tensor_array
from .onnx_scopes import STANDARD_DOMAINS, copies, hoist_constants, inner_constants

#: Tensors in a file beside the model begin at multiples of this, so that they can be mapped.
_PAGE_BYTES = 4096
#: Where a tensor may have its numbers.
_DATA = ("double_data", "float_data", "int32_data", "int64_data", "raw_data", "uint64_data")
#: Attributes of a Constant that hold numbers.
_NUMBERS = ("value", "value_float", "value_floats", "value_int", "value_ints")


class OriginalFile:
    """The model as it stands in its file; what is not replaced stays.

    Attributes:
        tensors: Initializers, results of Constant nodes and of Identity nodes that copy them, by
            name; those of subgraphs by the names that importing gives them.
        nodes: Names of the nodes of the main graph, as importing gives them.
    """

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            UsageError: The path is missing, a folder or unreadable.
            UnsupportedModelError: It is no model.
        """
        self._proto = read_proto(path)
        bare = ModelProto()
        bare.ParseFromString(path.read_bytes())
        pairs = zip(all_tensors(self._proto), all_tensors(bare), strict=True)
        self._outside = [t for t, b in pairs if b.data_location == TensorProto.EXTERNAL]
        graph = self._proto.graph
        self.nodes = unique_names(graph.node)
        self._places: dict[str, TensorProto | AttributeProto] = {}
        for node in graph.node:
            if node.op_type == "Constant" and node.domain in STANDARD_DOMAINS:
                for a in (a for a in node.attribute if a.name in _NUMBERS):
                    self._places[node.output[0]] = a.t if a.name == "value" else a
        self._places |= self._inner() | {t.name: t for t in graph.initializer}
        self.tensors: dict[str, Array] = {}
        for name, place in self._places.items():
            with suppress(ValueError):  # strings, and what importing refuses where it is used
                self.tensors[name] = _array(place)
        self._copies = copies(graph)
        for name, node in self._copies.items():
            if node.input[0] in self.tensors:
                self.tensors[name] = self.tensors[node.input[0]].copy()

    def _inner(self) -> dict[str, TensorProto]:
        """Constants of subgraphs, by the names that importing gives them."""
        inner = list(inner_constants(self._proto.graph))
        if not inner:
            return {}
        hoisted = ModelProto()
        hoisted.CopyFrom(self._proto)
        hoist_constants(hoisted)
        names = [t.name for t in hoisted.graph.initializer[-len(inner) :]]
        return dict(zip(names, inner, strict=True))

    def replace(self, name: str, data: Array) -> None:
        """Give a tensor other numbers, in its element type, and maybe another shape.

        What copies it keeps its own.
        """
        read = [c for c, n in self._copies.items() if c == name or n.input[0] == name]
        for copy in read:
            self._part(copy)
        place = self._places[name]
        array = np.ascontiguousarray(data, self.tensors[name].dtype).reshape(data.shape)
        if isinstance(place, TensorProto):
            for field in _DATA:
                place.ClearField(field)
            place.dims[:] = array.shape
            place.raw_data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        elif place.name in ("value_float", "value_int"):
            setattr(place, "f" if place.name == "value_float" else "i", array.item())
        else:
            numbers = place.floats if place.name == "value_floats" else place.ints
            numbers[:] = array.reshape(-1).tolist()
        self.tensors[name] = array

    def _part(self, name: str) -> None:
        """Make a copy of a tensor a Constant with the same numbers."""
        node = self._copies.pop(name)
        tensor = numpy_helper.from_array(self.tensors[name], name)
        attribute = onnx.helper.make_attribute("value", tensor)
        node.op_type = "Constant"
        del node.input[:]
        node.attribute.append(attribute)
        self._places[name] = node.attribute[-1].t

    def resize(self, tensors: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Correct what the file says about the sizes of values that are computed of tensors.

        Args:
            tensors: Tensors that have been given another shape.
            shapes: Shapes of the results of the model.
        """
        graph = self._proto.graph
        touched = set(tensors)
        for v in (v for v in graph.input if v.name in touched):
            _set_sizes(v, self.tensors[v.name].shape)
        for node in graph.node:
            if touched.intersection(node.input):
                touched.update(node.output)
        known = [v for v in graph.value_info if v.name not in touched]
        del graph.value_info[:]
        graph.value_info.extend(known)
        for v in (v for v in graph.output if v.name in touched):
            _set_sizes(v, shapes[v.name])

    def insert(self, nodes: Sequence[Node], constants: Mapping[str, Array]) -> list[str]:
        """Put an adapter's nodes beside those of the file; arguments and errors are ``insert``'s.

        Returns:
            Names of the tensors that the file has got.
        """
        graph = self._proto.graph
        count, known = len(graph.node), len(graph.initializer)
        at = insert(self._proto, nodes, constants)
        self.nodes[at:at] = [n.name for n in graph.node[at : at + len(graph.node) - count]]
        return [t.name for t in graph.initializer[known:]]

    def annotate(
        self, prefix: str, model: Mapping[str, str], nodes: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Write notes into ``metadata_props``, in the place of older ones of this prefix.

        Args:
            prefix: Begins the key of each note.
            model: Notes on the model.
            nodes: Notes on nodes of the main graph, by the names that importing gives them.
        """
        _note(self._proto.metadata_props, prefix, model)
        for node, name in zip(self._proto.graph.node, self.nodes, strict=True):
            _note(node.metadata_props, prefix, nodes.get(name, {}))

    def save(self, path: Path, data: str) -> None:
        """Write the model; tensors that stood beside it come into one file beside it again.

        Args:
            path: The model.
            data: Name of that file, in the same folder; it is made if there are such tensors.

        Raises:
            OSError: A file can't be written.
        """
        if self._outside:
            with (path.parent / data).open("wb") as file:
                for t in self._outside:
                    file.write(bytes(-file.tell() % _PAGE_BYTES))
                    place = (file.tell(), len(t.raw_data))
                    file.write(t.raw_data)
                    t.ClearField("raw_data")
                    t.data_location = TensorProto.EXTERNAL
                    entries = {"location": data, "offset": place[0], "length": place[1]}
                    for key, value in entries.items():
                        t.external_data.append(StringStringEntryProto(key=key, value=str(value)))
        path.write_bytes(self._proto.SerializeToString())


def _array(place: TensorProto | AttributeProto) -> Array:
    """Numbers of an initializer or of the attribute of a Constant.

    Raises:
        ValueError: They can't be read.
    """
    if isinstance(place, TensorProto):
        return tensor_array(place)
    data = onnx.helper.get_attribute_value(place)
    return np.array(data, np.float32 if place.name.startswith("value_f") else np.int64)


def _note(
    props: MutableSequence[StringStringEntryProto],
    prefix: str,
    notes: Mapping[str, str],
) -> None:
    """Replace the notes of a prefix."""
    others = [p for p in props if not p.key.startswith(prefix)]
    ours = [StringStringEntryProto(key=f"{prefix}{k}", value=v) for k, v in notes.items()]
    if len(others) < len(props):
        del props[:]
        props.extend(others)
    props.extend(ours)


def _set_sizes(v: ValueInfoProto, shape: tuple[int, ...]) -> None:
    """Fixed dimensions of a value; named ones stay."""
    for d, size in zip(v.type.tensor_type.shape.dim, shape, strict=False):
        if d.dim_value > 0:
            d.dim_value = size

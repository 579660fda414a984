"""What a conversion rule sees of the file, and how it builds IR nodes.

A rule (``ir.onnx_ops``) gets a ``Site``, one node of the file in its conversion, and returns the
value that stands for the node's result. It raises ``RejectedError`` with the reason when the node
can't be expressed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .graph import Array, Attr, Graph, Value, unique_name
from .obstacles import Obstacle
from .onnx_file import INTEGER_OPS, FileAttr, FileNode, ModelFile
from .ops.integers import EXACT
from .provenance import Origin, Step
from .qdq import Stored

#: ONNX element types: INT32 and INT64.
INTEGER_TYPES = (6, 7)
#: Smallest and largest of some integers.
Span = tuple[int, int]
#: Makes of a node the value of its result, or those of all its results in order (None: no element).
Rule = Callable[["Site"], Value | tuple[Value | None, ...]]


class RejectedError(Exception):
    """The node can't be converted; the text is the reason."""


@dataclass(eq=False)
class Conversion:
    """The state of a conversion.

    Attributes:
        file: What is converted.
        graph: The graph under construction.
        values: File value name -> IR value; None where its type is not known because of an
            obstacle upstream.
        obstacles: Everything that is wrong so far.
        order: Names of IR nodes and of rejected file nodes in the file's order.
        stored: File values of 8-bit integers; ``values`` holds the real numbers that they mean.
        empty: File values without elements, which nothing stands for.
        spans: File values of integers that depend on the data of a sample; ``values`` holds i32, or
            the f32 numbers that they are computed in.
    """

    file: ModelFile
    graph: Graph
    values: dict[str, Value | None] = field(default_factory=dict)
    obstacles: list[Obstacle] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    stored: dict[str, Stored] = field(default_factory=dict)
    empty: set[str] = field(default_factory=set)
    spans: dict[str, Span] = field(default_factory=dict)
    _constants: dict[str, Value] = field(default_factory=dict)

    def constant(self, name: str, data: Array, origin: Origin | None = None) -> Value:
        """The IR constant of this name; equal names mean equal data.

        Args:
            name: That of a constant of the file, or a new one.
            data: Its data.
            origin: Where they come from; not needed where they are those of the file.

        Raises:
            RejectedError: Not float32, empty, or not finite.
        """
        if name in self._constants:
            return self._constants[name]
        if data.dtype != np.float32:
            raise RejectedError(f"constant {name} is {data.dtype}; only float32 is supported")
        if data.size == 0:
            raise RejectedError(f"constant {name} of shape {list(data.shape)} is empty")
        if not np.isfinite(data).all():
            bad = int((~np.isfinite(data)).sum())
            what = f"{bad} NaN or infinite of {data.size} values"
            raise RejectedError(f"constant {name} holds {what}")
        as_it_is = data is self.file.constants.get(name)
        if as_it_is:
            origin = self.file.origin(name)
        contiguous = np.ascontiguousarray(data).reshape(data.shape)
        value = self.graph.add_constant(name, contiguous, origin=origin)
        self._constants[name] = value
        if as_it_is and name in self.file.quantization:
            self.graph.quantization[name] = self.file.quantization[name]
        return value

    def forget(self, name: str) -> None:
        """Take back a constant that its only reader replaces by another one of the same name."""
        if self._constants.pop(name, None) is not None:
            del self.graph.values[name], self.graph.constants[name]
            self.graph.quantization.pop(name, None)
            self.graph.origins.pop(name, None)


@dataclass(eq=False)
class Site:
    """A file node in its conversion."""

    conversion: Conversion
    node: FileNode
    _reals: dict[int, Value] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        return self.conversion.file.opset

    @property
    def batch(self) -> int:
        """The bound batch."""
        return self.conversion.file.batch

    # -- attributes --------------------------------------------------------------------------------

    def integer(self, key: str, default: int = 0) -> int:
        """Integer attribute."""
        return int(self._typed(key, default, int))

    def real(self, key: str, default: float) -> float:
        """Float attribute."""
        return float(self._typed(key, default, (int, float)))

    def text(self, key: str, default: str) -> str:
        """String attribute."""
        return str(self._typed(key, default, str))

    def integers(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Integer-tuple attribute; required if there is no default."""
        value = self.node.attrs.get(key, default)
        if value is None:
            raise RejectedError(f"attribute {key} is missing")
        if not isinstance(value, tuple):
            raise RejectedError(f"attribute {key} is {value!r}, not a list of integers")
        return tuple(int(v) for v in value)

    def reals(self, key: str) -> tuple[float, ...]:
        """Required float-tuple attribute."""
        value = self.node.attrs.get(key)
        if not isinstance(value, tuple):
            raise RejectedError(f"attribute {key} is {value!r}, not a list of numbers")
        return tuple(float(v) for v in value)

    def has(self, key: str) -> bool:
        """The attribute is given."""
        return key in self.node.attrs

    def _typed(self, key: str, default: FileAttr, kind: type | tuple[type, ...]) -> Any:
        value = self.node.attrs.get(key, default)
        if not isinstance(value, kind):
            raise RejectedError(f"attribute {key} is {value!r}, which has the wrong type")
        return value

    # -- operands ----------------------------------------------------------------------------------

    def present(self, index: int) -> bool:
        """The optional operand is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] != ""

    def wanted(self, index: int) -> bool:
        """The optional result is given a name."""
        return index < len(self.node.outputs) and self.node.outputs[index] != ""

    def value(self, index: int) -> Value:
        """A required operand.

        Raises:
            RejectedError: Missing, or a constant that is not float32.
        """
        if not self.present(index):
            raise RejectedError(f"operand {index} is missing")
        name = self.node.inputs[index]
        data = self.conversion.file.constants.get(name)
        value = self.conversion.values.get(name)
        is_integer = data.dtype.kind in "iu" if data is not None else _is_index(value)
        if is_integer and self._computes_integers():
            return self.integers_as_real(index)
        if data is not None:
            return self.conversion.constant(name, data)
        if name in self.conversion.empty:
            raise RejectedError(f"operand {name} has no elements")
        assert value is not None, name
        return value

    def integers_as_real(self, index: int) -> Value:
        """An operand of integers, constant or not, as f32 numbers.

        Raises:
            RejectedError: They may be too large for that.
        """
        name, graph = self.node.inputs[index], self.conversion.graph
        data, x = self.conversion.file.constants.get(name), self.conversion.values.get(name)
        if index not in self._reals:
            low, high = self.conversion.spans.get(name, (-EXACT, EXACT))
            if data is not None:
                low, high = int(data.min(initial=0)), int(data.max(initial=0))
            if max(-low, high) > EXACT:
                raise RejectedError(f"operand {name} is {low} to {high}, beyond {EXACT}")
            if data is not None:
                free = unique_name(f"{name}/i32", graph.values)
                x = graph.add_constant(free, np.asarray(data, np.int32))
            assert x is not None, name
            if _is_index(x):
                limit = {"limit": max(-low, high + 1)}
                x = self.emit("ToReal", (x,), limit, f"real{index}")
            self._reals[index] = x
        return self._reals[index]

    def _computes_integers(self) -> bool:
        """The node compares or computes integers that depend on the data of a sample."""
        if self.node.op not in INTEGER_OPS:
            return False
        made = self.conversion.file.types.get(self.node.outputs[0])
        integers = made is not None and made.dtype in ("i32", "i64")
        return integers or any(i in self.conversion.spans for i in self.node.inputs)

    def optional(self, index: int) -> Value | None:
        """An optional operand."""
        return self.value(index) if self.present(index) else None

    def data(self, index: int) -> Array | None:
        """Data of an operand that is constant; None if it is computed or absent."""
        if not self.present(index):
            return None
        return self.conversion.file.constants.get(self.node.inputs[index])

    def scalar(self, index: int, what: str, default: float) -> float:
        """An optional operand that must be a constant scalar."""
        if not self.present(index):
            return default
        data = self.fixed(index, what)
        if data.size != 1:
            raise RejectedError(f"{what} {self.node.inputs[index]} is not a scalar")
        return float(data.reshape(()))

    def real_number(self, index: int, stored: float) -> float:
        """What a number means beside operand ``index``, whose 8-bit integers it is one of."""
        meaning = self.conversion.stored.get(self.node.inputs[index])
        return stored if meaning is None else meaning.real(stored)

    def ints(self, index: int, what: str) -> tuple[int, ...] | None:
        """An optional operand that must be a constant list of integers."""
        if not self.present(index):
            return None
        data = self.fixed(index, what)
        if data.dtype.kind not in "iu":
            raise RejectedError(f"{what} {self.node.inputs[index]} are {data.dtype}, not integers")
        return tuple(int(v) for v in data.reshape(-1))

    def whole(self, index: int, what: str, default: int) -> int:
        """An optional operand that must be a constant integer."""
        values = self.ints(index, what)
        if values is not None and len(values) != 1:
            raise RejectedError(f"{what} {self.node.inputs[index]} is not a scalar")
        return default if values is None else values[0]

    def ints_or_attr(self, index: int, key: str) -> tuple[int, ...] | None:
        """Integers that older opsets keep in an attribute and newer ones in an operand."""
        return self.integers(key) if self.has(key) else self.ints(index, key)

    def fixed(self, index: int, what: str) -> Array:
        """An operand that must be constant."""
        data = self.data(index)
        if data is None:
            name = self.node.inputs[index]
            raise RejectedError(f"{what} {name} is not constant; export it fixed")
        return data

    # -- results -----------------------------------------------------------------------------------

    def emit(
        self,
        op: str,
        inputs: Iterable[Value | None],
        attrs: Mapping[str, Attr] | None = None,
        suffix: str = "",
    ) -> Value:
        """Append an IR node; ``suffix`` tells those beside the main one apart."""
        name = f"{self.node.name}/{suffix}" if suffix else self.node.name
        first = next(filter(None, self.node.outputs))
        out = f"{first}/{suffix}" if suffix else first
        node = self.conversion.graph.add_node(op, inputs, attrs, name=name, outputs=[out])
        return node.out

    def derived(self, index: int, suffix: str, *steps: Step) -> Value:
        """What steps make of operand ``index``; keeps its name if nobody else reads that."""
        name = self.node.inputs[index]
        data, origin = self.made(index, steps)
        readers = sum(n.inputs.count(name) for n in self.conversion.file.nodes)
        if readers > 1 or name in self.conversion.file.outputs:
            name = f"{name}/{suffix}"
        else:
            self.conversion.forget(name)
        return self.conversion.constant(name, data.astype(np.float32), origin)

    def made(self, index: int, steps: Iterable[Step]) -> tuple[Array, Origin]:
        """What steps make of constant operand ``index``, and where it comes from."""
        name, data = self.node.inputs[index], self.data(index)
        assert data is not None, name
        origin = self.conversion.file.origin(name)
        for step in steps:
            data, origin = step.forward(data), origin.then(step)
        return data, origin

    def indices(self, data: Array) -> Value:
        """A constant of indices or labels."""
        graph = self.conversion.graph
        name = unique_name(f"{self.node.name}/indices", graph.values)
        return graph.add_constant(name, np.ascontiguousarray(data, np.int32))

    def reshape(self, x: Value, shape: tuple[int, ...], suffix: str = "") -> Value:
        """``x`` in another shape of the same size; no node if it has the shape already."""
        if x.type.shape == shape:
            return x
        return self.emit("Reshape", (x,), {"shape": shape}, suffix)


def _is_index(value: Value | None) -> bool:
    return value is not None and value.type.dtype == "i32"

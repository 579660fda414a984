"""Graph IR: tensor types, values, nodes, graphs, and the verifier run between passes.

A graph is a topologically ordered list of nodes over named values. Values that nobody produces
are graph inputs, parameters (``constants`` with data) or optimizer state. The same structure holds
the imported forward graph and the training graph (forward + loss + backward + update);
``Node.phase`` tells the parts apart, so what backward needs of forward is the edges that cross.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import GraphError
from .provenance import Origin
from .quantization import Quantization

if TYPE_CHECKING:
    from .adapters import Adapter
    from .channels import AxisOrders

Array = NDArray[Any]
Attr = int | float | str | tuple[int, ...] | tuple[float, ...]
Phase = Literal["forward", "loss", "backward", "update"]
PHASES: tuple[Phase, ...] = ("forward", "loss", "backward", "update")

#: dtype name -> (NumPy storage dtype, bits per element). ``bits`` packs 8 elements, LSB first.
DTYPES: dict[str, tuple[str, int]] = {
    "f64": ("<f8", 64),
    "f32": ("<f4", 32),
    "f16": ("<f2", 16),
    "i64": ("<i8", 64),
    "i32": ("<i4", 32),
    "u8": ("u1", 8),
    "i8": ("i1", 8),
    "bits": ("u1", 1),
}


#: Larger tensors are refused: no small device holds them, and kernels count in int32.
MAX_ELEMENTS = 2**28


@dataclass(frozen=True)
class TensorType:
    """Static shape and element type.

    Attributes:
        shape: Logical dimensions, all positive (``()`` is a scalar).
        dtype: A key of ``DTYPES``.
        quant: What the integers of an ``i8`` tensor mean; part of the type, so that an operator
            can't get a tensor of another scale than it was built for.
    """

    shape: tuple[int, ...]
    dtype: str = "f32"
    quant: Quantization | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor; a ``bits`` tensor packs 8 elements into a byte."""
        return (self.size * DTYPES[self.dtype][1] + 7) // 8

    @property
    def storage_shape(self) -> tuple[int, ...]:
        """Shape of the NumPy array that stores it: packed bits are one-dimensional."""
        return ((self.size + 7) // 8,) if self.dtype == "bits" else self.shape

    @property
    def np_dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the stored array (little endian)."""
        return np.dtype(DTYPES[self.dtype][0])

    def with_dtype(self, dtype: str) -> TensorType:
        """The same shape in another dtype, without a quantization."""
        return TensorType(self.shape, dtype)

    @property
    def stored(self) -> TensorType:
        """Shape and element type alone: what a buffer holds."""
        return self if self.quant is None else TensorType(self.shape, self.dtype)

    def __str__(self) -> str:
        """As ``f32[1,3,32,32]``."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(eq=False)
class Value:
    """A tensor, unique by name in its graph; ``producer`` is None for inputs and constants."""

    name: str
    type: TensorType
    producer: Node | None = None

    def __repr__(self) -> str:
        """As ``%name: type``."""
        return f"%{self.name}: {self.type}"


@dataclass(eq=False)
class Node:
    """One application of an operator.

    Attributes:
        op: Key of the operator registry (``ir.opdef.OPS``).
        name: Unique in its graph; taken from the model file where it has one.
        inputs: Operands in the operator's order; an absent optional operand is None.
        outputs: Results in the operator's order.
        attrs: Attributes, immutable by convention.
        phase: Part of the training graph that it belongs to.
    """

    op: str
    name: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    attrs: dict[str, Attr] = field(default_factory=dict)
    phase: Phase = "forward"

    @property
    def out(self) -> Value:
        """The first (usually only) result."""
        return self.outputs[0]

    def operands(self) -> Iterator[Value]:
        """The operands that are present."""
        return (v for v in self.inputs if v is not None)

    def int_attr(self, key: str, default: int | None = None) -> int:
        """Integer attribute."""
        v = self.attrs[key] if default is None else self.attrs.get(key, default)
        assert isinstance(v, int), (self.name, key, v)
        return v

    def float_attr(self, key: str, default: float | None = None) -> float:
        """Float attribute."""
        v = self.attrs[key] if default is None else self.attrs.get(key, default)
        assert isinstance(v, int | float), (self.name, key, v)
        return float(v)

    def ints_attr(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Integer-tuple attribute."""
        v = self.attrs[key] if default is None else self.attrs.get(key, default)
        assert isinstance(v, tuple), (self.name, key, v)
        return tuple(int(i) for i in v)

    def __repr__(self) -> str:
        """One line of the textual IR."""
        args = ", ".join("-" if v is None else f"%{v.name}" for v in self.inputs)
        outs = ", ".join(map(repr, self.outputs))
        attrs = "".join(f" {k}={v}" for k, v in sorted(self.attrs.items()))
        return f"{outs} = {self.op}({args}){attrs}  # {self.name} [{self.phase}]"


class Graph:
    """Ordered nodes over named values.

    Attributes:
        name: Model name.
        inputs: Values fed at run time (samples, labels).
        constants: Data of parameters and folded constants by value name.
        nodes: Topologically ordered.
        outputs: Results that must be computed.
        values: Every value by name.
        quantization: How values of an annotated float graph may be stored as i8: activations with
            one scale, weights per output channel. Biases follow from the scales of their layer.
            The float graph itself ignores it; ``ir.precision`` lowers by it.
        origins: Where constants come from in the model file; those that importing adds have none.
        notes: What the importer changed to make a model that can be trained.
        loss: Of the prediction and a target, its two inputs: the loss that the file ends in.
        unchanged: Layers that ``ir.precision`` found to do nothing in i8, and left out.
        merged: Nodes that ``ir.precision`` made no node of -> the one that made their results
            before them; None: a run-time input holds it.
        adapters: What stands beside layers; see ``ir.adapters``.
        orders: Constants whose channels stand in another order than in the file -> by axis, the
            file's index of each; None: as in the file. See ``ir.channels``.
    """

    def __init__(self, name: str) -> None:
        """An empty graph."""
        self.name = name
        self.inputs: list[Value] = []
        self.constants: dict[str, Array] = {}
        self.nodes: list[Node] = []
        self.outputs: list[Value] = []
        self.values: dict[str, Value] = {}
        self.quantization: dict[str, Quantization] = {}
        self.origins: dict[str, Origin] = {}
        self.notes: tuple[str, ...] = ()
        self.loss: Graph | None = None
        self.unchanged: frozenset[str] = frozenset()
        self.merged: dict[str, str | None] = {}
        self.adapters: tuple[Adapter, ...] = ()
        self.orders: dict[str, AxisOrders] = {}

    def add_input(self, name: str, type_: TensorType) -> Value:
        """Declare a run-time input."""
        value = self._new_value(name, type_)
        self.inputs.append(value)
        return value

    def add_constant(
        self,
        name: str,
        data: Array,
        dtype: str | None = None,
        quant: Quantization | None = None,
        *,
        shape: tuple[int, ...] | None = None,
        origin: Origin | None = None,
    ) -> Value:
        """Declare a constant (parameter) with data; dtype and shape are the array's if not given.

        Packed bits need both.
        """
        if dtype is None:
            dtype = next((k for k, (d, _) in DTYPES.items() if np.dtype(d) == data.dtype), None)
            if dtype is None:
                raise GraphError(f"constant {name}: dtype {data.dtype} is not supported")
        dims = tuple(data.shape) if shape is None else shape
        value = self._new_value(name, TensorType(dims, dtype, quant))
        self.constants[name] = data
        if origin is not None:
            self.origins[name] = origin
        return value

    def add_state(self, name: str, type_: TensorType) -> Value:
        """Declare a value that nobody in the graph produces and that has no constant data."""
        return self._new_value(name, type_)

    def add_node(
        self,
        op: str,
        inputs: Iterable[Value | None],
        attrs: Mapping[str, Attr] | None = None,
        *,
        name: str,
        outputs: Iterable[str] | None = None,
        phase: Phase = "forward",
    ) -> Node:
        """Append a node; result types come from the operator's inference rule.

        Args:
            op: Registered operator.
            inputs: Operands, None where an optional one is absent.
            attrs: Attributes.
            name: Wanted node name; a suffix makes it unique.
            outputs: Wanted result names; default: the node's name (with ``.i`` beyond the first).
            phase: Part of the training graph.

        Raises:
            GraphError: Unknown operator or operands that do not fit it; names the node.
        """
        node = Node(op, self._unique_node(name), tuple(inputs), (), dict(attrs or {}), phase)
        types = _infer(node)
        for t in types:
            _check_size(f"node {node.name} ({node.op})", t)
        wanted = list(outputs) if outputs is not None else []
        names = [
            wanted[i] if i < len(wanted) else (node.name if i == 0 else f"{node.name}.{i}")
            for i in range(len(types))
        ]
        node.outputs = tuple(
            Value(self._unique_value(n), t, node) for n, t in zip(names, types, strict=True)
        )
        for v in node.outputs:
            self.values[v.name] = v
        self.nodes.append(node)
        self._node_names.add(node.name)
        return node

    def consumers(self) -> dict[Value, list[Node]]:
        """Nodes that read each value, in order; values without a reader map to an empty list."""
        result: dict[Value, list[Node]] = {v: [] for v in self.values.values()}
        for node in self.nodes:
            for v in node.operands():
                if node not in result[v]:
                    result[v].append(node)
        return result

    def verify(self) -> None:
        """Check the structural rules; call it after every pass.

        Raises:
            GraphError: Duplicate names, use before definition (which includes cycles), a dtype or
                shape that disagrees with inference, constants whose data do not fit.
        """
        defined: set[Value] = set()
        for v in self.values.values():
            if v.producer is None:
                defined.add(v)
        seen: set[str] = set()
        for name, data in self.constants.items():
            t = self.values[name].type
            if tuple(data.shape) != t.storage_shape or data.dtype != t.np_dtype:
                raise GraphError(f"constant {name}: data {data.dtype}{data.shape} is not {t}")
        for name, quant in self.quantization.items():
            if name not in self.values or not quant.fits(self.values[name].type.shape):
                raise GraphError(f"quantization of {name} ({quant}): no value that it fits")
        for node in self.nodes:
            if node.name in seen:
                raise GraphError(f"node name {node.name} occurs twice")
            seen.add(node.name)
            for v in node.operands():
                if v not in defined:
                    raise GraphError(f"node {node.name} reads {v.name} before it is computed")
                if self.values.get(v.name) is not v:
                    raise GraphError(f"node {node.name} reads {v.name}, which is of another graph")
            types = _infer(node)
            got = tuple(v.type for v in node.outputs)
            if tuple(types) != got:
                raise GraphError(f"node {node.name}: results {got} but inferred {tuple(types)}")
            for v in node.outputs:
                if self.values.get(v.name) is not v:
                    raise GraphError(f"value name {v.name} occurs twice, or is of another graph")
                if v.producer is not node:
                    raise GraphError(f"value {v.name} does not point at its producer {node.name}")
                if v in defined:
                    raise GraphError(f"value {v.name} is computed twice")
                defined.add(v)
        for v in self.outputs:
            if v not in defined:
                raise GraphError(f"output {v.name} is never computed")

    def __repr__(self) -> str:
        """The textual IR."""
        lines = [f"graph {self.name}({', '.join(map(repr, self.inputs))})"]
        lines += [f"  {n!r}" for n in self.nodes]
        lines.append(f"  return {', '.join(v.name for v in self.outputs)}")
        return "\n".join(lines)

    @property
    def _node_names(self) -> set[str]:
        if not hasattr(self, "_names"):
            self._names: set[str] = {n.name for n in self.nodes}
        return self._names

    def _new_value(self, name: str, type_: TensorType) -> Value:
        if name in self.values:
            raise GraphError(f"value name {name} occurs twice")
        if any(d <= 0 for d in type_.shape):
            raise GraphError(f"value {name}: {type_} has a dimension that is not positive")
        _check_size(f"value {name}", type_)
        if type_.quant is not None and (type_.dtype != "i8" or not type_.quant.fits(type_.shape)):
            raise GraphError(f"value {name}: {type_} can't be quantized as {type_.quant}")
        value = Value(name, type_)
        self.values[name] = value
        return value

    def _unique_value(self, name: str) -> str:
        return unique_name(name, self.values)

    def _unique_node(self, name: str) -> str:
        return unique_name(name, self._node_names)


def _infer(node: Node) -> tuple[TensorType, ...]:
    """Result types of a node.

    Raises:
        GraphError: Operands or attributes do not fit the operator; names the node.
    """
    from .opdef import get_op  # the registry needs Node and TensorType from this module

    definition = get_op(node.op)
    try:
        return tuple(definition.infer(node))
    except (GraphError, AssertionError, IndexError, KeyError, ValueError) as e:
        raise GraphError(f"node {node.name} ({node.op}): {e}") from e


def _check_size(what: str, type_: TensorType) -> None:
    if type_.size > MAX_ELEMENTS:
        raise GraphError(f"{what}: {type_} has more than {MAX_ELEMENTS} elements")


def unique_name(name: str, taken: Container[str]) -> str:
    """The name, or the next one that is not taken."""
    if name not in taken:
        return name
    i = 2
    while f"{name}~{i}" in taken:
        i += 1
    return f"{name}~{i}"

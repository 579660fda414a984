"""From an annotated float graph and a precision per layer to a graph with operators on i8 values.

A **layer** is a node with an integer twin together with the Relu or Clip behind it, if the value
between them is not annotated: that becomes the clamp of the operator on i8 values. A layer is
*i8* (integer operator), *mixed* (f32 weights and arithmetic, i8 operand and result) or *f32*. Where
f32 meets i8, one Quantize or Dequantize per value is written. What only moves data follows its
operand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import numpy as np

from .errors import UsageError
from .graph import Array, Attr, Graph, Node, TensorType, Value
from .lowered_layers import (
    INTEGER,
    MIXED,
    bias_and_factors,
    clamp_of,
    follower_of,
    mixed_obstacle,
    obstacle,
    out_axis,
)
from .provenance import Moved
from .quantization import HIGH, LOW, Quantization

Precision = Literal["f32", "mixed", "i8"]

#: Operators that hold what their operand holds, and exist for i8.
MOVES = ("Reshape", "Slice", "Transpose")


def quantizable(graph: Graph) -> dict[str, str | None]:
    """Why each layer can't be i8; None where it can.

    Args:
        graph: A forward graph, annotated or not.

    Returns:
        Name of the layer's first node -> reason or None, in order. Nodes without an integer twin,
        and those that are part of the layer before them, are left out.
    """
    return {n.name: obstacle(graph, n, follower) for n, follower in _layers(graph)}


def mixable(graph: Graph) -> dict[str, str | None]:
    """Why each layer with weights can't be mixed; None where it can.

    Args:
        graph: A forward graph, annotated or not.

    Returns:
        Name of the layer's first node -> reason or None, in order.
    """
    return {
        n.name: mixed_obstacle(graph, n, follower)
        for n, follower in _layers(graph)
        if n.op in MIXED
    }


def _layers(graph: Graph) -> Iterator[tuple[Node, Node | None]]:
    """First node of each layer, and the Relu or Clip that is part of it."""
    readers = graph.consumers()
    behind: set[Node] = set()
    for node in graph.nodes:
        if node.op not in INTEGER or node in behind:
            continue
        follower = follower_of(graph, node, readers)
        if follower is not None:
            behind.add(follower)
        yield node, follower


def all_i8(graph: Graph, *, inputs: bool = False) -> dict[str, Precision]:
    """The precision i8 for every layer that can have it.

    Args:
        graph: An annotated forward graph.
        inputs: Also the run-time inputs: the application hands them over quantized.
    """
    chosen: dict[str, Precision] = {n: "i8" for n, why in quantizable(graph).items() if why is None}
    if inputs:
        chosen |= {v.name: "i8" for v in graph.inputs if v.name in graph.quantization}
    return chosen


def lower(graph: Graph, precision: Mapping[str, Precision]) -> Graph:
    """The graph that computes the chosen layers on i8 values.

    Args:
        graph: An annotated forward graph; not modified.
        precision: Layer (its first node) or run-time input -> precision; f32 where not named. An
            input in i8 takes the stored values of its quantization.

    Returns:
        A new graph. Values and constants keep their names; where both forms of a value exist, the
        computed one has the name, but outputs are always f32.

    Raises:
        UsageError: A name or precision is not known, or a layer can't have it; says why.
    """
    reasons = {"i8": quantizable(graph), "mixed": mixable(graph)}
    weightless = {n.name for n in graph.nodes if n.op not in MIXED} | {v.name for v in graph.inputs}
    names = {n.name for n in graph.nodes} | {v.name for v in graph.inputs}
    for name, wanted in precision.items():
        if name not in names:
            raise UsageError(f"precision of {name}: {graph.name} has no layer or input like that")
        if wanted not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise UsageError(f"precision of {name}: {wanted} is not one of {known}")
        reason = reasons.get(wanted, {}).get(name)
        if reason is not None:
            raise UsageError(
                f"{name} can't be {wanted}: {reason}; calibrate the model or keep it f32"
            )
        if wanted == "mixed" and name in weightless:
            raise UsageError(f"{name} can't be mixed: it has no weights; make it i8 or keep it f32")
    for v in graph.inputs:
        free = v.type.dtype == "f32" and v.name not in graph.quantization
        if precision.get(v.name) == "i8" and free:
            raise UsageError(
                f"input {v.name} can't be i8: its range is not known; calibrate the model"
            )
    return _Lowering(graph, precision).run()


class _Lowering:
    """The two graphs while the second one grows."""

    def __init__(self, graph: Graph, precision: Mapping[str, Precision]) -> None:
        self.old = graph
        self.new = Graph(graph.name)
        self.new.loss = graph.loss
        self.new.adapters = graph.adapters
        self.precision = precision
        self.readers = graph.consumers()
        self.real: dict[Value, Value] = {}
        self.stored: dict[Value, Value] = {}
        self.done: set[Node] = set()

    def run(self) -> Graph:
        old, new = self.old, self.new
        for v in old.inputs:
            if v.type.dtype == "f32" and self.precision.get(v.name) == "i8":
                t = TensorType(v.type.shape, "i8", old.quantization[v.name])
                self.stored[v] = new.add_input(v.name, t)
            else:
                self.real[v] = new.add_input(v.name, v.type)
        for node in old.nodes:
            if node not in self.done:
                self._node(node)
        new.outputs = [self._real(v) for v in old.outputs]
        new.quantization = {
            k: q
            for k, q in old.quantization.items()
            if k in new.values and new.values[k].type == old.values[k].type
        }
        new.verify()
        return new

    def _node(self, node: Node) -> None:
        x = node.inputs[0] if node.inputs else None
        if node.op == "Dequantize" and x is not None and self._quant(node.out) == x.type.quant:
            self.stored[node.out] = self.real[x]  # a run-time input that is i8 in the file
            self.new.merged[node.name] = None
            return
        if node.op in MOVES and x is not None and self._moves_integers(node, x):
            self.stored[node.out] = self._emit(node, node.op, (self._stored(x),), node.attrs)
            return
        if node.op in INTEGER and self.precision.get(node.name) == "i8":
            self._integer(node)
            return
        if node.op in MIXED and self.precision.get(node.name) == "mixed":
            self._mixed(node)
            return
        inputs = [None if v is None else self._real(v) for v in node.inputs]
        twin = self.new.add_node(
            node.op, inputs, node.attrs, name=node.name, outputs=[v.name for v in node.outputs]
        )
        self.real |= dict(zip(node.outputs, twin.outputs, strict=True))
        for v in node.outputs:
            if v not in self.old.outputs and self._only_integers(v):
                self._stored(v)  # at once, which frees the f32 form

    def _moves_integers(self, node: Node, x: Value) -> bool:
        """A move is done in i8: its operand is i8, or will be at once because only i8 is read."""
        quant = self._quant(node.out)
        if quant is None or self._quant(x) != quant:
            return False
        if x in self.stored:
            return True
        return node.out not in self.old.outputs and self._only_integers(node.out)

    def _only_integers(self, v: Value) -> bool:
        """All readers take the i8 form of an annotated value, and there are some."""
        quant = self._quant(v)
        return (
            quant is not None
            and bool(self.readers[v])
            and all(
                (r.op in INTEGER and self.precision.get(r.name, "f32") != "f32")
                or (r.op in MOVES and self._quant(r.out) == quant and self._only_integers(r.out))
                for r in self.readers[v]
            )
        )

    # -- values ------------------------------------------------------------------------------------

    def _quant(self, v: Value) -> Quantization | None:
        return self.old.quantization.get(v.name)

    def _real(self, v: Value) -> Value:
        """The f32 form of a value."""
        if v not in self.real:
            if v.name in self.old.constants:
                data = self.old.constants[v.name]
                if (orders := self.old.orders.get(v.name)) is not None:
                    self.new.orders[v.name] = orders
                self.real[v] = self.new.add_constant(
                    v.name,
                    data,
                    v.type.dtype,
                    v.type.quant,
                    shape=v.type.shape,
                    origin=self.old.origins.get(v.name),
                )
            else:
                name = f"{v.name}/real" if v.name in self.new.values else v.name
                node = self.new.add_node(
                    "Dequantize", (self.stored[v],), name=f"{v.name}/dequantize", outputs=[name]
                )
                self.real[v] = node.out
        return self.real[v]

    def _stored(self, v: Value) -> Value:
        """The i8 form of an annotated value."""
        if v not in self.stored:
            quant = self.old.quantization[v.name]
            if v.name in self.old.constants:
                data = quant.quantize(self.old.constants[v.name])
                self.stored[v] = self._constant(v, v.name, data, quant)
            else:
                node = self.new.add_node(
                    "Quantize",
                    (self.real[v],),
                    _result_attrs(quant),
                    name=f"{v.name}/quantize",
                    outputs=[f"{v.name}/i8"],
                )
                self.stored[v] = node.out
        return self.stored[v]

    def _constant(
        self, v: Value, name: str, data: Array, quant: Quantization | None = None
    ) -> Value:
        """The integers of a constant, maybe transposed; the origin is that of its real numbers.

        A suffix makes the name free where the f32 form or another twin has it.
        """
        array, origin = np.ascontiguousarray(data), self.old.origins.get(v.name)
        wanted, i = name, 2
        kept = self._kept_real(name)
        while wanted in self.new.values or (wanted == name and kept):
            suffix = "i8" if quant is not None else "i32"
            wanted, i = f"{name}/{suffix}" if i == 2 else f"{name}/{suffix}~{i}", i + 1
        if (orders := self.old.orders.get(v.name)) is not None:
            self.new.orders[wanted] = orders
        return self.new.add_constant(wanted, array, None, quant, origin=origin)

    def _kept_real(self, name: str) -> bool:
        """A layer that stays f32 reads the constant too."""
        v = self.old.values.get(name)
        return v is not None and any(
            self.precision.get(n.name) != "i8" for n in self.readers.get(v, ())
        )

    # -- operators on i8 values --------------------------------------------------------------------

    def _begin(self, node: Node) -> tuple[Node, dict[str, Attr]]:
        """Last node of a layer, which is done now, and the attributes of the layer's result."""
        follower = follower_of(self.old, node, self.readers)
        last = node if follower is None else follower
        quant = self.old.quantization[last.out.name]
        self.done.add(last)
        if follower is not None:
            self.new.merged[follower.name] = node.name
        return last, {**_result_attrs(quant), "clamp": clamp_of(follower or node, quant)}

    def _mixed(self, node: Node) -> None:
        last, attrs = self._begin(node)
        x = self._stored(_operand(node, 0))
        constants = [None if v is None else self._real(v) for v in node.inputs[1:]]
        own = {"MatMul": {"trans_b": 0}}.get(node.op, node.attrs)
        op = MIXED[node.op]
        self.stored[last.out] = self._emit(last, op, (x, *constants), {**own, **attrs}, node.name)

    def _integer(self, node: Node) -> None:
        last, attrs = self._begin(node)
        quant = self.old.quantization[last.out.name]
        if node.op in ("Conv", "Gemm", "MatMul"):
            out = self._product(node, last, attrs)
        elif node.op in ("Relu", "Clip"):
            x = self._stored(_operand(node, 0))
            if x.type.quant == quant and attrs["clamp"] == (LOW, HIGH):
                self.stored[last.out] = x
                self.new.unchanged |= {node.name}
                self.new.merged[node.name] = None if x.producer is None else x.producer.name
                return
            out = self._emit(last, "Requantize", (x,), attrs, node.name)
        elif node.op == "MaxPool":
            x = self._stored(_operand(node, 0))
            out = self._emit(last, "QMaxPool", (x,), node.attrs, node.name)
        elif node.op == "ReduceMean":
            out = self._mean(node, last, attrs)
        else:
            inputs = [self._stored(v) for v in node.operands()]
            geometry = {k: v for k, v in node.attrs.items() if k not in attrs}
            out = self._emit(last, INTEGER[node.op], inputs, {**geometry, **attrs}, node.name)
        self.stored[last.out] = out

    def _product(self, node: Node, last: Node, attrs: dict[str, Attr]) -> Value:
        x, w = self._stored(_operand(node, 0)), _operand(node, 1)
        constants = bias_and_factors(self.old, node, attrs)
        name = f"{w.name}/{node.name}" if w in self.stored else w.name
        weight = self._constant(w, name, constants.weight, constants.quant)
        if out_axis(node) != 0:
            if (origin := self.new.origins.get(weight.name)) is not None:
                self.new.origins[weight.name] = origin.then(Moved(np.transpose))
            if (orders := self.new.orders.get(weight.name)) is not None:
                self.new.orders[weight.name] = orders[::-1]
        self.stored.setdefault(w, weight)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        b = None if bias is None else self._constant(bias, bias.name, constants.bias)
        factors = [
            self.new.add_constant(f"{node.name}/{k}", v)
            for k, v in (("multiplier", constants.multiplier), ("shift", constants.shift))
        ]
        geometry = dict(node.attrs) if node.op == "Conv" else {}
        return self._emit(
            last, INTEGER[node.op], (x, weight, b, *factors), {**geometry, **attrs}, node.name
        )

    def _mean(self, node: Node, last: Node, attrs: dict[str, Attr]) -> Value:
        """A mean over the last axes is a pool and a view."""
        x = self._stored(_operand(node, 0))
        shape, count = x.type.shape, len(node.ints_attr("axes"))
        if count == len(shape) - 2:
            op = "QGlobalAveragePool"
        else:
            op, spatial = "QAveragePool", shape[2:]
            ones = len(spatial) - count
            kernel = (*(1,) * ones, *spatial[ones:])
            attrs = {
                **attrs,
                "kernel_shape": kernel,
                "strides": kernel,
                "pads": (0,) * (2 * len(spatial)),
                "dilations": (1,) * len(spatial),
                "ceil_mode": 0,
                "count_include_pad": 0,
            }
        pooled = self.new.add_node(op, (x,), attrs, name=f"{node.name}/pool").out
        if pooled.type.shape == last.out.type.shape:
            return pooled
        return self._emit(last, "Reshape", (pooled,), {"shape": last.out.type.shape}, node.name)

    def _emit(
        self,
        last: Node,
        op: str,
        inputs: tuple[Value | None, ...] | list[Value],
        attrs: Mapping[str, Attr],
        name: str | None = None,
    ) -> Value:
        """The integer node that computes the result of ``last``."""
        out = f"{last.out.name}/i8" if last.out in self.old.outputs else last.out.name
        return self.new.add_node(op, inputs, attrs, name=name or last.name, outputs=[out]).out


def _operand(node: Node, index: int) -> Value:
    v = node.inputs[index]
    assert v is not None, (node.name, index)
    return v


def _result_attrs(quant: Quantization) -> dict[str, Attr]:
    return {
        "out_scale": quant.scale[0],
        "out_zero_point": quant.zero_point,
        "clamp": (LOW, HIGH),
    }

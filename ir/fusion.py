"""Chains of nodes that are one activation become that activation.

Exporters write GELU as up to nine nodes around a tanh or an erf, in many orders. Each of them would
save its operands for backward. Chains are found by what they compute: their values at points of an
interval, in double precision.
"""

from __future__ import annotations

import numpy as np

from .graph import Array, Graph, Node, Value
from .opdef import get_op
from .surgery import drop_unread, nodes_of, operand_of, take_out

#: The function in the middle of a chain -> the operator that the whole chain is.
_FORMS = {"Tanh": "Gelu", "Erf": "GeluErf"}
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", *_FORMS)
#: Where chains are compared, and how far they may be off: constants of files are rounded, but the
#: two forms of GELU differ by 5e-4.
_POINTS = np.linspace(-8.0, 8.0, 321)
_TOLERANCE = 1e-5
#: Most nodes behind that function that a chain is looked for in.
_REACH = 4


def merge_gelu(graph: Graph) -> bool:
    """Chains around a Tanh or Erf that compute GELU of one value become a Gelu of it."""
    changed = False
    for middle in (n for op in _FORMS for n in nodes_of(graph, op)):
        found = _gelu(graph, middle)
        if found is None:
            continue
        x, chain = found
        last = chain[-1]
        last.op, last.attrs, last.inputs = _FORMS[middle.op], {}, (x,)
        for node in reversed(chain[:-1]):
            drop_unread(graph, node)
        changed = True
    return changed


def drop_nan_guards(graph: Graph) -> bool:
    """What replaces NaN in the result of a Softmax is left out.

    PyTorch's exporter writes it for rows in which everything is masked by -inf. Softmax of finite
    numbers is never NaN; where a Where in front of it may mask by -inf, all stays as it is.
    """
    changed = False
    for node in nodes_of(graph, "Where"):
        condition, _, x = node.inputs
        negated = None if condition is None else condition.producer
        same = None if negated is None or negated.op != "Not" else operand_of(negated, 0).producer
        if x is None or x.producer is None or x.producer.op != "Softmax":
            continue
        scores = operand_of(x.producer, 0).producer
        if scores is not None and scores.op == "Where":
            continue
        if same is None or same.op != "Equal" or same.inputs != (x, x) or x.type != node.out.type:
            continue
        node.inputs = (x,)
        if take_out(graph, node):
            assert negated is not None
            drop_unread(graph, negated)
            drop_unread(graph, same)
            changed = True
        else:
            node.inputs = (condition, None, x)
    return changed


def _gelu(graph: Graph, middle: Node) -> tuple[Value, list[Node]] | None:
    """The operand of a GELU with this Tanh or Erf in it, and the nodes that make it, in order."""
    y = middle.out
    (wanted,) = get_op(_FORMS[middle.op]).kernel(middle, [_POINTS])
    for _ in range(_REACH):
        readers = [n for n in graph.nodes if y in n.inputs]
        if len(readers) != 1 or readers[0].op not in _ELEMENTWISE or y in graph.outputs:
            return None
        y = readers[0].out
        for x in _operands(graph, middle):
            chain = _chain(graph, x, y)
            if chain is None or any(n.out.name in graph.quantization for n in chain[:-1]):
                continue
            off = np.abs(_values(graph, chain, x) - wanted).max()
            if x.type == y.type and off < _TOLERANCE:
                return x, chain
    return None


def _operands(graph: Graph, node: Node) -> list[Value]:
    """Values that a node is computed from by elementwise nodes, nearest first."""
    result: list[Value] = []
    waiting = [node]
    while waiting:
        for v in waiting.pop(0).operands():
            if v.name in graph.constants or v in result:
                continue
            result.append(v)
            if v.producer is not None and v.producer.op in _ELEMENTWISE:
                waiting.append(v.producer)
    return result


def _chain(graph: Graph, x: Value, y: Value) -> list[Node] | None:
    """The nodes that compute y from x and constant numbers, in order; None if more is needed."""
    found: set[Node] = set()
    waiting = [y]
    while waiting:
        v = waiting.pop()
        if v is x or (v.name in graph.constants and v.type.size == 1):
            continue
        if v.producer is None or v.producer.op not in _ELEMENTWISE:
            return None
        if v.producer not in found:
            found.add(v.producer)
            waiting += v.producer.operands()
    return [n for n in graph.nodes if n in found]


def _values(graph: Graph, chain: list[Node], x: Value) -> Array:
    """What a chain computes from the points."""
    known: dict[Value, Array] = {x: _POINTS}
    for node in chain:
        inputs = [
            known[v] if v in known else graph.constants[v.name].astype(np.float64).reshape(())
            for v in node.operands()
        ]
        (known[node.out],) = get_op(node.op).kernel(node, inputs)
    return known[chain[-1].out]

"""Chains of nodes that are one activation become that activation.

Exporters write GELU as up to nine nodes around a tanh or an erf. Each of them would save its
operands for backward.
"""

from __future__ import annotations

import numpy as np

from .chains import Chain, chains
from .graph import Attr, Graph, Node, Value, unique_name
from .opdef import get_op
from .surgery import drop_unread, nodes_of, operand_of, take_out

#: The function in the middle of a chain -> the operator that the whole chain is.
_FORMS = {
    "Clip": "HardSwish",
    "Erf": "GeluErf",
    "HardSigmoid": "HardSwish",
    "Sigmoid": "Swish",
    "Softplus": "Mish",
    "Tanh": "Gelu",
}
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Relu", *_FORMS)
#: Where chains are compared, and how far they may be off: constants of files are rounded, but the
#: two forms of GELU differ by 5e-4.
_POINTS = np.linspace(-8.0, 8.0, 321)
_TOLERANCE = 1e-5
#: Most nodes one after the other behind that function.
_REACH = 4


def merge_activations(graph: Graph) -> bool:
    """Chains that compute GELU, Swish, HardSwish or Mish of one value become that operator."""
    changed = False
    for middle in [n for n in graph.nodes if n.op in _FORMS]:
        if middle not in graph.nodes:
            continue  # it was part of another one's chain
        for chain in chains(graph, middle, _ELEMENTWISE, _REACH):
            attrs = _recognized(chain, _FORMS[middle.op])
            if attrs is not None:
                chain.become(graph, _FORMS[middle.op], attrs)
                changed = True
                break
    return changed


def _recognized(chain: Chain, op: str) -> dict[str, Attr] | None:
    """Attributes with which an operator computes what the chain does; None if there are none."""
    if len(chain.nodes) < 2 or any(c.size > 1 for c in chain.constants.values()):
        return None
    got = chain.values(_POINTS)
    rates = {1.0, *(float(c.reshape(())) for c in chain.constants.values())}
    for attrs in [{"alpha": r} for r in rates] if op == "Swish" else [{}]:
        (want,) = get_op(op).kernel(Node(op, "", (), (), dict(attrs)), [_POINTS])
        if np.abs(got - want).max() < _TOLERANCE:
            return dict(attrs)
    return None


def merge_two_classes(graph: Graph) -> bool:
    """The probabilities ``1 - p, p`` of a Sigmoid are a Softmax of 0 and its operand.

    So a loss on them has the logits to be exact and stable with.
    """
    changed = False
    for join in nodes_of(graph, "Concat"):
        first, p = (*join.inputs, None, None)[:2]
        rest = None if first is None else first.producer
        sigmoid = None if p is None else p.producer
        if len(join.inputs) != 2 or rest is None or rest.op != "Sub" or sigmoid is None:
            continue
        one = graph.constants.get(operand_of(rest, 0).name)
        rank = len(join.out.type.shape)
        last = join.int_attr("axis") % rank == rank - 1
        if sigmoid.op != "Sigmoid" or rest.inputs[1] is not p or not last or one is None:
            continue
        z = operand_of(sigmoid, 0)
        if (
            one.size != 1
            or one.reshape(()) != 1
            or z.type.shape[-1] != 1
            or rest.out.type != z.type
        ):
            continue
        if any(v.name in graph.quantization for v in join.operands()):
            continue
        begins = (*(0,) * (rank - 1), 1)
        name = unique_name(f"{join.out.name}/logits", graph.values)
        logits = graph.values[name] = Value(name, join.out.type)
        free = unique_name(f"{join.name}/logits", {n.name for n in graph.nodes})
        attrs: dict[str, Attr] = {"begins": begins, "ends": (0,) * rank, "value": 0.0}
        logits.producer = Node("Pad", free, (z,), (logits,), attrs)
        graph.nodes.insert(graph.nodes.index(join), logits.producer)
        join.op, join.attrs, join.inputs = "Softmax", {"axis": -1}, (logits,)
        drop_unread(graph, rest)
        drop_unread(graph, sigmoid)
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


def drop_zero_states(graph: Graph) -> bool:
    """Sums with what a gate lets through of a state of zeros are left out.

    It is the state that an LSTM begins with where its steps are written out; no parameter.
    """
    changed = False
    for node in nodes_of(graph, "Add"):
        for x, kept in (node.inputs, node.inputs[::-1]):
            gated = None if kept is None else kept.producer
            if x is None or x.type != node.out.type or gated is None or gated.op != "Mul":
                continue
            gate, zeros = sorted(gated.operands(), key=lambda v: v.name in graph.constants)
            data = graph.constants.get(zeros.name)
            if data is None or data.any() or zeros.type != node.out.type:
                continue
            if gate.producer is None or gate.producer.op != "Sigmoid":
                continue
            whole, node.inputs = node.inputs, (x,)
            if take_out(graph, node):
                drop_unread(graph, gated)
                changed = True
            else:
                node.inputs = whole
            break
    return changed


def drop_zero_masks(graph: Graph) -> bool:
    """Sums with zeros that nodes of the file make of no weight are left out.

    The definition of Attention adds them where no mask is given; a bias of zeros stays a parameter.
    """
    changed = False
    for node in nodes_of(graph, "Add"):
        for x, c in (node.inputs, node.inputs[::-1]):
            data, origin = graph.constants.get(c.name if c else ""), None
            if data is None or data.any() or x is None or x.type != node.out.type:
                continue
            assert c is not None
            origin = graph.origins.get(c.name)
            if origin is None or not origin.computed or c.name in graph.quantization:
                continue
            whole, node.inputs = node.inputs, (x,)
            if take_out(graph, node):
                changed = True
            else:
                node.inputs = whole
            break
    return changed

"""Chains of nodes that are one activation become that activation.

Exporters write GELU as up to nine nodes around a tanh or an erf. Each of them would save its
operands for backward.
"""

from __future__ import annotations

import numpy as np

from .chains import Chain, chains
from .graph import Attr, Graph, Node
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

"""Normalizations that exporters write as several nodes become one.

As one node they save their operand alone, and have one scale and bias per channel to train.
"""

from __future__ import annotations

from math import prod

import numpy as np

from .graph import Graph, Node, Value
from .provenance import Moved
from .surgery import absorb, drop_unread, forget, nodes_of, only_reader, operand_of


def merge_group_norm(graph: Graph) -> bool:
    """Instances of groups between two Reshapes are groups: GroupNorm before opset 18."""
    changed = False
    for norm in nodes_of(graph, "GroupNormalization"):
        rows = operand_of(norm, 0)
        before, after = rows.producer, _reader(graph, norm.out)
        if before is None or before.op != "Reshape" or after is None or after.op != "Reshape":
            continue
        x, groups = operand_of(before, 0), rows.type.shape[1]
        shape = x.type.shape
        same = after.out.type.shape == shape and groups == norm.int_attr("num_groups", 1)
        if not same or len(shape) < 2 or rows.type.shape[0] != shape[0] or shape[1] % groups:
            continue
        if any(v.name in graph.quantization for v in (rows, norm.out)):
            continue
        if not (_is_all(graph, norm, 1, 1.0) and _is_all(graph, norm, 2, 0.0)):
            continue
        norm.inputs = (x,)
        absorb(graph, norm, after)
        drop_unread(graph, before)
        changed = True
    return changed


def merge_scale(graph: Graph) -> bool:
    """A number per channel behind a normalization without them is its scale, then its bias."""
    changed = False
    for norm in nodes_of(graph, "GroupNormalization"):
        scale, bias = (*norm.inputs[1:], None, None)[:2]
        follower = _reader(graph, norm.out)
        if follower is None or follower.op not in ("Mul", "Add") or bias is not None:
            continue
        if follower.op == "Mul" and scale is not None:
            continue
        other = next((v for v in follower.operands() if v is not norm.out), norm.out)
        shape = norm.out.type.shape
        if not _runs_along(graph, other, 1, shape) or follower.out.type.shape != shape:
            continue
        if scale is not None and scale.type.shape != shape[1:2]:
            continue  # one per group
        if norm.out.name in graph.quantization:
            continue
        constant = _as_vector(graph, other, follower)
        norm.inputs = (
            norm.inputs[0],
            *((constant,) if follower.op == "Mul" else (scale, constant)),
        )
        absorb(graph, norm, follower)
        changed = True
    return changed


def merge_rms_norm(graph: Graph) -> bool:
    """``x / sqrt(mean(x * x) + epsilon) * scale`` over the last axes is RMS normalization."""
    changed = False
    for mean in nodes_of(graph, "ReduceMean"):
        found = _rms_norm(graph, mean)
        if found is None:
            continue
        x, epsilon, scale, chain = found
        last = chain[-1]
        axis = len(x.type.shape) - len(scale.type.shape)
        last.op, last.attrs = "RMSNormalization", {"axis": axis, "epsilon": epsilon}
        last.inputs = (x, scale)
        for node in reversed(chain[:-1]):
            drop_unread(graph, node)
        changed = True
    return changed


def _rms_norm(graph: Graph, mean: Node) -> tuple[Value, float, Value, list[Node]] | None:
    """Operand, epsilon, scale and the nodes, in order, of an RMS normalization with this mean."""
    square = operand_of(mean, 0).producer
    if square is None or square.op not in ("Mul", "Pow"):
        return None
    x, factor = operand_of(square, 0), operand_of(square, 1)
    if factor is not x if square.op == "Mul" else _number(graph, factor) != 2.0:
        return None
    rank = len(x.type.shape)
    axes = sorted(a % rank for a in mean.ints_attr("axes", tuple(range(rank))))
    if axes != list(range(axes[0], rank)) or not mean.int_attr("keepdims", 1):
        return None
    add = _reader(graph, mean.out)
    if add is None or add.op != "Add":
        return None
    epsilon = next((n for v in add.operands() if (n := _number(graph, v)) is not None), None)
    root = _reader(graph, add.out)
    if epsilon is None or root is None or root.op != "Sqrt":
        return None
    chain = [square, mean, add, root]
    inverse = _reader(graph, root.out)
    if inverse is not None and inverse.op == "Reciprocal":
        chain.append(inverse)
        product = _reader(graph, inverse.out)
        fits = product is not None and product.op == "Mul" and x in product.inputs
    else:
        product = inverse
        fits = product is not None and product.op == "Div" and product.inputs[0] is x
    if product is None or not fits or product.out.type.shape != x.type.shape:
        return None
    last = _reader(graph, product.out)
    if last is None or last.op != "Mul" or last.out.type.shape != x.type.shape:
        return None
    scale = next((v for v in last.operands() if v.name in graph.constants), None)
    inner = (*chain, product)
    if scale is None or scale.type.shape != x.type.shape[axes[0] :]:
        return None
    if any(n.out.name in graph.quantization for n in inner):
        return None
    return x, epsilon, scale, [*inner, last]


def _reader(graph: Graph, value: Value) -> Node | None:
    """The only node that reads a value."""
    readers = [n for n in graph.nodes if value in n.inputs]
    return readers[0] if len(readers) == 1 and only_reader(graph, value, readers[0]) else None


def _number(graph: Graph, value: Value) -> float | None:
    """A constant of one element."""
    data = graph.constants.get(value.name)
    return None if data is None or data.size != 1 else float(data.reshape(()))


def _is_all(graph: Graph, node: Node, index: int, number: float) -> bool:
    """An optional operand is a constant that says nothing."""
    v = node.inputs[index] if index < len(node.inputs) else None
    return v is None or (
        v.name in graph.constants and bool((graph.constants[v.name] == number).all())
    )


def _runs_along(graph: Graph, value: Value, axis: int, shape: tuple[int, ...]) -> bool:
    """A constant has a number for each index of an axis of ``shape`` alone."""
    data = graph.constants.get(value.name)
    if data is None or data.ndim > len(shape) or data.size != shape[axis] or prod(shape) == 0:
        return False
    whole = (1,) * (len(shape) - data.ndim) + data.shape
    return whole[axis] == shape[axis]


def _as_vector(graph: Graph, value: Value, user: Node) -> Value:
    """The constant in one dimension; it keeps its name if nobody else reads it."""
    if len(value.type.shape) == 1:
        return value
    name, flat = value.name, Moved(np.ravel)
    data, origin = flat.forward(graph.constants[name]), graph.origins.get(name)
    if only_reader(graph, value, user):
        del graph.constants[name]
        forget(graph, value)
    else:
        name = f"{name}/{user.name}"
    return graph.add_constant(name, data, origin=None if origin is None else origin.then(flat))

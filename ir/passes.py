"""Clean-ups of the forward graph: fewer nodes, fewer tensors to save, biases that can be trained.

Every pass rewrites the graph in place, keeps the names of what stays, and leaves a graph that
verifies. A node that takes over another one's work keeps its own name and takes the other's result.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

from .graph import Array, Graph, Node, Value


def clean(graph: Graph, *, fold_batchnorm: bool = True) -> None:
    """Run all passes until none finds anything to do.

    Args:
        graph: A forward graph; rewritten in place.
        fold_batchnorm: Merge BatchNormalization into the Conv or Gemm before it.

    Raises:
        GraphError: A pass left a graph that does not verify.
    """
    graph.verify()
    passes: list[Callable[[Graph], bool]] = [
        merge_reshapes,
        merge_transposes,
        move_transpose_into_weight,
        merge_pad,
        merge_bias,
    ]
    if fold_batchnorm:
        passes.append(merge_batchnorm)
    changed = True
    while changed:
        changed = False
        for rewrite in passes:
            if rewrite(graph):
                graph.verify()
                changed = True
    drop_dead(graph)
    graph.verify()


def rename(graph: Graph, value: Value, name: str) -> None:
    """Give a value another name that is free."""
    assert name not in graph.values, name
    del graph.values[value.name]
    if value.name in graph.constants:
        graph.constants[name] = graph.constants.pop(value.name)
    value.name = name
    graph.values[name] = value


def drop_dead(graph: Graph) -> None:
    """Remove nodes that no output depends on, and constants that nobody reads."""
    live = set(graph.outputs)
    for node in reversed(graph.nodes):
        if live.intersection(node.outputs):
            live.update(node.operands())
    graph.nodes = [n for n in graph.nodes if live.intersection(n.outputs)]
    live.update(v for n in graph.nodes for v in n.outputs)
    live.update(graph.inputs)
    graph.values = {k: v for k, v in graph.values.items() if v in live}
    graph.constants = {k: a for k, a in graph.constants.items() if k in graph.values}


# -- views and transposes --------------------------------------------------------------------------


def merge_reshapes(graph: Graph) -> bool:
    """A reshape of a reshape skips the first; a reshape to the same shape goes."""
    changed = False
    for node in _of(graph, "Reshape"):
        x = _input(node, 0)
        if x.type.shape == node.out.type.shape and _take_out(graph, node):
            changed = True
            continue
        if x.producer is not None and x.producer.op == "Reshape":
            node.inputs = (x.producer.inputs[0],)
            _drop_unread(graph, x.producer)
            changed = True
    return changed


def merge_transposes(graph: Graph) -> bool:
    """Two transposes in a row become one; one that moves nothing goes or is a reshape."""
    changed = False
    for node in _of(graph, "Transpose"):
        x, perm = _input(node, 0), node.ints_attr("perm")
        before = x.producer
        if before is not None and before.op == "Transpose":
            first = before.ints_attr("perm")
            node.inputs = (before.inputs[0],)
            node.attrs = {"perm": tuple(first[p] for p in perm)}
            _drop_unread(graph, before)
            changed = True
            continue  # the next sweep looks at what has become of it
        if perm == tuple(range(len(perm))):
            if _take_out(graph, node):
                changed = True
            continue
        moved = [p for p in perm if x.type.shape[p] != 1]
        if moved == sorted(moved):
            node.op, node.attrs = "Reshape", {"shape": node.out.type.shape}
            changed = True
    return changed


def move_transpose_into_weight(graph: Graph) -> bool:
    """Transpose -> Reshape to rows -> product with a constant weight: permute the weight instead.

    This is what exporters of channels-last frameworks write before the first dense layer.
    """
    changed = False
    for node in list(graph.nodes):
        if node.op not in ("Gemm", "MatMul") or len(_input(node, 0).type.shape) != 2:
            continue
        view, w = _input(node, 0).producer, _input(node, 1)
        if view is None or view.op != "Reshape" or not _owned(graph, w) or len(w.type.shape) != 2:
            continue
        turn = _input(view, 0).producer
        if turn is None or turn.op != "Transpose" or not _only(graph, view.out, node):
            continue
        perm, shape = turn.ints_attr("perm"), turn.out.type.shape
        if perm[0] != 0 or view.out.type.shape != (shape[0], prod(shape[1:])):
            continue
        rows = node.op == "MatMul" or not node.int_attr("trans_b", 0)
        data = graph.constants[w.name] if rows else graph.constants[w.name].T
        data = data.reshape(*shape[1:], -1)
        back = [perm.index(i) - 1 for i in range(1, len(perm))]  # weight axes in the old order
        data = data.transpose(*back, len(back)).reshape(w.type.shape[0 if rows else 1], -1)
        graph.constants[w.name] = np.ascontiguousarray(data if rows else data.T)
        view.inputs = (turn.inputs[0],)
        _drop_unread(graph, turn)
        changed = True
    return changed


# -- into the layer --------------------------------------------------------------------------------


def merge_pad(graph: Graph) -> bool:
    """A zero Pad of spatial axes before a Conv becomes the Conv's padding."""
    changed = False
    for node in _of(graph, "Conv"):
        x = _input(node, 0)
        pad = x.producer
        if pad is None or pad.op != "Pad" or not _only(graph, x, node):
            continue
        begins, ends = pad.ints_attr("begins"), pad.ints_attr("ends")
        if pad.float_attr("value", 0.0) != 0.0 or any((*begins[:2], *ends[:2])):
            continue
        rank = len(begins) - 2
        old = node.ints_attr("pads", (0,) * (2 * rank))
        extra = (*begins[2:], *ends[2:])
        node.attrs = node.attrs | {"pads": tuple(a + b for a, b in zip(old, extra, strict=True))}
        node.inputs = (pad.inputs[0], *node.inputs[1:])
        _drop_unread(graph, pad)
        changed = True
    return changed


def merge_bias(graph: Graph) -> bool:
    """Adding a constant per channel to a Conv, Gemm or MatMul becomes its bias.

    As a bias it can be trained alone, and its gradient needs no saved activation.
    """
    changed = False
    for add in _of(graph, "Add"):
        for layer_at in (0, 1):
            y, c = _input(add, layer_at), _input(add, 1 - layer_at)
            layer = y.producer
            if layer is None or c.name not in graph.constants or not _only(graph, y, add):
                continue
            channels = _channel_count(graph, layer)
            if channels is None or add.out.type != y.type:
                continue
            axis = 1 if layer.op == "Conv" else len(y.type.shape) - 1
            per_channel = _per_channel(graph.constants[c.name], len(y.type.shape), axis, channels)
            if per_channel is None:
                continue
            old = layer.inputs[2] if len(layer.inputs) > 2 else None
            if old is not None:
                if old.name not in graph.constants:
                    continue
                per_channel = graph.constants[old.name] + per_channel
            if layer.op == "MatMul":
                layer.op, layer.attrs = "Gemm", {"trans_b": 0}
            bias = _constant(graph, old if old is not None else c, per_channel, layer, add)
            layer.inputs = (*layer.inputs[:2], bias)
            _absorb(graph, layer, add)
            changed = True
            break
    return changed


def merge_batchnorm(graph: Graph) -> bool:
    """BatchNormalization with frozen statistics scales the weights of the layer before it."""
    changed = False
    for norm in _of(graph, "BatchNormalization"):
        y = _input(norm, 0)
        layer = y.producer
        statistics = [v.name for v in norm.operands()][1:]
        if layer is None or not _only(graph, y, norm) or _channel_count(graph, layer) is None:
            continue
        constants = [*statistics, *(v.name for v in layer.operands() if v is not layer.inputs[0])]
        if not all(name in graph.constants for name in constants):
            continue
        scale, shift, mean, var = (graph.constants[n].astype(np.float64) for n in statistics)
        factor = scale / np.sqrt(var + norm.float_attr("epsilon", 1e-5))
        if not np.isfinite(factor).all():
            continue
        w, old = _input(layer, 1), layer.inputs[2] if len(layer.inputs) > 2 else None
        start = graph.constants[old.name].astype(np.float64) if old is not None else 0.0
        out_axis = 0 if layer.op == "Conv" or layer.int_attr("trans_b", 0) else 1
        shape = [-1 if i == out_axis else 1 for i in range(len(w.type.shape))]
        weight = graph.constants[w.name].astype(np.float64) * factor.reshape(shape)
        if layer.op == "MatMul":
            layer.op, layer.attrs = "Gemm", {"trans_b": 0}
        bias = _constant(
            graph, old if old is not None else _input(norm, 2), (start - mean) * factor + shift,
            layer, norm,
        )  # fmt: skip
        layer.inputs = (layer.inputs[0], _constant(graph, w, weight, layer, norm), bias)
        _absorb(graph, layer, norm)
        changed = True
    return changed


def _channel_count(graph: Graph, layer: Node) -> int | None:
    """Results of a layer with constant weight that can take a bias; None for other nodes."""
    flat = layer.op == "Gemm" or (layer.op == "MatMul" and len(layer.out.type.shape) == 2)
    if not (layer.op == "Conv" or flat) or len(layer.inputs) > 3:
        return None
    return layer.out.type.shape[1] if _input(layer, 1).name in graph.constants else None


def _per_channel(data: Array, rank: int, axis: int, channels: int) -> Array | None:
    """``data`` as ``[channels]`` if it is constant along every other axis of the result."""
    shape = (1,) * (rank - data.ndim) + data.shape
    if any(d != 1 for i, d in enumerate(shape) if i != axis) or shape[axis] not in (1, channels):
        return None
    return np.broadcast_to(data.reshape(-1), (channels,))


def _constant(graph: Graph, like: Value, data: Array, *users: Node) -> Value:
    """A constant that replaces ``like`` in ``users``; keeps its name if nobody else reads it."""
    array = np.ascontiguousarray(data, np.float32)
    others = any(like in n.inputs for n in graph.nodes if n not in users)
    if others or like in graph.outputs:
        name, i = f"{like.name}/{users[0].name}", 2
        while name in graph.values:
            name, i = f"{like.name}/{users[0].name}~{i}", i + 1
        return graph.add_constant(name, array)
    del graph.values[like.name], graph.constants[like.name]
    return graph.add_constant(like.name, array)


# -- surgery ---------------------------------------------------------------------------------------


def _of(graph: Graph, op: str) -> list[Node]:
    return [n for n in graph.nodes if n.op == op]


def _input(node: Node, index: int) -> Value:
    v = node.inputs[index]
    assert v is not None, (node.name, index)
    return v


def _only(graph: Graph, value: Value, reader: Node) -> bool:
    """``reader`` is all that reads the value, once."""
    reads = sum(v is value for n in graph.nodes for v in n.operands())
    return reads == 1 and value not in graph.outputs and value in reader.inputs


def _owned(graph: Graph, value: Value) -> bool:
    """A constant that is read exactly once."""
    return value.name in graph.constants and (
        sum(v is value for n in graph.nodes for v in n.operands()) == 1
    )


def _drop_unread(graph: Graph, node: Node) -> None:
    """Remove a node if nothing reads its results any more."""
    if any(v in graph.outputs for v in node.outputs):
        return
    if any(v in node.outputs for n in graph.nodes for v in n.operands()):
        return
    graph.nodes.remove(node)
    for v in node.outputs:
        del graph.values[v.name]


def _take_out(graph: Graph, node: Node) -> bool:
    """Remove a node whose result equals its first operand; False if both names must stay."""
    x, y = _input(node, 0), node.out
    if y in graph.outputs:
        if x.producer is None or x in graph.outputs:
            return False
        graph.outputs = [x if v is y else v for v in graph.outputs]
    for n in graph.nodes:
        n.inputs = tuple(x if v is y else v for v in n.inputs)
    graph.nodes.remove(node)
    del graph.values[y.name]
    if x in graph.outputs:
        rename(graph, x, y.name)
    return True


def _absorb(graph: Graph, layer: Node, follower: Node) -> None:
    """``layer`` computes what ``follower`` computed: it takes over the result and goes there."""
    old = layer.out
    layer.outputs = follower.outputs
    layer.out.producer = layer
    del graph.values[old.name]
    graph.nodes.remove(follower)

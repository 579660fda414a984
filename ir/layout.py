"""Passes on views and transposes: most of what layout-changing exporters write cancels out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod

import numpy as np

from .graph import Array, Graph, Node, TensorType, Value, unique_name
from .ops.unary import TABLE
from .provenance import Moved
from .surgery import (
    drop_unread,
    forget,
    nodes_of,
    only_reader,
    operand_of,
    owned_constant,
    replaced_constant,
    reshaped_constant,
    sole_reader,
    stored_differently,
    take_out,
    without_axis,
)

#: Operators that treat each element by itself; layout does not matter to them.
ELEMENTWISE = (
    *("Abs", "Clip", "HardSigmoid", "LeakyRelu", "Neg", "Relu", "ThresholdedRelu"),
    *(row.name for row in TABLE),
)
_BROADCASTING = ("Add", "Div", "Max", "Min", "Mul", "PRelu", "Sub")
_REDUCING = ("ReduceMean", "ReduceSum")


def fold_moves(graph: Graph) -> bool:
    """A constant that is turned or reshaped is a constant in another form."""
    changed = False
    for node in [n for n in graph.nodes if n.op in ("Reshape", "Transpose")]:
        x, y = operand_of(node, 0), node.out
        if x.name not in graph.constants or x.name in graph.quantization or y in graph.outputs:
            continue
        if node.op == "Reshape":
            moved = reshaped_constant(graph, x, y.type.shape, node)
        else:
            step = Moved(partial(np.transpose, axes=node.ints_attr("perm")))
            moved = replaced_constant(graph, x, step, node)
        for n in graph.nodes:
            n.inputs = tuple(moved if v is y else v for v in n.inputs)
        graph.nodes.remove(node)
        forget(graph, y)
        changed = True
    return changed


def merge_reshapes(graph: Graph) -> bool:
    """A reshape of a reshape skips the first; a reshape to the same shape goes."""
    changed = False
    for node in nodes_of(graph, "Reshape"):
        x = operand_of(node, 0)
        same = x.type.shape == node.out.type.shape and not stored_differently(graph, x, node.out)
        if same and take_out(graph, node):
            changed = True
            continue
        if x.producer is not None and x.producer.op == "Reshape":
            if stored_differently(graph, operand_of(x.producer, 0), x):
                continue
            node.inputs = (x.producer.inputs[0],)
            drop_unread(graph, x.producer)
            changed = True
    return changed


def merge_transposes(graph: Graph) -> bool:
    """Two transposes in a row become one; one that moves nothing goes or is a reshape."""
    changed = False
    for node in nodes_of(graph, "Transpose"):
        x, perm = operand_of(node, 0), node.ints_attr("perm")
        before = x.producer
        if before is not None and before.op == "Transpose":
            if stored_differently(graph, operand_of(before, 0), x):
                continue
            first = before.ints_attr("perm")
            node.inputs = (before.inputs[0],)
            node.attrs = {"perm": tuple(first[p] for p in perm)}
            drop_unread(graph, before)
            changed = True
            continue  # the next sweep looks at what has become of it
        if perm == tuple(range(len(perm))):
            if not stored_differently(graph, x, node.out) and take_out(graph, node):
                changed = True
            continue
        moved = [p for p in perm if x.type.shape[p] != 1]
        if moved == sorted(moved):
            node.op, node.attrs = "Reshape", {"shape": node.out.type.shape}
            changed = True
    return changed


def sink_transposes(graph: Graph) -> bool:
    """Transpose -> operator that does the same in any layout: swap, so that it meets its like.

    Functions of single elements let every Transpose pass; means, sums, Concat and operators of
    several operands only one of an image's channels, or a sequence's behind a convolution, to the
    last axis, which exporters of channels-last frameworks write before what their convolutions'
    Transposes don't reach.
    """
    changed = False
    for node in list(graph.nodes):
        turn = next((t for v in node.operands() if (t := _sinking(graph, v, node))), None)
        if turn is not None:
            _sink(graph, node, turn)
            changed = True
    return changed


def _sinking(graph: Graph, v: Value, node: Node) -> Node | None:
    """The Transpose that makes an operand, if it can be swapped with all that reads it."""
    turn = v.producer
    if turn is None or turn.op != "Transpose" or v in graph.outputs:
        return None
    x, perm = operand_of(turn, 0), turn.ints_attr("perm")
    if x.name in graph.quantization and stored_differently(graph, x, v):
        return None
    images = len(perm) > 3 or (len(perm) == 3 and _is_convolved(x))
    if not images or perm != (0, *range(2, len(perm)), 1):
        return turn if node.op in ELEMENTWISE and only_reader(graph, v, node) else None
    readers = [n for n in graph.nodes if v in n.inputs and n.op != "Transpose"]
    return turn if all(_passes(graph, n, perm) for n in readers) else None


def _is_convolved(x: Value) -> bool:
    """A convolution's result, or what is made of one without a change of layout.

    Of three axes, tokens and steps of recurrent layers are turned, too; these stay as they are.
    """
    seen, waiting = set[Value](), [x]
    while waiting:
        v = waiting.pop()
        if v.producer is None or v in seen:
            continue
        seen.add(v)
        if v.producer.op in ("Conv", "ConvTranspose"):
            return True
        if v.producer.op in (*ELEMENTWISE, *_BROADCASTING, "AveragePool", "Concat", "MaxPool"):
            waiting += v.producer.operands()
    return False


def _passes(graph: Graph, node: Node, perm: tuple[int, ...]) -> bool:
    """A Transpose of operands of a node can be one of its result as well."""
    if node.op in ELEMENTWISE:
        return True
    if len(node.out.type.shape) != len(perm) or node.out.type.dtype != "f32":
        return False
    if node.op in _REDUCING:
        return bool(node.int_attr("keepdims", 1))
    return node.op in (*_BROADCASTING, "Concat") and all(
        _turned_by(v, perm) or (_is_line(v.type.shape) and v.name not in graph.quantization)
        for v in node.operands()
    )


def _turned_by(v: Value, perm: tuple[int, ...]) -> bool:
    turn = v.producer
    return turn is not None and turn.op == "Transpose" and turn.ints_attr("perm") == perm


def _is_line(shape: tuple[int, ...]) -> bool:
    """At most one axis is longer than 1, so that moving it moves no element."""
    return sum(d > 1 for d in shape) <= 1


def _sink(graph: Graph, node: Node, turn: Node) -> None:
    """Swap a Transpose and a node that it passes."""
    perm, y = turn.ints_attr("perm"), node.out
    back = tuple(perm.index(i) for i in range(len(perm)))
    turns = [v.producer for v in node.operands() if _turned_by(v, perm)]
    quant = graph.quantization.get(turn.out.name)
    if quant is not None:  # the same numbers, before and after they move
        graph.quantization.setdefault(operand_of(turn, 0).name, quant)
    node.inputs = tuple(None if v is None else _before(graph, node, v, back) for v in node.inputs)
    if node.op == "Concat":
        node.attrs = node.attrs | {"axis": perm[node.int_attr("axis")]}
    elif node.op in _REDUCING:
        axes = node.ints_attr("axes", tuple(range(len(perm))))
        node.attrs = node.attrs | {"axes": tuple(sorted(perm[a] for a in axes))}
    for t in turns:
        if t is not None and t in graph.nodes:
            drop_unread(graph, t)
    name = unique_name(f"{y.name}/unturned", graph.values)
    shape = tuple(y.type.shape[b] for b in back)
    early = graph.values[name] = Value(name, TensorType(shape, y.type.dtype), node)
    if y.name in graph.quantization:
        graph.quantization[name] = graph.quantization[y.name]
    free = unique_name(turn.name, {n.name for n in graph.nodes})
    node.outputs = (early,)
    y.producer = Node("Transpose", free, (early,), (y,), {"perm": perm})
    graph.nodes.insert(graph.nodes.index(node) + 1, y.producer)


def _before(graph: Graph, node: Node, v: Value, back: tuple[int, ...]) -> Value:
    """An operand as it is before the Transpose that ``back`` undoes."""
    perm = tuple(back.index(i) for i in range(len(back)))
    if v.producer is not None and _turned_by(v, perm):
        return operand_of(v.producer, 0)
    whole = (1,) * (len(back) - len(v.type.shape)) + v.type.shape
    shape = tuple(whole[b] for b in back)
    if v.type.size == 1 and node.op != "Concat":
        return v
    if v.name in graph.constants:
        return reshaped_constant(graph, v, shape, node)
    name = unique_name(f"{v.name}/unturned", graph.values)
    view = graph.values[name] = Value(name, TensorType(shape, v.type.dtype), None)
    _insert_view(graph, graph.nodes.index(node), f"{node.name}/unturned", v, view)
    return view


def narrow_transposes(graph: Graph) -> bool:
    """A Transpose of images goes without an axis of length 1 that is added before or left behind.

    So the views stand beside the convolution, where ``flatten_convolutions`` looks for them.
    """
    changed = False
    for turn in nodes_of(graph, "Transpose"):
        x, y, perm = operand_of(turn, 0), turn.out, turn.ints_attr("perm")
        before, behind = x.producer, sole_reader(graph, y)
        if len(perm) < 4:
            continue
        added, dropped = _axis_of_view(graph, before), _axis_of_view(graph, behind, adds=False)
        if before is not None and added is not None and only_reader(graph, x, turn):
            axis, view = added, before
            x.type = replace(x.type, shape=without_axis(y.type.shape, perm.index(axis)))
            _swap(graph, before, turn)
        elif behind is not None and dropped is not None:
            axis, view = perm[dropped], behind
            y.type = replace(y.type, shape=without_axis(x.type.shape, axis))
            _swap(graph, turn, behind)
        else:
            continue
        turn.attrs = {"perm": tuple(p - (p > axis) for p in perm if p != axis)}
        view.attrs = {"shape": view.out.type.shape}
        changed = True
    return changed


def _axis_of_view(graph: Graph, view: Node | None, *, adds: bool = True) -> int | None:
    """The axis of length 1 that is all that a Reshape adds, or takes off; the batch stays first."""
    if view is None or view.op != "Reshape":
        return None
    x, y = operand_of(view, 0), view.out
    if stored_differently(graph, x, y):
        return None
    narrow, wide = (x.type.shape, y.type.shape) if adds else (y.type.shape, x.type.shape)
    fits = [i for i, d in enumerate(wide) if d == 1 and without_axis(wide, i) == narrow]
    return fits[-1] if fits else None


def _swap(graph: Graph, first: Node, second: Node) -> None:
    """Two nodes of which the second alone reads the first change places."""
    middle, end = first.out, second.out
    second.inputs, first.inputs = first.inputs, (middle,)
    second.outputs, first.outputs = (middle,), (end,)
    middle.producer, end.producer = second, first
    graph.nodes.remove(first)
    graph.nodes.insert(graph.nodes.index(second) + 1, first)


def sink_pads(graph: Graph) -> bool:
    """Pad -> Transpose: swap the two, so that the Pad meets the convolution behind it."""
    changed = False
    for turn in nodes_of(graph, "Transpose"):
        padded = operand_of(turn, 0)
        pad = padded.producer
        if pad is None or pad.op != "Pad" or not only_reader(graph, padded, turn):
            continue
        x, perm, name = operand_of(pad, 0), turn.ints_attr("perm"), padded.name
        if stored_differently(graph, x, padded):
            continue
        begins, ends = pad.ints_attr("begins"), pad.ints_attr("ends")
        del graph.values[name]
        turned = TensorType(tuple(x.type.shape[p] for p in perm), x.type.dtype)
        early = graph.values[name] = Value(name, turned, turn)
        pad.attrs = pad.attrs | {
            "begins": tuple(begins[p] for p in perm),
            "ends": tuple(ends[p] for p in perm),
        }
        pad.inputs, pad.outputs = (early,), turn.outputs
        pad.out.producer = pad
        turn.inputs, turn.outputs = (x,), (early,)
        graph.nodes.remove(pad)
        graph.nodes.insert(graph.nodes.index(turn) + 1, pad)
        changed = True
    return changed


def move_transpose_into_weight(graph: Graph) -> bool:
    """Transpose -> Reshape to rows -> product with a constant weight: permute the weight instead.

    This is what exporters of channels-last frameworks write before the first dense layer.
    """
    changed = False
    for node in list(graph.nodes):
        if node.op not in ("Gemm", "MatMul") or len(operand_of(node, 0).type.shape) != 2:
            continue
        view, w = operand_of(node, 0).producer, operand_of(node, 1)
        if (
            view is None
            or view.op != "Reshape"
            or not owned_constant(graph, w)
            or len(w.type.shape) != 2
        ):
            continue
        turn = operand_of(view, 0).producer
        if turn is None or turn.op != "Transpose" or not only_reader(graph, view.out, node):
            continue
        perm, shape = turn.ints_attr("perm"), turn.out.type.shape
        if perm[0] != 0 or view.out.type.shape != (shape[0], prod(shape[1:])):
            continue
        rows = node.op == "MatMul" or not node.int_attr("trans_b", 0)
        step = Moved(partial(_rows_back, perm, shape[1:], rows))
        graph.constants[w.name] = np.ascontiguousarray(step.forward(graph.constants[w.name]))
        if w.name in graph.origins:
            graph.origins[w.name] = graph.origins[w.name].then(step)
        view.inputs = (turn.inputs[0],)
        drop_unread(graph, turn)
        changed = True
    return changed


def _rows_back(perm: tuple[int, ...], shape: tuple[int, ...], rows: bool, weight: Array) -> Array:
    """The weight for what the Transpose read; ``rows``: it has a row per number of that."""
    data = weight if rows else weight.T
    back = [perm.index(i) - 1 for i in range(1, len(perm))]  # weight axes in the old order
    moved = data.reshape(*shape, -1).transpose(*back, len(back)).reshape(data.shape)
    return moved if rows else moved.T


def flatten_products(graph: Graph) -> bool:
    """A product of stacked rows with a constant matrix is one Gemm of all rows, between two views.

    So it can take its bias, which is added behind it, and has integer twins.
    """
    changed = False
    for node in nodes_of(graph, "MatMul"):
        x, w = operand_of(node, 0), operand_of(node, 1)
        matrix = len(w.type.shape) == 2 and w.name in graph.constants
        if not matrix or len(x.type.shape) < 3 or len(node.inputs) > 2 or node.attrs:
            continue
        depth, outs = w.type.shape
        rows = x.type.size // depth
        flat = _of_rows(graph, node.name, x, (rows, depth))
        _insert_view(graph, graph.nodes.index(node), f"{node.name}/rows", x, flat)
        add = _bias_behind(graph, node, outs)
        y = node.out
        node.op, node.attrs, node.inputs = "Gemm", {"trans_b": 0}, (flat, w, None)
        product = _of_rows(graph, y.name, y, (rows, outs))
        node.outputs, product.producer = (product,), node
        if add is not None:
            add.inputs = tuple(product if v is y else v for v in add.inputs)
            del graph.values[y.name]
            y = add.out
            product = _of_rows(graph, y.name, y, (rows, outs))
            add.outputs, product.producer = (product,), add
        _insert_view(graph, graph.nodes.index(add or node) + 1, f"{node.name}/stacked", product, y)
        changed = True
    return changed


def _bias_behind(graph: Graph, product: Node, outs: int) -> Node | None:
    """The Add of a constant per column that is all that reads the product."""
    y = product.out
    add = sole_reader(graph, y)
    if add is None or add.op != "Add":
        return None
    constants = [v for v in add.operands() if v.name in graph.constants]
    fits = [v.type.shape for v in constants] == [(outs,)] and y.name not in graph.quantization
    return add if fits else None


def _of_rows(graph: Graph, name: str, stacked: Value, shape: tuple[int, int]) -> Value:
    """A value of all rows, annotated as the stacked one."""
    free = unique_name(f"{name}/rows", graph.values)
    new = graph.values[free] = Value(free, TensorType(shape), None)
    if stacked.name in graph.quantization:
        graph.quantization[free] = graph.quantization[stacked.name]
    return new


def _insert_view(graph: Graph, at: int, name: str, x: Value, y: Value) -> None:
    """A Reshape that makes y of x, at a place among the nodes."""
    free = unique_name(name, {n.name for n in graph.nodes})
    y.producer = Node("Reshape", free, (x,), (y,), {"shape": y.type.shape})
    graph.nodes.insert(at, y.producer)

"""Clean-ups of the forward graph: fewer nodes, fewer tensors to save, biases that can be trained.

Every pass rewrites the graph in place, keeps the names of what stays, and leaves a graph that
verifies. A node that takes over another one's work keeps its own name and takes the other's result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import numpy as np

from .flat_conv import flatten_convolutions
from .fusion import (
    drop_nan_guards,
    drop_zero_masks,
    drop_zero_states,
    merge_activations,
    merge_two_classes,
)
from .graph import Array, Graph, Node, Value
from .layout import (
    flatten_products,
    fold_moves,
    merge_reshapes,
    merge_transposes,
    move_transpose_into_weight,
    narrow_transposes,
    sink_pads,
    sink_transposes,
)
from .norm_fusion import merge_group_norm, merge_row_norm, merge_scale
from .provenance import Affine, Moved, spread_out
from .surgery import (
    absorb,
    drop_dead,
    drop_unread,
    nodes_of,
    only_reader,
    operand_of,
    owned_constant,
    replaced_constant,
    reshaped_constant,
    sole_reader,
    stored_differently,
)

_CONVOLUTIONS = ("Conv", "ConvTranspose")


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
        fold_moves,
        merge_reshapes,
        merge_transposes,
        sink_transposes,
        narrow_transposes,
        sink_pads,
        move_transpose_into_weight,
        merge_pad,
        flatten_products,
        flatten_convolutions,
        merge_bias,
        merge_activations,
        merge_two_classes,
        drop_nan_guards,
        drop_zero_masks,
        drop_zero_states,
        merge_group_norm,
        merge_scale,
        merge_row_norm,
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


def merge_pad(graph: Graph) -> bool:
    """A Pad of spatial axes before a convolution or a pool becomes its padding, if that is equal.

    Zeros are before a convolution or an average that counts them, and before a maximum what is
    never larger than the elements beside it.
    """
    changed = False
    for node in [n for n in graph.nodes if n.op in ("Conv", "MaxPool", "AveragePool")]:
        x = operand_of(node, 0)
        pad = x.producer
        if pad is None or pad.op != "Pad" or not only_reader(graph, x, node):
            continue
        begins, ends = pad.ints_attr("begins"), pad.ints_attr("ends")
        rank = len(begins) - 2
        old = node.ints_attr("pads", (0,) * (2 * rank))
        new = tuple(a + b for a, b in zip(old, (*begins[2:], *ends[2:]), strict=True))
        if any((*begins[:2], *ends[:2])) or not _pads_alike(node, pad, old, new):
            continue
        if stored_differently(graph, operand_of(pad, 0), x):
            continue
        node.attrs = node.attrs | {"pads": new}
        if node.op == "AveragePool":
            node.attrs = node.attrs | {"count_include_pad": 1}
        node.inputs = (pad.inputs[0], *node.inputs[1:])
        drop_unread(graph, pad)
        changed = True
    return changed


def _pads_alike(node: Node, pad: Node, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """The padding ``new`` of a node does what its own, ``old``, and the Pad before it do."""
    value = pad.float_attr("value", 0.0)
    if node.op == "Conv":
        return value == 0.0
    kernel = node.ints_attr("kernel_shape")
    if node.int_attr("ceil_mode", 0) or any(p >= k for p, k in zip(new, kernel * 2, strict=True)):
        return False  # other windows, or some without an element
    if node.op == "AveragePool":
        return value == 0.0 and (not any(old) or bool(node.int_attr("count_include_pad", 0)))
    if value <= -float(np.finfo(np.float32).max):
        return True
    # at equal maxima the gradient would go to the padding; these let none pass at zero
    before = operand_of(pad, 0).producer
    floor = before is not None and (
        before.op == "Relu" or (before.op == "Clip" and before.float_attr("min") == 0.0)
    )
    return value == 0.0 and floor


def merge_bias(graph: Graph) -> bool:
    """Adding a constant per channel to a convolution, Gemm or MatMul becomes its bias.

    As a bias it can be trained alone, and its gradient needs no saved activation.
    """
    changed = False
    for add in nodes_of(graph, "Add"):
        for layer_at in (0, 1):
            y, c = operand_of(add, layer_at), operand_of(add, 1 - layer_at)
            layer = y.producer
            if layer is None or c.name not in graph.constants or not only_reader(graph, y, add):
                continue
            channels = _channel_count(graph, layer)
            if channels is None or add.out.type != y.type or y.name in graph.quantization:
                continue
            axis = 1 if layer.op in _CONVOLUTIONS else len(y.type.shape) - 1
            data = graph.constants[c.name]
            if not _is_per_channel(data, len(y.type.shape), axis, channels):
                continue
            old = layer.inputs[2] if len(layer.inputs) > 2 else None
            if old is not None and not (owned_constant(graph, old) and owned_constant(graph, c)):
                continue  # another node's bias as well, which would no longer be the same
            if layer.op == "MatMul":
                layer.op, layer.attrs = "Gemm", {"trans_b": 0}
            spread = Moved(partial(spread_out, channels))
            if old is not None:
                added = Affine(offset=spread.forward(data))
                bias = replaced_constant(graph, old, added, layer, add)
            elif data.size == channels:
                bias = reshaped_constant(graph, c, (channels,), layer, add)
            else:
                bias = replaced_constant(graph, c, spread, layer, add)
            layer.inputs = (*layer.inputs[:2], bias)
            absorb(graph, layer, add)
            changed = True
            break
    return changed


def merge_batchnorm(graph: Graph) -> bool:
    """BatchNormalization with frozen statistics scales the weights of the layer before it.

    A weight of several layers stays one parameter: they are folded together where all of them have
    the same normalization behind them, or not at all.
    """
    changed = False
    for norm in nodes_of(graph, "BatchNormalization"):
        layer = operand_of(norm, 0).producer
        if norm not in graph.nodes or layer is None or _channel_count(graph, layer) is None:
            continue
        pairs = _normalized_alike(graph, layer, norm)
        if pairs is None:
            continue
        statistics = [v.name for v in norm.operands()][1:]
        constants = [*statistics, *(v.name for v in layer.operands() if v is not layer.inputs[0])]
        if not all(name in graph.constants for name in constants):
            continue
        scale, shift, mean, var = (graph.constants[n].astype(np.float64) for n in statistics)
        with np.errstate(all="ignore"):  # of a negative variance: not folded
            factor = scale / np.sqrt(var + norm.float_attr("epsilon", 1e-5))
        if not np.isfinite(factor).all():
            continue
        nodes = [n for pair in pairs for n in pair]
        w, old = operand_of(layer, 1), layer.inputs[2] if len(layer.inputs) > 2 else None
        start = graph.constants[old.name].astype(np.float64) if old is not None else 0.0
        scaled, beta = Affine(_by_result(layer, w, factor)), operand_of(norm, 2)
        if old is None or _is_own(graph, beta, nodes):  # else what others read would move
            added = Affine(offset=(start - mean) * factor)
            bias = replaced_constant(graph, old or beta, added, *nodes, home=beta)
        else:
            moved = Affine(factor, shift - mean * factor)
            bias = replaced_constant(graph, old, moved, *nodes)
        weight = replaced_constant(graph, w, scaled, *nodes)
        for each, follower in pairs:
            if each.op == "MatMul":
                each.op, each.attrs = "Gemm", {"trans_b": 0}
            each.inputs = (each.inputs[0], weight, bias)
            absorb(graph, each, follower)
        changed = True
    return changed


def _normalized_alike(graph: Graph, layer: Node, norm: Node) -> list[tuple[Node, Node]] | None:
    """All layers that read a layer's weight, and behind each a normalization equal to this one."""
    w = operand_of(layer, 1)
    pairs: list[tuple[Node, Node]] = []
    for each in (n for n in graph.nodes if w in n.inputs):
        behind = sole_reader(graph, each.out)
        if behind is None or behind.op != norm.op or each.out.name in graph.quantization:
            return None
        if (each.op, each.inputs[1:]) != (layer.op, layer.inputs[1:]):
            return None
        kinds = [n.int_attr("trans_b", 0) for n in (each, layer)]
        if kinds[0] != kinds[1] or (behind.inputs[1:], behind.attrs) != (
            norm.inputs[1:],
            norm.attrs,
        ):
            return None
        pairs.append((each, behind))
    return pairs


def _is_own(graph: Graph, constant: Value, nodes: Collection[Node]) -> bool:
    """Only these nodes read a constant, and nothing else is made of its tensors in the file."""
    origin = graph.origins.get(constant.name)
    return (
        constant not in graph.outputs
        and all(n in nodes for n in graph.nodes if constant in n.inputs)
        and not any(
            origin is not None and origin.tensors & o.tensors
            for name, o in graph.origins.items()
            if name != constant.name
        )
    )


def _by_result(layer: Node, w: Value, factor: Array) -> Array:
    """A number per result channel of a layer, to multiply its weight with."""
    rank = len(w.type.shape)
    if layer.op == "ConvTranspose":  # [channels of x, result channels of a group, kernel...]
        group = layer.int_attr("group", 1)
        rows = np.repeat(factor.reshape(group, -1), w.type.shape[0] // group, axis=0)
        return rows.reshape(*rows.shape, *(1,) * (rank - 2))
    out_axis = 0 if layer.op == "Conv" or layer.int_attr("trans_b", 0) else 1
    return factor.reshape([-1 if i == out_axis else 1 for i in range(rank)])


def _channel_count(graph: Graph, layer: Node) -> int | None:
    """Results of a layer with constant weight that can take a bias; None for other nodes."""
    flat = layer.op == "Gemm" or (layer.op == "MatMul" and len(layer.out.type.shape) == 2)
    if not (layer.op in _CONVOLUTIONS or flat) or len(layer.inputs) > 3:
        return None
    return layer.out.type.shape[1] if operand_of(layer, 1).name in graph.constants else None


def _is_per_channel(data: Array, rank: int, axis: int, channels: int) -> bool:
    """``data`` is constant along every other axis of the result."""
    shape = (1,) * (rank - data.ndim) + data.shape
    ones = all(d == 1 for i, d in enumerate(shape) if i != axis)
    return ones and shape[axis] in (1, channels)

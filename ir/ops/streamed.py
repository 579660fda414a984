"""A block of frozen integer layers, computed row by row.

``StreamedBlock(x, first*, depthwise*, project*)``, with four operands ``w i8, bias i32 | None,
multiplier i32, shift i32`` per layer, means::

    first      QConv of any window, group 1; absent: the depthwise layer reads x
    depthwise  QConv, one filter per channel
    project    QConv 1x1
    add        QAdd of x and the projection; absent without attributes

The attributes of a layer have its place as prefix: ``depthwise.strides``; ``depthwise.name`` is
what it was called before it became a part of the block. The tensors between the
layers never exist whole: ``lines`` holds those rows of the depthwise layer's operand that ``rows``
rows of the result need, and moves on with them, so that no row is computed twice. Each element is
computed by the kernel of its layer; results are those of the separate operators bit for bit.

**In place.** Where y has the shape of x, it may lie on x. When the rows before m of y are written,
``lines`` reaches to row ``m - 1 - p + k`` at least, for windows of k lines with p lines of padding
on top; later rows are made of rows of x from there on, less the padding of a first layer that is
not pointwise. That is m or more (checked). The addition reads the very rows that it writes. Without
a first layer, ``lines`` is a copy of x then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, Sample, Work, array, get_op, operand, register, works
from .qtypes import activation, i8
from .window import Window, window

CONVOLUTIONS = ("first", "depthwise", "project")
#: Operands of a convolution: weight, bias, multipliers, shifts.
_OPERANDS = 4


@dataclass(frozen=True)
class Layers:
    """The layers of a block, each as a node of its own."""

    node: Node
    first: Node | None
    depthwise: Node
    project: Node
    add: Node | None

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Those that are there, in order."""
        every = (self.first, self.depthwise, self.project, self.add)
        return tuple(n for n in every if n is not None)

    @property
    def rows(self) -> int:
        """Rows of the result that are computed at a time."""
        return self.node.int_attr("rows")

    @property
    def held(self) -> bool:
        """Rows of the depthwise layer's operand are held; else it reads x, which y can't be."""
        return self.first is not None or operand(self.node, 0).shape == self.project.out.type.shape

    @property
    def gathered(self) -> bool:
        """The first layer is pointwise: its kernel is faster on rows that lie together."""
        return self.first is not None and _is_pointwise(self.first)

    @property
    def lines(self) -> int:
        """Rows of the depthwise layer's operand that are held."""
        y = _window(self.depthwise).y
        return (self.rows - 1) * y.stride + _reach(self.depthwise)


def _window(layer: Node) -> Window:
    return window(layer, operand(layer, 0).shape[2:], operand(layer, 1).shape[2:])


def _reach(layer: Node) -> int:
    """Lines from the first to the last tap of a window."""
    y = _window(layer).y
    return (y.kernel - 1) * y.dilation + 1


def _is_pointwise(layer: Node) -> bool:
    win = _window(layer)
    axes = ((a.kernel, a.stride, a.begin, a.end) for a in (win.y, win.x))
    return layer.int_attr("group", 1) == 1 and all(a == (1, 1, 0, 0) for a in axes)


def _layer(
    block: Node, name: str, op: str, inputs: Sequence[Value | None], attrs: dict[str, Attr]
) -> Node:
    """A node of its own, with the layer's name if the block tells it; its operator checks types."""
    own = {k: v for k, v in attrs.items() if k != "name"}
    node = Node(op, str(attrs.get("name", f"{block.name}/{name}")), tuple(inputs), (), own)
    (t,) = get_op(op).infer(node)
    node.outputs = (Value(node.name, t, node),)
    return node


def _attrs(block: Node, layer: str) -> dict[str, Attr]:
    prefix = f"{layer}."
    return {k.removeprefix(prefix): v for k, v in block.attrs.items() if k.startswith(prefix)}


def layers_of(node: Node) -> Layers:
    """The layers of a block.

    Raises:
        GraphError: Operands or attributes do not fit a layer, or the layers make no block.
    """
    x, (t, _) = node.inputs[0], activation(node, 0)
    if len(t.shape) != 4 or t.shape[0] != 1:
        raise GraphError(f"operand 0 is {t}; rows are streamed of one image [1,C,H,W]")
    if len(node.inputs) != 1 + _OPERANDS * len(CONVOLUTIONS):
        raise GraphError(f"{len(node.inputs)} operands; a block has x and four per convolution")
    last, found = x, {}
    for i, name in enumerate(CONVOLUTIONS):
        operands = node.inputs[1 + _OPERANDS * i : 1 + _OPERANDS * (i + 1)]
        if name == "first" and not any(operands):
            continue
        try:
            layer = _layer(node, name, "QConv", (last, *operands), _attrs(node, name))
        except GraphError as e:
            raise GraphError(f"{name}: {e}") from e
        last = layer.out
        found[name] = layer
    add = _attrs(node, "add")
    residual = _layer(node, "add", "QAdd", (x, last), add) if add else None
    result = Layers(node, found.get("first"), found["depthwise"], found["project"], residual)
    _check(result)
    return result


def _check(b: Layers) -> None:
    channels = operand(b.depthwise, 0).shape[1]
    if not operand(b.depthwise, 1).shape[0] == b.depthwise.int_attr("group", 1) == channels:
        raise GraphError(f"depthwise: not one filter for each of {channels} channels")
    if not _is_pointwise(b.project):
        raise GraphError("project: the last convolution must be 1x1, with stride 1 and no padding")
    if b.first is not None and b.first.int_attr("group", 1) != 1:
        raise GraphError("first: a first layer reads all channels, in one group")
    if not 1 <= b.rows <= b.project.out.type.shape[2]:
        raise GraphError(f"{b.rows} rows at a time, of {b.project.out.type.shape[2]}")
    back = _window(b.depthwise).y.begin + (_window(b.first).y.begin if b.first is not None else 0)
    if operand(b.node, 0).shape == b.project.out.type.shape and back >= _reach(b.depthwise):
        raise GraphError("its result could overwrite rows of x that are needed again")


def block_node(name: str, chain: Sequence[Node], rows: int, outputs: Sequence[Value] = ()) -> Node:
    """The block of a chain of QConv and QAdd nodes, in no graph; inference checks it."""
    convolutions = [n for n in chain if n.op == "QConv"]
    inputs: list[Value | None] = [chain[0].inputs[0]]
    if len(convolutions) < len(CONVOLUTIONS):
        inputs += [None] * _OPERANDS
    attrs: dict[str, Attr] = {"rows": rows}
    names = CONVOLUTIONS[-len(convolutions) :]
    for layer, node in zip(names, convolutions, strict=True):
        inputs += node.inputs[1 : 1 + _OPERANDS]
        attrs |= {f"{layer}.{k}": v for k, v in node.attrs.items()} | {f"{layer}.name": node.name}
    for node in chain[len(convolutions) :]:
        attrs |= {f"add.{k}": v for k, v in node.attrs.items()} | {"add.name": node.name}
    return Node("StreamedBlock", name, tuple(inputs), tuple(outputs), attrs)


def _infer(node: Node) -> list[TensorType]:
    b = layers_of(node)
    return [(b.add or b.project).out.type]


# -- the kernel ------------------------------------------------------------------------------------


def _convolve(
    layer: Node, x: Array, constants: Sequence[Array | None], top: int = 0, bottom: int = 0
) -> Array:
    """A convolution of some rows, with so many rows of padding around them."""
    axis = _window(layer).x
    t = TensorType(x.shape, "i8", activation(layer, 0)[1])
    attrs = {**layer.attrs, "pads": (top, axis.begin, bottom, axis.end)}
    node = _layer(layer, "rows", "QConv", (Value("rows", t), *layer.inputs[1:]), attrs)
    return get_op("QConv").kernel(node, [x, *constants])[0]


def _first_row(layer: Node, x: Array, constants: Sequence[Array | None], row: int) -> Array:
    """One row of the first layer."""
    y = _window(layer).y
    low = row * y.stride - y.begin
    high = low + _reach(layer)
    top, bottom = max(-low, 0), max(high - y.size, 0)
    return _convolve(layer, x[:, :, low + top : high - bottom], constants, top, bottom)


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    b, x = layers_of(node), array(inputs, 0)
    first, depthwise, project = (inputs[1 + _OPERANDS * i :][:_OPERANDS] for i in range(3))
    axis, reach = _window(b.depthwise).y, _reach(b.depthwise)
    (t, quant), y = activation(b.depthwise, 0), np.empty(node.out.type.shape, np.int8)
    lines = np.empty((1, t.shape[1], b.lines, t.shape[3]), np.int8)
    top = end = -axis.begin  # the rows that are held; those outside of the operand are padding
    for row in range(0, y.shape[2], b.rows):
        count = min(b.rows, y.shape[2] - row)
        begin = row * axis.stride - axis.begin
        kept = max(end - begin, 0)
        lines[:, :, :kept] = lines[:, :, end - top - kept : end - top].copy()
        top, end = begin, max(begin, end)
        stop = begin + (count - 1) * axis.stride + reach
        for held in range(end, stop):
            line = lines[:, :, held - top : held - top + 1]
            if not 0 <= held < axis.size:
                line[...] = quant.zero_point
            elif b.first is None:
                line[...] = x[:, :, held : held + 1]
            else:
                line[...] = _first_row(b.first, x, first, held)
        end = stop
        made = _convolve(
            b.project, _convolve(b.depthwise, lines[:, :, : stop - top], depthwise), project
        )
        if b.add is not None:
            made = _added(b.add, x[:, :, row : row + count], made)
        y[:, :, row : row + count] = made
    return [y]


def _added(add: Node, x: Array, projected: Array) -> Array:
    """Some rows of the residual addition."""
    types = [TensorType(x.shape, "i8", activation(add, i)[1]) for i in (0, 1)]
    inputs = [Value(f"rows{i}", t) for i, t in enumerate(types)]
    node = _layer(add, "rows", "QAdd", inputs, add.attrs)
    return get_op("QAdd").kernel(node, [x, projected])[0]


# -- what it costs ---------------------------------------------------------------------------------


def _rows_node(layer: Node, rows: int) -> Node:
    """A convolution of so many rows, without padding above and below."""
    t, quant = activation(layer, 0)
    x = Value("rows", TensorType((*t.shape[:2], rows, t.shape[3]), "i8", quant))
    axis = _window(layer).x
    attrs = {**layer.attrs, "pads": (0, axis.begin, 0, axis.end)}
    return _layer(layer, "rows", "QConv", (x, *layer.inputs[1:]), attrs)


def _repeated(node: Node, times: int) -> list[Work]:
    def scaled(w: Work) -> Work:
        assert w.outputs is not None, w
        return replace(
            w,
            amount=w.amount * times,
            loops=w.loops * times,
            passes=w.passes * times,
            outputs=w.outputs * times,
        )

    return [scaled(w) for w in works(node)]


def _work(node: Node) -> tuple[Work, ...]:
    """The kernels' work on the rows that they are given, and the copies between them.

    Of the copies: bytes, runs of bytes, kernel calls.
    """
    b = layers_of(node)
    y, (_, filters, height, _) = _window(b.depthwise).y, b.project.out.type.shape
    reach, (whole, rest) = _reach(b.depthwise), divmod(height, b.rows)
    t, stop = operand(b.depthwise, 0), (height - 1) * y.stride - y.begin + reach
    made = sum((i + y.begin) % y.stride < reach for i in range(min(y.size, stop)))
    parts: list[Work] = []
    if b.first is not None:
        parts += _repeated(_rows_node(b.first, _reach(b.first)), made)
    for rows, times in ((b.rows, whole), (rest, 1)):
        if rows * times:
            lines = (rows - 1) * y.stride + reach
            parts += _repeated(_rows_node(b.depthwise, lines), times)
            parts += _repeated(_rows_node(b.project, rows), times)
    if b.add is not None:
        parts += works(b.add)
    steps = whole + (rest > 0)
    # runs of bytes -> how many
    runs: list[tuple[int, int]] = []
    if b.held:
        outside = y.begin + max(0, stop - y.size)
        runs.append((t.shape[3], t.shape[1] * (made + outside)))
        runs.append((max(0, reach - y.stride) * t.shape[3], t.shape[1] * (steps - 1)))
    if b.gathered:
        x = operand(node, 0).shape
        runs.append((x[3], x[1] * made))
    if b.add is None:
        runs.append((b.rows * node.out.type.shape[3], filters * steps))
    calls = 2 * steps + (made if b.first is not None else 0)
    calls += filters * steps if b.add is not None else 0
    copied = sum(n * times for n, times in runs)
    started = sum(times for n, times in runs if n)
    return (*parts, Work("copy", copied, loops=started, outputs=calls, dtype="i8"))


def _words(n: int) -> int:
    """Bytes rounded up to whole words, as the C kernel places its buffers."""
    return -(-n // 4) * 4


def _workspace(node: Node) -> int:
    """The lines; behind them operand and result of the first layer, or of the other two."""
    b = layers_of(node)
    (_, channels, _, width), out = operand(b.depthwise, 0).shape, b.depthwise.out.type.shape
    own = {n: get_op(n.op).workspace(n) for n in (b.depthwise, b.project)}
    before = 0
    if b.first is not None:
        before = _words(channels * width) + get_op("QConv").workspace(b.first)
        if b.gathered:
            before += _words(operand(node, 0).shape[1] * width)
    projected = _words(b.project.out.type.shape[1] * b.rows * out[3])
    behind = _words(channels * b.rows * out[3])
    behind += max(own[b.depthwise], projected + own[b.project])
    return (_words(channels * b.lines * width) if b.held else 0) + max(before, behind)


def _c_params(node: Node) -> dict[str, Attr]:
    b = layers_of(node)
    fields: dict[str, Attr] = {
        "rows": b.rows,
        "lines": b.lines if b.held else 0,
        "gathered": int(b.gathered),
    }
    layers = {"first": b.first, "depthwise": b.depthwise, "project": b.project, "add": b.add}
    for name, layer in layers.items():
        if layer is not None:
            c = get_op(layer.op).c
            assert c is not None
            fields |= {f"{name}.{k}": v for k, v in c.params(layer).items()}
    return fields


# -- samples ---------------------------------------------------------------------------------------

#: Shape of x; first layer as (filters, kernel, stride, pad) or None; depthwise kernel, stride and
#: pads; filters of the projection; residual; rows at a time.
_Case = tuple[
    tuple[int, ...],
    tuple[int, int, int, int] | None,
    tuple[int, int, tuple[int, ...]],
    int,
    bool,
    int,
]
_CASES: tuple[_Case, ...] = (
    ((1, 4, 9, 10), (12, 1, 1, 0), (3, 1, (1, 1, 1, 1)), 4, True, 1),
    ((1, 4, 9, 10), (12, 1, 1, 0), (3, 1, (1, 1, 1, 1)), 4, False, 4),
    ((1, 3, 8, 8), (6, 1, 1, 0), (3, 2, (0, 0, 1, 1)), 5, False, 1),
    ((1, 5, 11, 7), (10, 1, 1, 0), (5, 2, (2, 2, 2, 2)), 6, False, 2),
    ((1, 4, 8, 9), (7, 1, 1, 0), (7, 1, (3, 3, 3, 3)), 4, True, 3),
    ((1, 3, 13, 12), (7, 1, 1, 0), (7, 2, (3, 2, 3, 3)), 3, False, 1),
    ((1, 3, 15, 17), (8, 3, 2, 1), (3, 1, (1, 1, 1, 1)), 5, False, 1),
    ((1, 3, 16, 16), (8, 3, 2, 1), (3, 2, (1, 1, 1, 1)), 5, False, 3),
    ((1, 1, 12, 8), (4, 5, 1, 2), (3, 1, (1, 1, 1, 1)), 3, False, 2),
    ((1, 6, 7, 9), None, (3, 2, (1, 1, 1, 1)), 8, False, 1),
    ((1, 6, 7, 9), None, (3, 1, (1, 1, 1, 1)), 8, False, 2),
    ((1, 6, 9, 8), None, (5, 1, (2, 2, 2, 2)), 6, True, 2),
    ((1, 6, 9, 8), None, (3, 1, (1, 1, 1, 1)), 6, False, 1),
    ((1, 2, 3, 3), (4, 1, 1, 0), (7, 1, (3, 3, 3, 3)), 2, True, 1),
    ((1, 3, 6, 6), (3, 3, 1, 1), (3, 1, (1, 1, 1, 1)), 3, True, 1),
    ((1, 4, 9, 6), (5, 1, 1, 0), (2, 3, (0, 0, 0, 0)), 4, False, 2),
    ((1, 4, 1, 6), (5, 1, 1, 0), (1, 1, (0, 0, 0, 0)), 4, True, 1),
)


def _sample(case: _Case) -> Sample:
    x, first, (kernel, stride, pads), filters, residual, rows = case
    channels = x[1] if first is None else first[0]
    attrs: dict[str, Attr] = {"rows": rows}
    types: list[TensorType | None] = [i8(x, 0.05, 3)]
    ranges: dict[int, tuple[int, int]] = {}

    def convolution(name: str, w: tuple[int, ...], clamp: tuple[int, int]) -> None:
        shift = 38 + int(np.log2(np.prod(w[1:])) / 2)
        at, outs = len(types), TensorType(w[:1], "i32")
        ranges.update({at + 1: (-3000, 3000), at + 2: (2**30, 2**31 - 1)})
        ranges[at + 3] = (shift - 1, shift + 1)
        types.extend((i8(w, [0.01 * (j + 1) for j in range(w[0])]), outs, outs, outs))
        stored: dict[str, Attr] = {"out_scale": 0.05, "out_zero_point": -7, "clamp": clamp}
        attrs.update({f"{name}.{k}": v for k, v in stored.items()})

    if first is None:
        types.extend((None,) * _OPERANDS)
    else:
        convolution("first", (channels, x[1], first[1], first[1]), (-100, 110))
        attrs |= {"first.strides": (first[2],) * 2, "first.pads": (first[3],) * 4}
    convolution("depthwise", (channels, 1, kernel, kernel), (-128, 100))
    attrs |= {
        "depthwise.strides": (stride,) * 2,
        "depthwise.pads": pads,
        "depthwise.group": channels,
    }
    convolution("project", (filters, channels, 1, 1), (-128, 127))
    if residual:
        attrs |= {"add.out_scale": 0.07, "add.out_zero_point": 4, "add.clamp": (-120, 127)}
    return Sample(tuple(types), attrs, differentiable=(), ranges=ranges)


register(
    OpDef(
        name="StreamedBlock",
        infer=_infer,
        kernel=_kernel,
        work=_work,
        c=CKernel("odtplan_streamed", "odtplan_streamed_t", "odtplan_streamed", _c_params),
        samples=lambda: map(_sample, _CASES),
        inplace=(0,),
        workspace=_workspace,
    )
)

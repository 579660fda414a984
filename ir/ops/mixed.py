"""Layers with f32 weights between i8 activations: precision ``mixed``.

``MixedConv(x i8, w, b | None, cold | None)`` and ``MixedGemm`` with the same operands are
``Quantize(Conv(Dequantize(x), w, b))`` bit for bit, with the geometry of ``Conv`` and ``Gemm`` and
``out_scale``, ``out_zero_point`` and ``clamp`` of the result. The C kernels convert the lines that
some rows of the result need, run the kernels of ``Conv`` and ``Gemm`` on them and convert these
rows, so that no tensor ever exists in f32. They write the padding out: its taps multiply zeros.

Gradients are straight-through as those of integer layers: ``dy`` is masked where the stored result
is at its bounds, the gradient of the weight reads the stored operand (``qconv_grad``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, ParamSlot, Sample, Work, get_op, operand, register, works
from . import conv_work
from .conv import CASES, PARTIAL, full_weight, is_depthwise, struct
from .qclip import through_clamp
from .qconv import MORE
from .qtypes import activation, i8, out_fields, result
from .window import Axis, Window, window

if TYPE_CHECKING:
    from ..grad_builder import GradBuilder

_SOURCE = "odtplan_mixed"
#: Bytes of lines and results up to which more rows and channels are taken at a time.
_ROOM = 4096
#: Stored numbers, and elements of an operand from which on a table of their reals pays.
_TABLE, _TABLE_FROM = 256, 4096
#: Instructions around the conversion of a line, that of a run of results, and the kernel between.
_CALLS = {"line": 15, "result": 50, "run": 250}
#: Pixels, and filters, that the kernels of Conv take at a time.
_BLOCK = 4
_GEOMETRY = ("strides", "pads", "dilations", "group")
_COLD = 3


def _float_layer(node: Node, op: str) -> Node:
    """The layer in f32, in no graph; inference checks its operands.

    Raises:
        GraphError: They do not fit.
    """
    real = activation(node, 0)[0].with_dtype("f32")
    keys = (*_GEOMETRY, "trans_b")
    attrs = {k: v for k, v in node.attrs.items() if k in keys}
    layer = Node(op, node.name, (Value("real", real), *node.inputs[1:]), (), attrs)
    (t,) = get_op(op).infer(layer)
    layer.outputs = (Value("y", t, layer),)
    return layer


def _infer(op: str, node: Node) -> list[TensorType]:
    return [result(node, _float_layer(node, op).out.type.shape)]


def _kernel(op: str, node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    layer = _float_layer(node, op)
    (real,) = get_op("Dequantize").kernel(node, inputs[:1])
    (y,) = get_op(op).kernel(layer, [real, *inputs[1:]])
    quantize = Node("Quantize", node.name, (layer.out,), (), node.attrs)
    return list(get_op("Quantize").kernel(quantize, [y]))


def _operands(node: Node) -> tuple[Value, Value, Value | None]:
    """Operand, weight, frozen rest of the weight."""
    x, w = node.inputs[:2]
    assert x is not None
    assert w is not None
    return x, w, node.inputs[_COLD] if len(node.inputs) > _COLD else None


def _conversions(node: Node) -> dict[str, Attr]:
    """Fields of ``odtplan_dequantize_t from`` and ``odtplan_quantize_t to`` but the counts."""
    _, quant = activation(node, 0)
    fields: dict[str, Attr] = {"from.x_zero": quant.zero_point, "from.scale": quant.scale[0]}
    fields["to.scale"] = node.float_attr("out_scale")
    return {**fields, **{f"to.{k}": v for k, v in out_fields(node).items()}}


# -- MixedConv -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """How the C kernel goes through an image.

    Attributes:
        win: Window of the layer; pointwise: the image is one column of pixels.
        sets: Groups, or runs of channels of a depthwise layer.
        channels: Channels of a set; depthwise: of all sets but the last.
        filters: Filters of a set.
        at_once: Filters whose results are held.
        rows: Rows of results that are held.
        table: Stored numbers are converted by a table.
    """

    win: Window
    sets: int
    channels: int
    filters: int
    at_once: int
    rows: int
    table: bool

    @property
    def width(self) -> int:
        """Elements of a converted line, padding included."""
        x = self.win.x
        return (x.out - 1) * x.stride + (x.kernel - 1) * x.dilation + 1

    def lines(self, rows: int) -> int:
        """Lines that so many rows of results need."""
        y = self.win.y
        return (rows - 1) * y.stride + (y.kernel - 1) * y.dilation + 1

    def window(self, rows: int) -> Window:
        """The window of so many rows of results over converted lines."""
        y, x = self.win.y, self.win.x
        return Window(
            replace(y, size=self.lines(rows), out=rows, begin=0, end=0),
            replace(x, size=self.width, begin=0, end=0),
        )

    @property
    def workspace(self) -> int:
        """Bytes of the table, of the converted lines and of the results."""
        lines = self.channels * self.lines(self.rows) * self.width
        results = self.at_once * self.rows * self.win.x.out
        return 4 * ((_TABLE if self.table else 0) + lines + results)


def _window(node: Node) -> Window:
    return window(node, operand(node, 0).shape[2:], operand(node, 1).shape[2:])


def _depthwise(node: Node) -> bool:
    return is_depthwise(node, operand(node, 0).shape[1], full_weight(node, 1, _COLD)[0])


def _rows(b: _Blocks, step: int) -> int:
    """Rows of results that the room allows, in parts as even as can be; 0 if there are none."""
    y, lines = b.win.y, b.channels * b.width
    overlap = (y.kernel - 1) * y.dilation + 1 - y.stride
    rows = (_ROOM // 4 - lines * overlap) // (lines * y.stride + b.at_once * b.win.x.out)
    if rows < step:
        return 0
    parts = -(-y.out // (rows // step * step))
    return min(y.out, -(-y.out // (parts * step)) * step)


def _shares(n: int, step: int) -> Iterator[int]:
    """n, half of it, a quarter, in steps."""
    while n > step:
        yield n
        n = -(-n // (2 * step)) * step
    yield n


def _blocks(node: Node) -> _Blocks:
    """The parts with the fewest calls, inside the room if any are."""
    x, weight, win = operand(node, 0), full_weight(node, 1, _COLD), _window(node)
    step, group = 1, node.int_attr("group", 1)
    if win.is_pointwise():
        pixels = win.y.out * win.x.out
        win = Window(Axis(pixels, pixels, 1, 1, 0, 0, 1), Axis(1, 1, 1, 1, 0, 0, 1))
        step = min(_BLOCK, pixels)
    table = x.size >= _TABLE_FROM
    if _depthwise(node):
        all_parts = [_Blocks(win, -(-group // n), n, n, n, step, table) for n in _shares(group, 1)]
    else:
        filters = weight[0] // group
        some = _Blocks(win, group, weight[1], filters, filters, step, table)
        all_parts = [replace(some, at_once=n) for n in _shares(filters, _BLOCK)]

    def calls(b: _Blocks) -> int:
        runs = b.sets * -(-b.filters // b.at_once)
        return -(-win.y.out // b.rows) * (
            x.shape[1] * _CALLS["line"] + weight[0] * _CALLS["result"] + runs * _CALLS["run"]
        )

    fitting = [replace(b, rows=_rows(b, step)) for b in all_parts]
    return min((b for b in fitting if b.rows > 0), key=calls, default=all_parts[-1])


def _c_params(node: Node) -> dict[str, Attr]:
    x, weight, b = operand(node, 0).shape, full_weight(node, 1, _COLD), _blocks(node)
    hot = operand(node, 1).shape[1 if node.int_attr("group", 1) == 1 else 0]
    conv = struct(node, b.win, x[0], x[1], weight, hot)
    return {
        **{f"conv.{k}": v for k, v in conv.items()},
        "sets": b.sets,
        "channels": b.channels,
        "filters": b.filters,
        "at_once": b.at_once,
        "rows": b.rows,
        "width": b.width,
        "table": int(b.table),
        **_conversions(node),
    }


def _work(node: Node) -> tuple[Work, ...]:
    """Work of the kernels of Conv on each block of rows, and the conversions."""
    b, (batch, channels) = _blocks(node), operand(node, 0).shape[:2]
    weight, y = full_weight(node, 1, _COLD), b.win.y
    hot, depth = operand(node, 1).shape[1], weight[1]
    depths = (hot, depth - hot) if 0 < hot < depth else (depth,)
    filters = [min(b.at_once, b.filters - i) for i in range(0, b.filters, b.at_once)]
    parts: list[Work] = []
    whole, rest = divmod(y.out, b.rows)
    for rows, times in ((b.rows, whole), (rest, 1)):
        if rows == 0 or times == 0:
            continue
        win = b.window(rows)
        if _depthwise(node):
            parts += conv_work.depthwise(win, False, batch * weight[0] * times)
        else:
            parts += conv_work.convolve(win, False, filters, depths, batch * b.sets * times)
    blocks, kept = -(-y.out // b.rows), max(0, b.lines(1) - y.stride)
    lines = blocks if b.width == b.win.x.size else y.size + blocks
    moved = 4 * batch * channels * (blocks - 1) * kept * b.width
    return (
        *(replace(w, operator="Conv") for w in parts),
        Work("elementwise", operand(node, 0).size, loops=batch * channels * lines, outputs=0),
        Work("elementwise", node.out.type.size, operator="Quantize", dtype="i8"),
        Work("setup", batch * blocks * weight[0], outputs=0),
        *([Work("copy", moved, outputs=0)] if moved else []),
    )


def _conv_vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    x, w, cold = _operands(node)
    grads: list[Value | None] = [None] * len(node.inputs)
    if not any(need):
        return grads
    inner = through_clamp(b, node, dy)
    geometry = {k: node.attrs[k] for k in _GEOMETRY if k in node.attrs}
    if need[0]:
        attrs: dict[str, Attr] = {**geometry, "shape": x.type.shape}
        grads[0] = b.add("ConvGradInput", (inner, w, cold), attrs, suffix="grad_input")
    if need[1]:
        shape, axis = list(w.type.shape), _channel_axis(node)
        if b.channels is not None and axis is not None:
            shape[axis] = b.channels
        attrs = {**geometry, "weight_shape": tuple(shape)}
        leading = b.leading_channels(x, 1)
        grads[1] = b.add("QConvGradWeight", (leading, inner), attrs, suffix="grad_weight")
    if len(need) > 2 and need[2]:
        grads[2] = b.add("ConvGradBias", (inner,), suffix="grad_bias")
    return grads


def _channel_axis(node: Node) -> int | None:
    if node.int_attr("group", 1) == 1:
        return 1
    return 0 if _depthwise(node) else None


# -- MixedGemm -------------------------------------------------------------------------------------


def _gemm_vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    x, w, cold = _operands(node)
    grads: list[Value | None] = [None] * len(node.inputs)
    if not any(need):
        return grads
    inner = through_clamp(b, node, dy)
    attrs: dict[str, Attr] = {"trans_b": node.int_attr("trans_b", 0)}
    if need[0]:
        grads[0] = b.add("GemmGradInput", (inner, w, cold), attrs, suffix="grad_input")
    if need[1]:
        leading = b.leading_channels(x, 1)
        grads[1] = b.add("QGemmGradWeight", (leading, inner), attrs, suffix="grad_weight")
    if len(need) > 2 and need[2]:
        grads[2] = b.add("GemmGradBias", (inner,), suffix="grad_bias")
    return grads


def _gemm_params(node: Node) -> dict[str, Attr]:
    kernel = get_op("Gemm").c
    assert kernel is not None
    gemm = kernel.params(_float_layer(node, "Gemm"))
    return {**{f"gemm.{k}": v for k, v in gemm.items()}, **_conversions(node)}


def _gemm_work(node: Node) -> tuple[Work, ...]:
    return (
        *works(_float_layer(node, "Gemm")),
        Work("elementwise", operand(node, 0).size, operator="Dequantize", dtype="i8"),
        Work("elementwise", node.out.type.size, operator="Quantize", dtype="i8"),
    )


# -- samples ---------------------------------------------------------------------------------------

#: Many channels, so that filters and pixels are taken in parts; wide lines.
_WIDE: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Attr]], ...] = (
    ((2, 70, 3, 9), (10, 70, 1, 1), {}),
    ((1, 40, 7, 8), (9, 40, 3, 3), {"pads": (1, 1, 1, 1)}),
    ((1, 12, 9, 9), (12, 1, 3, 3), {"group": 12, "pads": (1, 1, 1, 1)}),
    ((2, 2, 40, 50), (2, 1, 3, 3), {"group": 2, "pads": (1, 1, 1, 1), "strides": (2, 2)}),
    ((1, 2, 5, 6), (3, 2, 1, 1), {"strides": (3, 2), "pads": (1, 0, 2, 3)}),
)
#: Hot and cold parts: those of ``conv``; many channels; depthwise, split inside a run of channels.
_WIDE_PARTIAL: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...] = (
    *PARTIAL,
    (len(CASES) + len(MORE), (10, 9, 1, 1), (10, 61, 1, 1)),
    (len(CASES) + len(MORE) + 2, (7, 1, 3, 3), (5, 1, 3, 3)),
)
#: Result zero point, clamp, input zero point.
_RANGES: tuple[tuple[int, tuple[int, int], int], ...] = (
    (-5, (-128, 127), 3),
    (-128, (-128, 100), -128),
    (-100, (-100, 90), 60),
    (0, (-128, 127), 127),
)


def _sample(
    i: int, types: tuple[TensorType | None, ...], x: tuple[int, ...], attrs: dict[str, Attr]
) -> Sample:
    zero, clamp, x_zero = _RANGES[i % len(_RANGES)]
    stored: dict[str, Attr] = {"out_scale": 0.05, "out_zero_point": zero, "clamp": clamp}
    return Sample((i8(x, 0.02, x_zero), *types), {**attrs, **stored}, differentiable=())


def _samples() -> Iterator[Sample]:
    cases = (*CASES, *MORE, *_WIDE)
    for i, (x, w, attrs) in enumerate(cases):
        yield _sample(i, (TensorType(w), TensorType(w[:1]) if i % 3 else None), x, attrs)
    for i, hot, cold in _WIDE_PARTIAL:
        x, w, attrs = cases[i]
        yield _sample(i, (TensorType(hot), TensorType(w[:1]), TensorType(cold)), x, attrs)


def _gemm_samples() -> Iterator[Sample]:
    t = TensorType
    yield _sample(0, (t((6, 5)), t((6,))), (2, 5), {"trans_b": 1})
    yield _sample(1, (t((4, 7)), t((7,))), (3, 4), {"trans_b": 0})
    yield _sample(2, (t((3, 4)),), (1, 3), {"trans_b": 0})
    yield _sample(3, (t((5, 3)), t((5,)), t((5, 4))), (2, 7), {"trans_b": 1})
    yield _sample(4, (t((2, 5)), None, t((5, 5))), (2, 7), {"trans_b": 0})


register(
    OpDef(
        name="MixedConv",
        infer=lambda node: _infer("Conv", node),
        kernel=lambda node, inputs: _kernel("Conv", node, inputs),
        work=_work,
        c=CKernel("odtplan_mixed_conv", "odtplan_mixed_conv_t", _SOURCE, _c_params, operands=4),
        samples=_samples,
        vjp=_conv_vjp,
        workspace=lambda node: _blocks(node).workspace,
        inplace=(0,),
        can_be_inplace=lambda node: _depthwise(node) and _window(node).keeps_size(),
        params=(
            ParamSlot(1, "weight", channel_axis=_channel_axis, cold_index=_COLD),
            ParamSlot(2, "bias"),
        ),
    )
)
register(
    OpDef(
        name="MixedGemm",
        infer=lambda node: _infer("Gemm", node),
        kernel=lambda node, inputs: _kernel("Gemm", node, inputs),
        work=_gemm_work,
        c=CKernel("odtplan_mixed_gemm", "odtplan_mixed_gemm_t", _SOURCE, _gemm_params, operands=4),
        samples=_gemm_samples,
        vjp=_gemm_vjp,
        workspace=lambda node: 4 * (operand(node, 0).shape[1] + node.out.type.shape[1]),
        params=(
            ParamSlot(1, "weight", lambda node: 1 if node.int_attr("trans_b", 0) else 0, _COLD),
            ParamSlot(2, "bias"),
        ),
    )
)

"""Normalization of each sample's groups of channels, with a scale and a bias per channel.

Group normalization (Wu and He 2018); instance normalization is that of groups of one channel, and
one without scales is what remains of mean-variance and Lp normalization. With the attribute
``centred`` 0 the mean counts as 0 (root mean square without a scale). With the attribute
``across_batch`` the gradients are those of ``batch_norm``, whose rows are channels over all
samples. The formulas are those of ``standardize``. Backward saves ``x`` alone, as in
``layer_norm``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, ParamSlot, Sample, Work, array, f32_operand, operand, register
from .standardize import gradient, standardized

if TYPE_CHECKING:
    from ..autodiff import GradBuilder

T = TensorType


@dataclass(frozen=True)
class Layout:
    """Rows of a tensor ``[N, C, ...]``; as ``odtplan_group_norm_t``.

    Attributes:
        rows: Samples times groups.
        groups: Groups of channels.
        pieces: Parts of a row that have a scale of their own.
        run: Elements of a piece.
        samples: That a row takes its channel from; 0: it lies in one sample.
    """

    rows: int
    groups: int
    pieces: int
    run: int
    samples: int = 0

    @property
    def size(self) -> int:
        """Elements of a row."""
        return self.pieces * self.run

    @property
    def scales(self) -> int:
        """Scales of all groups."""
        return self.groups * self.pieces

    def rows_of(self, x: Array) -> Array:
        """A tensor as ``[rows, size]``."""
        if self.samples:
            x = np.swapaxes(x.reshape(self.samples, self.rows, -1), 0, 1)
        return x.reshape(self.rows, self.size)

    def whole(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """The tensor again."""
        if self.samples:
            rows = np.swapaxes(rows.reshape(self.rows, self.samples, -1), 0, 1)
        return np.ascontiguousarray(rows).reshape(shape)

    def per_row(self, scale: Array) -> Array:
        """The scale of each element, ``[rows, size]``."""
        parts = np.repeat(scale.reshape(self.groups, self.pieces), self.run, axis=1)
        return np.tile(parts, (self.rows // self.groups, 1))


def layout(node: Node, scales: int | None) -> Layout:
    """Rows of operand 0, with so many scales (None: one per group).

    Raises:
        GraphError: Groups or scales do not fit the channels.
    """
    shape, groups = operand(node, 0).shape, node.int_attr("num_groups", 1)
    if len(shape) < 2:
        raise GraphError(f"input {operand(node, 0)} has no channel axis")
    if groups < 1 or shape[1] % groups:
        raise GraphError(f"{shape[1]} channels are not {groups} groups of one size")
    if node.attrs.get("across_batch"):
        return across_batch(shape)
    scales = groups if scales is None else scales
    if scales not in (groups, shape[1]):
        raise GraphError(f"{scales} scales fit neither {shape[1]} channels nor {groups} groups")
    size = prod(shape[1:]) // groups
    pieces = scales // groups
    return Layout(shape[0] * groups, groups, pieces, size // pieces)


def across_batch(shape: tuple[int, ...]) -> Layout:
    """Rows are channels, over all samples."""
    return Layout(shape[1], shape[1], 1, prod(shape) // shape[1], shape[0])


def scales_of(node: Node, index: int) -> int | None:
    """Elements of an optional operand of scales."""
    if index >= len(node.inputs) or node.inputs[index] is None:
        return None
    scale = f32_operand(node, index)
    if len(scale.shape) != 1:
        raise GraphError(f"operand {index}, {scale}, is not a list of scales")
    return scale.size


def _layout(node: Node) -> Layout:
    """Layout of forward and of the gradients."""
    if node.op == "GroupNormGradScale":
        return layout(node, node.int_attr("scales"))
    return layout(node, scales_of(node, 2 if node.op == "GroupNormGradInput" else 1))


def _centred(node: Node) -> bool:
    return node.op != "LpNormalization" and bool(node.int_attr("centred", 1))


def _count(node: Node, lay: Layout) -> int:
    """Divisor of the sum of squares: Lp normalization has no mean of them."""
    return 1 if node.op == "LpNormalization" or node.int_attr("sum_of_squares", 0) else lay.size


def _epsilon(node: Node) -> float:
    return node.float_attr("epsilon", 1e-5)


def _standardized(node: Node, x: Array, lay: Layout) -> tuple[Array, Array]:
    return standardized(
        lay.rows_of(x), _epsilon(node), centred=_centred(node), count=_count(node, lay)
    )


def _params(node: Node) -> dict[str, Attr]:
    return struct(node, _layout(node))


def struct(node: Node, lay: Layout) -> dict[str, Attr]:
    """Fields of ``odtplan_group_norm_t``."""
    return {
        "rows": lay.rows,
        "row_step": lay.run // lay.samples if lay.samples else lay.size,
        "pieces": lay.samples or lay.pieces,
        "run": lay.run // (lay.samples or 1),
        "step": lay.run // lay.samples * lay.rows if lay.samples else lay.run,
        "groups": lay.groups,
        "scales": lay.pieces,
        "centred": int(_centred(node)),
        "count": float(_count(node, lay)),
        "epsilon": _epsilon(node),
    }


def _work(node: Node) -> Work:
    lay = _layout(node)
    size, loops = operand(node, 0).size, lay.rows * lay.pieces
    same = {"LpNormalization": "GroupNormalization"}.get(node.op, "")
    return Work("elementwise", size, loops=loops, operator=same)


def _infer(node: Node) -> list[TensorType]:
    x, lay = f32_operand(node, 0), _layout(node)
    if len(node.inputs) > 2 and node.inputs[2] is not None and scales_of(node, 2) != lay.scales:
        raise GraphError(f"bias {operand(node, 2)} does not fit {lay.scales} scales")
    return [x]


def _kernel(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    return [normalized(node, inputs, _layout(node))]


def normalized(node: Node, inputs: Sequence[Array | None], lay: Layout) -> Array:
    """``y`` from x and, where there are, scale and bias."""
    x, (scale, bias) = array(inputs, 0), (*inputs[1:], None, None)[:2]
    y, _ = _standardized(node, x, lay)
    if scale is not None:
        y = y * lay.per_row(scale)
    if bias is not None:
        y = y + lay.per_row(bias)
    return lay.whole(y, x.shape)


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    lay = _layout(node)
    attrs: dict[str, Attr] = {"num_groups": lay.groups, "epsilon": _epsilon(node)}
    if not _centred(node):
        attrs["centred"] = 0
    if node.op == "LpNormalization":
        attrs["sum_of_squares"] = 1
    return gradients(b, node, dy, need, attrs, lay)


def gradients(
    b: GradBuilder,
    node: Node,
    dy: Value,
    need: Sequence[bool],
    attrs: dict[str, Attr],
    lay: Layout,
) -> list[Value | None]:
    """Gradients of x, scale and bias; ``attrs`` tell the gradients' operators the layout."""
    x, scale = (*node.inputs, None)[:2]
    result: list[Value | None] = [None] * len(node.inputs)
    if need[0]:
        result[0] = b.add("GroupNormGradInput", (dy, x, scale), attrs, suffix="grad_input")
    if len(need) > 1 and need[1]:
        more = {**attrs, "scales": lay.scales}
        result[1] = b.add("GroupNormGradScale", (dy, x), more, suffix="grad_scale")
    if len(need) > 2 and need[2]:
        parts = dy
        if lay.scales != dy.type.shape[1]:
            shape = (dy.type.shape[0], lay.scales, lay.run)
            parts = b.add("Reshape", (dy,), {"shape": shape}, suffix="groups")
        result[2] = b.add("ConvGradBias", (parts,), suffix="grad_bias")
    return result


def _infer_grad_input(node: Node) -> list[TensorType]:
    _layout(node)
    return [_same(node)]


def _same(node: Node) -> TensorType:
    dy, x = f32_operand(node, 0), f32_operand(node, 1)
    if x != dy:
        raise GraphError(f"gradient {dy} is not of the type {x} of the input")
    return x


def _kernel_grad_input(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    dy, x, scale = array(inputs, 0), array(inputs, 1), inputs[2] if len(inputs) > 2 else None
    lay = _layout(node)
    xhat, inverse = _standardized(node, x, lay)
    g = lay.rows_of(dy)
    if scale is not None:
        g = g * lay.per_row(scale)
    dx = gradient(g, xhat, inverse, centred=_centred(node), count=_count(node, lay))
    return [lay.whole(dx, x.shape)]


def _rows_grad_scale(node: Node, inputs: Sequence[Array | None], begin: int, end: int) -> Array:
    dy, x, lay = array(inputs, 0), array(inputs, 1), _layout(node)
    xhat, _ = _standardized(node, x, lay)
    terms = (lay.rows_of(dy) * xhat).reshape(-1, lay.scales, lay.run)
    part = np.swapaxes(terms[:, begin:end], 0, 1).reshape(end - begin, -1)
    return np.ascontiguousarray(np.add.accumulate(part, axis=1)[:, -1])


def _tiled_work(node: Node, tile_rows: int) -> tuple[Work, ...]:
    """Every tile finds the statistics of the groups again that it has scales of."""
    lay = _layout(node)
    samples = lay.rows // lay.groups
    tiles = range(0, lay.scales, tile_rows)
    last = (min(t + tile_rows, lay.scales) - 1 for t in tiles)
    visits = samples * sum(
        e // lay.pieces - t // lay.pieces + 1 for t, e in zip(tiles, last, strict=True)
    )
    size = operand(node, 0).size
    return (Work("elementwise", visits * lay.size, loops=visits * lay.pieces, passes=size),)


#: x, scales (None: absent), groups: groups, instances, one scale per group, one group, 3-D.
_CASES: tuple[tuple[tuple[int, ...], int | None, int], ...] = (
    ((2, 6, 3, 4), 6, 3),
    ((2, 3, 4, 3), 3, 3),
    ((2, 6, 2, 3), 2, 2),
    ((2, 4, 5), 4, 1),
    ((3, 4, 3), None, 2),
    ((1, 1, 7), None, 1),
)


def _cases(gradient: bool) -> Iterator[tuple[T, T | None, dict[str, Attr]]]:
    for x, scales, groups in _CASES:
        attrs: dict[str, Attr] = {"num_groups": groups, "epsilon": 1e-3}
        yield T(x), None if scales is None else T((scales,)), attrs
    yield T((3, 2, 5)), None, {"centred": 0, "epsilon": 1e-3}
    if gradient:
        yield T((3, 2, 5)), None, {"centred": 0, "sum_of_squares": 1, "epsilon": 1e-3}
        yield T((3, 4, 2, 3)), T((4,)), {"across_batch": 1, "epsilon": 1e-3}


def _samples() -> Iterator[Sample]:
    for x, scale, attrs in _cases(False):
        yield Sample((x,) if scale is None else (x, scale, scale), attrs)


def _samples_lp() -> Iterator[Sample]:
    yield Sample((T((3, 7)),), {"epsilon": 1e-24}, low=0.2, high=1.0)
    yield Sample((T((2, 1, 5)),), {"epsilon": 1e-3})


def _samples_grad_input() -> Iterator[Sample]:
    for x, scale, attrs in _cases(True):
        yield Sample((x, x) if scale is None else (x, x, scale), attrs, differentiable=())


def _samples_grad_scale() -> Iterator[Sample]:
    for x, scale, attrs in _cases(True):
        if scale is not None:
            yield Sample((x, x), {**attrs, "scales": scale.size}, differentiable=())


def _c(symbol: str, operands: int | None = None) -> CKernel:
    return CKernel(symbol, "odtplan_group_norm_t", "odtplan_group_norm", _params, operands)


register(
    OpDef(
        name="GroupNormalization",
        infer=_infer,
        kernel=_kernel,
        work=_work,
        c=_c("odtplan_group_norm_f32"),
        samples=_samples,
        vjp=_vjp,
        inplace=(0,),
        params=(ParamSlot(1, "scale"), ParamSlot(2, "bias")),
    )
)
register(
    OpDef(
        name="LpNormalization",
        infer=_infer,
        kernel=_kernel,
        work=_work,
        c=_c("odtplan_group_norm_f32", 3),
        samples=_samples_lp,
        vjp=_vjp,
        inplace=(0,),
    )
)
register(
    OpDef(
        name="GroupNormGradInput",
        infer=_infer_grad_input,
        kernel=_kernel_grad_input,
        work=_work,
        c=_c("odtplan_group_norm_grad_input_f32", 3),
        samples=_samples_grad_input,
        inplace=(0, 1),
    )
)
register(
    OpDef(
        name="GroupNormGradScale",
        infer=lambda node: [T((_layout(node).scales,), _same(node).dtype)],
        kernel=lambda node, inputs: [_rows_grad_scale(node, inputs, 0, node.out.type.shape[0])],
        rows_kernel=_rows_grad_scale,
        work=lambda node: _tiled_work(node, node.out.type.shape[0])[0],
        tiled_work=_tiled_work,
        c=_c("odtplan_group_norm_grad_scale_f32"),
        samples=_samples_grad_scale,
    )
)

"""Normalizations that exporters write as several nodes become one.

As one node they save their operand alone, and have one scale and bias per channel to train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from math import prod

import numpy as np

from .chains import MEANS, Chain, chains, mean_axes
from .graph import Array, Attr, Graph, Node, Value
from .ops.standardize import standardized
from .surgery import (
    absorb,
    drop_unread,
    nodes_of,
    operand_of,
    reshaped_constant,
    sole_reader,
)

_CENTRED, _ROOT = "LayerNormalization", "RMSNormalization"
#: Operators of a chain that normalizes rows.
_ROW_PARTS = ("Add", "Div", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt", "Sub", *MEANS)
#: By constants of a row: what a chain may be, and which of them are its scale and bias.
_ROW_NORMS: dict[int, tuple[tuple[str, tuple[int, ...]], ...]] = {
    0: ((_CENTRED, ()), (_ROOT, ())),
    1: ((_CENTRED, (0,)), (_ROOT, (0,))),
    2: ((_CENTRED, (0, 1)), (_CENTRED, (1, 0))),
}
_LARGEST_EPSILON = 1.0
#: Constants of files are rounded to float32.
_TOLERANCE = 1e-5
#: Most nodes one after the other behind the root.
_REACH = 6


def merge_group_norm(graph: Graph) -> bool:
    """Instances of groups between two Reshapes are groups: GroupNorm before opset 18."""
    changed = False
    for norm in nodes_of(graph, "GroupNormalization"):
        rows = operand_of(norm, 0)
        before, after = rows.producer, sole_reader(graph, norm.out)
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
        follower, shape = sole_reader(graph, norm.out), norm.out.type.shape
        if follower is None or follower.op not in ("Mul", "Add") or bias is not None:
            continue
        if follower.op == "Mul" and scale is not None:
            continue
        if scale is None and follower.op == "Add" and norm.int_attr("num_groups", 1) != shape[1]:
            continue  # without scales a bias is one per group
        other = next((v for v in follower.operands() if v is not norm.out), norm.out)
        if not _runs_along(graph, other, 1, shape) or follower.out.type.shape != shape:
            continue
        if scale is not None and scale.type.shape != shape[1:2]:
            continue  # one per group
        if norm.out.name in graph.quantization:
            continue
        constant = reshaped_constant(graph, other, shape[1:2], follower)
        norm.inputs = (
            norm.inputs[0],
            *((constant,) if follower.op == "Mul" else (scale, constant)),
        )
        absorb(graph, norm, follower)
        changed = True
    return changed


def merge_row_norm(graph: Graph) -> bool:
    """Chains around a root that normalize rows, channels at each place or groups become one node.

    That of channels stands between two Transposes; one without a scale is group normalization of
    one group per row. Groups of channels are what Keras writes: on [N, H, W, groups, channels of a
    group], with a scale and a bias for each channel.
    """
    changed = False
    for root in nodes_of(graph, "Sqrt"):
        if root not in graph.nodes:
            continue  # it was part of another one's chain
        for chain in chains(graph, root, _ROW_PARTS, _REACH):
            found = _row_norm(chain) or _channel_groups(chain)
            if found is None:
                continue
            if found.moved and {chain.x.name, chain.y.name} & graph.quantization.keys():
                continue
            found.write(graph, chain)
            changed = True
            break
    return changed


@dataclass(frozen=True)
class _RowNorm:
    """What a chain computes.

    Attributes:
        op: Layer or RMS normalization.
        epsilon: Its own.
        row: Shape of what is normalized.
        scales: Scale and maybe bias; empty without both.
        channels: Rows lie along axis 1 instead of the last ones.
    """

    op: str
    epsilon: float
    row: tuple[int, ...]
    scales: list[Value]
    channels: bool

    @property
    def moved(self) -> bool:
        """It is written between moves."""
        return self.channels or not self.scales

    def write(self, graph: Graph, chain: Chain) -> None:
        """Put the normalization in the place of the chain."""
        shape, rank = chain.x.type.shape, len(chain.x.type.shape)
        rest: list[Value | None] = [
            reshaped_constant(graph, v, self.row, *chain.nodes) for v in self.scales
        ]
        ways: list[_Way] = []
        if self.channels:
            ways.append(_channels_last(rank))
            shape = tuple(shape[a] for a in (0, *range(2, rank), 1))
        attrs: dict[str, Attr] = {"axis": rank - len(self.row), "epsilon": self.epsilon}
        op = self.op
        if not rest:
            size = prod(self.row)
            rows = (prod(shape) // size, size)
            ways.append(_Way("Reshape", {"shape": rows}, {"shape": shape}))
            attrs = {"num_groups": 1, "epsilon": self.epsilon}
            if op == _ROOT:
                attrs["centred"] = 0
            op = "GroupNormalization"
        if ways:
            _write_moved(graph, chain, ways, [(op, attrs, rest)])
        else:
            chain.become(graph, op, attrs, rest)


def _row_norm(chain: Chain) -> _RowNorm | None:
    """What a chain computes, if it is one of these."""
    shape = chain.x.type.shape
    rank = len(shape)
    reduced = {mean_axes(n) for n in chain.nodes if n.op in MEANS}
    axes = list(next(iter(reduced), ()))
    channels = axes == [1] and rank > 2
    if len(reduced) != 1 or not (channels or axes == list(range(rank - len(axes), rank))):
        return None
    row = tuple(shape[a] for a in axes)
    apart = (1,) * (rank - 2) if channels else ()  # axes behind the row
    wide = [v for v, c in chain.constants.items() if c.size > 1]
    if prod(row) < 2 or any(_stripped(v.type.shape, len(row + apart)) != row + apart for v in wide):
        return None
    data = [chain.constants[v].reshape(row) for v in wide]
    for epsilon in {float(c.reshape(())) for c in chain.constants.values() if c.size == 1}:
        if not 0.0 < epsilon < _LARGEST_EPSILON:
            continue
        samples = _samples((1,) * axes[0] + row + apart, epsilon)
        got = [chain.values(x) for x in samples]
        for op, places in _ROW_NORMS.get(len(wide), ()):
            given = [data[i] for i in places]
            scale = given[0] if given else np.ones(row)
            bias = given[1] if len(given) > 1 else np.zeros(row)
            rows = [
                standardized(x.reshape(1, -1), epsilon, centred=op == _CENTRED) for x in samples
            ]
            want = [xhat.reshape(row) * scale + bias for xhat, _ in rows]
            if all(_close(g, w) for g, w in zip(got, want, strict=True)):
                return _RowNorm(op, epsilon, row, [wide[i] for i in places], channels)
    return None


@dataclass(frozen=True)
class _ChannelGroups:
    """What a chain computes.

    Attributes:
        axis: That of the groups; the one of the channels of a group is the next.
        epsilon: Its own.
        scale: One number per channel, if there are any.
        bias: Likewise.
    """

    axis: int
    epsilon: float
    scale: Value | None
    bias: Value | None
    moved = True

    def write(self, graph: Graph, chain: Chain) -> None:
        """Put the normalization in the place of the chain."""
        shape, axis = chain.x.type.shape, self.axis
        groups, size = shape[axis : axis + 2]
        whole = (*shape[:axis], groups * size, *shape[axis + 2 :])
        ways = [_Way("Reshape", {"shape": whole}, {"shape": shape})]
        if axis > 1:
            ways.append(_channels_first(len(whole), axis))

        def channels(v: Value, *ones: int) -> Value:
            return reshaped_constant(graph, v, (groups * size, *ones), *chain.nodes)

        scale, bias = self.scale, self.bias
        scales: list[Value | None] = [] if scale is None else [channels(scale)]
        attrs: dict[str, Attr] = {"num_groups": groups, "epsilon": self.epsilon}
        ops: list[_Op] = [("GroupNormalization", attrs, scales)]
        if bias is not None and scale is not None:
            scales.append(channels(bias))
        elif bias is not None:
            ops.append(("Add", {}, [channels(bias, *(1 for _ in whole[2:]))]))
        _write_moved(graph, chain, ways, ops)


def _channel_groups(chain: Chain) -> _ChannelGroups | None:
    """What a chain computes, if it normalizes groups of channels."""
    shape = chain.x.type.shape
    rank = len(shape)
    reduced = {mean_axes(n) for n in chain.nodes if n.op in MEANS}
    kept = [a for a in range(rank) if a not in next(iter(reduced), ())]
    if len(reduced) != 1 or len(kept) != 2 or kept[0] != 0 or kept[1] + 1 >= rank:
        return None
    axis = kept[1]
    channels = (*shape[axis : axis + 2], *(1,) * (rank - axis - 2))
    wide = [v for v, c in chain.constants.items() if c.size > 1]
    if len(wide) > 2 or any(_stripped(v.type.shape, len(channels)) != channels for v in wide):
        return None
    few = tuple(d if a in (axis, axis + 1) else min(d, 3) for a, d in enumerate(shape))
    for epsilon in {float(c.reshape(())) for c in chain.constants.values() if c.size == 1}:
        if not 0.0 < epsilon < _LARGEST_EPSILON or prod(few[1:]) < 2 * shape[axis]:
            continue
        samples = _samples((1, *few[1:]), epsilon)
        got = [chain.values(x) for x in samples]
        for scale, bias in permutations((*wide, None, None)[:2]):
            factor = 1.0 if scale is None else chain.constants[scale]
            offset = 0.0 if bias is None else chain.constants[bias]
            want = [_by_groups(x, axis, epsilon) * factor + offset for x in samples]
            if all(_close(g, w.reshape(-1)) for g, w in zip(got, want, strict=True)):
                return _ChannelGroups(axis, epsilon, scale, bias)
    return None


def _by_groups(x: Array, axis: int, epsilon: float) -> Array:
    """One sample, normalized over everything but the groups along an axis."""
    moved = np.moveaxis(x, axis, 0)
    xhat, _ = standardized(moved.reshape(len(moved), -1), epsilon, centred=True)
    return np.moveaxis(xhat.reshape(moved.shape), 0, axis)


@dataclass(frozen=True)
class _Way:
    """A move of axes, there and back."""

    op: str
    there: dict[str, Attr]
    back: dict[str, Attr]


#: An operator, its attributes, and its operands but the first.
_Op = tuple[str, dict[str, Attr], list[Value | None]]


def _channels_last(rank: int) -> _Way:
    there, back = (0, *range(2, rank), 1), (0, rank - 1, *range(1, rank - 1))
    return _Way("Transpose", {"perm": there}, {"perm": back})


def _channels_first(rank: int, axis: int) -> _Way:
    there = (0, axis, *(a for a in range(1, rank) if a != axis))
    back = tuple(there.index(a) for a in range(rank))
    return _Way("Transpose", {"perm": there}, {"perm": back})


def _write_moved(graph: Graph, chain: Chain, ways: Sequence[_Way], ops: Sequence[_Op]) -> None:
    """Put operators in the place of a chain, behind moves and in front of the moves back."""
    x, last = chain.x, chain.nodes[-1]
    there: list[_Op] = [(way.op, way.there, []) for way in ways]
    back: list[_Op] = [(way.op, way.back, []) for way in ways[:0:-1]]
    for op, attrs, more in (*there, *ops, *back):
        made = graph.add_node(op, (x, *more), attrs, name=f"{last.name}/{op.lower()}")
        graph.nodes.insert(graph.nodes.index(last), graph.nodes.pop())
        x = made.out
    replace(chain, x=x).become(graph, ways[0].op, ways[0].back)


def _samples(shape: tuple[int, ...], epsilon: float) -> list[Array]:
    """Rows in whose variance epsilon is next to nothing, half, and nearly all."""
    rng = np.random.default_rng(0)
    return [np.sqrt(epsilon) * s * (rng.standard_normal(shape) + 0.5) for s in (30.0, 1.0, 0.1)]


def _close(got: Array, want: Array) -> bool:
    off = np.abs(got.reshape(-1) - want.reshape(-1)).max()
    return bool(off <= _TOLERANCE * max(1.0, np.abs(want).max()))


def _stripped(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """A shape without leading axes of length 1 beyond a rank."""
    while len(shape) > rank and shape[0] == 1:
        shape = shape[1:]
    return shape


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

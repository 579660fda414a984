"""The order of a network's channels: which axes share one, and the same network in another.

A partial update of a weight is of its leading input channels, so their order decides what is
learned. It is free where a network is a chain: the rows of the weight that makes the channels, its
bias, the BatchNormalization and the depthwise weights behind it, and the columns of all weights
that read them can be permuted alike. Such axes are a *class*. Residual sums join the classes of
their operands; a Flatten makes the axis behind it run over channels in blocks. Inputs, outputs, and
all that an operator without a rule for its axes (``OpDef.axes``) reads or makes keep their order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from .axes import Axis, Split
from .candidates import channel_axis, param_slots
from .errors import UsageError
from .graph import Array, Graph, Node
from .opdef import get_op
from .quantization import Quantization
from .training import Candidate

#: Class -> index in the file of each of its channels.
Channels = Mapping[str, Sequence[int]]
#: What a constant's axes are permuted by; None: it is as in the file.
AxisOrders = tuple[NDArray[np.intp] | None, ...]
#: All constants are as in the file.
NO_ORDERS: Mapping[str, AxisOrders] = MappingProxyType({})


@dataclass(frozen=True)
class Member:
    """An axis that runs over the channels of a class.

    Attributes:
        value: Name of the value.
        axis: Its axis, of the length ``before * size * behind``.
        before: How often all channels occur in it.
        behind: How many neighbours belong to one channel.
    """

    value: str
    axis: int
    before: int
    behind: int

    def places(self, order: Sequence[int]) -> NDArray[np.intp]:
        """The indices of the axis, its channels in another order."""
        each = np.arange(self.before * len(order) * self.behind)
        return each.reshape(self.before, -1, self.behind)[:, list(order)].ravel()

    def by_channel(self, a: NDArray[np.float64], size: int) -> NDArray[np.float64]:
        """Sums of numbers along the axis."""
        sums: NDArray[np.float64] = a.reshape(self.before, size, self.behind).sum((0, 2))
        return sums


@dataclass(frozen=True)
class ChannelClass:
    """Axes that are permuted alike.

    Attributes:
        name: ``VALUE:AXIS`` of the first result in it.
        size: Number of channels.
        members: The axes, those of constants included.
    """

    name: str
    size: int
    members: tuple[Member, ...]


class _Classes:
    """Axes in a forest: each is ``before * parent * behind``, one axis inside the other."""

    def __init__(self) -> None:
        self._parent: dict[Axis, tuple[Axis, int, int]] = {}
        self._fixed: set[Axis] = set()

    def find(self, axis: Axis) -> tuple[Axis, int, int]:
        """The root of an axis, and how the axis runs over it."""
        before = behind = 1
        while axis in self._parent:
            axis, outer, inner = self._parent[axis]
            before, behind = before * outer, inner * behind
        return axis, before, behind

    def fix(self, axis: Axis) -> None:
        """The order of an axis stays."""
        self._fixed.add(self.find(axis)[0])

    def is_fixed(self, axis: Axis) -> bool:
        return self.find(axis)[0] in self._fixed

    def join(self, whole: Axis, part: Axis, before: int = 1, behind: int = 1) -> None:
        """``whole`` is ``before * part * behind``; where that can't be said, both are fixed."""
        a, a_before, a_behind = self.find(whole)
        b, b_before, b_behind = self.find(part)
        b_before, b_behind = before * b_before, b_behind * behind
        if a == b:
            if (a_before, a_behind) != (b_before, b_behind):
                self._fixed.add(a)
        elif b_before % a_before == 0 and b_behind % a_behind == 0:
            self._attach(a, b, b_before // a_before, b_behind // a_behind)
        elif a_before % b_before == 0 and a_behind % b_behind == 0:
            self._attach(b, a, a_before // b_before, a_behind // b_behind)
        else:
            self._fixed |= {a, b}

    def _attach(self, child: Axis, parent: Axis, before: int, behind: int) -> None:
        self._parent[child] = parent, before, behind
        if child in self._fixed:
            self._fixed.add(parent)


def channel_classes(graph: Graph) -> list[ChannelClass]:
    """All classes of more than one channel whose order is free, by their first result.

    Args:
        graph: A forward graph of real numbers.
    """
    classes = _Classes()
    for v in (*graph.inputs, *graph.outputs):
        for axis in range(len(v.type.shape)):
            classes.fix((v, axis))
    splits: list[Split] = []
    for node in graph.nodes:
        splits += _tie(classes, node)
    for split in splits:  # once all is known that fixes one of their parts
        _split(classes, split)
    found: dict[Axis, list[tuple[Axis, int, int]]] = {}
    results = (v for node in graph.nodes for v in node.outputs)
    for v in (*results, *map(graph.values.__getitem__, graph.constants)):
        for axis in range(len(v.type.shape)):
            root, before, behind = classes.find((v, axis))
            found.setdefault(root, []).append(((v, axis), before, behind))
    free = []
    for root, members in found.items():
        (first, first_axis), before, behind = members[0]
        size = first.type.shape[first_axis] // (before * behind)
        if size > 1 and first.producer is not None and not classes.is_fixed(root):
            each = tuple(Member(v.name, axis, p, q) for (v, axis), p, q in members)
            free.append(ChannelClass(f"{first.name}:{first_axis}", size, each))
    return free


def _tie(classes: _Classes, node: Node) -> list[Split]:
    """Join what a node's rule ties, and fix all other axes of it; what is split is for later."""
    rule = get_op(node.op).axes
    splits, told = [], set[Axis]()
    for tie in () if rule is None else rule(node):
        if isinstance(tie, Split):
            splits.append(tie)
            told |= {tie.whole, *tie.parts}
            continue
        for axis in tie[1:]:
            classes.join(tie[0], axis)
        told |= {*tie}
    for v in (*node.operands(), *node.outputs):
        for axis in {(v, i) for i in range(len(v.type.shape))} - told:
            classes.fix(axis)
    return splits


def _split(classes: _Classes, split: Split) -> None:
    """The whole runs over the one part whose order is free; it is fixed where several are."""
    free = [i for i, part in enumerate(split.parts) if not classes.is_fixed(part)]
    sizes = [v.type.shape[axis] for v, axis in split.parts]
    if len(free) != 1:
        for axis in (split.whole, *split.parts):
            classes.fix(axis)
        return
    (i,) = free
    before, behind = (int(np.prod(some)) for some in (sizes[:i], sizes[i + 1 :]))
    classes.join(split.whole, split.parts[i], before, behind)


def best_order(
    graph: Graph, scores: Mapping[str, tuple[int, NDArray[np.float64]]]
) -> dict[str, tuple[int, ...]]:
    """The channels of each class by falling score; classes that are in this order are left out.

    Several weights may read a class; a channel's score is the sum of what they have by it.

    Args:
        graph: A forward graph, in the file's order.
        scores: Parameter -> the axis that it is updated by parts of, and a score of each index.
    """
    found: dict[str, tuple[int, ...]] = {}
    for c in channel_classes(graph):
        total = np.zeros(c.size)
        for m in c.members:
            axis, each = scores.get(m.value, (None, total))
            if axis == m.axis:
                total = total + m.by_channel(each, c.size)
        order = np.argsort(-total, kind="stable")  # equal ones as in the file
        if not np.array_equal(order, np.arange(c.size)):
            found[c.name] = tuple(order.tolist())
    return found


def of_parts(graph: Graph, channels: Channels, chosen: Iterable[Candidate]) -> Channels:
    """Those classes by whose order it is decided which part of a weight is updated.

    Args:
        graph: A forward graph.
        channels: Classes and their order.
        chosen: Updates.
    """
    slots = param_slots(graph)
    parts = {(c.param, channel_axis(slots[c.param])) for c in chosen if c.channels is not None}
    return {
        c.name: channels[c.name]
        for c in channel_classes(graph)
        if c.name in channels and any((m.value, m.axis) in parts for m in c.members)
    }


def orders_of(graph: Graph, channels: Channels) -> dict[str, AxisOrders]:
    """What the constants of a graph are permuted by; those that are not are left out.

    Raises:
        UsageError: There is no such class, or its channels are not those.
    """
    classes = {c.name: c for c in channel_classes(graph)}
    found: dict[str, list[NDArray[np.intp] | None]] = {}
    for name, order in channels.items():
        if name not in classes or sorted(order) != list(range(classes[name].size)):
            raise UsageError(
                f"{graph.name} has no channels {name} in an order like that; plan the model again"
            )
        for m in classes[name].members:
            if m.value in graph.constants:
                axes = found.setdefault(m.value, [None] * len(graph.values[m.value].type.shape))
                axes[m.axis] = m.places(order)
    return {name: tuple(axes) for name, axes in found.items()}


def reordered(graph: Graph, channels: Channels) -> Graph:
    """The same network with its channels in another order.

    Args:
        graph: A forward graph in the file's order; it is not modified, but nodes are shared.
        channels: The classes whose order changes.

    Returns:
        A graph that knows what it was permuted by (``Graph.orders``), of which its origins tell
        nothing; the same graph if nothing changes.

    Raises:
        UsageError: As ``orders_of``.
    """
    if not channels:
        return graph
    result = copy.copy(graph)
    result.orders = orders_of(graph, channels)
    result.constants, result.quantization = dict(graph.constants), dict(graph.quantization)
    for name, orders in result.orders.items():
        result.constants[name] = permuted(graph.constants[name], orders)
        if (quant := graph.quantization.get(name)) is not None:
            result.quantization[name] = _scales(quant, orders)
    result.verify()
    return result


def permuted(data: Array, orders: AxisOrders) -> Array:
    """Each axis in its new order."""
    for axis, order in enumerate(orders):
        data = data if order is None else np.take(data, order, axis)
    return data


def in_file_order(data: Array, orders: AxisOrders) -> Array:
    """What was permuted, as it was."""
    return permuted(data, tuple(None if o is None else np.argsort(o) for o in orders))


def _scales(quant: Quantization, orders: AxisOrders) -> Quantization:
    order = None if quant.axis is None else orders[quant.axis]
    if order is None:
        return quant
    return Quantization(tuple(quant.scale[i] for i in order), quant.zero_point, quant.axis)

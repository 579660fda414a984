"""Blocks of convolutional networks: those that a reader sees."""

from __future__ import annotations

from collections.abc import Callable

import nets
import numpy as np
import pytest

from odt_plan.ir.conv_blocks import conv_blocks
from odt_plan.ir.graph import Attr, Graph, TensorType, Value


def plain(size: int = 12) -> Graph:
    """Two convolutions and a pool, two and a stride, one that is left with odd sizes."""
    rng, g = np.random.default_rng(0), Graph("plain")
    x = g.add_input("x", TensorType((1, 3, size, size)))
    x = nets.relu(g, nets.conv(g, rng, x, "c0", 5), "r0")
    x = nets.relu(g, nets.conv(g, rng, x, "c1", 5), "r1")
    x = nets.pool(g, "MaxPool", x, "p1")
    x = nets.relu(g, nets.conv(g, rng, x, "c2", 6), "r2")
    x = nets.relu(g, nets.conv(g, rng, x, "c3", 6), "r3")
    x = nets.relu(g, nets.conv(g, rng, x, "c4", 7, stride=2), "r4")
    g.outputs = [nets.dense(g, rng, nets.flat(g, x), "fc", 3)]
    g.verify()
    return g


NETS: dict[str, Callable[[], Graph]] = {
    "resnet": nets.resnet,
    "bottlenecks": nets.bottlenecks,
    "plain": plain,
}
#: (what a block reads, what it makes) of each.
BLOCKS: dict[str, list[tuple[str, str]]] = {
    "resnet": [("stem.relu", "b0.add"), ("b0.relu2", "b1.add")],
    "bottlenecks": [
        ("stem.relu", "b0.project"), ("b0.project", "b1.project"), ("b1.project", "b2.add"),
    ],
    "plain": [("r0", "c1"), ("p1", "c3"), ("r3", "c4")],
}  # fmt: skip


@pytest.mark.parametrize("net", BLOCKS)
def test_blocks_of_the_usual_kinds(net: str) -> None:
    found = conv_blocks(NETS[net]())
    assert [(b.start.name, b.end.name) for b in found] == BLOCKS[net]
    assert [b.layer.op for b in found] == ["Conv"] * len(found)


def gate(g: Graph, rng: np.random.Generator, x: Value, name: str) -> Value:
    """Squeeze and excite: channels times numbers that follow from their means."""
    s = g.add_node("GlobalAveragePool", (x,), name=f"{name}.squeeze").out
    s = nets.relu(g, nets.conv(g, rng, s, f"{name}.less", 2, kernel=1), f"{name}.relu")
    s = nets.conv(g, rng, s, f"{name}.more", x.type.shape[1], kernel=1)
    s = g.add_node("Sigmoid", (s,), name=f"{name}.share").out
    return g.add_node("Mul", (x, s), name=name).out


def normalized(g: Graph, x: Value, name: str) -> Value:
    """BatchNormalization with numbers of its own."""
    shape = x.type.shape[1:2]
    numbers = [g.add_constant(f"{name}.{n}", np.ones(shape, np.float32)) for n in "sbmv"]
    attrs: dict[str, Attr] = {"epsilon": 1e-5}
    return g.add_node("BatchNormalization", (x, *numbers), attrs, name=name).out


def begun(name: str) -> tuple[Graph, np.random.Generator, Value]:
    """A graph with a stem."""
    rng, g = np.random.default_rng(0), Graph(name)
    x = g.add_input("x", TensorType((1, 3, 8, 8)))
    return g, rng, nets.relu(g, nets.conv(g, rng, x, "stem", 4), "stem.relu")


def blocks_of(g: Graph, rng: np.random.Generator, x: Value) -> list[tuple[str, str, str]]:
    g.outputs = [nets.dense(g, rng, nets.flat(g, x), "fc", 3)]
    g.verify()
    return [(b.start.name, b.end.name, b.layer.name) for b in conv_blocks(g)]


def test_gates_and_normalizations_belong_to_blocks() -> None:
    """A gate parts no block, a normalization is part of what it follows."""
    g, rng, x = begun("gated")
    x = gate(g, rng, nets.conv(g, rng, x, "depthwise", 4, group=4), "gate")
    x = normalized(g, nets.conv(g, rng, x, "project", 6, kernel=1), "norm")
    x = g.add_node("HardSwish", (x,), name="swish").out
    assert blocks_of(g, rng, x) == [("stem.relu", "norm", "project")]


def test_a_gate_at_the_end_is_behind_the_sum() -> None:
    g, rng, x = begun("gated")
    x = gate(g, rng, nets.conv(g, rng, x, "wide", 4), "gate")
    assert blocks_of(g, rng, x) == [("stem.relu", "wide", "wide")]


def test_normalized_bottlenecks_are_linear_too() -> None:
    g, rng, x = begun("normalized")
    for i in (0, 1):
        x = normalized(g, nets.conv(g, rng, x, f"b{i}.expand", 8, kernel=1), f"b{i}.norm1")
        x = nets.relu(g, x, f"b{i}.relu1")
        x = nets.conv(g, rng, x, f"b{i}.depthwise", 8, stride=2, group=8)
        x = nets.relu(g, normalized(g, x, f"b{i}.norm2"), f"b{i}.relu2")
        x = normalized(g, nets.conv(g, rng, x, f"b{i}.project", 4, kernel=1), f"b{i}.norm3")
    last = ("b0.norm3", "b1.norm3", "b1.project")
    # the first begins at an activation, so its stride parts it from the layer before
    assert blocks_of(g, rng, x) == [("b0.relu1", "b0.norm3", "b0.project"), last]


def test_a_bottleneck_behind_a_sum_has_its_stride_inside() -> None:
    """A sum without an activation is linear, too."""
    g, rng, x = begun("behind a sum")
    y = nets.conv(g, rng, x, "beside", 4)
    x = g.add_node("Add", (x, y), name="sum").out
    x = nets.relu(g, nets.conv(g, rng, x, "expand", 8, kernel=1), "relu1")
    x = nets.relu(g, nets.conv(g, rng, x, "depthwise", 8, stride=2, group=8), "relu2")
    x = nets.conv(g, rng, x, "project", 4, kernel=1)
    wanted = [("stem.relu", "sum", "beside"), ("sum", "project", "project")]
    assert blocks_of(g, rng, x) == wanted


def test_branches_that_are_multiplied_are_no_block() -> None:
    g, rng, x = begun("product")
    one, two = (nets.conv(g, rng, x, name, 4) for name in ("one", "two"))
    x = g.add_node("Mul", (one, two), name="product").out
    x = nets.conv(g, rng, x, "next", 4)
    assert blocks_of(g, rng, x) == [("product", "next", "next")]


def test_a_part_with_branches_is_a_block() -> None:
    """Two branches of other widths, joined by channels; what follows in a row is another block."""
    g, rng, x = begun("branches")
    one = nets.conv(g, rng, x, "narrow", 2, kernel=1)
    three = nets.conv(g, rng, x, "wide", 2)
    x = nets.relu(g, g.add_node("Concat", (one, three), {"axis": 1}, name="join").out, "join.relu")
    x = nets.relu(g, nets.conv(g, rng, x, "next", 4), "next.relu")
    wanted = [("stem.relu", "join", "wide"), ("join.relu", "next", "next")]
    assert blocks_of(g, rng, x) == wanted

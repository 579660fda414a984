"""Lite residual modules beside frozen blocks: TinyTL (Cai et al., NeurIPS 2020, arXiv 2007.11622).

Beside a block ``y = F(x)`` of a convolutional network stands a small one that works on a quarter of
the pixels: the average over 2x2, a convolution in two groups, Relu, a 1x1 convolution, and bilinear
interpolation to the size of ``y``, to which it is added. Backward reads maps of a quarter of the
size, and none of the block. The first weight is drawn at random and the last one is zero, so that
the model computes what it did before.

The paper's two normalizations are not there. At batch 1 their statistics are frozen numbers, so
that each is a factor and an offset per channel, which a convolution beside it has too: the first
one's are part of the weight and bias before the Relu, the second one's, whose factor begins at
zero, of the weight that begins at zero here, and of the bias of the block itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

import numpy as np

from .adapters import Adapter
from .conv_blocks import ConvBlock, conv_blocks
from .errors import UnsupportedModelError
from .graph import Array, Attr, Graph, Node, Value, unique_name
from .import_options import Lite
from .surgery import operand_of, rename

#: What the pool shrinks height and width by, and the groups of the convolution behind it.
POOLED, GROUPS = 2, 2


@dataclass(frozen=True)
class LiteResidual(Adapter):
    """The module beside one block.

    Attributes:
        bias: Of the convolution in groups, zero at first.
    """

    bias: str

    @property
    def params(self) -> tuple[str, ...]:
        """Weight and bias of the convolution in groups, and the weight of the 1x1 convolution."""
        return self.down, self.bias, self.up

    @property
    def way(self) -> tuple[str, ...]:
        """The pool and the convolution in groups."""
        return self.nodes[:2]

    @property
    def choice(self) -> str:
        """Its own: what the block updates is another choice."""
        return self.down


def add_lite_residuals(graph: Graph, lite: Lite) -> None:
    """Put a module beside every block that has more than one pixel, in place; note which.

    The convolution in groups has as many channels as the block reads, and the strides of the block.
    Its weight is normal with the deviation ``sqrt(2 / inputs of a result)`` (He et al., ICCV 2015),
    drawn from the seed in the order of the blocks.

    Args:
        graph: A cleaned forward graph.
        lite: Window and seed.

    Raises:
        UnsupportedModelError: It is quantized, or has no such block.
    """
    if graph.quantization:
        raise UnsupportedModelError(
            f"{graph.name}: --lite-residual is for float models; this one has scales of integers,"
            " and its file would get layers without any"
        )
    blocks = [b for b in conv_blocks(graph) if _bears_one(graph, b)]
    if not blocks:
        raise UnsupportedModelError(
            f"{graph.name}: --lite-residual needs a block of 2-D convolutions behind the first"
            " layer, of more than one pixel and wider than 1x1; the model has none"
        )
    rng = np.random.default_rng(lite.seed)
    told = ", ".join(f"{b.start.name} .. {b.end.name}" for b in blocks)
    # from the last block on, so that what a block reads is what the one before it really makes
    weights = [_drawn(b, lite, rng) for b in blocks]
    made = [_add(graph, b, w) for b, w in zip(reversed(blocks), reversed(weights), strict=True)]
    graph.adapters = tuple(reversed(made))
    graph.notes += (f"lite residual modules are offered beside {told}",)
    graph.verify()


def _bears_one(graph: Graph, block: ConvBlock) -> bool:
    """There is something to shrink, and a weight to stand beside."""
    weight = operand_of(block.layer, 1)
    return max(block.start.type.shape[2:]) > 1 and weight.name in graph.constants


def _drawn(block: ConvBlock, lite: Lite, rng: np.random.Generator) -> Array:
    """The first weight of a module; its window has one element along an axis of one pixel."""
    channels, *sizes = block.start.type.shape[1:]
    group = GROUPS if channels % GROUPS == 0 else 1
    shape = (channels, channels // group, *(lite.kernel if n > 1 else 1 for n in sizes))
    data: Array = rng.standard_normal(shape) * sqrt(2 / prod(shape[1:]))
    return data


def _add(graph: Graph, block: ConvBlock, data: Array) -> LiteResidual:
    x, y, made = block.start, block.end, list[Node]()
    name, weight = block.layer.name, operand_of(block.layer, 1).name
    nodes, end = graph.nodes, y.producer
    assert end is not None, y.name
    first = next(i for i, n in enumerate(nodes) if x in n.inputs)
    inside, behind = nodes[first : nodes.index(end) + 1], nodes[nodes.index(end) + 1 :]
    del nodes[first:]

    def add(op: str, what: str, *operands: Value, **attrs: Attr) -> Value:
        made.append(graph.add_node(op, operands, attrs, name=f"{name}/lite_{what}"))
        return made[-1].out

    channels, results = x.type.shape[1], y.type.shape[1]
    pool = tuple(min(POOLED, n) for n in x.type.shape[2:])
    down = _parameter(graph, f"{weight}.lite_down", data)
    bias = _parameter(graph, f"{weight}.lite_bias", np.zeros(channels))
    up = _parameter(graph, f"{weight}.lite_up", np.zeros((results, channels, 1, 1)))
    sizes = y.type.shape[2:]
    strides = tuple(max(1, round(a / b)) for a, b in zip(x.type.shape[2:], sizes, strict=True))
    pads, group = tuple(k // 2 for k in data.shape[2:]) * 2, channels // data.shape[1]

    h = add("AveragePool", "pool", x, kernel_shape=pool, strides=pool)
    nodes += inside
    attrs: dict[str, Attr] = {"strides": strides, "pads": pads, "dilations": (1, 1), "group": group}
    h = add("Conv", "down", h, down, bias, **attrs)
    h = add("Relu", "relu", h)
    h = add("Conv", "up", h, up, strides=(1, 1), pads=(0,) * 4, dilations=(1, 1), group=1)
    if h.type.shape[2:] != sizes:
        at = [_centres(n, m) for n, m in zip(h.type.shape[2:], sizes, strict=True)]
        where = unique_name(f"{name}/lite_positions", graph.values)
        positions = graph.add_constant(where, np.concatenate(at))
        h = add("Resize", "resize", h, positions, sizes=sizes, mode="linear")
    end_name = y.name
    rename(graph, y, unique_name(f"{end_name}/frozen", graph.values))
    made.append(graph.add_node("Add", (y, h), name=f"{name}/lite", outputs=[end_name]))
    total = made[-1].out
    for node in behind:
        node.inputs = tuple(total if v is y else v for v in node.inputs)
    graph.outputs = [total if v is y else v for v in graph.outputs]
    nodes += behind
    names = tuple(n.name for n in made)
    return LiteResidual(name, weight, down.name, up.name, names, bias.name)


def _parameter(graph: Graph, name: str, data: Array) -> Value:
    return graph.add_constant(unique_name(name, graph.values), data.astype(np.float32))


def _centres(size: int, wanted: int) -> Array:
    """Where the centres of ``wanted`` pixels lie among those of ``size`` pixels."""
    at: Array = np.clip((np.arange(wanted) + 0.5) * (size / wanted) - 0.5, 0, size - 1)
    return at.astype(np.float32)

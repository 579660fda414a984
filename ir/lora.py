"""Low-rank adapters beside frozen weights: LoRA (Hu et al., 2021, arXiv 2106.09685).

Beside a layer ``y = x W + b`` stand two small weights, ``y = x W + b + (alpha / rank) (x A) B``. A
is drawn at random and B is zero, so that the model computes what it did before. What has been
learned goes back into ``W + (alpha / rank) A B``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

import numpy as np

from .adapters import Adapter
from .errors import UnsupportedModelError, UsageError
from .graph import Array, Graph, Node, unique_name
from .import_options import Lora
from .lowered_layers import out_axis
from .surgery import operand_of, owned_constant, rename

#: Layers that take an adapter.
LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class LowRankAdapter(Adapter):
    """Two small weights beside a frozen one.

    Attributes:
        scale: ``alpha / rank``.
    """

    scale: float

    @property
    def params(self) -> tuple[str, ...]:
        """A and B."""
        return self.down, self.up

    @property
    def way(self) -> tuple[str, ...]:
        """The work of A."""
        return self.nodes[:1]

    @property
    def choice(self) -> str:
        """The weight beside it, which is frozen while the adapter learns."""
        return self.weight

    def merged(self, weight: Array, down: Array, up: Array, axis: int) -> Array:
        """The weight that does what weight and adapter do, summed in double precision.

        Args:
            weight: Of the layer.
            down: A, stored as the weight is.
            up: B, likewise.
            axis: Of the weight's output channels.
        """
        a, b = down.astype(np.float64), up.astype(np.float64)
        # output channels first, or both flat
        product = b.reshape(len(b), -1) @ a.reshape(len(a), -1) if axis == 0 else a @ b
        return (weight + self.scale * product.reshape(weight.shape)).astype(np.float32)


def add_adapters(graph: Graph, lora: Lora) -> None:
    """Put an adapter beside every float layer that can have one, in place; note which have none.

    A is normal with the deviation ``1 / sqrt(inputs of a result)``, drawn from the seed in the
    order of the layers.

    Args:
        graph: A cleaned forward graph.
        lora: Rank, scale and seed.

    Raises:
        UnsupportedModelError: No layer can have one.
        UsageError: The rank is larger than every one of them bears.
    """
    layers = [n for n in graph.nodes if n.op in LAYERS and _own_weight(graph, n)]
    floats = [n for n in layers if not _stored_as_integers(graph, n)]
    if not floats:
        what = "has none" if not layers else "has integer ones alone, whose weights are quantized"
        raise UnsupportedModelError(
            f"{graph.name}: --lora needs a MatMul, Gemm or ungrouped convolution with a constant"
            f" float weight of its own; the model {what}"
        )
    bearing = [n for n in floats if lora.rank <= _most(n)]
    if not bearing:
        widest = max(floats, key=_most)
        raise UsageError(
            f"--lora: rank {lora.rank} is too large for every layer; {widest.name}, with"
            f" {' x '.join(map(str, operand_of(widest, 1).type.shape))} weights, takes up to"
            f" {_most(widest)}"
        )
    reasons = {n.name: f"takes up to rank {_most(n)}" for n in floats if n not in bearing}
    reasons |= {n.name: "has integer weights" for n in layers if n not in floats}
    if reasons:
        told = ", ".join(f"{name} {reason}" for name, reason in reasons.items())
        graph.notes += (f"no adapter is offered beside some layers: {told}",)
    rng = np.random.default_rng(lora.seed)
    graph.adapters = tuple(_add(graph, node, lora, rng) for node in bearing)
    graph.verify()


def _own_weight(graph: Graph, node: Node) -> bool:
    weight = operand_of(node, 1)
    if node.op == "MatMul" and (len(weight.type.shape) != 2 or any(map(bool, node.attrs.values()))):
        return False  # of two computed matrices, or transposed
    return node.int_attr("group", 1) == 1 and owned_constant(graph, weight)


def _stored_as_integers(graph: Graph, node: Node) -> bool:
    """The file has the layer's weight or result as integers."""
    return any(v.name in graph.quantization for v in (operand_of(node, 1), node.out))


def _most(node: Node) -> int:
    """The largest rank: that of a whole weight."""
    shape, axis = operand_of(node, 1).type.shape, out_axis(node)
    return min(shape[axis], prod(shape) // shape[axis])


def _add(graph: Graph, layer: Node, lora: Lora, rng: np.random.Generator) -> LowRankAdapter:
    weight, y, axis = operand_of(layer, 1), layer.out, out_axis(layer)
    shape = weight.type.shape
    inputs = prod(shape) // shape[axis]
    down_shape = [lora.rank if i == axis else d for i, d in enumerate(shape)]
    up_shape = [{axis: shape[axis], 1 - axis: lora.rank}.get(i, 1) for i in range(len(shape))]
    data = rng.standard_normal(down_shape) / sqrt(inputs)
    down = graph.add_constant(f"{weight.name}.lora_A", data.astype(np.float32))
    up = graph.add_constant(f"{weight.name}.lora_B", np.zeros(up_shape, np.float32))
    at = graph.nodes.index(layer)
    behind = graph.nodes[at + 1 :]
    del graph.nodes[at:]
    operands = (layer.inputs[0], down)
    made = [graph.add_node(layer.op, operands, layer.attrs, name=f"{layer.name}/lora_A")]
    graph.nodes.append(layer)
    if lora.scale != 1:
        factor = graph.add_constant(f"{weight.name}.lora_scale", np.array(lora.scale, np.float32))
        made.append(graph.add_node("Mul", (made[-1].out, factor), name=f"{layer.name}/lora_scale"))
    again = {} if layer.op == "Conv" else layer.attrs  # the window is A's
    made.append(graph.add_node(layer.op, (made[-1].out, up), again, name=f"{layer.name}/lora_B"))
    name = y.name
    rename(graph, y, unique_name(f"{name}/frozen", graph.values))
    summed = (y, made[-1].out)
    made.append(graph.add_node("Add", summed, name=f"{layer.name}/lora", outputs=[name]))
    for node in behind:
        node.inputs = tuple(made[-1].out if v is y else v for v in node.inputs)
    graph.outputs = [made[-1].out if v is y else v for v in graph.outputs]
    graph.nodes += behind
    names = tuple(n.name for n in made)
    return LowRankAdapter(layer.name, weight.name, down.name, up.name, names, lora.scale)

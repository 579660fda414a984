"""Low-rank adapters beside frozen weights: LoRA (Hu et al., 2021, arXiv 2106.09685).

Beside a layer ``y = x W + b`` stand two small weights, ``y = x W + b + (alpha / rank) (x A) B``. A
is drawn at random and B is zero, so that the model computes what it did before. They are ordinary
layers and an ordinary sum: gradients, kernels and precisions are those of any other node. What has
been learned goes back into ``W + (alpha / rank) A B``, and an adapter that learns nothing is taken
out of the graph again (``without_unused``).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod, sqrt

import numpy as np

from .errors import UnsupportedModelError, UsageError
from .graph import Array, Graph, Node, Value, unique_name
from .import_options import Lora
from .lowered_layers import out_axis
from .surgery import operand_of, owned_constant, rename

#: Layers that take an adapter.
LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Adapter:
    """The names of what stands beside one layer.

    Attributes:
        layer: The node.
        weight: Its weight, which is frozen while the adapter learns.
        down: A, from the layer's input to ``rank`` channels.
        up: B, from there to the layer's result.
        scale: ``alpha / rank``.
        nodes: Those that A, the scale where it is not 1, B and the sum are the work of.
    """

    layer: str
    weight: str
    down: str
    up: str
    scale: float
    nodes: tuple[str, ...]

    @property
    def params(self) -> tuple[str, str]:
        """A and B, which are updated together."""
        return self.down, self.up

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


def adapters_by_param(graph: Graph) -> dict[str, Adapter]:
    """A and B of each adapter -> the adapter."""
    return {p: a for a in graph.adapters for p in a.params}


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


def _add(graph: Graph, layer: Node, lora: Lora, rng: np.random.Generator) -> Adapter:
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
    return Adapter(layer.name, weight.name, down.name, up.name, lora.scale, names)


def without_unused(graph: Graph, params: Collection[str]) -> Graph:
    """A forward graph without the adapters that none of these parameters belongs to.

    Their B is zero, so it computes the same; what is left has the names that it would have without
    them.

    Args:
        graph: It is not modified; the same one if there is nothing to leave out.
        params: What is to be updated.
    """
    wanted = set(params)
    unused = [a for a in graph.adapters if not wanted.intersection(a.params)]
    if not unused:
        return graph
    gone = {name for a in unused for name in a.nodes}
    sums = {a.layer: a.nodes[-1] for a in unused}
    by_name = {n.name: n for n in graph.nodes}
    names = {by_name[layer].out: by_name[total].out.name for layer, total in sums.items()}
    read = {v for n in graph.nodes if n.name not in gone for v in n.operands()}
    read |= set(graph.outputs)
    result = Graph(graph.name)
    twin: dict[Value, Value] = {v: result.add_input(v.name, v.type) for v in graph.inputs}
    for name, data in graph.constants.items():
        v = graph.values[name]
        if v in read:
            t, origin = v.type, graph.origins.get(name)
            twin[v] = result.add_constant(
                name, data, t.dtype, t.quant, shape=t.shape, origin=origin
            )
    for node in graph.nodes:
        if node.name in gone:
            twin[node.out] = twin[operand_of(node, 0)]  # of the sum: what the layer makes
            continue
        inputs = [None if v is None else twin[v] for v in node.inputs]
        wanted_names = [names.get(v, v.name) for v in node.outputs]
        made = result.add_node(node.op, inputs, node.attrs, name=node.name, outputs=wanted_names)
        twin |= dict(zip(node.outputs, made.outputs, strict=True))
    result.outputs = [twin[v] for v in graph.outputs]
    result.quantization = {k: q for k, q in graph.quantization.items() if k in result.values}
    result.unchanged, result.merged = graph.unchanged, graph.merged
    result.loss, result.notes = graph.loss, graph.notes
    result.adapters = tuple(a for a in graph.adapters if a not in unused)
    result.verify()
    return result

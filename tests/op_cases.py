"""Operators' samples as concrete nodes with data, for the generic tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from odt_plan.ir.grad_builder import GradBuilder
from odt_plan.ir.graph import Attr, Graph, Node, TensorType, Value
from odt_plan.ir.opdef import OpDef, Sample, all_ops, get_op

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Case:
    """Sample number ``index`` of an operator as a node of a graph of its own."""

    op: OpDef
    index: int
    sample: Sample
    node: Node

    @property
    def name(self) -> str:
        return f"{self.op.name}-{self.index}"

    def data(self, seed: int = 0) -> list[Array | None]:
        """Operand arrays in storage form, the same for the same seed."""
        rng = np.random.default_rng([seed, self.index, *self.op.name.encode()])
        types = enumerate(self.sample.types)
        return [None if t is None else _random(t, i, self.sample, rng) for i, t in types]


def cases() -> Iterator[Case]:
    """Every sample of every operator, in the registry's order."""
    for op in all_ops().values():
        for i, sample in enumerate(op.samples()):
            yield Case(op, i, sample, build(op.name, sample))


def build(op: str, sample: Sample) -> Node:
    """The sample as the only node of a graph."""
    graph = Graph(op)
    inputs = [
        None if t is None else graph.add_input(f"x{i}", t) for i, t in enumerate(sample.types)
    ]
    return graph.add_node(op, inputs, sample.attrs, name="node")


def _random(t: TensorType, index: int, sample: Sample, rng: np.random.Generator) -> Array:
    if t.dtype == "i8" or index in sample.ranges:
        low, high = sample.ranges.get(index, (-128, 127))
        return rng.integers(low, high, t.shape, t.np_dtype, endpoint=True)
    if t.dtype == "bits":
        return rng.integers(0, 256, t.storage_shape, np.uint8)
    if t.dtype == "i32":  # labels: positions on the last axis of the first operand
        first = sample.types[0]
        assert first is not None
        return rng.integers(0, first.shape[-1], t.shape, np.int32)
    if t.dtype == "u8":
        return rng.integers(int(sample.low), max(2, int(sample.high)), t.shape, np.uint8)
    return spaced(rng, t.shape, sample).astype(t.np_dtype)


def spaced(rng: np.random.Generator, shape: Sequence[int], sample: Sample) -> Array:
    """Uniform values that keep ``gap`` from each other and from the kinks."""
    size = int(np.prod(shape, dtype=int))
    values = rng.uniform(sample.low, sample.high, size)
    if sample.gap > 0 and not sample.kinks and size > 1:
        # one value in the middle of each of `size` cells of the range, in random order
        cell = (sample.high - sample.low) / size
        assert cell >= sample.gap, f"{size} values do not fit with a gap of {sample.gap}"
        values = sample.low + cell * (rng.permutation(size) + 0.5)
    for kink in sample.kinks:
        near = np.abs(values - kink) < sample.gap
        values = np.where(near, kink + np.where(values < kink, -2, 2) * sample.gap, values)
    return values.reshape(tuple(shape))


def forward_and_gradients(
    op: str, data: Sequence[Array], attrs: dict[str, Attr], seed: int = 0, bptt: int | None = None
) -> tuple[Array, Array, list[Array]]:
    """Run an operator and its gradient rule on float64 arrays.

    Returns:
        The result, the random gradient of the result, and the gradient of every operand.
    """
    graph = Graph(op)
    inputs = [graph.add_input(f"x{i}", TensorType(a.shape)) for i, a in enumerate(data)]
    node = graph.add_node(op, inputs, attrs, name="node")
    dy = graph.add_input("dy", node.out.type)
    vjp = get_op(op).vjp
    assert vjp is not None
    builder = GradBuilder(graph, node, {})
    builder.bptt = bptt
    gradients = vjp(builder, node, dy, [True] * len(inputs))
    graph.verify()
    values: dict[Value, Array] = dict(zip(inputs, data, strict=True))
    values[dy] = np.random.default_rng(seed).uniform(-1, 1, node.out.type.shape)
    for n in graph.nodes:
        results = get_op(n.op).kernel(n, [None if v is None else values[v] for v in n.inputs])
        for v, r in zip(n.outputs, results, strict=True):
            assert r.shape == v.type.storage_shape, n
            values[v] = r
    return values[node.out], values[dy], [values[g] for g in gradients if g is not None]

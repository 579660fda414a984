"""Executed instructions of the int8 kernels per multiply-accumulate, on the emulated Cortex-M7.

Forward kernels are all integer, also with a weight of which a quarter is updated, the rest frozen;
input gradients are fp32 on the stored int8 weights, weight gradients fp32 on the stored int8 input.
A training step makes weight gradients by tiles of rows, so they are measured for whole layers and
for tiles of 4 rows and of 1. Every result is compared with the NumPy kernel bit for bit.

    python -m benchmarks.kernels_int8 [--compiler zig]
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from odt_plan.ir.graph import Attr, Graph, Node, TensorType, Value
from odt_plan.ir.opdef import get_op
from odt_plan.ir.quantization import Quantization, fixed_points

from .board import lane, run_kernels
from .kernels import CMSIS_NN_INT8, CORE, LAYERS, Layer

Array = NDArray[Any]
#: Instructions per MAC of Tiny Training Engine's gradients, means over its updated layers.
TINY_TRAINING_ENGINE = {"input gradient": 3.7, "weight gradient": 4.2}
#: Late layers of MCUNet at 128 px, where updates are.
LATE = (
    Layer("pointwise 1x1 240->40, 8x8", (1, 240, 8, 8), (40, 240, 1, 1)),
    Layer("pointwise 1x1 40->240, 8x8", (1, 40, 8, 8), (240, 40, 1, 1)),
    Layer("pointwise 1x1 96->480, 4x4", (1, 96, 4, 4), (480, 96, 1, 1)),
    Layer("depthwise 5x5 240, 8x8", (1, 240, 8, 8), (240, 1, 5, 5), group=240),
    Layer("depthwise 7x7 480, 4x4", (1, 480, 4, 4), (480, 1, 7, 7), group=480),
)


def integer_nodes(layer: Layer) -> Iterator[tuple[str, int, Node, list[Array]]]:
    """The kernels of a layer: kind, MACs (with padding), node, operands."""
    rng = np.random.default_rng(0)
    g, outs = Graph("layer"), layer.w[0]
    dense = len(layer.w) == 2
    x = g.add_input("x", TensorType(layer.x, "i8", Quantization((0.05,), -3)))
    w = g.add_input("w", TensorType(layer.w, "i8", Quantization((0.01,) * outs, 0, 0)))
    rest: list[Value] = [g.add_input(n, TensorType((outs,), "i32")) for n in "bms"]
    geometry: dict[str, Attr] = {}
    if not dense:
        pads = tuple((k - 1) // 2 for k in layer.w[2:]) * 2
        geometry = {"strides": (layer.stride,) * 2, "pads": pads, "group": layer.group}
    stored: dict[str, Attr] = {"out_scale": 0.1, "out_zero_point": -5}
    op = "QGemm" if dense else "QConv"
    forward = g.add_node(op, (x, w, *rest), {**geometry, **stored}, name="y")
    terms = math.prod(layer.w[1:])
    macs = forward.out.type.size * terms
    weight = rng.integers(-127, 128, layer.w, np.int8)
    multiplier, shift = fixed_points(np.full(outs, 0.02 / math.sqrt(terms)))
    bias = rng.integers(-3000, 3000, outs).astype(np.int32)
    data = rng.integers(-128, 128, layer.x, np.int8)
    yield "forward", macs, forward, [data, weight, bias, multiplier, shift]
    axis = 1 if layer.group == 1 else 0
    parts = [np.ascontiguousarray(a) for a in np.split(weight, [-(-layer.w[axis] // 4)], axis)]
    hot, cold = (
        g.add_input(n, TensorType(a.shape, "i8", Quantization((0.01,) * a.shape[0], 0, 0)))
        for n, a in zip(("hot", "cold"), parts, strict=True)
    )
    split = g.add_node(op, (x, hot, *rest, cold), {**geometry, **stored}, name="split")
    yield "forward, split", macs, split, [data, parts[0], bias, multiplier, shift, parts[1]]

    dy = g.add_input("dy", forward.out.type.with_dtype("f32"))
    scale = g.add_input("scale", TensorType((outs,)))
    shape: dict[str, Attr] = {} if dense else {**geometry, "shape": layer.x}
    gradient = g.add_node(f"{op}GradInput", (dy, w, scale), shape, name="dx")
    seed = rng.standard_normal(dy.type.shape).astype(np.float32)
    yield "input gradient", macs, gradient, [seed, weight, np.full(outs, 0.01, np.float32)]
    yield from weight_gradients(layer, x, geometry, data, seed, macs)


def weight_gradients(
    layer: Layer, x: Value, geometry: dict[str, Attr], data: Array, seed: Array, macs: int
) -> Iterator[tuple[str, int, Node, list[Array]]]:
    """The weight gradient of all rows, of 4 and of 1, as nodes of layers with so many filters."""
    outs, dense = layer.w[0], len(layer.w) == 2
    for rows, name in ((outs, ""), (4, ", 4 rows"), (1, ", 1 row")):
        g = Graph("tile")
        channels = rows if layer.group > 1 else layer.x[1]
        part, dy = np.ascontiguousarray(data[:, :channels]), seed[:, :rows].copy()
        values = (
            g.add_input("x", TensorType(part.shape, "i8", x.type.quant)),
            g.add_input("dy", TensorType(dy.shape)),
        )
        shape: dict[str, Attr] = {"trans_b": 1}
        if not dense:
            group = rows if layer.group > 1 else 1
            shape = {**geometry, "group": group, "weight_shape": (rows, *layer.w[1:])}
        op = "QGemmGradWeight" if dense else "QConvGradWeight"
        node = g.add_node(op, values, shape, name="dw")
        yield f"weight gradient{name}", macs * rows // outs, node, [part, dy]


def instructions(node: Node, data: list[Array], compiler: lane.Compiler, flag: str) -> int:
    """Executed instructions of one call, whose results must be those of NumPy."""
    with tempfile.TemporaryDirectory() as folder:
        results, done = run_kernels(Path(folder), [(node, data)], CORE, compiler, optimise=flag)
    assert np.array_equal(results[0][0], get_op(node.op).kernel(node, data)[0]), node
    return done.instructions["train"]


def int8_table(compiler: lane.Compiler | None = None) -> Iterator[str]:
    """Markdown rows: instructions per MAC of each layer's kernels."""
    chosen = compiler or ("gcc" if lane.has_gcc() else "zig")
    yield f"### Kernels: executed instructions per MAC, int8, emulated {CORE}, {chosen}"
    yield ""
    yield (
        "MACs count products with padding too. Executed instructions are exact and repeatable;"
        " they are not cycles. Gradients are fp32 on int8 operands. Others: forward CMSIS-NN, -O3;"
        " gradients Tiny Training Engine, means over its updated layers."
    )
    yield ""
    yield "| layer | kernel | -O2 | -O3 | others | workspace B |"
    yield "|---|---|---|---|---|---|"
    for layer in (*LAYERS, *LATE):
        for kind, macs, node, data in integer_nodes(layer):
            rates = [instructions(node, data, chosen, f) / macs for f in ("-O2", "-O3")]
            known = TINY_TRAINING_ENGINE.get(kind.split(",")[0])
            known = CMSIS_NN_INT8.get(layer.name) if kind == "forward" else known
            scratch = get_op(node.op).workspace(node)
            row = (layer.name, kind, f"{rates[0]:.2f}", f"{rates[1]:.2f}", known or "", scratch)
            yield f"| {' | '.join(map(str, row))} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--compiler", choices=("gcc", "zig"))
    for line in int8_table(parser.parse_args().compiler):
        print(line)


if __name__ == "__main__":
    main()

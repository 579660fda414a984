"""Executed instructions of the int8 kernels per multiply-accumulate, on the emulated Cortex-M7.

Forward kernels are all integer; input gradients are fp32 on the stored int8 weights. Every result
is compared with the NumPy kernel bit for bit.

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


def integer_nodes(layer: Layer) -> Iterator[tuple[str, int, Node, list[Array]]]:
    """Forward and input gradient of a layer: kind, MACs (with padding), node, operands."""
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

    dy = g.add_input("dy", forward.out.type.with_dtype("f32"))
    scale = g.add_input("scale", TensorType((outs,)))
    shape: dict[str, Attr] = {} if dense else {**geometry, "shape": layer.x}
    gradient = g.add_node(f"{op}GradInput", (dy, w, scale), shape, name="dx")
    seed = rng.standard_normal(dy.type.shape).astype(np.float32)
    yield "input gradient", macs, gradient, [seed, weight, np.full(outs, 0.01, np.float32)]


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
        " they are not cycles. Input gradients are fp32 on int8 weights. CMSIS-NN: forward, -O3."
    )
    yield ""
    yield "| layer | kernel | -O2 | -O3 | CMSIS-NN int8 | workspace B |"
    yield "|---|---|---|---|---|---|"
    for layer in LAYERS:
        for kind, macs, node, data in integer_nodes(layer):
            rates = [instructions(node, data, chosen, f) / macs for f in ("-O2", "-O3")]
            known = CMSIS_NN_INT8.get(layer.name) if kind == "forward" else None
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

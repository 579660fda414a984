"""Executed instructions of the fp32 kernels per multiply-accumulate, on the emulated Cortex-M7.

Two ways of compiling: as firmware is by default (-O2, every product rounded, so that results have
the bits of the NumPy kernels), and -O3 with contraction allowed, for those who need no equal bits.

    python -m benchmarks.kernels [--compiler zig] [--kernels folder]
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from odt_plan.backends.c.emit import kernel_files
from odt_plan.backends.c.emit_call import kernel_of
from odt_plan.ir.graph import Attr, Graph, Node, TensorType, Value

from .board import lane
from .calibrate import LIMITS, Case, program

CORE = "cortex-m7"
#: What makes a compiler contract products and sums in a file, although its command forbids it.
CONTRACT: dict[lane.Compiler, str] = {
    "gcc": '#pragma GCC optimize ("fp-contract=fast")\n',
    "zig": "#pragma clang fp contract(fast)\n",
}
#: Constants of CMSIS-NN's int8 forward kernels on a Cortex-M7, gcc 12 -O3, per shape: to compare.
CMSIS_NN_INT8 = {"pointwise 1x1 48->8, 16x16": 2.24, "depthwise 3x3 48, 16x16": 8.5}


@dataclass(frozen=True)
class Layer:
    """A layer whose kernels are measured; ``name`` tells its shape."""

    name: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    stride: int = 1
    group: int = 1

    def nodes(self) -> Iterator[tuple[str, int, Node]]:
        """Each kernel of the layer: what it makes, its MACs (with padding), a node for it."""
        g = Graph("layer")
        x, w = g.add_input("x", TensorType(self.x)), g.add_input("w", TensorType(self.w))
        results = self._dense(g, x, w) if len(self.w) == 2 else self._convolution(g, x, w)
        macs = results[0].type.size * math.prod(self.w[1:])
        kinds = ("forward", "input gradient", "weight gradient")
        for kind, value in zip(kinds, results, strict=True):
            assert value.producer is not None
            yield kind, macs, value.producer

    def _dense(self, g: Graph, x: Value, w: Value) -> list[Value]:
        b = g.add_input("b", TensorType(self.w[:1]))
        turned: dict[str, Attr] = {"trans_b": 1}
        y = g.add_node("Gemm", (x, w, b), turned, name="y").out
        dx = g.add_node("GemmGradInput", (y, w), turned, name="dx").out
        return [y, dx, g.add_node("GemmGradWeight", (x, y), turned, name="dw").out]

    def _convolution(self, g: Graph, x: Value, w: Value) -> list[Value]:
        b = g.add_input("b", TensorType(self.w[:1]))
        pads = tuple((k - 1) // 2 for k in self.w[2:]) * 2
        strides = (self.stride, self.stride)
        geometry: dict[str, Attr] = {"strides": strides, "pads": pads, "group": self.group}
        y = g.add_node("Conv", (x, w, b), geometry, name="y").out
        shape: dict[str, Attr] = {**geometry, "shape": self.x}
        dx = g.add_node("ConvGradInput", (y, w), shape, name="dx").out
        weight: dict[str, Attr] = {**geometry, "weight_shape": self.w}
        return [y, dx, g.add_node("ConvGradWeight", (x, y), weight, name="dw").out]


LAYERS = (
    Layer("pointwise 1x1 48->8, 16x16", (1, 48, 16, 16), (8, 48, 1, 1)),
    Layer("pointwise 1x1 8->48, 16x16", (1, 8, 16, 16), (48, 8, 1, 1)),
    Layer("pointwise 1x1 336->56, 4x4", (1, 336, 4, 4), (56, 336, 1, 1)),
    Layer("depthwise 3x3 48, 16x16", (1, 48, 16, 16), (48, 1, 3, 3), group=48),
    Layer("depthwise 3x3 48, 16x16, stride 2", (1, 48, 16, 16), (48, 1, 3, 3), 2, 48),
    Layer("depthwise 3x3 336, 4x4", (1, 336, 4, 4), (336, 1, 3, 3), group=336),
    Layer("depthwise 5x5 72, 8x8", (1, 72, 8, 8), (72, 1, 5, 5), group=72),
    Layer("depthwise 7x7 48, 32x32, stride 2", (1, 48, 32, 32), (48, 1, 7, 7), 2, 48),
    Layer("3x3 16->16, 32x32", (1, 16, 32, 32), (16, 16, 3, 3)),
    Layer("3x3 16->32, 32x32, stride 2", (1, 16, 32, 32), (32, 16, 3, 3), 2),
    Layer("3x3 3->16, 64x64, stride 2", (1, 3, 64, 64), (16, 3, 3, 3), 2),
    Layer("dense 256->32", (1, 256), (32, 256)),
)


def sources_of(nodes: Sequence[Node], kernels: Path | None) -> dict[str, str]:
    """Kernel files by name: those that the nodes need, or all of a folder."""
    if kernels is None:
        return kernel_files(sorted({kernel_of(n).source for n in nodes}))
    return {p.name: p.read_text() for p in kernels.glob("odtplan_*.[ch]")}


def instructions(
    nodes: Sequence[Node],
    compiler: lane.Compiler,
    flag: str,
    *,
    contract: bool = False,
    kernels: Path | None = None,
) -> list[int]:
    """Executed instructions of each kernel call.

    Args:
        nodes: What to run, on random operands.
        compiler: ``gcc`` or ``zig``.
        flag: Optimisation.
        contract: Contract products and sums.
        kernels: Folder of kernels to measure instead of the package's.
    """
    cases = [Case(n, None, "shape") for n in nodes]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in sources_of(nodes, kernels).items():
            head = CONTRACT[compiler] if contract and file.endswith(".c") else ""
            (folder / file).write_text(head + text)
        (folder / "main.c").write_text(program(cases))
        sources = sorted(folder.glob("*.c"))
        image = lane.build_program(folder, sources, CORE, compiler, limits=LIMITS, optimise=flag)
        result = []
        for i in range(len(cases)):
            files = {"case.bin": i.to_bytes(4, "little")}
            run = lane.run(image, CORE, files=files, limits=LIMITS)
            assert run.exit_code == 0, (cases[i].node, run.stdout)
            result.append(run.instructions["train"])
        return result


def measured_table(
    compiler: lane.Compiler | None = None, kernels: Path | None = None
) -> Iterator[str]:
    """Markdown rows: instructions per MAC of each layer's three kernels."""
    chosen = compiler or ("gcc" if lane.has_gcc() else "zig")
    yield f"### Kernels: executed instructions per MAC, fp32, emulated {CORE}, {chosen}"
    yield ""
    yield (
        "MACs count products with padding too. Executed instructions are exact and repeatable;"
        " they are not cycles. CMSIS-NN's constants are of its int8 forward kernels (-O3)."
    )
    yield ""
    yield "| layer | kernel | -O2 | -O3 contracted | CMSIS-NN int8 |"
    yield "|---|---|---|---|---|"
    rows = [(layer, *row) for layer in LAYERS for row in layer.nodes()]
    nodes = [node for _, _, _, node in rows]
    plain = instructions(nodes, chosen, "-O2", kernels=kernels)
    contracted = instructions(nodes, chosen, "-O3", contract=True, kernels=kernels)
    for (layer, kind, macs, _), n, m in zip(rows, plain, contracted, strict=True):
        known = CMSIS_NN_INT8.get(layer.name) if kind == "forward" else None
        yield f"| {layer.name} | {kind} | {n / macs:.2f} | {m / macs:.2f} | {known or ''} |"


def kernel_table() -> Iterator[str]:
    """The table for the compiler that is here."""
    return measured_table()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--compiler", choices=("gcc", "zig"))
    parser.add_argument("--kernels", type=Path, help="measure the kernels of this folder")
    options = parser.parse_args()
    for line in measured_table(options.compiler, options.kernels):
        print(line)


if __name__ == "__main__":
    main()

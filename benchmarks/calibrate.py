"""Executed instructions of the C kernels, measured on emulated Cortex-M cores.

Every kernel call of the training steps of real models (all parameters trained) runs alone on the
emulated core. Three figures per cost class, instructions per unit of work, per element of the
result and per inner loop, are fitted to them by non-negative least squares. With ``--write`` the
figures go into ``specs/cores/<core>.yaml``.

    python -m benchmarks.calibrate [--core cortex-m7] [--write] [models...]
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import numpy as np

from odt_plan.backends.c.emit import kernel_files
from odt_plan.backends.c.emit_call import call, kernel_of, param_struct
from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.graph import Attr, Graph, Node, TensorType
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.opdef import get_op
from odt_plan.ir.precision import all_i8, lower
from odt_plan.ir.training import TrainingSpec
from odt_plan.planner.device import load_core

from .board import lane
from .models import NAMES, ROOT, models

#: Room of the emulated board: one operator at a time, so larger than any real device.
LIMITS = lane.Limits(flash_bytes=4 << 20, ram_bytes=16 << 20, stack_bytes=64 << 10)
#: Work beyond this is left out on cores without FPU: they need 100 instructions per unit.
SOFT_FLOAT_WORK = 300_000
SOFT_FLOAT = {"cortex-m0plus", "cortex-m3"}
MODELS = (*NAMES, "mlperf_ad_autoencoder", "mcunet-5fps-head10-relu6")


#: Models whose integer kernels are measured.
QUANTIZED = (
    "mlperf_resnet8_int8",
    "mlperf_dscnn_kws_int8",
    "tinyengine_mcunet_vww_int8",
    "mcunet-5fps-head10-qdq",
)

#: Instructions around a call in the generated schedule: addresses into registers, branch, return.
_CALLER = 12.0


@dataclass(frozen=True)
class Case:
    """One kernel call; ``tile_rows`` is set where the plan streams it."""

    node: Node
    tile_rows: int | None
    model: str

    @property
    def calls(self) -> int:
        """Kernel calls in it."""
        if self.tile_rows is None:
            return 1
        return -(-self.node.out.type.shape[0] // self.tile_rows)


@dataclass(frozen=True)
class Measured:
    """A case and its executed instructions."""

    case: Case
    instructions: int

    @property
    def cost_class(self) -> tuple[str, str]:
        """Dtype and class that the planner books it under."""
        work = get_op(self.case.node.op).work(self.case.node)
        return work.dtype, work.cost_class

    @property
    def amount(self) -> int:
        """Units of work."""
        return self.counts[0]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Units of work, elements of the result, inner loops."""
        work = get_op(self.case.node.op).work(self.case.node)
        return work.amount, self.case.node.out.type.size, work.loops

    def predicted(self, rate: Rate, one_call: float) -> float:
        """Instructions by these rates."""
        each = sum(n * r for n, r in zip(self.counts, rate, strict=True))
        return each + one_call * self.case.calls


def model_cases(path: Path) -> list[Case]:
    """All kernel calls of a training step with everything trained, by SGD and by Adam."""
    forward = import_model(path)
    every = [c for c in candidates(forward) if c.channels is None]
    result = []
    for optimizer in ("sgd", "adam"):
        training = build_training(forward, TrainingSpec(optimizer=optimizer), every)  # type: ignore[arg-type]
        tiles = {u.grad_node: u.tile_rows for u in training.updates if u.grad_node is not None}
        for node in training.graph.nodes:
            streamed = get_op(node.op).rows_kernel is not None
            if not get_op(node.op).view:
                result.append(Case(node, tiles.get(node) if streamed else None, path.stem))
    return result


def integer_cases(path: Path) -> list[Case]:
    """The integer kernels of a quantized model."""
    graph = import_model(path)
    graph = lower(graph, all_i8(graph))
    ops = {n: get_op(n.op) for n in graph.nodes}
    return [
        Case(n, None, path.stem)
        for n, op in ops.items()
        if not op.view and op.work(n).dtype == "i8"
    ]


def copy_cases() -> list[Case]:
    """Data movement, which small models hardly have: layout changes, channel parts, borders."""
    g = Graph("copies")
    x = g.add_input("x", TensorType((1, 16, 24, 24)))
    part: dict[str, Attr] = {"starts": (0, 4, 0, 0), "sizes": (1, 8, 24, 24), "steps": (1, 1, 1, 1)}
    g.add_node("Transpose", (x,), {"perm": (0, 2, 3, 1)}, name="to channels last")
    g.add_node("Slice", (x,), part, name="channels")
    g.add_node("Concat", (x, x), {"axis": 1}, name="concat")
    border: dict[str, Attr] = {"begins": (0, 0, 1, 1), "ends": (0, 0, 1, 1), "value": 0.0}
    g.add_node("Pad", (x,), border, name="border")
    return [Case(n, None, "copies") for n in g.nodes]


def distinct(cases: Iterable[Case]) -> list[Case]:
    """Cases that differ in kernel, parameters or tiling."""
    found: dict[tuple[str, str, int | None], Case] = {}
    for c in cases:
        key = (kernel_of(c.node).symbol, param_struct(c.node, "p"), c.tile_rows)
        found.setdefault(key, c)
    return list(found.values())


def program(cases: Sequence[Case]) -> str:
    """C main program that runs the case whose number is in ``case.bin``."""
    sources = sorted({kernel_of(c.node).source for c in cases})
    parts = ['#include "board.h"\n', *(f'#include "{s}.h"\n' for s in sources)]
    room = max(sum(_operand_bytes(c.node)) for c in cases)
    parts.append(f"static uint8_t memory[{room}] __attribute__((aligned(8)));\n")
    for i, c in enumerate(cases):
        parts += [param_struct(c.node, f"p{i}"), _case_function(i, c)]
    table = ", ".join(f"case{i}" for i in range(len(cases)))
    parts.append(f"static void (*const cases[])(void) = {{{table}}};\n")
    parts.append(
        """
int main(void) {
    uint32_t number, i, seed = 1u;
    const int file = board_open("case.bin", BOARD_READ);
    if (file < 0 || board_read(file, &number, 4u) != 0) {
        return 1;
    }
    for (i = 0; i + 4u <= sizeof memory; i += 4u) { /* floats in -1 .. 1 */
        seed = seed * 1664525u + 1013904223u;
        *(float *)(void *)(memory + i) = (float)(int32_t)seed * 4.656612873e-10f;
    }
    cases[number]();
    return 0;
}
"""
    )
    return "".join(parts)


def _operand_bytes(node: Node) -> list[int]:
    sizes = [v.type.nbytes for v in (*node.inputs, *node.outputs) if v is not None]
    return [-(-n // 8) * 8 for n in (*sizes, get_op(node.op).workspace(node), 8)]


def _case_function(i: int, c: Case) -> str:
    at = 0
    places: list[str | None] = []
    clear = ""
    for v in (*c.node.inputs, *c.node.outputs):
        if v is None:
            places.append(None)
            continue
        places.append(f"memory + {at}")
        if v.type.dtype == "i32":  # labels must be valid: 1 is; a shift is usually above 32
            value = 40 if c.node.op in ("QConv", "QGemm") and v is c.node.inputs[-1] else 1
            words = f"((int32_t *)(void *)(memory + {at}))"
            clear += f"    for (i = 0; i < {v.type.size}; i++) {{ {words}[i] = {value}; }}\n"
        if v.type.dtype == "u8":  # so must indices: 0 is
            clear += f"    for (i = 0; i < {v.type.nbytes}; i++) {{ memory[{at} + i] = 0; }}\n"
        at += -(-v.type.nbytes // 8) * 8
    inputs = places[: len(c.node.inputs)]
    outputs = [p for p in places[len(c.node.inputs) :] if p is not None]
    workspace = f"memory + {at}" if get_op(c.node.op).workspace(c.node) else None
    rows = c.node.out.type.shape[0] if c.node.out.type.shape else 1
    if c.tile_rows is None:
        body = "    " + call(c.node, f"p{i}", inputs, outputs, workspace)
    else:
        end = f"row + {c.tile_rows} < {rows} ? row + {c.tile_rows} : {rows}"
        one = call(c.node, f"p{i}", inputs, outputs, workspace, ("row", end))
        body = f"    for (row = 0; row < {rows}; row += {c.tile_rows}) {{ {one} }}"
    return (
        f"static void case{i}(void) {{\n    int32_t row = 0, i;\n    (void)row, (void)i;\n{clear}"
        f"    region_train_begin();\n{body}\n    region_train_end();\n}}\n"
    )


def measure(core: str, cases: Sequence[Case], compiler: lane.Compiler, flag: str) -> list[Measured]:
    """Run every case alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in kernel_files(sorted({kernel_of(c.node).source for c in cases})).items():
            (folder / file).write_text(text)
        main = folder / "main.c"
        main.write_text(program(cases))
        sources = sorted(folder.glob("*.c"))
        image = lane.build_program(folder, sources, core, compiler, limits=LIMITS, optimise=flag)
        result = []
        for i, c in enumerate(cases):
            files = {"case.bin": i.to_bytes(4, "little")}
            run = lane.run(image, core, files=files, limits=LIMITS)
            assert run.exit_code == 0, (c.node, run.stdout)
            result.append(Measured(c, run.instructions["train"]))
        return result


#: Instructions per unit of work, per element of the result, per inner loop.
Rate = tuple[float, float, float]
Rates = dict[tuple[str, str], Rate]


def summarize(measured: Sequence[Measured]) -> tuple[float, Rates]:
    """Instructions of one call, and the three rates of each class.

    A call is what small elementwise kernels take beyond their work, by the rate of a large case of
    the same operator.
    """
    simple = [m for m in measured if m.cost_class == ("f32", "elementwise")]
    rest = []
    for op in {m.case.node.op for m in simple}:
        cases = sorted((m for m in simple if m.case.node.op == op), key=lambda m: m.amount)
        small, large = cases[0], cases[-1]
        if small.amount <= 64 and large.amount >= 1000:
            rest.append(small.instructions - large.instructions / large.amount * small.amount)
    one_call = max(0.0, statistics.median(rest) if rest else 0.0) + _CALLER
    return one_call, _rates(measured, one_call)


def _rates(measured: Sequence[Measured], one_call: float) -> Rates:
    return {
        name: _fit([m for m in measured if m.cost_class == name], one_call)
        for name in sorted({m.cost_class for m in measured})
    }


def _fit(chosen: Sequence[Measured], one_call: float) -> Rate:
    """Non-negative rates with the least squared error: the best of all subsets of them.

    Cases weigh by 1 / instructions^0.75: between the absolute error, which would leave small layers
    to chance, and the relative one, which would leave large ones.
    """
    spent = np.array([m.instructions for m in chosen], float)
    weight = spent**-0.75
    known = np.array([one_call * m.case.calls for m in chosen])
    counts = np.array([m.counts for m in chosen], float) * weight[:, None]
    goal = np.maximum(spent - known, 0.0) * weight
    best, least = np.zeros(3), float(goal @ goal)
    for size in (1, 2, 3):
        for subset in combinations(range(3), size):
            rates = np.zeros(3)
            rates[list(subset)] = np.linalg.lstsq(counts[:, subset], goal, rcond=None)[0]
            error = float(np.sum((counts @ rates - goal) ** 2))
            if (rates >= 0).all() and error < 0.999 * least:
                best, least = rates, error
    return float(best[0]), float(best[1]), float(best[2])


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _compiler_name(compiler: lane.Compiler) -> str:
    if compiler == "zig":
        return f"zig cc {version('ziglang')}"
    command = ["arm-none-eabi-gcc", "-dumpversion"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return f"arm-none-eabi-gcc {done.stdout.strip()}"


#: Cores that no emulator here runs: factor on the Cortex-M7's figures, and why.
DERIVED = {
    "xtensa-lx7": (1.1, "cortex-m7 (measured) x 1.1, windowed calls and no load pair"),
    "cortex-a72": (1.0, "as cortex-m7 (measured), scalar code"),
}


def write_spec(core: str, one_call: float, rates: Rates, source: str) -> None:
    """Replace the figures of ``specs/cores/<core>.yaml``, its comments kept."""
    path = ROOT / "specs" / "cores" / f"{core}.yaml"
    text = path.read_text()
    text = _put(text, "call", f"value: {_rounded(one_call)}", source)
    for (dtype, name), (value, output, loop) in rates.items():
        figures = f"value: {_rounded(value)}"
        figures += f", per_output: {_rounded(output)}" if output else ""
        figures += f", per_loop: {_rounded(loop)}" if loop else ""
        head, tail = text.split(f"\n  {dtype}:\n")
        own, rest = re.match(r"((?:    [^\n]*\n)*)(.*)", tail, re.DOTALL).groups()  # type: ignore[union-attr]
        text = f"{head}\n  {dtype}:\n{_put(own, name, figures, source)}{rest}"
    path.write_text(text)
    load_core(core)


def _put(text: str, name: str, figures: str, source: str) -> str:
    entry = f'{name}: {{{figures}, source: "{source}"}}'
    text, n = re.subn(rf"\b{name}: \{{value: [^}}]*\}}", lambda _: entry, text)
    assert n == 1, f"no entry {name}"
    return text


def main() -> None:
    """Measure, print, optionally write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--core", default="cortex-m7", choices=sorted(lane.CORES))
    parser.add_argument("--compiler", default="gcc", choices=("gcc", "zig"))
    parser.add_argument("--flag", default="-O2")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--all", action="store_true", help="print every case")
    options = parser.parse_args()
    paths = options.models or models(MODELS)
    quantized = [] if options.models else models(QUANTIZED)[1:]
    cases = [*copy_cases(), *(c for m in paths for c in model_cases(m))]
    cases = distinct([*cases, *(c for m in quantized for c in integer_cases(m))])
    if options.core in SOFT_FLOAT:
        cases = [c for c in cases if get_op(c.node.op).work(c.node).amount <= SOFT_FLOAT_WORK]
    measured = measure(options.core, cases, options.compiler, options.flag)
    one_call, rates = summarize(measured)
    if options.all:
        for m in sorted(measured, key=lambda m: (m.cost_class, m.case.node.op, m.amount)):
            rate = m.instructions / max(1, m.amount)
            where = f"{m.case.model} {m.case.node.name[-40:]}"
            print(
                f"{' '.join(m.cost_class):26} {m.case.node.op:20} {m.amount:>10,} {m.case.calls:4}",
                end="",
            )
            print(f" {m.instructions:>12,} {rate:9.2f}  {where}")
    print(f"{'call':22} {one_call:9.0f}")
    for name, rate in rates.items():
        chosen = [m for m in measured if m.cost_class == name]
        off = sorted(m.instructions / m.predicted(rate, one_call) for m in chosen)
        figures = " ".join(f"{r:8.2f}" for r in rate)
        spread = f"{off[0]:.2f} .. {off[len(off) // 2]:.2f} .. {off[-1]:.2f}"
        print(f"{' '.join(name):26} {figures}   measured / predicted {spread} in {len(off)} cases")
    if options.write:
        source = (
            f"measured: {_compiler_name(options.compiler)} {options.flag}, emulated {options.core},"
            f" {len(measured)} kernel calls of {len(paths) + len(quantized)} models"
        )
        write_spec(options.core, one_call, rates, source)
        for core, (factor, why) in DERIVED.items() if options.core == "cortex-m7" else ():
            scaled = {n: (a * factor, b * factor, c * factor) for n, (a, b, c) in rates.items()}
            write_spec(core, one_call * factor, scaled, f"estimated: {why}")


if __name__ == "__main__":
    main()

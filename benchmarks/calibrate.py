"""Executed instructions of the C kernels, measured on emulated Cortex-M cores.

Every kernel call of the training steps of real models (all parameters trained, in each precision
that there is) runs alone on the emulated core. Operators that no model needs run their samples.
Four figures per operator and cost class, instructions per unit of work, per pass and start of an
inner loop and per result, are fitted to them by non-negative least squares; so are those of cost
classes, for operators that are not measured. With ``--write`` the figures go into
``specs/cores/<core>.yaml``; with ``--only``, only those of some operators, the others kept.

    python -m benchmarks.calibrate [--core cortex-m7] [--only 'LayerNorm*'] [--write] [models...]
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from odt_plan.backends.c.emit import kernel_files
from odt_plan.backends.c.emit_call import call, kernel_of, param_struct
from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.errors import GraphError
from odt_plan.ir.graph import Attr, Graph, Node, TensorType, Value
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.opdef import Work, all_ops, get_op, works
from odt_plan.ir.precision import all_i8, lower, mixable
from odt_plan.ir.streaming import blocks, stream
from odt_plan.ir.training import OptimizerName, TrainingSpec
from odt_plan.planner.device import load_core

from .board import lane
from .models import NAMES, ROOT, models

#: Room of the emulated board: one operator at a time, so larger than any real device.
LIMITS = lane.Limits(flash_bytes=4 << 20, ram_bytes=16 << 20, stack_bytes=64 << 10)
#: Work beyond this is left out on cores without FPU, which need 100 instructions per unit of fp32;
#: ten integer units count as one.
SOFT_FLOAT_WORK = 300_000
SOFT_FLOAT = {"cortex-m0plus", "cortex-m3"}
MODELS = (
    *NAMES,
    "mlperf_ad_autoencoder",
    "mcunet-5fps-head10-relu6",
    "mbv2-w0.35-head10-relu6",
    "mlperf_resnet8_int8",
    "mlperf_dscnn_kws_int8",
    "tinyengine_mcunet_vww_int8",
    "mcunet-5fps-head10-qdq",
    "mbv2-w0.35-head10-qdq",
    "proxyless-w0.3-head10-qdq",
    "kwt1_op17",
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
    def works(self) -> tuple[Work, ...]:
        """What the planner counts for it."""
        return works(self.node, self.tile_rows)

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

    def predicted(self, rates: Rates, one_call: float) -> float:
        """Instructions by these rates."""
        return sum(_spent(w, rates) for w in self.case.works) + one_call * self.case.calls


def _spent(work: Work, rates: Rates) -> float:
    """Instructions by the rates of the operator, or else of the cost class."""
    rate = rates.get((work.operator, work.cost_class)) or rates[work.dtype, work.cost_class]
    return sum(n * r for n, r in zip(counts(work), rate, strict=True))


def counts(work: Work) -> tuple[int, int, int, int]:
    """Units, passes, starts of loops, results."""
    assert work.outputs is not None, work
    return work.amount, work.passes, work.loops, work.outputs


def model_cases(path: Path) -> list[Case]:
    """All kernel calls of training steps with everything trained, by each optimizer."""
    graph = import_model(path)
    forms = [graph]
    if graph.quantization:
        integers = lower(graph, all_i8(graph))
        forms = [integers, stream(integers, [b.name for b in blocks(integers)])]
        mixed = {n: "mixed" for n, why in mixable(graph).items() if why is None}
        forms += [lower(graph, {**all_i8(graph), **mixed})] if mixed else []  # type: ignore[dict-item]
    return [case for form in forms for case in _training_cases(form, path.stem)]


def _training_cases(forward: Graph, model: str) -> list[Case]:
    """By each optimizer; with the inputs of layers kept as they are, as f16, and as i8."""
    whole = [c for c in candidates(forward) if c.channels is None]
    plain = {c.param: c for c in whole if c.saved == "f32"}
    result = []
    for optimizer, saved in product(get_args(OptimizerName), ("f32", "f16", "i8")):
        chosen = plain | {c.param: c for c in whole if c.saved == saved}
        if saved != "f32" and (optimizer != "sgd" or chosen == plain):
            continue
        spec = TrainingSpec(optimizer=optimizer)
        training = build_training(forward, spec, list(chosen.values()))
        tiles = {u.grad_node: u.tile_rows for u in training.updates if u.grad_node is not None}
        for node in training.graph.nodes:
            streamed = get_op(node.op).rows_kernel is not None
            if not get_op(node.op).view:
                result.append(Case(node, tiles.get(node) if streamed else None, model))
    return result


def thinned(cases: Sequence[Case]) -> list[Case]:
    """Without most cases of operators that only do elementwise work, which is proportional."""
    result, simple = [], dict[str, list[Case]]()
    for c in cases:
        elementwise = all(w.cost_class == "elementwise" for w in c.works)
        (simple.setdefault(c.node.op, []) if elementwise else result).append(c)
    for same in simple.values():
        same.sort(key=lambda c: c.works[0].amount)
        result += same[:: max(1, len(same) // 8)]
    return result


def sample_cases(measured: Iterable[Case]) -> list[Case]:
    """The samples of the operators that have no case, and the same of many images."""
    known = {c.node.op for c in measured}
    result = []
    for name, op in all_ops().items():
        for sample in op.samples() if name not in known and op.c else ():
            for times in (1, 100):
                types = tuple(_repeated(t, sample.types[0], times) for t in sample.types)
                inputs = [None if t is None else Value(f"x{j}", t) for j, t in enumerate(types)]
                node = Node(name, f"{name} x {times}", tuple(inputs), (), dict(sample.attrs))
                try:
                    made = op.infer(node)
                except GraphError:  # its attributes tell a shape
                    continue
                node.outputs = tuple(Value(f"y{j}", t, node) for j, t in enumerate(made))
                result.append(Case(node, None, "samples"))
    return result


def _repeated(t: TensorType | None, first: TensorType | None, times: int) -> TensorType | None:
    """With so many more rows, if it has as many as the first operand."""
    if t is None or first is None or t.shape[:1] != first.shape[:1] or not t.shape:
        return t
    return TensorType((t.shape[0] * times, *t.shape[1:]), t.dtype, t.quant)


def _soft_float_work(case: Case) -> float:
    integer = ("copy", "setup")
    light = [w.dtype == "i8" or w.cost_class in integer for w in case.works]
    return sum(w.amount / 10 if few else w.amount for w, few in zip(case.works, light, strict=True))


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


def row_cases() -> list[Case]:
    """Layer normalization of long and short rows; models have rows of one length."""
    result = []
    for rows, size in ((64, 16), (30, 96), (5, 320)):
        g = Graph("rows")
        x = g.add_input("x", TensorType((rows, size)))
        for name in ("first", "second"):
            scale, bias = (
                g.add_constant(f"{name}.{k}", np.ones(size, np.float32)) for k in ("scale", "bias")
            )
            x = g.add_node("LayerNormalization", (x, scale, bias), name=name).out
        g.outputs = [x]
        result += [c for c in _training_cases(g, "rows") if c.node.op.startswith("LayerNorm")]
    return result


def product_cases() -> list[Case]:
    """Small products of batches of matrices; models have large ones."""
    g = Graph("products")
    for i, (a, b, flip) in enumerate(
        (
            ((4, 12, 8), (4, 8, 20), (0, 0)),
            ((2, 3, 16, 9), (9, 6), (0, 0)),
            ((3, 24, 10), (3, 24, 14), (1, 0)),
            ((3, 11, 32), (3, 18, 32), (0, 1)),
            ((1, 64), (64, 12), (0, 0)),
        )
    ):
        operands = [g.add_input(f"{k}{i}", TensorType(s)) for k, s in (("a", a), ("b", b))]
        g.add_node("MatMul", operands, {"trans_a": flip[0], "trans_b": flip[1]}, name=f"product{i}")
    return [Case(n, None, "products") for n in g.nodes]


def distinct(cases: Iterable[Case]) -> list[Case]:
    """Cases that differ in kernel, work or tiling: scales and names change no instruction."""
    found: dict[tuple[str, tuple[Work, ...], int | None], Case] = {}
    for c in cases:
        found.setdefault((kernel_of(c.node).function(c.node), c.works, c.tile_rows), c)
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
    rooms = ", ".join(str(sum(_operand_bytes(c.node))) for c in cases)
    parts.append(f"static const uint32_t rooms[] = {{{rooms}}};\n")
    parts.append(
        """
int main(void) {
    uint32_t number, i, seed = 1u;
    const int file = board_open("case.bin", BOARD_READ);
    if (file < 0 || board_read(file, &number, 4u) != 0) {
        return 1;
    }
    for (i = 0; i < rooms[number]; i += 4u) { /* floats in -1 .. 1 */
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


def _shifts(node: Node) -> list[Value | None]:
    """Operands that are shifts of a requantization."""
    places = {"QConv": (4,), "QGemm": (4,), "StreamedBlock": (4, 8, 12)}
    return [node.inputs[i] for i in places.get(node.op, ())]


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
            value = 40 if v in _shifts(c.node) else 1
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


def measure(
    core: str, cases: Sequence[Case], compiler: lane.Compiler, flag: str, *, packed: bool = True
) -> list[Measured]:
    """Run every case alone; without ``packed``, by the integer kernels of cores without SIMD32."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in kernel_files(sorted({kernel_of(c.node).source for c in cases})).items():
            head = "" if packed or file.endswith(".h") else "#undef __ARM_FEATURE_SIMD32\n"
            (folder / file).write_text(head + text)
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


#: Instructions per unit of work, per pass, per start of a loop, per result.
Rate = tuple[float, ...]
#: By operator and cost class, or by dtype and cost class.
Rates = dict[tuple[str, str], Rate]
_NAMES = ("value", "per_pass", "per_loop", "per_output")


def one_call(measured: Sequence[Measured]) -> float:
    """Instructions of one call.

    It is what small elementwise kernels take beyond their work, by the rate of a large case of the
    same operator.
    """
    rest = []
    for op in {m.case.node.op for m in measured}:
        cases = [m for m in measured if m.case.node.op == op and m.case.calls == 1]
        if any(w.cost_class != "elementwise" for m in cases for w in m.case.works):
            continue
        cases.sort(key=lambda m: m.case.works[0].amount)
        amounts = [m.case.works[0].amount for m in cases]
        if cases and amounts[0] <= 64 and amounts[-1] >= 1000:
            per_unit = cases[-1].instructions / amounts[-1]
            rest.append(cases[0].instructions - per_unit * amounts[0])
    return max(0.0, statistics.median(rest) if rest else 0.0) + _CALLER


def operator_rates(measured: Sequence[Measured], classes: Rates, call: float) -> Rates:
    """Rates of every operator; those made of others come last and use the rates of their parts."""
    result: Rates = {}
    groups: dict[str, list[Measured]] = {}
    for m in measured:
        groups.setdefault(m.case.node.op, []).append(m)

    def others(op: str) -> int:
        return len({w.operator for m in groups[op] for w in m.case.works} - {op})

    for op in sorted(groups, key=others):
        known = [
            call * m.case.calls
            + sum(_spent(w, classes | result) for w in m.case.works if w.operator != op)
            for m in groups[op]
        ]
        own = [
            [((op, w.cost_class), counts(w)) for w in m.case.works if w.operator == op]
            for m in groups[op]
        ]
        if any(own):
            result |= _fit(own, [m.instructions for m in groups[op]], known)
    return result


def class_rates(measured: Sequence[Measured], call: float) -> Rates:
    """Rates of every cost class, over all operators."""
    parts = [[((w.dtype, w.cost_class), counts(w)) for w in m.case.works] for m in measured]
    spent = [m.instructions for m in measured]
    return _fit(parts, spent, [call * m.case.calls for m in measured])


def _fit(
    parts: Sequence[Sequence[tuple[tuple[str, str], Sequence[int]]]],
    spent: Sequence[int],
    known: Sequence[float],
) -> Rates:
    """Non-negative rates with the least squared error.

    Cases weigh by 1 / instructions^0.75: between the absolute error, which would leave small layers
    to chance, and the relative one, which would leave large ones.

    Args:
        parts: By case: the keys of its rates and their counts.
        spent: Its instructions.
        known: What of them other rates explain.
    """
    keys = sorted({key for case in parts for key, _ in case})
    table = np.zeros((len(parts), len(keys), len(_NAMES)))
    for i, case in enumerate(parts):
        for key, n in case:
            table[i, keys.index(key)] += n
    weight = np.array(spent, float) ** -0.75
    goal = np.maximum(np.array(spent) - np.array(known), 0.0) * weight
    rates = nonnegative(table.reshape(len(parts), -1) * weight[:, None], goal)
    return {
        k: tuple(map(float, r)) for k, r in zip(keys, rates.reshape(-1, len(_NAMES)), strict=True)
    }


def nonnegative(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 with the least ``|a x - b|``, by Lawson's and Hanson's active sets (1974)."""
    size = np.linalg.norm(a, axis=0)
    a = a / np.where(size > 0, size, 1.0)
    x, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], bool)
    for _ in range(3 * a.shape[1]):
        slope = np.where(free, -np.inf, a.T @ (b - a @ x))
        best = int(slope.argmax())
        if slope[best] <= 1e-6 * np.linalg.norm(b):
            break
        free[best] = True
        while True:
            wanted = np.zeros_like(x)
            wanted[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            if (wanted[free] > 0).all():
                x = wanted
                break
            low = free & (wanted <= 0)
            x = x + (x[low] / (x[low] - wanted[low])).min() * (wanted - x)
            free &= x > 1e-12
            x[~free] = 0.0
    return np.asarray(x / np.where(size > 0, size, 1.0))


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _compiler_name(compiler: lane.Compiler) -> str:
    if compiler == "zig":
        return f"zig cc {version('ziglang')}"
    command = ["arm-none-eabi-gcc", "-dumpversion"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return f"arm-none-eabi-gcc {done.stdout.strip()}"


#: Cores that no emulator here runs: factor on the Cortex-M7's figures without SIMD32, and why.
DERIVED = {
    "xtensa-lx7": (1.1, "cortex-m7 (measured) x 1.1, windowed calls and no load pair"),
    "cortex-a72": (1.0, "as cortex-m7 (measured), scalar code"),
}


def all_rates(
    measured: Sequence[Measured], known_call: float | None = None
) -> tuple[float, Rates, Rates]:
    """Instructions of a call; rates of cost classes, and of operators.

    Args:
        measured: All cases; or, with ``known_call``, those of some operators.
        known_call: Instructions of a call where these few cases can't tell them, nor any class.
    """
    if known_call is not None:
        return known_call, {}, operator_rates(measured, {}, known_call)
    call = one_call(measured)
    classes = class_rates(measured, call)
    return call, classes, operator_rates(measured, classes, call)


def write_spec(core: str, call: float, classes: Rates, operators: Rates, source: str) -> None:
    """Replace the figures of ``specs/cores/<core>.yaml``, its comments kept."""
    path = _path(core)
    text = _put(path.read_text(), "call", f"value: {_rounded(call)}", source)
    for (dtype, name), rate in classes.items():
        if not any(rate):  # lost in the noise of soft floats: what stands there stays
            continue
        head, tail = text.split(f"\n  {dtype}:\n")
        own, rest = re.match(r"((?:    [^\n]*\n)*)(.*)", tail, re.DOTALL).groups()  # type: ignore[union-attr]
        text = f"{head}\n  {dtype}:\n{_put(own, name, _figures(rate), source)}{rest}"
    path.write_text(text)
    write_operators(core, operators, source)


def write_operators(core: str, operators: Rates, source: str) -> None:
    """Replace the rates of operators of ``specs/cores/<core>.yaml``."""
    path = _path(core)
    text = path.read_text().split("# Operators that were measured on their own.\n")[0]
    text += "# Operators that were measured on their own.\noperators:\n"
    text += f'  source: "{source}"\n  rates:\n'
    for op in sorted({op for op, _ in operators}):
        text += f"    {op}:\n"
        for (name, cost_class), rate in operators.items():
            text += f"      {cost_class}: {{{_figures(rate)}}}\n" if name == op else ""
    path.write_text(text)
    load_core(core)


def write(core: str, found: tuple[float, Rates, Rates], source: str, some: bool) -> None:
    """All figures, or those of some operators: the rest stays."""
    if some:
        add_operators(core, found[2], source)
    else:
        write_spec(core, *found, source)


def add_operators(core: str, operators: Rates, source: str) -> None:
    """Put the rates of these operators among those that the core has."""
    old = load_core(core).operators
    assert old is not None, core
    kept = {
        (op, name): (r.value, r.per_pass, r.per_loop, r.per_output)
        for op, rates in old.rates.items()
        for name, r in rates.items()
    }
    new = {op for op, _ in operators}
    parts = [part.partition(": ") for part in old.source.split("; ")]  # names: source
    parts = [(", ".join(n for n in p[0].split(", ") if n not in new), *p[1:]) for p in parts]
    parts = [p for p in parts if p[0]] + [(", ".join(sorted(new)), ": ", source)]
    write_operators(core, kept | operators, "; ".join(map("".join, parts)))


def _path(core: str) -> Path:
    return ROOT / "specs" / "cores" / f"{core}.yaml"


def _figures(rate: Rate) -> str:
    named = [(n, r) for n, r in zip(_NAMES, rate, strict=True) if r or n == "value"]
    return ", ".join(f"{n}: {_rounded(r)}" for n, r in named)


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
    parser.add_argument("--only", default="*", metavar="NAME*,...", help="operators")
    parser.add_argument("--all", action="store_true", help="print every case")
    options = parser.parse_args()
    paths = options.models or models(MODELS)
    made = [*copy_cases(), *row_cases(), *product_cases()]
    cases = thinned(distinct([*made, *(c for m in paths for c in model_cases(m))]))
    cases += distinct(sample_cases(cases))
    cases = [c for c in cases if any(fnmatch(c.node.op, p) for p in options.only.split(","))]
    if options.core in SOFT_FLOAT:
        cases = [c for c in cases if _soft_float_work(c) <= SOFT_FLOAT_WORK]
    measured = measure(options.core, cases, options.compiler, options.flag)
    some = options.only != "*"
    known = load_core(options.core).call.value if some else None
    call, classes, operators = all_rates(measured, known)
    every = classes | operators
    if options.all:
        _print_all(measured, every, call)
    print(f"{'call':40} {call:9.1f}")
    for (owner, name), rate in every.items():
        print(f"{owner + ' ' + name:40}", " ".join(f"{r:9.3f}" for r in rate))
    for op in sorted({m.case.node.op for m in measured}):
        chosen = [m for m in measured if m.case.node.op == op]
        off = sorted(m.instructions / m.predicted(every, call) for m in chosen)
        spread = f"{off[0]:.2f} .. {off[len(off) // 2]:.2f} .. {off[-1]:.2f}"
        print(f"{op:26} measured / predicted {spread} in {len(off)} cases")
    if options.write:
        source = (
            f"measured: {_compiler_name(options.compiler)} {options.flag}, emulated {options.core},"
            f" {len(measured)} kernel calls of {len(paths)} models"
        )
        write(options.core, (call, classes, operators), source, some)
    if options.write and options.core == "cortex-m7":
        integers = [c for c in cases if any(w.dtype == "i8" for w in c.works)]
        compiled = (options.compiler, options.flag)
        scalar = measure(options.core, integers, *compiled, packed=False) if integers else []
        rest = [m for m in measured if all(w.dtype != "i8" for w in m.case.works)]
        call, classes, operators = all_rates([*rest, *scalar], call if some else None)
        for core, (factor, why) in DERIVED.items():
            scaled = [
                {key: tuple(factor * r for r in rate) for key, rate in rates.items()}
                for rates in (classes, operators)
            ]
            write(core, (call * factor, scaled[0], scaled[1]), f"estimated: {why}", some)


def _print_all(measured: Sequence[Measured], rates: Rates, call: float) -> None:
    for m in sorted(measured, key=lambda m: (m.case.node.op, m.instructions)):
        first = m.case.works[0]
        shapes = [None if v is None else v.type.shape for v in m.case.node.inputs[:2]]
        off = m.instructions / m.predicted(rates, call)
        print(
            f"{m.case.node.op:20} {first.cost_class:18} {m.instructions:>12,} {off:6.2f}"
            f" {counts(first)} {shapes} {m.case.node.out.type.shape} {m.case.calls} {m.case.model}"
        )


if __name__ == "__main__":
    main()

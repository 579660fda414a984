"""The emitted C of five models under compilers, sanitizers, checkers and emulators.

Run as ``python -m benchmarks.portable_c`` (``make check-c``): writes its table into RESULTS.md, and
fails where a compiler warns, a result is not NumPy's bit for bit, cppcheck finds something that
docs/misra.md does not document, or more stack is used than the bound. Tools that are not there are
said to be so.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odt_plan.backends.c import emit_c
from odt_plan.ir.training import TrainingGraph
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request, make_plan
from odt_plan.planner.plan import Plan

from .board import lane, stack
from .models import ROOT, shared
from .results import put

from test_c_backend import CASES, reference, samples  # isort: skip  # found by .board

TITLE = "### The emitted C of five models: compilers, sanitizers, checkers, emulated cores"
ABSENT = "not available"
LIMITS = lane.Limits(flash_bytes=4 << 20, ram_bytes=4 << 20, stack_bytes=16 << 10)
CORES = ("cortex-m3", "cortex-m4", "cortex-m7", "cortex-m33", "rv32imac")
LR = 0.05
#: Of one run in QEMU: attention without an FPU takes minutes where other work runs beside it.
RUN_S = 3600.0
WARNINGS = ["-std=c99", "-Wall", "-Wextra", "-Wconversion", "-Wdouble-promotion"]
COMPILERS = {"gcc": ["gcc"], "clang": ["clang"], "zig": lane.ZIG}
KERNELS = ROOT / "backends" / "c" / "kernels"
#: The plain library, and the one whose session decays weights and clips.
BUILDS: tuple[list[str], ...] = ([], ["-DODTPLAN_WEIGHT_DECAY=1", "-DODTPLAN_CLIP=1"])
CPPCHECK = ["cppcheck", "--std=c99", "--platform=arm32-wchar_t4", "--quiet", "--inconclusive"]
CPPCHECK += ["--suppress=missingIncludeSystem", "--template={id}\t{file}\t{line}"]
DEVIATIONS = ROOT / "docs" / "misra.md"
DISCO, LARGE = "stm32f746g-disco", "generic-cortex-m7"
LAST_BLOCK = {
    "freeze_before": ("/b.10/n2/LayerNormalization",),
    "ram_bytes": 3 << 20,
    "flash_bytes": 4 << 20,
}
#: (kind, file of the bundled or the shared models, device, what else is asked for, what of the
#: tests' networks stands in where the file is not here).
MODELS: tuple[tuple[str, str, str, dict[str, Any], str], ...] = (
    ("fp32 convolutions", "digits_cnn", DISCO, {}, "resnet-adam"),
    ("int8 and mixed, all trained", "mlperf_resnet8_int8", DISCO, {}, "functions-i8"),
    ("int8, last layer trained", "mlperf_dscnn_kws_int8", DISCO, {"train": ("last",)}, "cnn-i8"),
    ("LSTM", "tflm_mnist_lstm", DISCO, {}, "recurrent"),
    ("attention, last block trained", "kwt1_op17", LARGE, LAST_BLOCK, "transformer"),
)


@dataclass(frozen=True)
class Emitted:
    """The C of a model.

    Attributes:
        title: Name of the model, and what it is.
        name: C prefix.
        folder: Where its files are.
        files: What ``emit_c`` wrote.
        data: Input of the test program: a sample, and one training step.
        wanted: What NumPy makes of it.
    """

    title: str
    name: str
    folder: Path
    files: list[Path]
    data: dict[str, bytes]
    wanted: bytes


class Findings:
    """Cells of the tables, and what is not as it should be."""

    def __init__(self) -> None:
        """None so far."""
        self.wrong: list[str] = []
        self.absent: set[str] = set()

    def cell(self, good: bool, text: str, where: str) -> str:
        """A cell, bold where it is not good."""
        if good:
            return text
        self.wrong.append(f"{where}: {text}")
        return f"**{text}**"

    def missing(self, tool: str) -> str:
        """The cell of a tool that is not there."""
        self.absent.add(tool)
        return ABSENT


def main() -> int:
    """Write the table; 1 if something is not as it should be."""
    found = Findings()
    with tempfile.TemporaryDirectory() as name:
        models = [_emitted(Path(name) / m[1], *m) for m in MODELS]
        table = [TITLE, "", *_introduction(), ""]
        for part in (_host_table, _core_table, _checker_table):
            for line in part(models, found):
                print(line, flush=True)
                table.append(line)
            table.append("")
    put(TITLE, table)
    for tool in sorted(found.absent):
        print(f"{tool} is {ABSENT}: not checked", file=sys.stderr)
    for line in found.wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if found.wrong else 0


def _introduction() -> Iterator[str]:
    yield (
        "`make check-c`. Exact: prediction, loss, parameters and optimizer tensors after a training"
        " step equal NumPy's bit for bit, and so does the self-test."
    )


def _emitted(
    folder: Path, kind: str, file: str, device: str, asked: dict[str, Any], stand_in: str
) -> Emitted:
    models = shared()
    path = ROOT / "examples" / f"{file}.onnx"
    if models is not None and not path.is_file():
        path = models / "models" / f"{file}.onnx"
    plan: Plan
    training: TrainingGraph
    if path.is_file():
        done = make_plan(Request(path, load_device(device), with_baselines=False, **asked))
        plan, training = done.plan, done.training
    else:
        file = stand_in
        plan, training = CASES[stand_in]()
    count = plan.training.micro_batches
    files = emit_c(plan, training, folder)
    data = lane.training_input(*samples(training, count), LR)
    wanted = reference(plan, training, count, LR)
    return Emitted(f"{file} ({kind})", files[0].stem, folder, files, data, wanted)


# ---- this machine


def _host_table(models: Sequence[Emitted], found: Findings) -> Iterator[str]:
    yield (
        "Warnings of `-Wall -Wextra -Wconversion -Wdouble-promotion`, with and without weight"
        " decay and clipping; C++ is `-std=c++11 -Wall -Wextra` on the headers. ASan and UBSan run"
        " with dead ranges of the arena poisoned and filled with NaN."
    )
    yield ""
    yield "| model | .c files | gcc | clang | zig | C++ | ASan, UBSan, arena | valgrind memcheck |"
    yield "|---|---|---|---|---|---|---|---|"
    for m in models:
        sources = _sources(m.files)
        warnings = [
            _warnings(m.name, m.folder, sources, n, c, found) for n, c in COMPILERS.items()
        ]
        cells = [*warnings, _cplusplus(m, found), _sanitized(m, found), _valgrind(m, found)]
        yield f"| {m.title} | {len(_sources(m.files))} | {' | '.join(cells)} |"
    library = _sources(KERNELS.iterdir())
    told = [_warnings("library", KERNELS, library, n, c, found) for n, c in COMPILERS.items()]
    yield f"| all kernels of the library | {len(library)} | {' | '.join(told)} | - | - | - |"


def _sources(files: Iterable[Path]) -> list[str]:
    """Names of those that are compiled."""
    return sorted(f.name for f in files if f.suffix == ".c")


def _there(command: Sequence[str]) -> bool:
    return lane.has_zig_lane() if command is lane.ZIG else shutil.which(command[0]) is not None


def _warnings(
    what: str,
    folder: Path,
    sources: Sequence[str],
    name: str,
    compiler: Sequence[str],
    found: Findings,
) -> str:
    if not _there(compiler):
        return found.missing(name)
    told = set()
    with tempfile.TemporaryDirectory() as objects:
        for build in BUILDS:
            command = [*compiler, *WARNINGS, *build, "-O2", "-c", *(folder / s for s in sources)]
            done = subprocess.run(command, cwd=objects, capture_output=True, text=True)
            told |= set(re.findall(r"^.*(?:warning|error): .*$", done.stderr, re.MULTILINE))
            if done.returncode != 0:
                told.add(f"exit code {done.returncode}")
    return found.cell(not told, str(len(told)), f"{what}, {name}")


def _cplusplus(m: Emitted, found: Findings) -> str:
    compiler = next((c for c in ("g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        return found.missing("a C++ compiler")
    headers = [f.name for f in m.files if f.suffix == ".h"]
    source = m.folder / "headers.cpp"
    source.write_text("".join(f'#include "{h}"\n' for h in headers) + f"{m.name}_t net;\n")
    command = [compiler, "-std=c++11", "-Wall", "-Wextra", "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    told = re.findall("(?:warning|error): ", done.stderr)
    good = not told and done.returncode == 0
    return found.cell(good, str(len(told)), f"{m.name}, {compiler}")


def _sanitized(m: Emitted, found: Findings) -> str:
    if shutil.which("gcc") is None:
        return found.missing("gcc")
    result = lane.run_host(lane.build_host(m.folder, m.name), m.data)
    good = result.exit_code == 0 and _is_exact(m, result)
    return found.cell(good, "clean, exact" if good else _end(result.stdout), f"{m.name}, sanitized")


def _valgrind(m: Emitted, found: Findings) -> str:
    if shutil.which("valgrind") is None or shutil.which("gcc") is None:
        return found.missing("valgrind")
    program = lane.build_host(m.folder, m.name, sanitize=False)
    checked = m.folder / "valgrind.sh"
    command = f'valgrind -q --error-exitcode=99 --leak-check=full "{program}"'
    checked.write_text(f"#!/bin/sh\nexec {command}\n")
    checked.chmod(0o755)
    result = lane.run_host(checked, m.data)
    good = result.exit_code == 0 and _is_exact(m, result)
    return found.cell(good, "clean, exact" if good else _end(result.stdout), f"{m.name}, valgrind")


def _is_exact(m: Emitted, result: lane.BoardResult) -> bool:
    return result.value("selftest_exact") == 1 and result.files["output.bin"] == m.wanted


def _end(text: str) -> str:
    """Last line of a log."""
    return ["", *text.strip().splitlines()][-1].replace("|", "/")


# ---- emulated cores


def _core_table(models: Sequence[Emitted], found: Findings) -> Iterator[str]:
    yield (
        "Emulated cores, gcc -O2: M3 and RISC-V without FPU. Stack in bytes, from reset on: the"
        " bound is that of `tests/board/stack.py`, of all that is linked and of the instructions"
        " that ran; frames may have words that nothing was put in, so *written* goes to the lowest"
        " word that an instruction which ran writes. Painted is what was measured. It may be less"
        " than written where what a function writes hangs on its caller."
    )
    yield ""
    yield (
        "| model | core | emulator | result | instructions per step | stack bound | of what ran |"
        " written | painted |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for m in models:
        for core in CORES:
            cells = " | ".join(_core_cells(m, core, found))
            yield f"| {m.title} | {core} | {cells} |"


def _core_cells(m: Emitted, core: str, found: Findings) -> Iterator[str]:
    c = lane.CORES[core]
    if not lane.has_gcc(core) or c.machine is None or not lane.has_qemu(core):
        missing = found.missing(f"{c.gcc_program} or {c.qemu_program}")
        yield from (missing, *["-"] * 6)
        return
    limits = LIMITS.on(c.machine)
    image = lane.build(m.folder, m.name, core, "gcc", limits=limits, flags=stack.FLAGS)
    result = lane.run(image, core, "qemu", files=m.data, limits=limits, timeout_s=RUN_S)
    yield f"QEMU {c.machine.name}"
    good = result.exit_code == 0 and _is_exact(m, result)
    yield found.cell(good, "exact" if good else _end(result.stdout), f"{m.name}, {core}")
    yield f"{result.instructions['train']:,}"
    objdump = c.gcc_program.removesuffix("gcc") + "objdump"
    calls = stack.Stack(image, objdump)
    bound, ran = calls.bound("start").bytes, calls.bound("start", result.blocks).bytes
    written, painted = calls.bound("start", result.blocks, written=True).bytes, result.stack_bytes
    yield f"{bound:,}"
    yield f"{ran:,}"
    yield f"{written:,}"
    good = painted <= written <= ran <= bound
    yield found.cell(good, f"{painted:,}", f"{m.name}, stack on {core}")


# ---- checkers


def deviations() -> set[str]:
    """What docs/misra.md documents: ``rule`` or ``rule in file``."""
    text = DEVIATIONS.read_text(encoding="utf-8")
    return set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))


def _checker_table(models: Sequence[Emitted], found: Findings) -> Iterator[str]:
    yield (
        "cppcheck `--enable=all --inconclusive`, and its MISRA C:2012 addon, on all files but the"
        " constants of the weights, and on all kernels, whether a model here uses them or not. Each"
        " finding belongs to a rule of"
        " [docs/misra.md](../docs/misra.md), or is undocumented."
    )
    yield ""
    yield "| files | cppcheck | undocumented | MISRA | rules | undocumented |"
    yield "|---|---|---|---|---|---|"
    if shutil.which("cppcheck") is None:
        yield f"| all | {found.missing('cppcheck')} | - | - | - | - |"
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The kernels of the models are the same files.
        for f in (*KERNELS.iterdir(), *(f for m in models for f in m.files)):
            if f.suffix in (".c", ".h"):
                shutil.copy(f, folder)
        plain = _cppcheck(folder, ["--enable=all"])
        misra = [f for f in _cppcheck(folder, ["--addon=misra"]) if f[0].startswith("misra")]
    known, owners = deviations(), {m.name: m.title for m in models}
    for owner, title in {"odtplan_": "kernels and runtime", **owners}.items():
        cells = []
        for findings in (plain, misra):
            rules = Counter(r for r, f in findings if f.startswith(owner))
            new = {
                f"{r} in {f}"
                for r, f in findings
                if f.startswith(owner) and not {r, f"{r} in {f}"} & known
            }
            cells.append(f"{rules.total()}")
            cells += [str(len(rules))] if findings is misra else []
            cells.append(found.cell(not new, str(len(new)), ", ".join(sorted(new))))
        yield f"| {title} | {' | '.join(cells)} |"


def _cppcheck(folder: Path, options: Sequence[str]) -> list[tuple[str, str]]:
    """(rule, file) of each place where cppcheck finds something."""
    sources = sorted(f.name for f in folder.glob("*.c") if not f.name.endswith("_weights.c"))
    kernels = [f for f in sources if f.startswith("odtplan_")]
    models = [f for f in sources if f not in kernels]
    places = set()
    # A schedule of thousands of lines takes a minute for each combination of #if; it has few.
    for part, files in (([], kernels), (["--max-configs=2"], models)):
        command = [*CPPCHECK, *options, *part, *files]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        places |= {tuple(x.split("\t")) for x in done.stderr.splitlines() if x.count("\t") == 2}
    return [(rule, file) for rule, file, _ in sorted(places)]


if __name__ == "__main__":
    sys.exit(main())

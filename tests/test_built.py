"""What a compiler made of the emitted C, against a linker, GCC's call graph, a painted stack."""

from __future__ import annotations

import os
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import nets
import pytest
from board import lane
from cli_run import Cli
from onnx_files import export
from test_c_backend import CASES, samples

from odt_plan import figures
from odt_plan.backends.c import BuildError, Built, built, emit_c, measure_built
from odt_plan.planner.device import load_device

needs_gcc = pytest.mark.skipif(not lane.has_gcc(), reason="needs arm-none-eabi-gcc")
CORE = "cortex-m7"
GCC = ["arm-none-eabi-gcc", "-mthumb", *lane.CORES[CORE].gcc.split()]
FLAGS = ["-std=c99", "-O2", "-ffp-contract=off", "-fno-math-errno", "-ffreestanding"]
FLAGS += ["-ffunction-sections", "-fdata-sections", f"-I{lane.FIRMWARE / 'freestanding'}"]
LIMITS = ("--ram", "64KB", "--flash", "256KB")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Takes a compiler away: ``gcc``, or ``gcc and zig``."""
    built._compiler.cache_clear()

    def hide(which: str) -> None:
        monkeypatch.setattr(built, "shutil", SimpleNamespace(which=lambda _: None))
        if "zig" in which:
            monkeypatch.setattr(built, "find_spec", lambda _: None)

    yield hide
    built._compiler.cache_clear()


def sources(folder: Path) -> list[str]:
    """What infers and trains."""
    others = ("_weights", "_selftest", "_train", "_store", "_delta")
    return [str(s) for s in folder.glob("*.c") if not s.stem.endswith(others)]


def kept_by_a_linker(folder: Path, model: str) -> int:
    """Code and constants that GNU ld keeps of the library without its weights."""
    roots = [f"-Wl,-u,{model}{end}" for end in ("_init", "_infer", "_train_step")]
    options = ["-nostdlib", "-Wl,--gc-sections", "-Wl,--unresolved-symbols=ignore-all"]
    image = folder / "linked.elf"
    entry = f"-Wl,-e,{model}_train_step"
    command = [*GCC, *FLAGS, *options, *roots, entry, *sources(folder), "-o", str(image)]
    subprocess.run(command, check=True, capture_output=True)
    told = subprocess.run(
        ["arm-none-eabi-size", "-A", str(image)], check=True, capture_output=True, text=True
    ).stdout
    rows = [line.split() for line in told.splitlines() if line.startswith(".")]
    sizes = {name: int(size) for name, size, _ in rows}
    return sizes[".text"] + sizes.get(".rodata", 0)


def deepest_by_gcc(folder: Path, model: str) -> int:
    """Stack of the deepest path of GCC's call graph, which knows calls and frames by itself."""
    subprocess.run(
        [*GCC, *FLAGS, "-fcallgraph-info=su", "-c", *sources(folder)], cwd=folder, check=True
    )
    frames: dict[str, int] = {}
    calls: dict[str, set[str]] = {}
    for text in (p.read_text(encoding="utf-8") for p in folder.glob("*.ci")):
        for name, label in re.findall(r'node: \{ title: "([^"]+)" label: "([^"]*)"', text):
            if size := re.search(r"(\d+) bytes", label):
                frames[name] = int(size[1])
        for a, b in re.findall(r'edge: \{ sourcename: "([^"]+)" targetname: "([^"]+)"', text):
            calls.setdefault(a, set()).add(b)

    def depth(name: str) -> int:
        return frames.get(name, 0) + max(map(depth, calls.get(name, ())), default=0)

    return max(depth(f"{model}{end}") for end in ("_init", "_infer", "_train_step"))


@needs_gcc
def test_code_and_stack_by_gcc(tmp_path: Path) -> None:
    """With a copy of a function that has a name of the compiler's, and no calls by pointer."""
    plan, training = CASES["mlp-triplet"]()
    model = emit_c(plan, training, tmp_path)[0].stem
    found = measure_built(tmp_path, model, CORE)
    assert found is not None
    assert re.fullmatch(r"arm-none-eabi-gcc \d+\.\d+\.\d+ -O2, cortex-m7", found.compiler)
    assert found.array_bytes == plan.claims.ram_bytes.total
    # The linker fills up each function to the alignment of the next one.
    assert found.code_bytes == pytest.approx(kept_by_a_linker(tmp_path, model), abs=128)
    assert found.stack_bytes == deepest_by_gcc(tmp_path, model)


@pytest.mark.skipif(not lane.has_zig_lane(), reason="needs ziglang and unicorn")
def test_zig_and_the_stack_that_is_touched(
    no_compiler: Callable[[str], None], tmp_path: Path
) -> None:
    plan, training = CASES["mlp-sgd"]()
    model = emit_c(plan, training, tmp_path)[0].stem
    no_compiler("gcc")
    found = measure_built(tmp_path, model, CORE)
    assert found is not None
    assert re.fullmatch(r"ziglang \S+ -O2, cortex-m7", found.compiler)
    assert found.array_bytes == plan.claims.ram_bytes.total
    image = lane.build(tmp_path, model, CORE, "zig", selftest=False)
    done = lane.run(image, CORE, files=lane.training_input(*samples(training, 1), 0.05))
    of_the_test = 200  # frames of its main, and of start-up
    assert found.stack_bytes <= done.stack_bytes <= found.stack_bytes + of_the_test


def test_without_a_compiler_nothing_is_measured(
    no_compiler: Callable[[str], None], odt: Cli, tmp_path: Path
) -> None:
    no_compiler("gcc and zig")
    done = odt(export(nets.mlp(), tmp_path), *LIMITS, "--emit", "c", "-o", "out")
    assert done.code == 0, done.err
    assert "code (estimated)" in done.out
    assert "measured:" not in done.out


@needs_gcc
def test_report_page_and_json_tell_the_same(odt: Cli, tmp_path: Path) -> None:
    model = export(nets.mlp(), tmp_path)
    done = odt(model, *LIMITS, "--emit", "c,html", "-o", "out")
    told = odt(model, *LIMITS, "--emit", "c", "-o", "out", "--json").json["built"]
    found = Built(**told)
    assert found == measure_built(tmp_path / "out", "model", CORE)
    (line,) = [row for row in done.out.splitlines() if row.startswith("built ")]
    for n in (found.code_bytes, found.array_bytes, found.stack_bytes):
        assert f" {n:,} B" in line
    assert line.endswith(f"measured: {found.compiler}")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert line.removeprefix("built").strip() in page
    assert "built" not in odt(model, *LIMITS, "--json").json, "nothing was emitted"


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'a.c:1: error: no such float' >&2; exit 3", "a.c:1: error: no such float"),
        ("exit 0", "No such file or directory"),
        ("touch made.o", "the compiler made no ELF file"),
    ],
)
def test_a_broken_compiler_is_a_warning(
    script: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odt: Cli
) -> None:
    """The plan and the C are there; the figure stays the estimate."""
    fake = tmp_path / "bin" / "arm-none-eabi-gcc"
    fake.parent.mkdir()
    version = 'case "$*" in *-dumpfullversion*) echo 1.2.3; exit;; esac'
    fake.write_text(f"#!/bin/sh\n{version}\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    built._compiler.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done = odt(export(nets.mlp(), tmp_path), *LIMITS, "--emit", "c", "-o", "out")
    built._compiler.cache_clear()
    assert done.code == 0, done.err
    assert done.err.startswith("warning: the emitted C was not measured: ")
    assert told in done.err
    assert "measured:" not in done.out
    assert (tmp_path / "out" / "model.c").is_file()


@pytest.mark.parametrize(
    ("code", "stack", "told"),
    [
        (0, 0, []),
        (1, 0, ["the flash budget is 1 B too small for it"]),
        (0, 1, ["the reserve of RAM is 1 B too small for it"]),
        (7, 9, ["the flash budget is 7 B too small", "the reserve of RAM is 9 B too small"]),
    ],
)
def test_what_does_not_fit_is_told(code: int, stack: int, told: list[str]) -> None:
    plan, _ = CASES["mlp-sgd"]()
    device = load_device(plan.device.id)
    left = plan.device.budget.flash_bytes - plan.claims.flash_bytes.weights
    made = Built("cc", left + code, 0, device.reserve.ram_bytes + stack)
    lines = [line.text for line in figures.built_lines(plan, device, made)[2:]]
    assert len(lines) == len(told)
    assert all(line.startswith(start) for line, start in zip(lines, told, strict=True))


def test_calls_in_a_ring_have_no_bound() -> None:
    sections = {k: built._Section(4, writable=False, executable=True, frame=8) for k in "abc"}
    edges = {"a": ["b"], "b": ["c"], "c": []}
    assert built._depths(["a"], edges, sections) == {"a": 24, "b": 16, "c": 8}
    with pytest.raises(BuildError, match="call each other"):
        built._depths(["a"], {**edges, "c": ["a"]}, sections)
    sections["c"].frame = None
    with pytest.raises(BuildError, match="tells no stack"):
        built._depths(["a"], edges, sections)

"""Run a firmware image on QEMU with our counting plugin; what every emulator reports."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from .elf import Elf

FIRMWARE = Path(__file__).parent / "firmware"
REGIONS = {"infer": 1, "train": 2}
ZIG = [sys.executable, "-m", "ziglang", "cc"]


@dataclass
class BoardResult:
    """What a run left behind.

    Attributes:
        exit_code: Of the firmware; 120 after a fault, 121 after an access outside the memory map.
        stdout: Its console.
        files: Files that it wrote, by name.
        instructions: Executed instructions per region (``infer``, ``train``), all its entries.
        entries: How often each region was entered.
        functions: Executed instructions per region and function.
        blocks: (address, instructions) of all blocks that ran, in a region or not.
    """

    exit_code: int
    stdout: str
    files: dict[str, bytes] = field(default_factory=dict)
    instructions: dict[str, int] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)
    functions: dict[str, dict[str, int]] = field(default_factory=dict)
    blocks: frozenset[tuple[int, int]] = frozenset()

    def value(self, key: str) -> int:
        """A ``key=value`` line of the console."""
        lines = [line for line in self.stdout.splitlines() if line.startswith(f"{key}=")]
        assert lines, f"no {key} in {self.stdout!r}"
        return int(lines[-1].split("=")[1], 0)

    @property
    def stack_bytes(self) -> int:
        """High-water mark of the painted stack."""
        return self.value("stack_bytes")

    def enter(self, elf: Elf, address: int, runs: int) -> None:
        """Record how often a marker function ran."""
        for region in REGIONS:
            begin = elf.symbols.get(f"region_{region}_begin")
            if begin is not None and begin.address & ~1 == address:
                self.entries[region] = runs

    def count(self, elf: Elf, blocks: list[tuple[int, int, int, int]]) -> None:
        """Enter (address, instructions, region, runs) of all blocks."""
        self.blocks = frozenset((pc, n) for pc, n, _, _ in blocks)
        names = {number: name for name, number in REGIONS.items()}
        functions: dict[str, Counter[str]] = {name: Counter() for name in REGIONS}
        for pc, n, region, runs in blocks:
            if region in names:
                functions[names[region]][elf.function_at(pc)] += n * runs
        self.functions = {r: dict(c.most_common()) for r, c in functions.items()}
        self.instructions = {r: sum(c.values()) for r, c in functions.items()}


@cache
def shared_library(source: Path, compiler: tuple[str, ...]) -> Path:
    """Compile a counter for this machine, once per process."""
    target = Path(_scratch().name) / f"{source.stem}.so"
    command = [*compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    return target


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends; a loaded library may keep its file on Windows."""
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def run_qemu(
    image: Path, board: Sequence[str], files: dict[str, bytes], *, timeout_s: float = 300.0
) -> BoardResult:
    """Run on QEMU, ``board`` being its command up to the board's name; the MPU works there."""
    elf = Elf(image)
    plugin = shared_library(FIRMWARE / "count_qemu.c", ("gcc",))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for f, data in files.items():
            (folder / f).write_bytes(data)
        marks = [
            f"mark={elf.symbols[f'region_{r}_{edge}'].address:#x}:{n if edge == 'begin' else 0}"
            for r, n in REGIONS.items()
            for edge in ("begin", "end")
            if f"region_{r}_{edge}" in elf.symbols
        ]
        console = "stdio,id=console"
        semihosting = "enable=on,target=native,chardev=console"
        command = [*board, "-bios", "none", "-nographic", "-monitor", "none"]
        command += ["-serial", "none", "-chardev", console, "-semihosting-config", semihosting]
        command += ["-plugin", ",".join([str(plugin), "out=blocks.txt", *marks])]
        command += ["-kernel", str(image.resolve())]
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s
        )
        result = BoardResult(done.returncode, done.stdout.decode() + done.stderr.decode())
        result.files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in files}
        blocks: list[tuple[int, int, int, int]] = []
        for line in result.files.pop("blocks.txt", b"").decode().splitlines():
            kind, *numbers = line.split()
            if kind == "block":
                pc, n, region, runs = map(int, numbers)
                blocks.append((pc, n, region, runs))
            else:
                result.enter(elf, int(numbers[0]), int(numbers[1]))
        result.count(elf, blocks)
        return result

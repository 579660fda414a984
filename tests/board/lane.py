"""Build generated models for a Cortex-M or RISC-V and run them on an emulated board.

Two lanes give the same results: ``zig`` + Unicorn come from PyPI alone; ``gcc`` + QEMU need
``arm-none-eabi-gcc`` and ``qemu-system-arm`` (``riscv64-unknown-elf-gcc`` and
``qemu-system-riscv32``), and add the MPU.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Literal

import numpy as np

from odt_plan.planner.device import Device

from .emulate import FIRMWARE, ZIG, BoardResult, run_qemu
from .objects import link
from .unicorn_board import run_unicorn

#: Sources of the board.
BOARD = ("board.c", "cortex_m.c", "riscv.c", "memory.c")
Compiler = Literal["zig", "gcc"]
Emulator = Literal["unicorn", "qemu"]
FLASH_ORIGIN, RAM_ORIGIN = 0x00000000, 0x20000000


@dataclass(frozen=True)
class Machine:
    """A board of QEMU, and where flash and RAM begin there."""

    name: str
    flash_origin: int = FLASH_ORIGIN
    ram_origin: int = RAM_ORIGIN


@dataclass(frozen=True)
class Core:
    """How a core is compiled for and emulated; ``machine`` is None where QEMU has no board."""

    gcc: str
    zig: str
    unicorn: str
    machine: Machine | None

    @property
    def is_riscv(self) -> bool:
        """Whether it is no Arm."""
        return self.zig.startswith("-target riscv")

    @property
    def gcc_program(self) -> str:
        """The GNU compiler."""
        return "riscv64-unknown-elf-gcc" if self.is_riscv else "arm-none-eabi-gcc"

    @property
    def qemu_program(self) -> str:
        """The emulator of whole boards."""
        return "qemu-system-riscv32" if self.is_riscv else "qemu-system-arm"


CORES = {
    "cortex-m7": Core(
        "-mcpu=cortex-m7 -mfpu=fpv5-sp-d16 -mfloat-abi=hard",
        "-target thumb-freestanding-eabihf -mcpu=cortex_m7+fp_armv8d16sp",
        "ARM_CORTEX_M7",
        Machine("mps2-an500"),
    ),
    "cortex-m4": Core(
        "-mcpu=cortex-m4 -mfpu=fpv4-sp-d16 -mfloat-abi=hard -DODTPLAN_NO_VMLA",
        "-target thumb-freestanding-eabihf -mcpu=cortex_m4+vfp4d16sp",
        "ARM_CORTEX_M4",
        Machine("mps2-an386"),
    ),
    "cortex-m33": Core(
        "-mcpu=cortex-m33 -mfpu=fpv5-sp-d16 -mfloat-abi=hard",
        "-target thumb-freestanding-eabihf -mcpu=cortex_m33+fp_armv8d16sp",
        "ARM_CORTEX_M33",
        Machine("mps2-an505", 0x10000000, 0x38000000),
    ),
    "cortex-m3": Core(
        "-mcpu=cortex-m3 -mfloat-abi=soft",
        "-target thumb-freestanding-eabi -mcpu=cortex_m3",
        "ARM_CORTEX_M3",
        Machine("mps2-an385"),
    ),
    "cortex-m0plus": Core(
        "-mcpu=cortex-m0plus -mfloat-abi=soft",
        "-target thumb-freestanding-eabi -mcpu=cortex_m0plus",
        "ARM_CORTEX_M0",
        None,
    ),
    "rv32imac": Core(
        "-march=rv32imac -mabi=ilp32",
        "-target riscv32-freestanding-none -mcpu=generic_rv32+m+a+c",
        "RISCV32_SIFIVE_E31",
        Machine("virt", 0x80000000, 0x80800000),
    ),
}


@dataclass(frozen=True)
class Limits:
    """Exact memory of the board; ``stack_bytes`` are a part of the RAM.

    ``regions`` are more RAM: name, origin and bytes, each for the section of that name.
    """

    flash_bytes: int = 1 << 20
    ram_bytes: int = 320 << 10
    stack_bytes: int = 6 << 10
    ram_origin: int = RAM_ORIGIN
    flash_origin: int = FLASH_ORIGIN
    regions: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def of(cls, device: Device) -> Limits:
        """The memory map of a device; stack and data lie in its largest run of RAM."""
        main = device.main_run
        return cls(
            device.flash_bytes,
            main.bytes,
            ram_origin=main.origin,
            regions=tuple(
                (r.name.lower(), r.origin, r.bytes) for r in device.ram_runs if r != main
            ),
        )

    def on(self, machine: Machine) -> Limits:
        """The same bytes where a board of QEMU has them."""
        return replace(
            self, flash_origin=machine.flash_origin, ram_origin=machine.ram_origin
        )

    def linked(self) -> dict[str, str]:
        """What the linker script is filled in with."""
        names = ("flash_bytes", "ram_bytes", "stack_bytes")
        memory = [f"  {n} (rw) : ORIGIN = {at:#x}, LENGTH = {b}\n" for n, at, b in self.regions]
        sections = [
            f"  .odt_plan_{n} (NOLOAD) : {{ *(.odt_plan_{n}) }} > {n}\n" for n, _, _ in self.regions
        ]
        return {
            "flash_origin": hex(self.flash_origin),
            "ram_origin": hex(self.ram_origin),
            **{n: str(getattr(self, n)) for n in names},
            "more_memory": "".join(memory),
            "more_sections": "".join(sections),
        }


def has_zig_lane() -> bool:
    """Whether the PyPI lane can run."""
    return find_spec("ziglang") is not None and find_spec("unicorn") is not None


def has_gcc(core: str = "cortex-m7") -> bool:
    """Whether the cross compiler of the apt lane is there."""
    return shutil.which(CORES[core].gcc_program) is not None


def has_qemu(core: str = "cortex-m7") -> bool:
    """Whether the emulator of the apt lane is there."""
    return all(shutil.which(p) is not None for p in (CORES[core].qemu_program, "gcc"))


def build(
    folder: Path,
    name: str,
    core: str = "cortex-m7",
    compiler: Compiler = "zig",
    *,
    limits: Limits = Limits(),
    optimise: str = "-O2",
    defines: Sequence[str] = (),
    selftest: bool = True,
    main: Path = FIRMWARE / "main.c",
    mpu: bool = False,
    flags: Sequence[str] = (),
) -> Path:
    """Compile and link a generated model with the board's start-up and main program.

    Args:
        folder: What ``emit_c`` wrote.
        name: The model's C prefix.
        core: Key of ``CORES``.
        compiler: ``zig`` (clang) or ``gcc``.
        limits: Memory of the board.
        optimise: Optimisation flag.
        defines: More preprocessor definitions.
        selftest: Link and run the golden self-test.
        main: Main program.
        mpu: Protect memory outside flash and RAM (QEMU).
        flags: More flags of the compiler, for all files.

    Returns:
        The ELF file, beside the sources.

    Raises:
        BuildError: The compiler or the linker failed, for example because a region overflows.
    """
    macros = [*_model_macros(folder, name, selftest, defines), *["BOARD_MPU"] * mpu]
    return build_program(
        folder,
        [*_model_sources(folder, name, selftest), main],
        core,
        compiler,
        limits=limits,
        optimise=optimise,
        defines=macros,
        flags=flags,
    )


def build_program(
    folder: Path,
    sources: Sequence[Path],
    core: str,
    compiler: Compiler,
    *,
    limits: Limits = Limits(),
    optimise: str = "-O2",
    defines: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> Path:
    """Compile and link sources with the board's start-up; ``folder`` is searched for headers."""
    tag = f"{core}-{compiler}{'-mpu' if 'BOARD_MPU' in defines else ''}"
    script = folder / f"{tag}.ld"
    script.write_text(Template((FIRMWARE / "link.ld").read_text()).substitute(limits.linked()))
    memory = {"FLASH": (limits.flash_origin, limits.flash_bytes)}
    memory["RAM"] = limits.ram_origin, limits.ram_bytes
    macros = [f"BOARD_{m}_ORIGIN={at}u" for m, (at, _) in memory.items()]
    macros += [f"BOARD_{m}_BYTES={size}u" for m, (_, size) in memory.items()]
    command = [*_driver(core, compiler), *flags]
    command += ["-std=c99", optimise, "-ffp-contract=off", "-ffreestanding", "-fno-math-errno"]
    command += ["-Wdouble-promotion", "-ffunction-sections", "-fdata-sections"]
    command += [f"-I{FIRMWARE / 'freestanding'}"]
    command += [f"-D{m}" for m in defines if m.startswith("ODTPLAN_")]  # of the kernels, too
    options = [f"-I{folder}", f"-I{FIRMWARE}", *(f"-D{m}" for m in (*macros, *defines))]
    options += ["-Wl,--gc-sections", f"-Wl,-T,{script}"]
    # Without FPU, zig's run-time library has the soft floats.
    soft = compiler == "zig" and "eabihf" not in CORES[core].zig
    options += ["-nostartfiles" if soft else "-nostdlib"]
    options += ["-lgcc"] if compiler == "gcc" else []
    files = [*sources, *(FIRMWARE / f for f in BOARD)]
    return link(command, files, options, folder / f"{tag}.elf")


def _model_sources(folder: Path, name: str, selftest: bool) -> list[Path]:
    left_out = f"{name}_selftest.c"
    return [s for s in sorted(folder.glob("*.c")) if selftest or s.name != left_out]


def _model_macros(folder: Path, name: str, selftest: bool, defines: Sequence[str]) -> list[str]:
    header = folder / f"{name}.h"
    text = header.read_text() if header.is_file() else ""
    labels = "const int32_t *labels" in text
    macros = [f'MODEL_HEADER="{name}.h"', f"MODEL_NAME={name}", f"MODEL_MACRO={name.upper()}"]
    macros += ["MODEL_LABELS"] * labels + ["MODEL_SELFTEST"] * selftest
    # Where transfers run beside the core they move at their wait, unless told otherwise.
    late = f"{name.upper()}_TRANSFERS" in text and not any("MODEL_OVERLAPS" in d for d in defines)
    return [*macros, *["MODEL_OVERLAPS=2"] * late, *defines]


def _driver(core: str, compiler: Compiler) -> list[str]:
    if compiler == "gcc":
        tree = ["-fno-tree-loop-distribute-patterns"]  # or memcpy would call itself
        thumb = [] if CORES[core].is_riscv else ["-mthumb"]
        return [CORES[core].gcc_program, *thumb, *CORES[core].gcc.split(), *tree]
    return [*ZIG, *CORES[core].zig.split(), "-fno-sanitize=all"]


def run(
    elf: Path,
    core: str = "cortex-m7",
    emulator: Emulator = "unicorn",
    *,
    files: dict[str, bytes] | None = None,
    limits: Limits = Limits(),
    timeout_s: float = 300.0,
) -> BoardResult:
    """Run an image; ``files`` are what it can open, the time limit is QEMU's."""
    given = files or {}
    if emulator == "qemu":
        machine = CORES[core].machine
        assert machine is not None, f"QEMU has no board with {core}"
        board = [CORES[core].qemu_program, "-M", machine.name]
        return run_qemu(elf, board, given, timeout_s=timeout_s)
    ram = [(limits.ram_origin, limits.ram_bytes), *((at, b) for _, at, b in limits.regions)]
    flash = limits.flash_origin, limits.flash_bytes
    return run_unicorn(elf, CORES[core].unicorn, given, flash=flash, ram=ram)


#: Flags that generated code and kernels must be clean under.
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wconversion", "-Wdouble-promotion", "-Werror"]
#: -fPIC, so that programs and libraries share objects.
BITS = ["-fPIC", "-ffp-contract=off", "-fno-math-errno"]
#: As it is used.
OPTIMISED = ["-O2", *BITS]
#: Address and undefined-behaviour checks; dead arena bytes are poisoned. At -O1 gcc takes three
#: times as long.
CHECKED = ["-Og", *BITS, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
CHECKED += ["-DODTPLAN_POISON"]


def build_host(
    folder: Path,
    name: str,
    compiler: Sequence[str] = ("gcc",),
    *,
    sanitize: bool = True,
    selftest: bool = True,
    defines: Sequence[str] = (),
    main: Path = FIRMWARE / "main.c",
) -> Path:
    """Compile for this machine.

    ``sanitize`` adds address and undefined-behaviour checks and poisons dead arena bytes.

    Raises:
        BuildError: The compiler refused, warnings included.
    """
    target = folder / f"host{'-checked' if sanitize else ''}"
    macros = _model_macros(folder, name, selftest, defines)
    command = [*compiler, *STRICT, *(CHECKED if sanitize else OPTIMISED)]
    options = [f"-I{folder}", f"-I{FIRMWARE}", *(f"-D{m}" for m in macros)]
    files = [*_model_sources(folder, name, selftest), FIRMWARE / "host.c", main]
    return link(command, files, options, target)


def run_host(program: Path, files: dict[str, bytes]) -> BoardResult:
    """Run a host build in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for n, data in files.items():
            (Path(folder) / n).write_bytes(data)
        done = subprocess.run([str(program.resolve())], cwd=folder, capture_output=True, text=True)
        written = {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name not in files}
        return BoardResult(done.returncode, done.stdout + done.stderr, written)


def training_input(
    samples: Sequence[np.ndarray], targets: Sequence[np.ndarray], lr: float
) -> dict[str, bytes]:
    """The ``input.bin`` of the main program: the sample of an inference, then training steps."""
    parts = [struct.pack("<I", len(samples)), _sample(samples[0])]
    for x, t in zip(samples, targets, strict=True):
        kind = "<i4" if np.asarray(t).dtype.kind == "i" else "<f4"
        parts += [_sample(x), np.asarray(t, kind).tobytes()]
        parts.append(struct.pack("<f", lr))
    return {"input.bin": b"".join(parts)}


def replay_input(
    samples: Sequence[np.ndarray], uses: Sequence[tuple[int, np.ndarray, float]]
) -> dict[str, bytes]:
    """The ``input.bin`` of ``replay.c``: samples to capture, then (entry, target, step size)."""
    parts = [struct.pack("<I", len(samples)), *map(_sample, samples), struct.pack("<I", len(uses))]
    for entry, t, lr in uses:
        kind = "<i4" if np.asarray(t).dtype.kind == "i" else "<f4"
        parts += [struct.pack("<I", entry), np.asarray(t, kind).tobytes(), struct.pack("<f", lr)]
    return {"input.bin": b"".join(parts)}


def _sample(x: np.ndarray) -> bytes:
    return np.asarray(x, {np.int8: "i1", np.int32: "<i4"}.get(x.dtype.type, "<f4")).tobytes()

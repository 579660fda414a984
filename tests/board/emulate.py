"""Run a firmware image on an emulated Cortex-M: Unicorn (PyPI) or QEMU with our plugin."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    """

    exit_code: int
    stdout: str
    files: dict[str, bytes] = field(default_factory=dict)
    instructions: dict[str, int] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)
    functions: dict[str, dict[str, int]] = field(default_factory=dict)

    def value(self, key: str) -> int:
        """A ``key=value`` line of the console."""
        lines = [line for line in self.stdout.splitlines() if line.startswith(f"{key}=")]
        assert lines, f"no {key} in {self.stdout!r}"
        return int(lines[-1].split("=")[1], 0)

    @property
    def stack_bytes(self) -> int:
        """High-water mark of the painted stack."""
        return self.value("stack_bytes")

    def _count(self, elf: Elf, blocks: list[tuple[int, int, int, int]]) -> None:
        """Enter (address, instructions, region, runs) of all blocks."""
        names = {number: name for name, number in REGIONS.items()}
        functions: dict[str, Counter[str]] = {name: Counter() for name in REGIONS}
        for pc, n, region, runs in blocks:
            if region in names:
                functions[names[region]][elf.function_at(pc)] += n * runs
        self.functions = {r: dict(c.most_common()) for r, c in functions.items()}
        self.instructions = {r: sum(c.values()) for r, c in functions.items()}


def shared_library(source: Path, compiler: list[str]) -> Path:
    """Compile a counter for this machine, once per source version and compiler."""
    folder = Path(tempfile.gettempdir()) / f"odtplan-board-{os.getuid() if hasattr(os, 'getuid') else 0}"
    folder.mkdir(exist_ok=True)
    stamp = f"{source.stat().st_mtime_ns:x}"
    target = folder / f"{source.stem}-{stamp}-{Path(compiler[-1]).name}.so"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [*compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(part)],
            check=True,
            capture_output=True,
        )
        part.replace(target)
    return target


def run_qemu(
    image: Path, machine: str, files: dict[str, bytes], *, timeout_s: float = 300.0
) -> BoardResult:
    """Run on QEMU; the MPU works there."""
    elf = Elf(image)
    plugin = shared_library(FIRMWARE / "count_qemu.c", ["gcc"])
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
        command = ["qemu-system-arm", "-M", machine, "-nographic", "-monitor", "none"]
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
                _enter(result, elf, int(numbers[0]), int(numbers[1]))
        result._count(elf, blocks)
        return result


def _enter(result: BoardResult, elf: Elf, address: int, runs: int) -> None:
    for region in REGIONS:
        begin = elf.symbols.get(f"region_{region}_begin")
        if begin is not None and begin.address & ~1 == address:
            result.entries[region] = runs


def run_unicorn(
    image: Path, core: str, files: dict[str, bytes], *, flash: tuple[int, int], ram: tuple[int, int]
) -> BoardResult:
    """Run on Unicorn with exactly the given (origin, bytes) of flash and RAM mapped."""
    return _Unicorn(image, core, files, flash, ram).run()


class _Block(ctypes.Structure):
    _fields_ = [
        ("pc", ctypes.c_uint32),
        ("bytes", ctypes.c_uint32),
        ("region", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
        ("runs", ctypes.c_uint64),
    ]


_SLOTS = 65536
_COUNTER_DATA: dict[str, Any] = {
    "count_table": _Block * _SLOTS,
    "count_markers": (ctypes.c_uint32 * 2) * 8,
    "count_entries": ctypes.c_uint32 * 8,
    "count_overflow": ctypes.c_uint32,
    "count_region": ctypes.c_uint32,
}


class _Unicorn:
    def __init__(
        self,
        image: Path,
        core: str,
        files: dict[str, bytes],
        flash: tuple[int, int],
        ram: tuple[int, int],
    ) -> None:
        import unicorn
        from unicorn import arm_const as arm

        self.arm, self.api, self.elf = arm, unicorn, Elf(image)
        self.files = {n: bytearray(d) for n, d in files.items()}
        self.open: dict[int, list[Any]] = {}  # handle -> [name, position]
        self.console: list[str] = []
        self.exit_code: int | None = None
        uc = self.uc = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS)
        uc.ctl_set_cpu_model(getattr(arm, f"UC_CPU_ARM_{core}"))
        page = 4096
        uc.mem_map(flash[0], -(-flash[1] // page) * page, unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC)
        uc.mem_map(ram[0], -(-ram[1] // page) * page, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE)
        uc.mem_map(0xE000E000, 0x1000)  # system control space, as plain memory
        for address, content in self.elf.segments:
            uc.mem_write(address, content)
        uc.hook_add(unicorn.UC_HOOK_INTR, self._interrupt)
        uc.hook_add(unicorn.UC_HOOK_MEM_INVALID, self._bad_access)
        self.vectors = struct.unpack("<II", uc.mem_read(flash[0], 8))

    def run(self) -> BoardResult:
        uc, arm = self.uc, self.arm
        counter = self._start_counter()
        uc.reg_write(arm.UC_ARM_REG_SP, self.vectors[0])
        pc = self.vectors[1]
        while self.exit_code is None:
            try:
                uc.emu_start(pc | 1, 0xFFFFFFFE)
            except self.api.UcError as e:
                self.console.append(f"{e} at {uc.reg_read(arm.UC_ARM_REG_PC):#x}\n")
                self.exit_code = self.exit_code or 121
            pc = uc.reg_read(arm.UC_ARM_REG_PC)
        result = BoardResult(self.exit_code, "".join(self.console))
        result.files = {n: bytes(d) for n, d in self.files.items()}
        assert not ctypes.c_uint32.in_dll(counter, "count_overflow").value, "too many blocks"
        table = (_Block * _SLOTS).in_dll(counter, "count_table")
        used = [b for b in table if b.runs]
        blocks = [(b.pc, self._instructions(b.pc, b.bytes), b.region, b.runs) for b in used]
        for address, runs in zip(self.markers, self._entries(counter), strict=False):
            _enter(result, self.elf, address, runs)
        result._count(self.elf, blocks)
        return result

    def _start_counter(self) -> ctypes.CDLL:
        """Hook the native block counter; it lives in this process, so it is cleared first."""
        from unicorn.unicorn_py3.unicorn import uclib

        counter = ctypes.CDLL(str(shared_library(FIRMWARE / "count_unicorn.c", ZIG)))
        for name, kind in _COUNTER_DATA.items():
            ctypes.memset(ctypes.addressof(kind.in_dll(counter, name)), 0, ctypes.sizeof(kind))
        table = _COUNTER_DATA["count_markers"].in_dll(counter, "count_markers")
        self.markers: list[int] = []
        for region, number in REGIONS.items():
            for edge, after in (("begin", number), ("end", 0)):
                s = self.elf.symbols.get(f"region_{region}_{edge}")
                if s is not None:
                    table[len(self.markers)] = (s.address & ~1, after)
                    self.markers.append(s.address & ~1)
        handle = ctypes.c_size_t()
        callback = ctypes.cast(counter.count_block, ctypes.c_void_p)
        error = uclib.uc_hook_add(
            self.uc._uch,
            ctypes.byref(handle),
            self.api.UC_HOOK_BLOCK,
            callback,
            None,
            ctypes.c_uint64(1),
            ctypes.c_uint64(0),
        )
        assert error == 0, error
        return counter

    def _entries(self, counter: ctypes.CDLL) -> list[int]:
        return list(_COUNTER_DATA["count_entries"].in_dll(counter, "count_entries"))

    def _instructions(self, pc: int, size: int) -> int:
        """Thumb instructions in a block: 4 bytes long when the top five bits are 11101 or above."""
        code = self.uc.mem_read(pc, size)
        at = count = 0
        while at < size:
            at += 4 if code[at + 1] >> 3 >= 0x1D else 2
            count += 1
        return count

    def _bad_access(self, uc: Any, kind: int, address: int, size: int, _v: int, _d: Any) -> bool:
        pc = uc.reg_read(self.arm.UC_ARM_REG_PC)
        self.console.append(f"bad access of {size} bytes at {address:#x}, pc {pc:#x}\n")
        self.exit_code = 121
        return False

    def _interrupt(self, uc: Any, number: int, _data: Any) -> None:
        arm = self.arm
        pc = uc.reg_read(arm.UC_ARM_REG_PC)
        if bytes(uc.mem_read(pc, 2)) != b"\xab\xbe":
            self.console.append(f"exception {number} at {pc:#x}\n")
            self.exit_code = 120
            uc.emu_stop()
            return
        operation, argument = uc.reg_read(arm.UC_ARM_REG_R0), uc.reg_read(arm.UC_ARM_REG_R1)
        answer = self._semihost(operation, argument)
        if self.exit_code is None:
            uc.reg_write(arm.UC_ARM_REG_R0, answer & 0xFFFFFFFF)
            uc.reg_write(arm.UC_ARM_REG_PC, (pc + 2) | 1)

    def _words(self, address: int, n: int) -> tuple[int, ...]:
        return struct.unpack(f"<{n}I", self.uc.mem_read(address, 4 * n))

    def _semihost(self, operation: int, argument: int) -> int:
        """Semihosting calls on files that live in memory."""
        if operation == 0x04:
            text = bytearray()
            while (c := self.uc.mem_read(argument + len(text), 1)[0]) != 0:
                text.append(c)
            self.console.append(text.decode())
            return 0
        if operation == 0x20:
            self.exit_code = self._words(argument, 2)[1]
            self.uc.emu_stop()
            return 0
        if operation == 0x01:
            return self._open(*self._words(argument, 3))
        handle, *rest = self._words(argument, {0x02: 1, 0x05: 3, 0x06: 3, 0x0A: 2}[operation])
        if operation == 0x02:
            del self.open[handle]
            return 0
        name, position = self.open[handle]
        if operation == 0x0A:
            self.open[handle][1] = rest[0]
            return 0
        address, n = rest
        content = self.files[name]
        if operation == 0x05:
            data = self.uc.mem_read(address, n)
            content.extend(bytes(max(0, position - len(content))))
            content[position : position + n] = data
        else:
            data = content[position : position + n]
            self.uc.mem_write(address, bytes(data))
        self.open[handle][1] += len(data)
        return n - len(data)

    def _open(self, address: int, mode: int, length: int) -> int:
        name = bytes(self.uc.mem_read(address, length)).decode()
        if mode < 4 and name not in self.files:
            return -1
        if mode >= 4:
            self.files[name] = bytearray()
        handle = len(self.open) + 1
        while handle in self.open:
            handle += 1
        self.open[handle] = [name, 0]
        return handle

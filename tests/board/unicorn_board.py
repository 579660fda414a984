"""Run a firmware image on Unicorn, a CPU emulator from PyPI, with semihosting and exact counts."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from operator import or_
from pathlib import Path
from typing import Any

from .elf import Elf
from .emulate import FIRMWARE, REGIONS, ZIG, BoardResult, shared_library


def run_unicorn(
    image: Path,
    core: str,
    files: dict[str, bytes],
    *,
    flash: tuple[int, int],
    ram: Sequence[tuple[int, int]],
) -> BoardResult:
    """Run on Unicorn with exactly the given (origin, bytes) of flash and RAM regions mapped."""
    return _Unicorn(image, core, files, flash, ram).run()


def _pages(n_bytes: int) -> int:
    """Bytes rounded up to the emulator's pages."""
    return -(-n_bytes // 4096) * 4096


@dataclass(frozen=True)
class _Isa:
    """Names of an architecture in Unicorn's API, and how its programs ask for semihosting.

    Attributes:
        name: Of the architecture, as in ``UC_ARCH_...``.
        modes: As in ``UC_MODE_...``.
        registers: Stack pointer, program counter, two arguments.
        ask: Instruction at which the emulator stops.
        resume: From there to the next instruction; odd for Thumb.
    """

    name: str
    modes: tuple[str, ...]
    registers: tuple[str, str, str, str]
    ask: bytes
    resume: int

    def instruction_bytes(self, high: int, low: int) -> int:
        """Bytes of an instruction by its first two: Thumb's top bits, RISC-V's low ones."""
        long = high >> 3 >= 0x1D if self.name == "ARM" else low & 3 == 3
        return 4 if long else 2


_ARM = _Isa("ARM", ("THUMB", "MCLASS"), ("SP", "PC", "R0", "R1"), b"\xab\xbe", 3)
_RISCV = _Isa("RISCV", ("RISCV32",), ("SP", "PC", "A0", "A1"), b"\x73\x00\x10\x00", 4)


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
        ram: Sequence[tuple[int, int]],
    ) -> None:
        import unicorn

        self.api, self.elf = unicorn, Elf(image)
        isa = self.isa = _RISCV if core.startswith("RISCV") else _ARM
        names = import_module(f"unicorn.{isa.name.lower()}_const")
        self.sp, self.pc, self.a0, self.a1 = (
            getattr(names, f"UC_{isa.name}_REG_{r}") for r in isa.registers
        )
        self.files = {n: bytearray(d) for n, d in files.items()}
        self.open: dict[int, list[Any]] = {}  # handle -> [name, position]
        self.console: list[str] = []
        self.exit_code: int | None = None
        mode = reduce(or_, (getattr(unicorn, f"UC_MODE_{m}") for m in isa.modes))
        uc = self.uc = unicorn.Uc(getattr(unicorn, f"UC_ARCH_{isa.name}"), mode)
        uc.ctl_set_cpu_model(getattr(names, f"UC_CPU_{core}"))
        read, write, execute = (getattr(unicorn, f"UC_PROT_{x}") for x in ("READ", "WRITE", "EXEC"))
        uc.mem_map(flash[0], _pages(flash[1]), read | execute)
        for origin, size in ram:
            uc.mem_map(origin, _pages(size), read | write)
        if isa is _ARM:
            uc.mem_map(0xE000E000, 0x1000)  # system control space, as plain memory
        for address, content in self.elf.segments:
            uc.mem_write(address, content)
        self.flash = flash[0]
        uc.hook_add(unicorn.UC_HOOK_INTR, self._interrupt)
        uc.hook_add(unicorn.UC_HOOK_MEM_INVALID, self._bad_access)

    def run(self) -> BoardResult:
        uc = self.uc
        counter = self._start_counter()
        pc = self.flash
        if self.isa is _ARM:
            stack, pc = struct.unpack("<II", uc.mem_read(pc, 8))
            uc.reg_write(self.sp, stack)
        while self.exit_code is None:
            try:
                uc.emu_start(pc | self.isa.resume & 1, 0xFFFFFFFE)
            except self.api.UcError as e:
                if self.exit_code is None and self._asks():  # RISC-V's ebreak is no interrupt
                    self._interrupt(uc, 0, None)
                else:
                    self.console.append(f"{e} at {uc.reg_read(self.pc):#x}\n")
                    self.exit_code = self.exit_code or 121
            pc = uc.reg_read(self.pc)
        result = BoardResult(self.exit_code, "".join(self.console))
        result.files = {n: bytes(d) for n, d in self.files.items()}
        assert not ctypes.c_uint32.in_dll(counter, "count_overflow").value, "too many blocks"
        table = (_Block * _SLOTS).in_dll(counter, "count_table")
        used = [b for b in table if b.runs]
        blocks = [(b.pc, self._instructions(b.pc, b.bytes), b.region, b.runs) for b in used]
        for address, runs in zip(self.markers, self._entries(counter), strict=False):
            result.enter(self.elf, address, runs)
        result.count(self.elf, blocks)
        return result

    def _start_counter(self) -> ctypes.CDLL:
        """Hook the native block counter; it lives in this process, so it is cleared first."""
        from unicorn.unicorn_py3.unicorn import uclib

        # Where it can be left out, zig does not build the C library first.
        bare = ["-nostdlib"] * (sys.platform == "linux")
        counter = ctypes.CDLL(str(shared_library(FIRMWARE / "count_unicorn.c", (*ZIG, *bare))))
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
        code = self.uc.mem_read(pc, size)
        at = count = 0
        while at < size:
            at += self.isa.instruction_bytes(code[at + 1], code[at])
            count += 1
        return count

    def _bad_access(self, uc: Any, kind: int, address: int, size: int, _v: int, _d: Any) -> bool:
        pc = uc.reg_read(self.pc)
        self.console.append(f"bad access of {size} bytes at {address:#x}, pc {pc:#x}\n")
        self.exit_code = 121
        return False

    def _interrupt(self, uc: Any, number: int, _data: Any) -> None:
        pc = uc.reg_read(self.pc)
        if not self._asks():
            self.console.append(f"exception {number} at {pc:#x}\n")
            self.exit_code = 120
            uc.emu_stop()
            return
        operation, argument = uc.reg_read(self.a0), uc.reg_read(self.a1)
        answer = self._semihost(operation, argument)
        if self.exit_code is None:
            uc.reg_write(self.a0, answer & 0xFFFFFFFF)
            uc.reg_write(self.pc, pc + self.isa.resume)

    def _asks(self) -> bool:
        """Whether the next instruction asks for semihosting."""
        code = self.uc.mem_read(self.uc.reg_read(self.pc), len(self.isa.ask))
        return bytes(code) == self.isa.ask

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

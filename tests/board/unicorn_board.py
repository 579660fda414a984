"""Run a firmware image on Unicorn, a CPU emulator from PyPI, with semihosting and exact counts."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Sequence
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
        from unicorn import arm_const as arm

        self.arm, self.api, self.elf = arm, unicorn, Elf(image)
        self.files = {n: bytearray(d) for n, d in files.items()}
        self.open: dict[int, list[Any]] = {}  # handle -> [name, position]
        self.console: list[str] = []
        self.exit_code: int | None = None
        mode = unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS
        uc = self.uc = unicorn.Uc(unicorn.UC_ARCH_ARM, mode)
        uc.ctl_set_cpu_model(getattr(arm, f"UC_CPU_ARM_{core}"))
        read, write, execute = (getattr(unicorn, f"UC_PROT_{x}") for x in ("READ", "WRITE", "EXEC"))
        uc.mem_map(flash[0], _pages(flash[1]), read | execute)
        for origin, size in ram:
            uc.mem_map(origin, _pages(size), read | write)
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

"""A bound on the stack of a linked image: frames as the compiler describes them, calls as linked.

Frames come from the call frame information of the image (``-g``), which tells for every instruction
how far the stack pointer is below that of the caller: a call adds what it tells there, so a tail
call, which has given its frame back, adds nothing. Functions of the compiler's library without any
are read from their instructions. An indirect call may reach every function whose address is taken
(relocations, ``-Wl,--emit-relocs``). Recursion has no bound and is refused.
"""

from __future__ import annotations

import re
import subprocess
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from elftools.dwarf.callframe import FDE
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection

#: What the compiler and the linker have to be told.
FLAGS = ("-g", "-Wl,--emit-relocs")
#: Relocations of calls and jumps; others take an address.
_JUMPS = {"EM_ARM": {10, 30, 51, 102, 103}, "EM_RISCV": {16, 17, 18, 19, 43, 44, 45, 51}}
_ALLOCATED = 2
_LINE = re.compile(r"^\s*([0-9a-f]+):\t[0-9a-f ]+\t(\S+)(?:\t([^;]*))?")
_TARGET = re.compile(r"(?:^|[ ,])([0-9a-f]+) <")
_CONDITION = "(eq|ne|cs|cc|mi|pl|vs|vc|hi|ls|ge|lt|gt|le)?"
_JUMP = re.compile(
    rf"(bl?{_CONDITION}|cbn?z|j|jal|b(eq|ne|lt|ge|ltu|geu|gt|le|gtu|leu)z?)(\.[nw])?"
)


@dataclass(frozen=True)
class Bound:
    """Most bytes of stack, and the functions on the way there."""

    bytes: int
    path: tuple[str, ...]


@dataclass
class _Function:
    """What a function does to the stack.

    Attributes:
        name: Its symbol.
        rows: (address, bytes of the frame from there on); None where nothing tells them.
        frames: Address of each instruction, and bytes of the frame before it.
        calls: Addresses of calls, and of the functions that they may reach; None: any whose
            address is taken.
        written: Addresses of instructions that write to the frame or take an address in it, and
            bytes from there up to the caller's stack pointer.
    """

    name: str
    rows: list[tuple[int, int]] | None
    frames: dict[int, int] = field(default_factory=dict)
    calls: dict[int, int | None] = field(default_factory=dict)
    written: dict[int, int] = field(default_factory=dict)
    _pushed: int = 0

    def enter(self, address: int, taken: int, lowest: int | None) -> None:
        """The next instruction, which itself takes some bytes.

        ``lowest`` is the lowest byte that it writes, from the stack pointer before it; None: none.
        """
        if self.rows is not None:
            row = self.rows[max(bisect_right(self.rows, (address, 1 << 30)) - 1, 0)]
            self.frames[address] = row[1]
        else:
            self.frames[address] = self._pushed
            self._pushed += taken
        if lowest is not None:
            self.written[address] = self.frames[address] - lowest


class Stack:
    """The calls and frames of a linked program, built with ``FLAGS``."""

    def __init__(self, image: Path, objdump: str) -> None:
        """Read it, ``objdump`` being the disassembler of its architecture."""
        self._functions, self._taken = _symbols(image)
        command = [objdump, "-d", str(image)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        _read(text.splitlines(), self._functions)

    def bound(
        self,
        entry: str,
        ran: Collection[tuple[int, int]] | None = None,
        *,
        written: bool = False,
    ) -> Bound:
        """The most stack that a function and all below it can take.

        Args:
            entry: The function.
            ran: (address, instructions) of blocks; other instructions are left out. None: none is.
            written: Up to the lowest word that an instruction writes, or takes the address of,
                instead of to the end of its frame: what a painted stack can show.

        Raises:
            ValueError: Functions call each other in a circle, so there is no bound.
        """
        functions = self._functions
        every = sorted(at for f in functions.values() for at in f.frames)
        counted = set(every)
        if ran is not None:
            places = ((bisect_left(every, at), n) for at, n in ran)
            counted = {at for i, n in places for at in every[i : i + n]}
        waiting: set[int] = set()

        @cache
        def below(address: int) -> Bound:
            f = functions[address]
            if address in waiting:
                raise ValueError(f"{f.name} calls itself, so the stack has no bound")
            waiting.add(address)
            own = f.written if written else f.frames
            ways = [Bound(0, (f.name,))]
            ways += [Bound(b, (f.name,)) for at, b in own.items() if at in counted]
            for at, to in f.calls.items():
                for reached in (self._taken if to is None else (to,)) if at in counted else ():
                    if reached in counted:
                        deeper = below(reached)
                        ways.append(
                            Bound(f.frames[at] + deeper.bytes, (f.name, *deeper.path))
                        )
            waiting.remove(address)
            return max(ways, key=lambda b: b.bytes)

        (start,) = (a for a, f in functions.items() if f.name == entry)
        return below(start)


def _symbols(image: Path) -> tuple[dict[int, _Function], set[int]]:
    """Functions by address, and the addresses that are taken outside of the vector table.

    The entry of the image is where the core begins: nothing calls it.
    """
    with image.open("rb") as file:
        elf = ELFFile(file)
        rows: dict[int, list[tuple[int, int]]] = {}
        for entry in elf.get_dwarf_info(relocate_dwarf_sections=False).CFI_entries():
            if isinstance(entry, FDE):
                table = entry.get_decoded().table
                rows[entry["initial_location"]] = [(r["pc"], r["cfa"].offset) for r in table]
        functions: dict[int, _Function] = {}
        for s in elf.get_section_by_name(".symtab").iter_symbols():
            if s["st_info"]["type"] == "STT_FUNC":
                at = s["st_value"] & ~1
                functions.setdefault(at, _Function(s.name, rows.get(at)))
        taken: set[int] = set()
        for section in elf.iter_sections():
            if not isinstance(section, RelocationSection):
                continue
            into = elf.get_section(section["sh_info"])
            if not into["sh_flags"] & _ALLOCATED or into.name == ".isr_vector":
                continue
            symbols = elf.get_section(section["sh_link"])
            taken |= {
                symbols.get_symbol(r["r_info_sym"])["st_value"] & ~1
                for r in section.iter_relocations()
                if r["r_info_type"] not in _JUMPS[elf["e_machine"]]
            }
    return functions, taken & functions.keys() - {elf["e_entry"] & ~1}


def _read(lines: Iterable[str], functions: dict[int, _Function]) -> None:
    """Enter frames and calls."""
    starts = sorted(functions)
    for line in lines:
        found = _LINE.match(line)
        if not found:
            continue
        at, word, operands = int(found[1], 16), found[2], found[3] or ""
        i = bisect_right(starts, at) - 1
        if i < 0:
            continue
        f = functions[starts[i]]
        f.enter(at, _taken(word, operands), _lowest(word, operands))
        to = _TARGET.search(operands)
        if to and _JUMP.fullmatch(word):
            target = starts[bisect_right(starts, int(to[1], 16)) - 1]
            if target != starts[i] or word in ("bl", "jal"):
                f.calls[at] = target
        elif _is_indirect(word, operands.strip()):
            f.calls[at] = None


def _is_indirect(word: str, register: str) -> bool:
    """Thumb's ``blx r3`` and ``bx r3``, RISC-V's ``jalr a5`` and ``jr a5``."""
    back = {"blx": "lr", "bx": "lr", "jalr": "ra", "jr": "ra"}
    return word in back and register != back[word]


def _lowest(word: str, operands: str) -> int | None:
    """The lowest byte that an instruction writes, or takes the address of, from the stack pointer.

    None where it does neither; what is popped is only read.
    """
    if word in ("push", "vpush") or (word.startswith("stm") and operands.startswith("sp")):
        return -_registers_bytes(operands) if word.startswith(("push", "vpush", "stmdb")) else 0
    if word.startswith(("st", "vst")):  # Thumb: str r0, [sp, #4], and [sp, #-8]! that moves it
        place = re.search(r"\[sp(?:, #(-?\d+))?\]", operands)
        return int(place[1] or 0) if place else None
    if re.fullmatch(r"(c\.)?(fs|s)[bhwd](sp)?", word):  # RISC-V: sw ra,12(sp)
        place = re.search(r",(-?\d+)\(sp\)", operands)
        return int(place[1]) if place else None
    if word.startswith("sub"):
        return None
    taken = re.match(r"(?!sp)\w+, ?sp(?:, ?#?(\d+))?$", operands.strip())
    return int(taken[1] or 0) if taken and re.match("add|mov|mv", word) else None


def _registers_bytes(operands: str) -> int:
    """Bytes of the registers of a list, as {r4-r7, lr}, {d8-d15}."""
    registers = re.search(r"{(.*)}", operands)
    total = 0
    for part in registers[1].split(",") if registers else ():
        span = re.fullmatch(r"\s*([rds])(\d+)-[rds](\d+)", part)
        count = int(span[3]) - int(span[2]) + 1 if span else 1
        total += count * (8 if part.strip().startswith("d") else 4)
    return total


def _taken(word: str, operands: str) -> int:
    """Bytes that an instruction takes from the stack."""
    if word == "push" or (word == "stmdb" and operands.startswith("sp!")):
        return _registers_bytes(operands)
    if word.startswith("sub"):
        moved = re.match(r"sp, (?:sp, )?#(\d+)", operands)
    elif word.startswith("add"):
        moved = re.match(r"sp,sp,-(\d+)", operands)
    else:
        moved = re.search(r"\[sp, #-(\d+)\]!", operands)
    return int(moved[1]) if moved else 0

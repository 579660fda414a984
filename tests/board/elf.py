"""What the tests need of a 32-bit little-endian ELF file: segments and symbols."""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Symbol:
    """A symbol; ``bytes`` is 0 where the compiler gave no size."""

    name: str
    address: int
    bytes: int
    is_function: bool


class Elf:
    """An executable image.

    Attributes:
        path: Its file.
        segments: (load address, content) of each segment with file content.
        symbols: By name.
    """

    def __init__(self, path: Path) -> None:
        """Read a file."""
        self.path = path
        data = path.read_bytes()
        assert data[:6] == b"\x7fELF\x01\x01", f"{path} is no 32-bit little-endian ELF file"
        ph_offset, sh_offset = struct.unpack_from("<II", data, 28)
        (ph_count,) = struct.unpack_from("<H", data, 44)
        (sh_count,) = struct.unpack_from("<H", data, 48)
        self.segments: list[tuple[int, bytes]] = []
        for i in range(ph_count):
            kind, offset, _, load, size, _ = struct.unpack_from("<6I", data, ph_offset + 32 * i)
            if kind == 1 and size:
                self.segments.append((load, data[offset : offset + size]))
        sections = [struct.unpack_from("<10I", data, sh_offset + 40 * i) for i in range(sh_count)]
        self.symbols: dict[str, Symbol] = {}
        for section in sections:
            if section[1] == 2:
                self._read_symbols(data, section, sections[section[6]])
        functions = {s.address & ~1: s.name for s in self.symbols.values() if s.is_function}
        self._starts = sorted(functions)
        self._functions = functions

    def function_at(self, address: int) -> str:
        """Name of the function that an address belongs to."""
        i = bisect_right(self._starts, address) - 1
        return self._functions[self._starts[i]] if i >= 0 else "?"

    def _read_symbols(self, data: bytes, table: tuple[int, ...], strings: tuple[int, ...]) -> None:
        for offset in range(table[4], table[4] + table[5], 16):
            name, value, size, info = struct.unpack_from("<IIIB", data, offset)
            start = strings[4] + name
            text = data[start : data.index(b"\0", start)].decode()
            if text and not text.startswith("$"):
                self.symbols[text] = Symbol(text, value, size, info & 15 == 2)

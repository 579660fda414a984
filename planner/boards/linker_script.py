"""Linker scripts of GNU ld: the MEMORY block, and what stack and heap are given."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .chips import data_ram
from .facts import Facts, Memory, MemoryKind, sizes_told, unreadable
from .ld_expression import evaluate

#: Comments, and what the C preprocessor leaves of where a line comes from.
_COMMENT = re.compile(r"/\*.*?\*/|^[ \t]*#[ \t]*[0-9][^\n]*", re.DOTALL | re.MULTILINE)
_MEMORY = re.compile(r"(?<![\w.])MEMORY\s*\{([^}]*)(\}?)")
_REGION = re.compile(
    r"(?P<name>[A-Za-z_.][\w.$-]*)\s*(?:\((?P<attributes>[^)]*)\))?\s*:\s*(?:ORIGIN|org|o)\s*="
)
_LENGTH = re.compile(r",\s*(?:LENGTH|len|l)\s*=")
_ASSIGNMENT = re.compile(r"(?<![\w.$])([A-Za-z_.$][\w.$]*)\s*=\s*([^;={}][^;{}]*);")
_INCLUDE = re.compile(r"(?<![\w.])INCLUDE\s+(?:\"([^\"\n]+)\"|(\S+))")
_DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*(?:if|include|define|else|endif)", re.MULTILINE)
_CODE = re.compile(r"itcm|iram(?!\d*$)|icode|(?<![a-z])instr", re.IGNORECASE)
_FLASH = re.compile(r"flash|rom(?![a-z])|irom|drom|nvm|qspi|xip|boot|text", re.IGNORECASE)
_RAM = re.compile(r"(?<!prog)ram|tcm|ccm|data|heap|stack|dmem|noinit", re.IGNORECASE)
_SRAM_AREA = range(0x2000_0000, 0x4000_0000)


def read_script(file: str, text: str, symbols: Mapping[str, str] | None = None) -> Facts:
    """What a linker script tells.

    Args:
        file: Its name.
        text: Its text.
        symbols: What the linker is told by ``--defsym``: symbol -> expression.

    Raises:
        UsageError: It needs the preprocessor, or a region can't be evaluated; tells what could be.
    """
    plain = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)  # lines stay where they are
    included = [quoted or bare for quoted, bare in _INCLUDE.findall(plain)]
    if directive := _DIRECTIVE.search(plain):
        line = _line(plain, directive.start() + len(directive[0]) - 1)
        raise unreadable(
            f"{file}:{line}",
            "needs the C preprocessor; give what `gcc -E -P -x c` makes of it, or the map",
        )
    block = _MEMORY.search(plain)
    if block is not None and not block[2]:
        line = _line(plain, block.start())
        raise unreadable(f"{file}:{line}", "the MEMORY block has no end; the file may be cut")
    regions = _Regions(file, plain, block, symbols or {})
    stack, heap = sizes_told(file, regions.sizes())
    notes = [f"{file}: INCLUDE {name} is not followed; give that file as well" for name in included]
    if block is None:
        notes.insert(0, f"{file}: has no MEMORY block")
    return Facts(
        "script", file, memories=regions.all(), stack=stack, heap=heap, notes=tuple(notes)
    )


def kind_of(name: str, attributes: str, origin: int) -> MemoryKind | None:
    """Kind of a region by its attributes, its name, and its address; None if none of them tells.

    Args:
        name: As in the linker script.
        attributes: ``rx`` and the like; what stands behind ``!`` is what the region is not.
        origin: Its address; Cortex-M has data RAM from 0x20000000 on.
    """
    yes, _, no = attributes.lower().partition("!")
    if _CODE.search(name) and "rom" not in name.lower():
        return "code"
    in_flash, in_ram = bool(_FLASH.search(name)), bool(_RAM.search(name))
    if in_flash != in_ram:  # vendors write (xrw) of flash, too
        return "flash" if in_flash else data_ram(origin)
    if "w" in yes:
        return data_ram(origin)
    if ("r" in yes or "x" in yes) and origin not in _SRAM_AREA:
        return "flash"
    if "w" in no and not yes.strip():
        return "flash"
    return "ram" if origin in _SRAM_AREA else None


class _Regions:
    """The MEMORY block of a script; regions may refer to each other and to symbols."""

    def __init__(
        self, file: str, text: str, block: re.Match[str] | None, given: Mapping[str, str]
    ) -> None:
        self._file, self._text = file, text
        assigned = {m[1]: m[2] for m in reversed(list(_ASSIGNMENT.finditer(text)))}
        self._symbols = {**assigned, **given}
        self._found: dict[str, re.Match[str]] = {}
        self._texts: dict[str, str] = {}
        self._active: list[str] = []
        self._done: list[Memory] = []
        self._begin = 0
        if block is not None:
            self._begin = block.start(1)
            self._read(_INCLUDE.sub(lambda m: " " * len(m[0]), block[1]))

    def _read(self, body: str) -> None:
        """Find the regions and the texts of their origins and lengths."""
        starts = list(_REGION.finditer(body))
        if stray := body[: starts[0].start() if starts else None].strip():
            first = stray.splitlines()[0]
            line = _line(self._text, self._begin + body.index(first))
            why = f"{first[:40]!r} is no region NAME (ATTRIBUTES) : ORIGIN = ..., LENGTH = ..."
            raise unreadable(f"{self._file}:{line}", why)
        ends = [*(m.start() for m in starts[1:]), len(body)]
        for match, end in zip(starts, ends, strict=True):
            name = match["name"]
            origin, comma, length = _halves(body[match.end() : end])
            if name in self._found:
                raise self._error(match, f"region {name} is defined twice")
            if not comma:
                raise self._error(match, f"region {name} has no LENGTH")
            self._found[name] = match
            self._texts |= {f"ORIGIN({name})": origin, f"LENGTH({name})": length}

    def _error(self, match: re.Match[str], why: str) -> Exception:
        line = _line(self._text, self._begin + match.start("name"))
        return unreadable(f"{self._file}:{line}", why, self._done)

    def all(self) -> tuple[Memory, ...]:
        """Every region."""
        for name, match in self._found.items():
            try:
                origin, size = self._region("ORIGIN", name), self._region("LENGTH", name)
            except (ValueError, RecursionError) as e:
                why = f"region {name}: {e}; the map of the linked program has it, too"
                raise self._error(match, why) from None
            line = _line(self._text, self._begin + match.start("name"))
            source = f"{self._file}:{line}, MEMORY"
            if size:
                kind = kind_of(name, match["attributes"] or "", origin)
                self._done.append(Memory(name, kind, origin, size, source))
        return tuple(self._done)

    def _region(self, what: str, name: str) -> int:
        if name not in self._found:
            raise ValueError(f"there is no region {name!r}")
        return self._guarded(f"{what}({name})", self._texts[f"{what}({name})"])

    def _symbol(self, name: str) -> int:
        if name not in self._symbols:
            raise ValueError(f"{name} is not defined here; give --defsym {name}=VALUE")
        return self._guarded(name, self._symbols[name])

    def _defined(self, name: str) -> bool:
        """Whether a symbol has a value, other than the one that is being made."""
        return name in self._symbols and name not in self._active

    def _guarded(self, name: str, text: str) -> int:
        if name in self._active:
            raise ValueError(f"{name} depends on itself")
        self._active.append(name)
        try:
            return evaluate(text, self._symbol, self._region, self._defined)
        finally:
            self._active.pop()

    def sizes(self) -> list[tuple[str, int]]:
        """Symbols that can be evaluated."""
        found = []
        for name in self._symbols:
            try:
                found.append((name, self._symbol(name)))
            except (ValueError, RecursionError):
                continue  # most depend on the program
        return found


def _halves(text: str) -> tuple[str, bool, str]:
    """Origin and length of a region, and whether it has one."""
    match = _LENGTH.search(text)
    if match is None:
        return text, False, ""
    return text[: match.start()], True, text[match.end() :].rstrip(" \t\n,;")


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


"""Maps of GNU ld: the regions as they were linked, and what each output section takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .facts import Facts, Memory, Use, sizes_told, unreadable
from .linker_script import kind_of

_REGIONS = "Memory Configuration"
_SECTIONS = "Linker script and memory map"
_REGION = re.compile(r"(\S+)\s+0x([0-9a-fA-F]+)\s+0x([0-9a-fA-F]+)(?:[ \t]+([a-zA-Z!]+))?[ \t]*$")
_OUTPUT = re.compile(
    r"(?P<name>[._A-Za-z][^\s(]*)\s+0x(?P<origin>[0-9a-f]+)\s+0x(?P<bytes>[0-9a-f]+)"
    r"(?:\s+load address 0x(?P<load>[0-9a-f]+))?\s*$"
)
_INPUT = re.compile(r" (?P<name>[._A-Za-z]\S*)\s+0x[0-9a-f]+\s+0x(?P<bytes>[0-9a-f]+)(?:\s|$)")
_NAME = re.compile(r" ?[._A-Za-z]\S*$")
_SYMBOL = re.compile(r"\s+0x([0-9a-f]+)\s+(?:PROVIDE \()?([A-Za-z_.$][\w.$]*) = ")
#: Sections that no memory holds; their addresses count from 0.
_NOT_LOADED = re.compile(
    r"\.(?:z?debug|comment|stab|note\.GNU|gnu\.|line|pdr|xt\.|xtensa\.info|symtab|strtab|shstrtab"
    r"|(?:ARM|riscv)\.attributes|swift_ast|mdebug)"
)
_ZEROS = re.compile(r"\.?(?:[st]?bss|COMMON|noinit|gnu\.linkonce\.s?b\.)")


@dataclass
class _Output:
    """An output section, and where it is loaded from; ``stored``: it holds more than zeros."""

    name: str
    origin: int
    bytes: int
    load: int
    stored: bool = False


def read_map(file: str, text: str) -> Facts:
    """What a map tells.

    Raises:
        UsageError: It has no table of regions or of sections.
    """
    _, found, rest = text.partition(_REGIONS)
    table, also, body = rest.partition(_SECTIONS)
    if not found or not also:
        raise unreadable(file, f"no map of GNU ld: {_SECTIONS if found else _REGIONS!r} is missing")
    memories = []
    for line in table.splitlines():
        if (match := _REGION.match(line)) and match[1] not in ("*default*", "Name"):
            origin, size = int(match[2], 16), int(match[3], 16)
            if size:
                kind = kind_of(match[1], match[4] or "", origin)
                memories.append(Memory(match[1], kind, origin, size, f"{file}: {_REGIONS}"))
    if not memories:
        raise unreadable(
            file, "the program was linked without MEMORY regions; give the chip's file or --base"
        )
    outputs = [o for o in _outputs(body) if o.bytes and not _NOT_LOADED.match(o.name)]
    uses = [Use(o.name, o.origin, o.bytes) for o in outputs]
    uses += [
        Use(o.name, o.load, o.bytes)
        for o in outputs
        if o.load != o.origin and o.stored
    ]
    symbols = ((m[2], int(m[1], 16)) for m in map(_SYMBOL.match, body.splitlines()) if m)
    stack, heap = sizes_told(file, symbols, (o.name for o in outputs))
    return Facts("map", file, memories=tuple(memories), uses=tuple(uses), stack=stack, heap=heap)


def _outputs(body: str) -> Iterator[_Output]:
    """The output sections; long names stand on a line of their own, before their numbers."""
    current: _Output | None = None
    before = ""
    for line in body.splitlines():
        joined, before = f"{before}{line}", ""
        if _NAME.match(joined):
            before = joined
        elif match := _OUTPUT.match(joined):
            if current:
                yield current
            origin, size = int(match["origin"], 16), int(match["bytes"], 16)
            load = origin if match["load"] is None else int(match["load"], 16)
            current = _Output(match["name"], origin, size, load)
        elif current and (match := _INPUT.match(joined)) and int(match["bytes"], 16):
            current.stored |= not _ZEROS.match(match["name"])
    if current:
        yield current

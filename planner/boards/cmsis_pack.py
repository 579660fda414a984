"""Device descriptions of CMSIS-Packs (``.pdsc``): chips with memories, cores and clocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn
from xml.etree import ElementTree
from xml.parsers import expat

from .chips import choose, data_ram
from .facts import Facts, Memory, MemoryKind, Told, unreadable

#: Elements from the outside to the chip; inner ones change what outer ones say.
_LEVELS = ("family", "subFamily", "device", "variant")
_NAMES = ("Dvariant", "Dname")
#: Deeper ones are no description of a device.
_MOST_LEVELS = 64


def read_pack(file: str, data: bytes, chip: str | None, core: str | None) -> Facts:
    """What a description tells of one of its chips.

    Args:
        file: Name of the file.
        data: Its bytes.
        chip: ``--chip``; None where it has one only.
        core: ``--core``, which chooses of several cores of the chip.

    Raises:
        UsageError: It is broken, or several chips or cores are possible.
    """
    root = _parse(file, data)
    paths: dict[str, list[ElementTree.Element]] = {}
    for path in _chips(root, []):
        name = next((path[-1].get(n) for n in _NAMES if path[-1].get(n)), None)
        if name:
            paths.setdefault(name, path)
    packages: dict[str, list[str]] = {n: [] for n, p in paths.items() if p[-1].tag == "device"}
    for name, path in paths.items():
        if path[-1].tag == "variant":
            outer = path[-2].get("Dname")
            alike = outer in packages and not path[-1].findall("memory")
            packages.setdefault(outer if alike and outer else name, []).append(name)
    name = choose(file, packages, chip)
    try:
        processor = _processor(file, name, paths[name], core)
        memories, notes = _memories(file, name, paths[name], processor.get("Pname"))
        clock = processor.get("Dclock")
        hertz = None if clock is None else Told(float(int(clock, 0)), f"{file}: {name}, Dclock")
    except (KeyError, ValueError) as e:
        raise unreadable(file, f"{name}: {type(e).__name__} at {e}", [name]) from None
    told = processor.get("Dcore")
    cores: Told[tuple[str, ...]] | None = None
    if told:
        cores = Told((told.lower(),), f"{file}: {name}, Dcore")
    return Facts("pack", file, name, cores, hertz, tuple(memories), notes=tuple(notes))


def _parse(file: str, data: bytes) -> ElementTree.Element:
    """The document. One that declares entities is refused: they can grow without bounds."""
    parser = expat.ParserCreate()
    depth = 0

    def refuse(*_: object) -> NoReturn:
        raise unreadable(
            f"{file}:{parser.CurrentLineNumber}", "a DOCTYPE, which no CMSIS-Pack needs; remove it"
        )

    def deeper(*_: object) -> None:
        nonlocal depth
        depth += 1
        if depth > _MOST_LEVELS:
            raise unreadable(f"{file}:{parser.CurrentLineNumber}", "elements are nested too deep")

    def back(_: str) -> None:
        nonlocal depth
        depth -= 1

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = deeper, back
    try:
        parser.Parse(data, True)
        return ElementTree.fromstring(data)
    except (expat.ExpatError, ElementTree.ParseError, LookupError, ValueError) as e:
        raise unreadable(file, f"broken XML: {e}") from None


def _chips(
    element: ElementTree.Element, path: list[ElementTree.Element]
) -> Iterator[list[ElementTree.Element]]:
    """Devices and their variants, each with what it lies in."""
    for child in element:
        if child.tag in _LEVELS:
            inner = [*path, child]
            if child.tag in ("device", "variant"):
                yield inner
            yield from _chips(child, inner)
        elif child.tag == "devices":
            yield from _chips(child, path)


def _processor(
    file: str, name: str, path: list[ElementTree.Element], core: str | None
) -> dict[str, str]:
    """Attributes of the processor; of several the one whose core is chosen."""
    found: dict[str, dict[str, str]] = {}
    for element in path:
        for p in element.findall("processor"):
            found.setdefault(p.get("Pname", ""), {}).update(p.attrib)
    common = found.pop("", {}) if len(found) > 1 else {}
    choices = [common | p for p in found.values()] or [common]
    if len(choices) > 1:
        cores = [p.get("Dcore", "").lower() for p in choices]
        choices = [p for p, c in zip(choices, cores, strict=True) if c == (core or "").lower()]
        if not choices:
            why = f"{name} has the cores {', '.join(cores)}; choose by --core"
            raise unreadable(file, why)
    return choices[0]


def _memories(
    file: str, name: str, path: list[ElementTree.Element], processor: str | None
) -> tuple[list[Memory], list[str]]:
    """Memories, the inner ones in place of outer ones of their name, and what was left out."""
    found: dict[str, Memory] = {}
    left: list[str] = []
    for element in path:
        for m in element.findall("memory"):
            if m.get("Pname") not in (None, processor):
                continue
            label = m.get("name") or m.attrib["id"]
            access = m.get("access") or ("rwx" if label.startswith("IRAM") else "rx")
            origin, size = int(m.attrib["start"], 0), int(m.attrib["size"], 0)
            kind: MemoryKind = data_ram(origin) if "w" in access else "flash"
            memory = Memory(label, kind, origin, size, f"{file}: {name}, memory {label}")
            by_default = m.get("default", "0") in ("1", "true") or m.get("startup") in ("1", "true")
            if m.get("alias") or (kind == "flash" and not by_default):
                left.append(f"{file}: {memory} is left out: an alias, or not for programs")
            elif size:
                found[label] = memory
    return list(found.values()), left

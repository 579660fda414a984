"""What one file tells about a device, each value with its source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from ...ir.errors import UsageError

T = TypeVar("T")
MemoryKind = Literal["ram", "code", "flash"]
#: Kinds of files that are understood.
FileKind = Literal["script", "map", "elf", "pack", "probe", "platformio", "base"]


@dataclass(frozen=True)
class Told(Generic[T]):
    """A value, and where it stands."""

    value: T
    source: str


@dataclass(frozen=True)
class Memory:
    """A memory region.

    Attributes:
        name: As the file calls it.
        kind: None where the file does not tell.
        origin: First address.
        bytes: Size.
        source: Where it stands.
    """

    name: str
    kind: MemoryKind | None
    origin: int
    bytes: int
    source: str

    @property
    def end(self) -> int:
        """Address after the last byte."""
        return self.origin + self.bytes

    def __str__(self) -> str:
        """``RAM 0x20000000 98,304 B``."""
        return f"{self.name} {self.origin:#010x} {self.bytes:,} B"


@dataclass(frozen=True)
class Use:
    """Bytes that the firmware takes, at the addresses from ``origin`` on."""

    section: str
    origin: int
    bytes: int


@dataclass(frozen=True)
class Facts:
    """What one file tells.

    Attributes:
        kind: Of the file.
        file: Its name, as messages and sources say it.
        name: Of board or chip.
        cores: Names of cores, in lower case, of which it is one.
        clock_hz: Core clock.
        memories: Regions.
        placed: Their addresses are told, too; else only their sizes count.
        uses: What the firmware takes; None where the file does not tell.
        stack: Bytes of stack beside the ``uses``; None where the file does not tell.
        heap: The same for the heap.
        notes: What was left out, and why.
    """

    kind: FileKind
    file: str
    name: str | None = None
    cores: Told[tuple[str, ...]] | None = None
    clock_hz: Told[float] | None = None
    memories: tuple[Memory, ...] = ()
    placed: bool = True
    uses: tuple[Use, ...] | None = None
    stack: Told[int] | None = None
    heap: Told[int] | None = None
    notes: tuple[str, ...] = ()


#: Symbols that linker scripts and start-up files of vendors keep sizes in, in lower case.
_STACK_SIZES = ("_min_stack_size", "__stack_size", "__stack_size__", "_stack_size", "stack_size")
_HEAP_SIZES = ("_min_heap_size", "__heap_size", "__heap_size__", "_heap_size", "heap_size")


def sizes_told(
    file: str, symbols: Iterable[tuple[str, int]], sections: Iterable[str] = ()
) -> tuple[Told[int] | None, Told[int] | None]:
    """Bytes of stack and heap by symbols of their sizes; none where a section holds them already.

    Args:
        file: Name of the file.
        symbols: Names and values.
        sections: Names of the firmware's sections.
    """
    values = {name.lower(): (name, value) for name, value in symbols}
    held = tuple(sections)

    def find(names: Sequence[str], word: str) -> Told[int] | None:
        if section := next((s for s in held if word in s.lower()), None):
            return Told(0, f"{file}: section {section}")
        found = next((values[n] for n in names if n in values), None)
        return found and Told(found[1], f"{file}: {found[0]}")

    return find(_STACK_SIZES, "stack"), find(_HEAP_SIZES, "heap")


def unreadable(file: str, why: str, understood: Iterable[object] = ()) -> UsageError:
    """The error for a file that can't be understood, with what could be."""
    told = ", ".join(map(str, understood))
    return UsageError(f"{file}: {why}" + (f"; understood so far: {told}" if told else ""))

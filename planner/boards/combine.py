"""One device of what several files tell; where they differ, an order of precedence decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import ValidationError

from ...ir.errors import UsageError
from ..device import GENERIC_DEVICE, Device, Quantity, Region, device_ids, load_core, load_device
from ..spec_file import bundled_ids
from .facts import Facts, FileKind, Memory, MemoryKind, Told
from .firmware import reserved, taken

#: Whose word counts first. The linker script is what the firmware lives by; vendors know the chip.
MEMORY_ORDER: tuple[FileKind, ...] = ("script", "map", "pack", "probe", "platformio", "base")
CORE_ORDER: tuple[FileKind, ...] = ("elf", "pack", "platformio", "probe", "base")
CLOCK_ORDER: tuple[FileKind, ...] = ("platformio", "pack", "base")
#: Cores without figures of their own -> those of another, which runs the same code no faster.
STAND_INS = {
    "cortex-m0": ("cortex-m0plus", "the same instructions, one stage of pipeline more"),
    "cortex-m1": ("cortex-m0plus", "the same instructions"),
    "cortex-m3": ("cortex-m0plus", "floats in software on both; the M3 is faster"),
    "cortex-m23": ("cortex-m0plus", "floats in software on both"),
    "cortex-m35p": ("cortex-m33", "the same instructions"),
    "cortex-m55": ("cortex-m33", "without the vectors of the M55"),
    "cortex-m85": ("cortex-m33", "without the vectors of the M85"),
}
#: Where a Cortex-M has no memory for programs: peripherals, and the system itself.
_NO_MEMORY = (range(0x4000_0000, 0x6000_0000), range(0xE000_0000, 1 << 64))


@dataclass(frozen=True)
class Conflict:
    """Files that say different things; ``taken`` counts."""

    what: str
    taken: Told[str]
    others: tuple[Told[str], ...]


@dataclass(frozen=True)
class Given:
    """What the user says beside the files.

    Attributes:
        device_id: Id of the new device.
        core: Id of its core.
        clock_hz: Its clock.
        base: Board that it is like, for all that no file tells.
        kinds: Region -> its kind, or ``none`` to leave it out.
        stack: Bytes of stack.
        heap: Bytes of heap.
    """

    device_id: str
    core: str | None = None
    clock_hz: float | None = None
    base: Device | None = None
    kinds: Mapping[str, MemoryKind | Literal["none"]] = field(default_factory=dict)
    stack: int | None = None
    heap: int | None = None


@dataclass(frozen=True)
class Imported:
    """A device, where the files contradict each other, and what should be known about it."""

    device: Device
    conflicts: tuple[Conflict, ...]
    notes: tuple[str, ...]


def combine(files: Sequence[Facts], given: Given) -> Imported:
    """Make one device of what files tell.

    Raises:
        UsageError: Nothing tells the RAM, the flash or the core, a region's kind is not known, or
            regions contradict each other.
    """
    facts = [*files, *([_facts_of(given.base)] if given.base else [])]
    conflicts: list[Conflict] = []
    notes = [note for f in facts for note in f.notes]
    core, core_source = _core(facts, given, conflicts, notes)
    memories = _memories(facts, given, core, conflicts, notes)
    clock = _clock(facts, given, conflicts)
    like = given.base or _stand_in(core, clock)
    clock = clock or Told(
        like.clock_hz.value, f"estimated: as {like.id}, no file tells it; give --clock"
    )
    name = next((f.name for k in ("platformio", "pack", "probe") for f in facts if f.kind == k), "")
    try:
        device = Device(
            id=given.device_id,
            name=name or given.device_id,
            core=core,
            core_source=core_source,
            clock_hz=Quantity(value=clock.value, source=clock.source),
            cycles_per_instruction=_as(like, like.cycles_per_instruction),
            power_w=_power(like, clock.value),
            regions=tuple(_region(m, given.base) for m in memories),
            storage=tuple(s for s in given.base.storage if s.region is None) if given.base else (),
            reserve=like.reserve.model_copy(
                update={"source": _estimate(like, like.reserve.source), "region": None}
            ),
        )
    except ValidationError as e:
        why = e.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(
            f"the files give no device: {why}; leave a region out by --kind NAME=none"
        ) from None
    device, about = reserved(device, facts, given.stack, given.heap)
    conflicts += _firmware_conflicts(facts, device)
    return Imported(device, tuple(conflicts), tuple(dict.fromkeys(notes + about)))


def _facts_of(base: Device) -> Facts:
    memories = tuple(Memory(r.name, r.kind, r.origin, r.bytes, f"as {base.id}: {r.source}")
                     for r in base.regions)  # fmt: skip
    clock = Told(base.clock_hz.value, f"as {base.id}: {base.clock_hz.source}")
    cores: Told[tuple[str, ...]] = Told((base.core,), f"as {base.id}")
    return Facts("base", base.id, base.name, cores, clock, memories)


def _ordered(facts: Sequence[Facts], order: Sequence[FileKind]) -> list[Facts]:
    return sorted((f for f in facts if f.kind in order), key=lambda f: order.index(f.kind))


def _core(
    facts: Sequence[Facts], given: Given, conflicts: list[Conflict], notes: list[str]
) -> tuple[str, str]:
    """The core whose figures count, and why."""
    told = [f.cores for f in _ordered(facts, CORE_ORDER) if f.cores]
    names = [tuple(_plain(c) for c in t.value) for t in told]
    if given.core is not None:
        load_core(given.core)
        others = [t for t, n in zip(told, names, strict=True)
                  if given.core not in {_figures(c)[0] for c in n}]  # fmt: skip
        _add(conflicts, "core", Told(given.core, "given by --core"), _joined(others))
        return given.core, "given by --core"
    if not told:
        raise UsageError("no file tells the core; give --core, as cortex-m4, or the firmware's ELF")
    left = names[0]
    for more in names[1:]:
        left = tuple(c for c in left if c in more) or left
    others = [t for t, n in zip(told, names, strict=True) if not set(left) & set(n)]
    figures = {_figures(c)[0] for c in left}
    if len(figures) != 1 or not (core := figures.pop()):
        known = ", ".join(left)
        raise UsageError(
            f"the core is {'one of ' if len(left) > 1 else ''}{known} ({told[0].source}); give"
            " --core with the one that has the figures to plan by"
        )
    _add(conflicts, "core", Told(", ".join(left), told[0].source), _joined(others))
    source = told[0].source
    if core not in left:
        why = _figures(left[0])[1]
        source = f"estimated: {left[0]} ({source}) by the figures of {core}: {why}"
        notes.append(f"core: {left[0]} has no figures of its own; {core} stands in: {why}")
    return core, source


def _plain(core: str) -> str:
    """``Cortex-M0+`` and ``cortex-m4f`` as the specs call them."""
    name = core.lower().replace("+", "plus")
    return name[:-1] if name.startswith("cortex-m") and name.endswith("f") else name


def _figures(core: str) -> tuple[str, str]:
    """The bundled core with the figures of a core (empty: there is none), and why it may be."""
    if core in bundled_ids("cores"):
        return core, ""
    return STAND_INS.get(core, ("", ""))


def _joined(told: Sequence[Told[tuple[str, ...]]]) -> list[Told[str]]:
    return [Told(" or ".join(t.value), t.source) for t in told]


def _add(
    conflicts: list[Conflict], what: str, taken: Told[str], others: Sequence[Told[str]]
) -> None:
    if others:
        conflicts.append(Conflict(what, taken, tuple(others)))


def _memories(
    facts: Sequence[Facts],
    given: Given,
    core: str,
    conflicts: list[Conflict],
    notes: list[str],
) -> list[Memory]:
    """The regions of the file that counts first, RAM and flash each on their own."""
    usable = {id(f): _usable(f, given, core, notes) for f in facts}
    known = {m.name for f in facts for m in f.memories}
    if unknown := [n for n in given.kinds if n not in known]:
        raise UsageError(f"--kind {unknown[0]}: no file has that region; there are"
                         f" {', '.join(sorted(known)) or 'none'}")  # fmt: skip
    chosen: list[Memory] = []
    for what, kinds in (("RAM", ("ram", "code")), ("flash", ("flash",))):
        having = [(f, own) for f in _ordered(facts, MEMORY_ORDER)
                  if (own := [m for m in usable[id(f)] if m.kind in (*kinds, None)])
                  and any(m.kind == kinds[0] for m in own)]  # fmt: skip
        if not having:
            more = "".join(f" ({n})" for n in notes[:3])
            raise UsageError(
                f"no file tells of any {what}; give the linker script, the map, a chip's file or"
                f" --base, or say --kind NAME={kinds[0]}{more}"
            )
        first, own = having[0]
        if doubtful := [m for m in own if m.kind is None]:
            raise UsageError(
                f"{doubtful[0].source}: {doubtful[0]} may be RAM or flash; say"
                f" --kind {doubtful[0].name}=ram, flash, code or none"
            )
        chosen += own
        usual = kinds[0]
        others = [f for f, o in having[1:]
                  if _extents(o, usual, f.placed) != _extents(own, usual, f.placed)]  # fmt: skip
        _add(
            conflicts,
            what,
            Told(_told(own, usual), first.file),
            [Told(_told(usable[id(f)], usual), f.file) for f in others],
        )
    return sorted(set(chosen), key=lambda m: m.origin)


def _usable(f: Facts, given: Given, core: str, notes: list[str]) -> list[Memory]:
    """Regions with the kinds that the user says, without those where no program's memory is."""
    found: list[Memory] = []
    for m in f.memories:
        kind = given.kinds.get(m.name, m.kind)
        if kind == "none":
            continue
        if core.startswith("cortex-m") and any(m.origin in area for area in _NO_MEMORY):
            notes.append(f"{f.file}: {m} is left out: an address of peripherals or of the system")
            continue
        found.append(Memory(m.name, kind, m.origin, m.bytes, m.source))
    return found


def _extents(memories: Sequence[Memory], kind: str, placed: bool) -> object:
    """What two files have to agree on: where memory is, or else how much."""
    own = sorted((m.origin, m.end) for m in memories if m.kind == kind)
    if not placed:
        return sum(end - begin for begin, end in own)
    merged: list[tuple[int, int]] = []
    for begin, end in own:
        if merged and begin <= merged[-1][1]:
            begin, end = merged[-1][0], max(end, merged.pop()[1])
        merged.append((begin, end))
    return merged


def _told(memories: Sequence[Memory], kind: str) -> str:
    own = [m for m in memories if m.kind == kind]
    return f"{sum(m.bytes for m in own):,} B = {' + '.join(map(str, own))}"


def _clock(
    facts: Sequence[Facts], given: Given, conflicts: list[Conflict]
) -> Told[float] | None:
    told = [f.clock_hz for f in _ordered(facts, CLOCK_ORDER) if f.clock_hz]
    if given.clock_hz is not None:
        told.insert(0, Told(given.clock_hz, "given by --clock"))
    if not told:
        return None
    others = [Told(_mhz(t.value), t.source) for t in told[1:] if t.value != told[0].value]
    _add(conflicts, "clock", Told(_mhz(told[0].value), told[0].source), others)
    return told[0]


def _mhz(hertz: float) -> str:
    return f"{hertz / 1e6:g} MHz"


def _stand_in(core: str, clock: Told[float] | None) -> Device:
    """The bundled device of that core with the nearest clock, else the slowest one."""
    devices = [load_device(i) for i in device_ids() if i != GENERIC_DEVICE]
    wanted = clock.value if clock else 0.0
    alike = [d for d in devices if d.core == core]
    return min(alike, key=lambda d: (abs(d.clock_hz.value - wanted), d.id))


def _estimate(like: Device, source: str) -> str:
    return f"estimated: as {like.id}, {source.removeprefix('estimated: ')}"


def _as(like: Device, quantity: Quantity) -> Quantity:
    return Quantity(value=quantity.value, source=_estimate(like, quantity.source))


def _power(like: Device, clock_hz: float) -> Quantity:
    """That of the stand-in, in proportion to the clock."""
    own = like.clock_hz.value
    if own == clock_hz:
        return _as(like, like.power_w)
    value = float(f"{like.power_w.value * clock_hz / own:.3g}")
    how = f"{like.power_w.value:g} W of {like.id} x {_mhz(clock_hz)} / {_mhz(own)}"
    return Quantity(value=value, source=f"estimated: {how}")


def _region(memory: Memory, base: Device | None) -> Region:
    """A region, with what the base knows of the same memory: speed, sectors, units."""
    assert memory.kind is not None  # checked where they were chosen
    found = Region(
        name=memory.name,
        kind=memory.kind,
        origin=memory.origin,
        bytes=memory.bytes,
        source=memory.source,
    )
    for r in base.regions if base else ():
        inside = r.origin <= memory.origin and memory.end <= r.origin + r.bytes
        if r.kind == memory.kind and inside:
            same = (r.origin, r.bytes) == (memory.origin, memory.bytes)
            return found.model_copy(
                update={
                    "extra_cycles_per_byte": r.extra_cycles_per_byte,
                    "program_bytes": r.program_bytes,
                    "sectors": r.sectors if same else (),
                    "erase_cycles": r.erase_cycles if same else None,
                }
            )
    return found


def _firmware_conflicts(facts: Sequence[Facts], device: Device) -> list[Conflict]:
    """An ELF and a map of different builds."""
    elfs, maps = ([f for f in facts if f.kind == kind] for kind in ("elf", "map"))
    if len(elfs) != 1 or len(maps) != 1:
        return []
    told = []
    for f in (*elfs, *maps):
        ram, flash = taken(f, device)
        told.append(Told(f"{ram:,} B of RAM, {flash:,} B of flash", f.file))
    return [] if told[0].value == told[1].value else [Conflict("firmware", told[0], (told[1],))]

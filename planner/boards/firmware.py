"""What the user's firmware leaves of a device: bytes that it takes, region by region."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..device import Device, RamRun, Region, Reserve
from .facts import Facts, Told, Use

#: Of a stack of which no file tells anything: a deep call of the C library, and interrupts.
STACK_BYTES = 4096
#: A smaller gap between two sections is no memory that a plan could use.
_ALIGNMENT = 64
_SHOWN = 6


def reserved(
    device: Device, facts: Sequence[Facts], stack: int | None, heap: int | None
) -> tuple[Device, list[str]]:
    """The device less what the firmware takes of it.

    Args:
        device: Its memory, with the reserve of a stand-in.
        facts: Of all files; ELFs tell what is taken, else maps.
        stack: Bytes of stack, as given.
        heap: Bytes of heap, as given.

    Returns:
        The device, and what should be known about it.
    """
    firmware = [f for f in facts if f.uses is not None and f.kind == "elf"]
    firmware = firmware or [f for f in facts if f.uses is not None][:1]
    told = (*firmware, *(f for f in facts if f.kind == "script"))
    stacks = _size(stack, "--stack", (f.stack for f in told))
    heaps = _size(heap, "--heap", (f.heap for f in told))
    if not firmware:
        return _guessed(device, stacks, heaps)
    uses = tuple(u for f in firmware for u in f.uses or ())
    stacks = stacks or Told(STACK_BYTES, "estimated: no file tells it, give --stack")
    heaps = heaps or Told(0, "no file tells of one, else give --heap")
    run = _stack_run(device, uses)
    regions, notes = [], []
    for r in device.regions:
        left = r if r.kind != "ram" or r.name in run.regions else _longest_rest(r, uses)
        if left is None:
            notes.append(f"RAM {r.name} is left out: the firmware takes all of it")
            continue
        if left != r:
            notes.append(f"RAM {r.name}: {r.bytes - left.bytes:,} B of it are the firmware's")
        regions.append(left)
    own = [r for r in device.regions if r.name in run.regions]
    flash = [r for r in device.regions if r.kind == "flash"]
    in_ram, in_flash = _inside(uses, own), _inside(uses, flash)
    inside = _inside(uses, device.regions)
    notes += [
        f"{u.section} at {u.origin:#010x}, {u.bytes:,} B, lies in no region"
        for u in uses
        if u not in inside
    ]
    files = ", ".join(f.file for f in firmware)
    beside = [
        f" + {what} {told.value:,} ({told.source})"
        for what, told in (("stack", stacks), ("heap", heaps))
        if told.value or "section" not in told.source  # else it is listed
    ]
    reserve = Reserve(
        ram_bytes=_bytes(in_ram) + stacks.value + heaps.value,
        flash_bytes=_bytes(in_flash),
        region=run.name,
        source=f"{files}: RAM {_listed(in_ram)}{''.join(beside)}; flash {_listed(in_flash)}",
    )
    return device.model_copy(update={"regions": tuple(regions), "reserve": reserve}), notes


def taken(facts: Facts, device: Device) -> tuple[int, int]:
    """Bytes of the device's RAM and flash that the firmware takes by one file."""
    kinds = [[r for r in device.regions if r.kind == kind] for kind in ("ram", "flash")]
    ram, flash = (_bytes(_inside(facts.uses or (), regions)) for regions in kinds)
    return ram, flash


def _guessed(
    device: Device, stack: Told[int] | None, heap: Told[int] | None
) -> tuple[Device, list[str]]:
    """With the reserve of the stand-in, or what stack and heap alone take, if that is more."""
    kept = device.reserve
    known = [told for told in (stack, heap) if told is not None]
    least = sum(told.value for told in known)
    how = " + ".join(f"{told.value:,} ({told.source})" for told in known)
    source = kept.source if least <= kept.ram_bytes else f"estimated: stack and heap alone, {how}"
    reserve = kept.model_copy(
        update={"ram_bytes": max(kept.ram_bytes, least), "source": source, "region": None}
    )
    note = "what the firmware takes is an estimate; give its ELF or its map as well"
    return device.model_copy(update={"reserve": reserve}), [note]


def _size(given: int | None, option: str, told: Iterable[Told[int] | None]) -> Told[int] | None:
    if given is not None:
        return Told(given, f"given by {option}")
    return next((t for t in told if t is not None), None)


def _stack_run(device: Device, uses: Sequence[Use]) -> RamRun:
    """The run with the section of the stack, else that where the firmware takes most."""

    def weight(run: RamRun) -> tuple[bool, int, int]:
        own = [r for r in device.regions if r.name in run.regions]
        inside = _inside(uses, own)
        return any("stack" in u.section.lower() for u in inside), _bytes(inside), run.bytes

    return max(device.ram_runs, key=weight)


def _inside(uses: Sequence[Use], regions: Sequence[Region]) -> list[Use]:
    return [
        u for u in uses if any(r.origin <= u.origin < r.origin + r.bytes for r in regions)
    ]


def _bytes(uses: Iterable[Use]) -> int:
    """Bytes that any of them takes, and the gaps of alignment between them."""
    total, end = 0, None
    for u in sorted(uses, key=lambda u: u.origin):
        gap = 0 if end is None else u.origin - end
        total += max(0, u.bytes + gap) if gap < _ALIGNMENT else u.bytes
        end = max(end or 0, u.origin + u.bytes)
    return total


def _longest_rest(region: Region, uses: Sequence[Use]) -> Region | None:
    """The longest part of a region that no section takes."""
    inside = sorted(_inside(uses, [region]), key=lambda u: u.origin)
    if not inside:
        return region
    at, best = region.origin, (0, 0)
    for begin, end in [*((u.origin, u.origin + u.bytes) for u in inside),
                       (region.origin + region.bytes, 0)]:  # fmt: skip
        best = max(best, (begin - at, -at))
        at = max(at, -(-end // 4) * 4)
    size, origin = best[0] // 4 * 4, -best[1]
    if size <= 0:
        return None
    source = f"{region.source}, less {_listed(inside)} of the firmware"
    return region.model_copy(update={"origin": origin, "bytes": size, "source": source})


def _listed(uses: Sequence[Use]) -> str:
    ordered = sorted(uses, key=lambda u: -u.bytes)
    shown = [f"{u.section} {u.bytes:,}" for u in ordered[:_SHOWN]]
    rest = _bytes(ordered[_SHOWN:])
    return " + ".join([*shown, *([f"others {rest:,}"] if rest else [])]) or "0"

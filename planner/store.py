"""Keeping what was learned in the chip's flash: what a save takes, and how many there can be.

As ``<model>_store_save`` of the emitted C does it: two slots of whole sectors, written by turns,
each erased once per two saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..ir.training import TrainingGraph
from .device import Device, Region
from .plan import ALIGNMENT_BYTES, Plan

#: Header and progress, in front of the tensors.
HEAD_BYTES = 24 + 16
#: What makes a slot count: number of the save and checksum, in units of their own.
MARK_BYTES = 8
#: What flash is taken to be programmed by where its spec does not say: a multiple of what most
#: flash on a chip is.
UNIT_BYTES = 32
SLOTS = 2


@dataclass(frozen=True)
class Slots:
    """Where the two slots can be: at the end of a flash region.

    Attributes:
        region: The region; its ``erase_cycles`` are those of each sector.
        slot_bytes: Of one slot.
        sectors: Of both.
    """

    region: Region
    slot_bytes: int
    sectors: int

    @property
    def origin(self) -> int:
        """Address of the first slot."""
        return self.region.origin + self.region.bytes - SLOTS * self.slot_bytes

    @property
    def saves(self) -> int | None:
        """Saves until the sectors are worn out; None: the spec does not know their erase cycles."""
        cycles = self.region.erase_cycles
        return None if cycles is None else SLOTS * int(cycles.value)


@dataclass(frozen=True)
class Store:
    """What keeping all that was learned takes of the chip's flash.

    Attributes:
        saved_bytes: What a save writes, as ``<model>_save`` does.
        program_bytes: What flash is programmed by: at once, and once after each erase.
        written_bytes: What is programmed per save: the saved bytes, filled up to whole units, and
            the mark in units of its own.
        slots: Where the two slots can be; None: the device's sectors for two are not known.
        free_bytes: Of flash, beside the plan and the device's reserve.
    """

    saved_bytes: int
    program_bytes: int
    written_bytes: int
    slots: Slots | None
    free_bytes: int

    @property
    def fits(self) -> bool:
        """Whether both slots lie in flash that is free."""
        return self.slots is not None and SLOTS * self.slots.slot_bytes <= self.free_bytes

    def record(self) -> dict[str, Any]:
        """All of it for JSON."""
        told: dict[str, Any] = {
            "saved_bytes": self.saved_bytes,
            "program_bytes": self.program_bytes,
            "written_bytes": self.written_bytes,
            "free_bytes": self.free_bytes,
            "fits": self.fits,
            "slots": None,
        }
        if (s := self.slots) is not None:
            cycles = s.region.erase_cycles
            told["slots"] = {
                "count": SLOTS,
                "region": s.region.name,
                "origin": s.origin,
                "slot_bytes": s.slot_bytes,
                "sectors": s.sectors,
                "erase_cycles": None if cycles is None else int(cycles.value),
                "saves": s.saves,
            }
        return told


def plan_store(plan: Plan, training: TrainingGraph, device: Device) -> Store:
    """What the store of a plan takes on its device."""
    saved = saved_bytes(plan, training)
    slots = place_slots(device, saved)
    flash = [r for r in device.regions if r.kind == "flash"]
    unit = max(unit_bytes(r) for r in flash) if slots is None else unit_bytes(slots.region)
    free = device.flash_bytes - device.reserve.flash_bytes - plan.claims.flash_bytes.total
    return Store(saved, unit, written_bytes(saved, unit), slots, max(0, free))


def unit_bytes(region: Region) -> int:
    """What a flash region is programmed by."""
    return UNIT_BYTES if region.program_bytes is None else region.program_bytes.value


def written_bytes(n_bytes: int, unit: int) -> int:
    """What is programmed of a slot for so many saved bytes: whole units, then the mark's own."""
    return sum(-(-n // unit) * unit for n in (n_bytes, MARK_BYTES))


def saved_bytes(plan: Plan, training: TrainingGraph) -> int:
    """What ``<model>_save`` writes: all that training changes, wherever it is kept."""
    state = sum(part.end - part.begin for part in plan.parts("state"))
    return HEAD_BYTES + state + stored_bytes(plan, training)


def stored_bytes(plan: Plan, training: TrainingGraph) -> int:
    """State in the storage: optimizer tensors, which come first there."""
    homes = {v.name for u in training.updates for v in u.paged}
    ends = [
        b.offset + -(-b.bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        for b in plan.buffers
        if b.space == "storage" and b.value in homes
    ]
    return max(ends, default=0)


def place_slots(device: Device, n_bytes: int) -> Slots | None:
    """The smallest slots of whole sectors at the end of the last flash region with sectors.

    Args:
        device: The device.
        n_bytes: What a save writes.

    Returns:
        None where no region tells its sectors, or two slots of one size can't be had.
    """
    known = [r for r in device.regions if r.kind == "flash" and r.sectors]
    for region in sorted(known, key=lambda r: r.origin, reverse=True):
        need = written_bytes(n_bytes, unit_bytes(region))
        sizes = [size for count, size in reversed(region.sectors) for _ in range(count)]
        ends = {end: i for i, end in enumerate(accumulate(sizes), 1)}
        for end in ends:
            if end >= need and SLOTS * end in ends:
                return Slots(region, end, ends[SLOTS * end])
    return None

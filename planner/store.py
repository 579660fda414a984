"""Keeping what was learned in the chip's flash: what a save takes, and how many there can be.

As ``<model>_store_save`` of the emitted C does it: two slots of whole sectors, written by turns,
each erased once per two saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from ..ir.training import TrainingGraph
from .device import Device, Region
from .plan import ALIGNMENT_BYTES, Plan

#: Header and progress, in front of the tensors.
HEAD_BYTES = 24 + 16
#: What flash is programmed by at most, where the library is built as it is. It fills up the state,
#: and the mark behind it.
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
    def saves(self) -> int | None:
        """Saves until the sectors are worn out; None: the spec does not know their erase cycles."""
        cycles = self.region.erase_cycles
        return None if cycles is None else SLOTS * int(cycles.value)


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
    need = (-(-n_bytes // UNIT_BYTES) + 1) * UNIT_BYTES
    known = [r for r in device.regions if r.kind == "flash" and r.sectors]
    for region in sorted(known, key=lambda r: r.origin, reverse=True):
        sizes = [size for count, size in reversed(region.sectors) for _ in range(count)]
        ends = {end: i for i, end in enumerate(accumulate(sizes), 1)}
        for end in ends:
            if end >= need and SLOTS * end in ends:
                return Slots(region, end, ends[SLOTS * end])
    return None

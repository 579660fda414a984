"""A smaller arena for a schedule that is decided: the same buffers, laid out anew.

A search for plans takes any layout that keeps the budget, since a better one takes time and changes
nothing that it looks for. Of its last plan the arena is made as small as is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .blocks import Block, arena_bytes
from .layout import place
from .plan import Buffer
from .schedule import MANY_BLOCKS, Schedule
from .tensors import aligned

#: Limit of the search for addresses, as work.
COMPACT_S = 1.0


def compacted(schedule: Schedule, seed: int) -> Schedule:
    """The schedule in the smallest arena that is found; as it was where that is no smaller.

    Args:
        schedule: In one RAM region: what lies in several is placed for their speed.
        seed: Of the search.
    """
    peak = max(schedule.live, default=0)
    if schedule.regions or schedule.arena_bytes <= peak:
        return schedule
    groups = list(_sharing(schedule.buffers))
    if len(groups) > MANY_BLOCKS:
        return schedule
    blocks = [
        Block(aligned(max(b.bytes for b in g)), min(b.first for b in g), max(b.last for b in g))
        for g in groups
    ]
    offsets = place(blocks, len(schedule.steps), exact_time_s=COMPACT_S, seed=seed)
    arena = arena_bytes(blocks, offsets)
    if arena >= schedule.arena_bytes:
        return schedule
    moved = {b.id: o for g, o in zip(groups, offsets, strict=True) for b in g}
    buffers = tuple(
        b.model_copy(update={"offset": moved[b.id]}) if b.id in moved else b
        for b in schedule.buffers
    )
    return replace(schedule, buffers=buffers, arena_bytes=arena)


def _sharing(buffers: Sequence[Buffer]) -> Iterator[list[Buffer]]:
    """Arena buffers that are one block: in-place results and views begin where it still lives."""
    group: list[Buffer] = []
    end = -1
    for b in sorted(
        (b for b in buffers if b.space == "arena"), key=lambda b: (b.offset, b.first, b.last)
    ):
        if group and (b.offset != group[0].offset or b.first > end):
            yield group
            group, end = [], -1
        group.append(b)
        end = max(end, b.last)
    if group:
        yield group

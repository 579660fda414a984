"""Page transfers of a plan: the time they take, and what they do to the storage.

Part of the checker (see ``planner.check``): the clocks of ``planner.transfers`` and the wear of
``planner.cost`` a second time, written from their definition in docs/design.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .check_program import CheckError, Program, occupied
from .device import Device, Storage
from .plan import Step


def core_cycles(steps: Sequence[Step], work: Sequence[int], *, last: bool) -> list[int]:
    """Core cycles of each step of a micro-step.

    Args:
        steps: Of the plan.
        work: Cycles of computing, or of the transfer that a step starts.
        last: It is the last micro-step, in which the steps marked so run.
    """
    now = bus_free = 0
    ends: dict[str, int] = {}  # target of a transfer -> when it ends
    result = []
    for step, cycles in zip(steps, work, strict=True):
        begin = now
        if step.last_micro and not last:
            result.append(0)
            continue
        if step.kind in ("page_out", "page_in"):
            bus_free = max(now, bus_free) + cycles
            if step.overlapped:
                ends[step.writes[0]] = bus_free
            else:
                now = bus_free
        elif step.kind == "page_wait":
            now = max(now, ends[str(step.reads[1])])
        else:
            now += cycles
        result.append(now - begin)
    return result


def storage_end(p: Program, storage: Storage | None) -> int:
    """End of the highest storage buffer; in whole units where each tensor has units of its own."""
    unit = _own_units(storage)
    stored = [b for b in p.plan.buffers if b.space == "storage"]
    return max((b.offset + _up(occupied(b.bytes), unit) for b in stored), default=0)


def wear(p: Program, storage: Storage | None) -> tuple[int, int | None]:
    """Bytes that a training step wears, and training steps until the storage is worn out."""
    if storage is None or storage.wear is None:
        return 0, None
    unit, cycles = storage.wear.unit_bytes, storage.wear.cycles.value
    micro = p.plan.training.micro_batches
    erased: Counter[int] = Counter()  # unit -> how often a training step erases it
    total = 0
    for step in p.plan.steps:
        if step.kind == "page_out":
            b = p.buffers[step.writes[0]]
            times = 1 if step.last_micro else micro
            size = _up(occupied(b.bytes), unit)
            total += times * size
            first = b.offset // unit
            erased.update({first + i: times for i in range(size // unit)})
    if not total:
        return 0, None
    if storage.wear.levelled:
        return total, int(storage.bytes * cycles // total)
    return total, int(cycles // max(erased.values()))


def storage_rules(p: Program, device: Device) -> None:
    """Demand that the paged tensors fit the storage, and that none is erased with another one.

    Raises:
        CheckError: They do not fit, or share an erase unit that no controller looks after.
    """
    storage = next((s for s in device.storage if s.id == p.plan.device.storage), None)
    if storage is None:
        return
    end = storage_end(p, storage)
    if end > storage.bytes:
        raise CheckError(f"pages {end} B, but {storage.id} holds {storage.bytes} B")
    unit = _own_units(storage)
    owner: dict[int, str] = {}
    for b in p.plan.buffers:
        if b.space == "storage" and unit > 1:
            for i in range(b.offset // unit, (b.offset + occupied(b.bytes) - 1) // unit + 1):
                if owner.setdefault(i, b.id) != b.id:
                    raise CheckError(
                        f"buffers {owner[i]} and {b.id} share the erase unit {i} of {storage.id}"
                    )


def _own_units(storage: Storage | None) -> int:
    """Bytes that are erased together where the plan has to look after that."""
    if storage is None or storage.wear is None or storage.wear.levelled:
        return 1
    return storage.wear.unit_bytes


def _up(n: int, unit: int) -> int:
    return (n + unit - 1) // unit * unit

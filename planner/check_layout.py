"""Layout rules of the checker: who writes a buffer, and who may share its bytes.

Part of the checker (see ``planner.check``).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..ir.opdef import get_op, inplace_operands
from .check_program import CheckError, Program, occupied
from .plan import Buffer, Step


def layout(p: Program) -> None:
    """Each buffer is written once, lives while it is touched, and shares bytes only if it may.

    Raises:
        CheckError: A lifetime is not what the steps need, or two live buffers share bytes.
    """
    _lifetimes(p)
    _overlaps(p)


def _touched(step: Step) -> Iterator[str]:
    """Every buffer id that a step names."""
    yield from (b for b in step.reads if b is not None)
    yield from step.writes
    yield from (b for b in (step.workspace, step.tile) if b is not None)


def _lifetimes(p: Program) -> None:
    """Each arena and storage buffer is written once, at its first step, and read only later.

    State, also that in storage, is there before; an update changes it in place.
    """
    writers: dict[str, int] = {}
    for i, step in enumerate(p.plan.steps):
        scratch = [b for b in (step.workspace, step.tile) if b is not None]
        for name in _touched(step):
            p.buffer(i, name)
        for name in (*step.writes, *scratch):
            b = p.buffers[name]
            own = b.value in p.home_of
            changes = own and (b.space == "storage" or step.kind == "update")
            if name in step.writes and (b.space == "state" or changes):
                continue
            if b.space not in ("arena", "storage"):
                raise CheckError(f"{p.where(i)}: writes buffer {name} in read-only space {b.space}")
            if name in writers:
                raise CheckError(
                    f"{p.where(i)}: buffer {name} was written by step {writers[name]} before"
                )
            writers[name] = i
    for b in p.plan.buffers:
        if b.space not in ("arena", "storage") or b is p.home_of.get(b.value):
            continue
        if b.id not in writers and b not in p.given:
            raise CheckError(f"buffer {b.id} ({b.value}) is never written")
        first = writers.get(b.id, 0)
        if b.first != first:
            raise CheckError(
                f"buffer {b.id} ({b.value}) lives from step {b.first}, but step {first} writes it"
            )


def _overlaps(p: Program) -> None:
    """No two live buffers share bytes, except views and in-place results at the same range."""
    family = _families(p)
    for space in ("arena", "state", "storage"):
        ordered = sorted((b for b in p.plan.buffers if b.space == space), key=lambda b: b.offset)
        for k, a in enumerate(ordered):
            for b in ordered[k + 1 :]:
                if b.offset >= a.offset + occupied(a.bytes):
                    break
                if b.first <= a.last and a.first <= b.last and occupied(b.bytes) > 0:
                    _may_share(p, a, b, family)


def _families(p: Program) -> dict[str, str]:
    """Buffer -> representative of the views of the same bytes."""
    family = {b: b for b in p.buffers}
    for i, step in enumerate(p.plan.steps):
        if step.kind == "compute" and len(step.writes) == 1 and step.reads and step.reads[0]:
            nodes = p.step_nodes(i)
            if len(nodes) == 1 and get_op(nodes[0].op).view:
                family[step.writes[0]] = family[step.reads[0]]
    return family


def _may_share(p: Program, a: Buffer, b: Buffer, family: dict[str, str]) -> None:
    same = a.offset == b.offset and a.bytes == b.bytes
    if same and family[a.id] == family[b.id]:
        return
    old, new = (a, b) if a.first <= b.first else (b, a)
    step = p.plan.steps[new.first]
    nodes = p.step_nodes(new.first) if step.writes[:1] == (new.id,) else []
    if same and old.last == new.first and step.kind == "compute" and len(nodes) == 1:
        for k in inplace_operands(nodes[0]):
            source = step.reads[k] if k < len(step.reads) else None
            if source is not None and family[source] == family[old.id]:
                return
    raise CheckError(
        f"{p.where(new.first)}: buffer {new.id} ({new.value}) takes bytes {new.offset} to"
        f" {new.offset + occupied(new.bytes)} of space {new.space}, where {old.id} ({old.value})"
        f" lives at {old.offset} to {old.offset + occupied(old.bytes)} until step {old.last}"
    )

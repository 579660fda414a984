"""The step of a plan at which most RAM is live, and what lives there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plan import Plan
from .tensors import aligned

if TYPE_CHECKING:
    from .pipeline import PlannedModel

#: Tensors that are named.
_SHOWN = 5


@dataclass(frozen=True)
class Resident:
    """A tensor in RAM.

    Attributes:
        name: Value, or ``workspace:NODE`` and ``tile:NODE``.
        bytes: Aligned size.
        kept: It is state, which lives all the time.
    """

    name: str
    bytes: int
    kept: bool


@dataclass(frozen=True)
class Peak:
    """A step and what is in RAM at it.

    Attributes:
        step: Its position in the plan.
        steps: Steps of the plan.
        node: What the step computes.
        phase: forward, loss, backward or update.
        residents: Largest first; together they are the plan's RAM but for gaps of the layout.
    """

    step: int
    steps: int
    node: str
    phase: str
    residents: tuple[Resident, ...]

    def where(self) -> str:
        """The step in words."""
        return f"step {self.step} of {self.steps} ({self.node}, {self.phase})"

    def words(self) -> str:
        """The largest residents in words."""
        told = [f"{r.name} {r.bytes:,} B{' (kept)' * r.kept}" for r in self.residents[:_SHOWN]]
        rest = self.residents[_SHOWN:]
        if rest:
            told.append(f"{len(rest)} more {sum(r.bytes for r in rest):,} B")
        return ", ".join(told)

    def record(self) -> dict[str, object]:
        """For JSON."""
        return {**vars(self), "residents": [vars(r) for r in self.residents]}


def peak_of(planned: PlannedModel) -> Peak:
    """The peak of a plan, by its checked claims."""
    report = planned.report
    k = report.peak_step
    step = report.steps[k]
    return Peak(k, len(report.steps), step.label, step.phase, _residents(planned.plan, k))


def _residents(plan: Plan, k: int) -> tuple[Resident, ...]:
    """What occupies bytes during a step; results in place share those of their operand."""
    found: dict[tuple[str, int], Resident] = {}
    for b in plan.buffers:
        if b.space not in ("arena", "state") or not b.first <= k <= b.last:
            continue
        place = (b.space, b.offset)
        size = aligned(b.bytes)
        if size and (place not in found or size > found[place].bytes):
            found[place] = Resident(b.value, size, b.space == "state")
    return tuple(sorted(found.values(), key=lambda r: (-r.bytes, r.name)))

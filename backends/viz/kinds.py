"""What each arena buffer holds, and which phase each step belongs to, for the memory picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...planner.plan import Plan

if TYPE_CHECKING:
    from ...planner.check import CheckReport


@dataclass(frozen=True)
class Kind:
    """Legend entry: fill (Okabe and Ito's colour-blind safe palette) and a text colour on it.

    ``hatch`` is the path of a stripe in a square of 6 pixels; it tells fills apart whose lightness
    is alike, which a grey print does not.
    """

    text: str
    color: str
    ink: str
    hatch: str = ""

    def fill(self, name: str) -> str:
        """What to fill with: the colour, or the pattern that has the kind's name."""
        return f"url(#{name})" if self.hatch else self.color


KINDS: dict[str, Kind] = {
    "forward": Kind("forward activation", "#56b4e9", "#000000"),
    "saved": Kind("saved for backward", "#0072b2", "#ffffff"),
    "restored": Kind("recomputed or paged in", "#e69f00", "#000000", "M-1 1L1 -1M0 6L6 0M5 7L7 5"),
    "mask": Kind("mask or index", "#f0e442", "#000000"),
    "gradient": Kind("gradient", "#d55e00", "#ffffff", "M-1 5L1 7M0 0L6 6M5 -1L7 1"),
    "scratch": Kind("workspace or tile", "#cc79a7", "#000000"),
}
PHASE_COLORS = {
    "forward": "#9ad2f2",
    "loss": "#bbbbbb",
    "backward": "#d55e00",
    "update": "#00795a",
    "recompute": "#e69f00",
    "paging": "#cc79a7",
}
#: Element types that only masks and indices have.
MASK_DTYPES = ("bits", "u8", "i32", "i64")


def shown_kinds(plan: Plan, report: CheckReport) -> dict[str, str]:
    """Buffer id -> key of ``KINDS`` for every lifetime in the report."""
    phases = [s.phase for s in report.steps]
    written: dict[str, int] = {}
    restored: set[str] = set()
    saved: set[str] = set()
    for i, step in enumerate(plan.steps):
        for b in step.writes:
            written.setdefault(b, i)
            if step.recompute or step.kind == "page_in":
                restored.add(b)
        if step.kind == "page_out":
            saved.update(b for b in step.reads if b is not None)
    turn = phases.index("backward") if "backward" in phases else len(phases)
    dtypes = {b.id: b.dtype for b in plan.buffers}
    result: dict[str, str] = {}
    for life in report.lifetimes:
        b = life.buffer
        first = phases[written[b]] if b in written else "forward"
        if life.value.startswith(("workspace:", "tile:")):
            result[b] = "scratch"
        elif b in restored:
            result[b] = "restored"
        elif first in ("backward", "update"):
            result[b] = "gradient"
        elif dtypes[b] in MASK_DTYPES:
            result[b] = "mask"
        else:
            result[b] = "saved" if b in saved or life.first < turn <= life.last else "forward"
    return result


def phase_runs(report: CheckReport) -> list[tuple[str, int, int]]:
    """Maximal runs of steps of one phase: (phase, first step, last step)."""
    runs: list[tuple[str, int, int]] = []
    for i, step in enumerate(report.steps):
        if runs and runs[-1][0] == step.phase:
            runs[-1] = (step.phase, runs[-1][1], i)
        else:
            runs.append((step.phase, i, i))
    return runs

"""memory.svg: the arena over time. Every lifetime of the checker's report is one rectangle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...planner.plan import Plan
from .files import write_whole
from .kinds import KINDS, PHASE_COLORS, phase_runs, shown_kinds
from .picture import kib, summary, title
from .routing import spread
from .svg import DECLARATION, document, element, number, shorten, text, text_width, tooltip

if TYPE_CHECKING:
    from ...planner.check import CheckReport, Lifetime

MARGIN = 20.0
LEFT = 92.0  # room for the address axis
RIGHT = 24.0
TOP = 132.0  # heading, legend and the strip of the state
STATE_HEIGHT = 20.0
PLOT_HEIGHT = 460.0
LEAST_WIDTH = 900.0
MOST_WIDTH = 2200.0
STEP_WIDTH = 14.0
BAND = 20.0  # phase strip
LABEL_HEIGHT = 14.0
GREY = "#666666"
LIVE = "#000000"
#: A budget beyond this multiple of the arena would squeeze the picture; it is named at the edge.
SCALE_LIMIT = 1.6


def write_memory_svg(plan: Plan, report: CheckReport, path: Path) -> None:
    """Write the memory-over-time picture of a checked plan.

    Args:
        plan: The plan.
        report: The checker's report on this plan; its lifetimes and live bytes are drawn.
        path: File to write; it appears whole or not at all.

    Raises:
        OdtPlanError: The file can't be written.
    """
    write_whole(path, DECLARATION + memory_drawing(plan, report))


@dataclass(frozen=True)
class _Scale:
    """Steps and bytes to pixels."""

    steps: int
    most_bytes: int
    width: float

    def x(self, step: float) -> float:
        return LEFT + step * self.width / max(1, self.steps)

    def y(self, address: float) -> float:
        return TOP + PLOT_HEIGHT * (1 - address / max(1, self.most_bytes))

    @property
    def right(self) -> float:
        return LEFT + self.width


def memory_drawing(plan: Plan, report: CheckReport, most_width: float = MOST_WIDTH) -> str:
    """The ``<svg>`` element of that file, its plot at most ``most_width`` pixels wide."""
    room = plan.device.budget.ram_bytes - report.state_bytes - plan.replay_bytes("ram")
    fits = room <= report.arena_bytes * SCALE_LIMIT
    most = round(max(report.arena_bytes, room if fits else 0, 1) * 1.06)
    steps = len(report.steps)
    scale = _Scale(steps, most, min(most_width, max(LEAST_WIDTH, steps * STEP_WIDTH)))
    kinds = shown_kinds(plan, report)
    heading = f"{plan.model.name}: memory over one training step"
    regions = _region_labels(plan)
    legend, legend_width = _legend(set(kinds.values()))
    body = [
        text(MARGIN, MARGIN + 14, shorten(heading, 100), 16, font_weight="bold"),
        text(MARGIN, MARGIN + 34, summary(plan, report), 11),
        element("defs", _patterns()),
        element("g", legend, transform=f"translate({number(MARGIN)} {number(MARGIN + 44)})"),
        *_axes(scale),
        *_state(report, scale),
        '<g class="lifetimes" stroke="#ffffff" stroke-width="0.7">',
        *(_lifetime(life, kinds[life.buffer], scale) for life in report.lifetimes),
        "</g>",
        *_names(report, kinds, scale),
        *_live(report, scale),
        *(
            _regions(regions, scale)
            if regions
            else _budget(plan.device.budget.ram_bytes, room, fits, report, scale)
        ),
        *_phases(report, scale),
    ]
    beside = max((text_width(label, 11) * 1.1 for _, label in regions), default=0.0)  # bold
    width = max(scale.right + RIGHT + beside, legend_width + 2 * MARGIN)
    width = max(width, text_width(summary(plan, report), 11) + 2 * MARGIN)
    return document(width, TOP + PLOT_HEIGHT + 112, title(plan), body)


def _patterns() -> Iterator[str]:
    for name, kind in KINDS.items():
        if kind.hatch:
            ground = element("rect", width=6.0, height=6.0, fill=kind.color)
            stripe = element("path", d=kind.hatch, stroke="#ffffff", stroke_opacity=0.4)
            yield element(
                "pattern", [ground, stripe], id=name, width=6.0, height=6.0,
                patternUnits="userSpaceOnUse",
            )  # fmt: skip


def _lifetime(life: Lifetime, kind: str, scale: _Scale) -> str:
    x, y = scale.x(life.first), scale.y(life.offset + life.bytes)
    tip = tooltip(
        f"{life.value} ({life.buffer})",
        f"{KINDS[kind].text}, {life.bytes:,} B at offset {life.offset:,}",
        f"steps {life.first} to {life.last}",
    )
    return element(
        "rect",
        tip,
        x=x,
        y=y,
        width=scale.x(life.last + 1) - x,
        height=max(0.3, scale.y(life.offset) - y),
        fill=KINDS[kind].fill(kind),
        _class=f"lifetime {kind}",
    )


def _names(report: CheckReport, kinds: dict[str, str], scale: _Scale) -> Iterator[str]:
    """Value names in the rectangles that are large enough, clear of in-place successors."""
    taken = {(life.offset, life.first) for life in report.lifetimes}
    written: dict[int, list[tuple[float, float]]] = {}  # by base line, from and to
    for life in report.lifetimes:
        followed = life.last > life.first and (life.offset, life.last) in taken
        x, end = scale.x(life.first), scale.x(life.last + (0 if followed else 1))
        height = scale.y(life.offset) - scale.y(life.offset + life.bytes)
        cells = int((end - x - 8) / (0.58 * 10))
        if height < 12 or cells < 6:
            continue
        name = shorten(life.value, cells)
        y = scale.y(life.offset + life.bytes) + min(height / 2 + 3.5, 12)
        ends = x + text_width(name, 10)
        line = written.setdefault(round(y), [])
        if any(x < right and left < ends for left, right in line):  # a view of the same bytes
            continue
        line.append((x, ends))
        yield text(
            x + 4,
            y,
            name,
            10,
            fill=KINDS[kinds[life.buffer]].ink,
            pointer_events="none",
        )


def _axes(scale: _Scale) -> Iterator[str]:
    for address in _ticks(scale.most_bytes, 8):
        y = scale.y(address)
        yield element("line", x1=LEFT, y1=y, x2=scale.right, y2=y, stroke="#dddddd", stroke_width=1)
        label = text(LEFT - 8, y + 3.5, kib(address), 10, text_anchor="end")
        yield element("g", [tooltip(f"{address:,} B"), label])
    bottom = TOP + PLOT_HEIGHT
    yield element("line", x1=LEFT, y1=TOP, x2=LEFT, y2=bottom, stroke=GREY, stroke_width=1)
    yield element(
        "line", x1=LEFT, y1=bottom, x2=scale.right, y2=bottom, stroke=GREY, stroke_width=1
    )
    middle = TOP + PLOT_HEIGHT / 2
    yield text(
        MARGIN + 6,
        middle,
        "address in the arena",
        11,
        text_anchor="middle",
        transform=f"rotate(-90 {number(MARGIN + 6)} {number(middle)})",
    )
    for step in _ticks(scale.steps, 16, whole=True):
        if step < scale.steps:
            x = scale.x(step + 0.5)
            yield element("line", x1=x, y1=bottom, x2=x, y2=bottom + 4, stroke=GREY, stroke_width=1)
            yield text(x, bottom + 16, str(step), 10, text_anchor="middle")


def _state(report: CheckReport, scale: _Scale) -> Iterator[str]:
    if not report.state_bytes:
        return
    y = TOP - STATE_HEIGHT - 14
    label = f"{report.state_bytes:,} B of weights and optimizer tensors that training changes"
    tip = tooltip(
        "state: updated weights, optimizer tensors, accumulators; it survives the step",
        f"{report.state_bytes:,} B, not drawn to scale",
    )
    shape = element(
        "rect",
        x=LEFT,
        y=y,
        width=scale.width,
        height=STATE_HEIGHT,
        fill="#d9d9d9",
        stroke=GREY,
        stroke_width=0.7,
    )
    yield element("g", [tip, shape], _class="state")
    yield text(LEFT + 6, y + 14, label, 10, pointer_events="none")
    yield text(LEFT - 8, y + 14, "state", 10, text_anchor="end")


def _live(report: CheckReport, scale: _Scale) -> Iterator[str]:
    if not report.steps:
        return
    path = [f"M{number(scale.x(0))} {number(scale.y(report.steps[0].live_bytes))}"]
    for i, step in enumerate(report.steps):
        path.append(f"V{number(scale.y(step.live_bytes))}H{number(scale.x(i + 1))}")
    d = "".join(path)
    halo, line = (4.5, 1.8) if scale.x(1) - scale.x(0) > 2 else (2.2, 1.0)
    for color, width in (("#ffffff", halo), (LIVE, line)):
        yield element(
            "path", d=d, fill="none", stroke=color, stroke_width=width, pointer_events="none"
        )
    peak = report.steps[report.peak_step]
    x, y = scale.x(report.peak_step + 0.5), scale.y(report.live_peak_bytes)
    where = f"step {report.peak_step} ({peak.kind} {shorten(peak.label, 48)})"
    label = f"live peak {report.live_peak_bytes:,} B at {where}"
    dot = element("circle", cx=x, cy=y, r=4.5, fill="#ffffff", stroke=LIVE, stroke_width=2)
    tip = tooltip(
        f"live peak {report.live_peak_bytes:,} B, arena {report.arena_bytes:,} B",
        f"step {report.peak_step}: {peak.kind} {peak.label}",
    )
    yield element("g", [tip, dot], _class="peak")
    half = text_width(label, 11) * 0.55  # bold
    middle = min(max(x, LEFT + half + 4), scale.right - half - 4)
    yield text(
        middle,
        y - 9,
        label,
        11,
        text_anchor="middle",
        font_weight="bold",
        stroke="#ffffff",
        stroke_width=4,
        paint_order="stroke",
    )


def _budget(
    budget: int, room: int, fits: bool, report: CheckReport, scale: _Scale
) -> Iterator[str]:
    y = scale.y(room) if fits else TOP
    label = f"RAM budget {budget:,} B leaves {room:,} B" + ("" if fits else " (above this scale)")
    line = element(
        "line",
        x1=LEFT,
        y1=y,
        x2=scale.right,
        y2=y,
        stroke="#d55e00",
        stroke_width=2,
        stroke_dasharray="9 5" if fits else "2 5",
    )
    yield element(
        "g", [tooltip(f"{budget:,} B, less the state: {room:,} B"), line], _class="budget"
    )
    # the peak's label stands on the other side
    left = report.peak_step * 2 >= len(report.steps)
    x, anchor = (LEFT + 6, "start") if left else (scale.right - 4, "end")
    yield text(x, y - 5, label, 11, text_anchor=anchor, fill="#a34700", font_weight="bold")


def _region_labels(plan: Plan) -> list[tuple[int, str]]:
    """Where the part of each RAM region ends; the arena is these parts, one above the other."""
    if not plan.regions:
        return []
    return [
        (part.end, f"{r.name}: arena {r.arena:,} B, state {r.state:,} B of {r.budget:,} B")
        for r, part in zip(plan.regions, plan.parts("arena"), strict=True)
        if part.end > part.begin
    ]


def _regions(labels: list[tuple[int, str]], scale: _Scale) -> Iterator[str]:
    """Lines at the ends of regions; their labels stand on the right, none upon another."""
    ends = [scale.y(address) for address, _ in labels][::-1]
    places = spread([y + 4 for y in ends], [LABEL_HEIGHT] * len(ends), [1.0] * len(ends))
    for y, place, (_, label) in zip(ends, places, labels[::-1], strict=True):
        line = element(
            "line", x1=LEFT, y1=y, x2=scale.right, y2=y, stroke="#d55e00", stroke_width=2,
            stroke_dasharray="9 5",
        )  # fmt: skip
        yield element("g", [tooltip(label), line], _class="region")
        yield text(scale.right + 8, place, label, 11, fill="#a34700", font_weight="bold")


def _phases(report: CheckReport, scale: _Scale) -> Iterator[str]:
    y = TOP + PLOT_HEIGHT + 24
    for name, first, last in phase_runs(report):
        x, end = scale.x(first), scale.x(last + 1)
        tip = tooltip(f"{name}: steps {first} to {last}")
        yield element(
            "rect",
            tip,
            x=x,
            y=y,
            width=end - x,
            height=BAND,
            fill=PHASE_COLORS[name],
            stroke="#ffffff",
            stroke_width=0.7 if end - x > 4 else 0,
            _class=f"phase {name}",
        )
        if text_width(name, 10) + 6 < end - x:
            ink = "#ffffff" if name in ("backward", "update") else "#000000"
            yield text((x + end) / 2, y + 14, name, 10, text_anchor="middle", fill=ink)
    yield text(LEFT - 8, y + 14, "phase", 10, text_anchor="end")
    yield text(LEFT - 8, TOP + PLOT_HEIGHT + 16, "step", 10, text_anchor="end")
    x = LEFT
    for name, color in PHASE_COLORS.items():
        yield element("rect", x=x, y=y + 34, width=14.0, height=12.0, fill=color)
        yield text(x + 19, y + 44, name, 10.5)
        x += 19 + text_width(name, 10.5) + 16


def _legend(kinds: set[str]) -> tuple[list[str], float]:
    parts: list[str] = []
    x = 0.0
    for name, kind in KINDS.items():
        if name in kinds:
            parts.append(element("rect", x=x, y=2.0, width=18.0, height=13.0, fill=kind.fill(name)))
            parts.append(text(x + 24, 13, kind.text, 10.5))
            x += 24 + text_width(kind.text, 10.5) + 14
    parts.append(element("line", x1=x, y1=8.5, x2=x + 18, y2=8.5, stroke=LIVE, stroke_width=1.8))
    parts.append(text(x + 24, 13, "live bytes", 10.5))
    return parts, x + 24 + text_width("live bytes", 10.5)


def _ticks(most: int, wanted: int, *, whole: bool = False) -> list[int]:
    """Round values from 0 to ``most``: powers of two for bytes, 1-2-5 for counts (``whole``)."""
    step, factors = 1, ((2, 5, 10) if whole else (2,))
    base = 1
    while most // step > wanted:
        if whole:
            step = next(base * f for f in factors if base * f > step)
            base = step if step == base * 10 else base
        else:
            step *= 2
    return list(range(0, most + 1, step))

"""The page of a plan: what the terminal report tells, drawn, and every layer in a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ... import figures
from ...figures import Budgeted, Grid, Line, Meter
from ...planner.sizes import format_joules, format_seconds
from ..viz.graph_svg import graph_drawing
from ..viz.kinds import PHASE_COLORS
from ..viz.layer_table import layer_grid
from ..viz.memory_svg import memory_drawing
from .page import Page, Part, Section, Table, Tile

if TYPE_CHECKING:
    from ...planner.pipeline import PlannedModel
    from ..c import Built

#: Of the memory picture: its letters can be read without zooming on most screens.
PLOT_WIDTH = 1000.0
#: Okabe and Ito's palette, for the parts of a meter, which are named below it in their order.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#999999")


def plan_page(
    planned: PlannedModel, budgeted: Budgeted, built: Built | None = None
) -> Page:
    """The report of a new plan.

    Args:
        planned: The plan with what it was made from.
        budgeted: Which budgets the user gave.
        built: What a compiler made of the emitted C.
    """
    plan, training, report = planned.plan, planned.training, planned.report
    sections = [
        _summary(planned, budgeted, built),
        Section(
            "graph",
            "Graph",
            drawing=graph_drawing(plan, training, report),
            found="node",
            things="nodes",
        ),
        Section(
            "memory",
            "Memory",
            drawing=memory_drawing(plan, report, PLOT_WIDTH),
            found="lifetime",
            things="tensors",
        ),
        _spent(planned),
        _trained(planned),
        _layers(planned),
    ]
    if planned.baselines:
        grid = figures.baseline_grid(planned)
        sections.append(Section("comparison", "Comparison", tables=(Table(grid, (1, 2, 3)),)))
    return Page(
        title=f"{plan.model.name} on {planned.device.name}",
        facts=f"A training plan, {plan.status}, replayed by the checker. Times and energies are"
        " predictions, flash is estimated where it says so.",
        sections=tuple(sections),
        made_by=f"odt-plan {plan.odt_plan_version}",
    )


def _summary(planned: PlannedModel, budgeted: Budgeted, built: Built | None) -> Section:
    plan, device, report = planned.plan, planned.device, planned.report
    ram, flash = (f(plan, device, budgeted) for f in (figures.ram_meter, figures.flash_meter))
    best = plan.objective[0]
    value, bound = (figures.amount(best.name, v) for v in (best.value, best.bound))
    peak = report.steps[report.peak_step]
    where = f"at step {report.peak_step} of {len(report.steps)} ({peak.phase})"
    per_step, spent = ("predicted per training step",), _part_grid(planned)
    tiles = (
        _meter_tile(ram),
        _meter_tile(flash),
        Tile("latency", format_seconds(report.latency_s), per_step, _parts(spent, 1)),
        Tile("energy", format_joules(report.energy_j), per_step, _parts(spent, 3)),
        Tile("peak of the arena", f"{report.live_peak_bytes:,} B", (where,)),
        Tile(f"gap of {best.name}", f"{best.gap:.3%}", (value, f"bound {bound}", plan.status)),
    )
    lines = figures.heading(planned, budgeted)
    lines.append(Line(ram.label, f"{ram.text} {ram.sum}"))
    lines += figures.region_lines(plan)
    lines.append(Line(flash.label, f"{flash.text} {flash.sum}"))
    lines += figures.built_lines(plan, device, built)
    lines += figures.storage_lines(plan)
    lines.append(figures.store_line(planned))
    lines += figures.time_lines(report, device, plan.device.storage)
    lines += figures.replay_lines(plan)
    if planned.no_replay:
        lines.append(Line("replay", f"none: {planned.no_replay}"))
    lines.append(figures.saved_line(plan))
    lines += figures.precision_lines(planned)
    lines += figures.solver_lines(plan)
    return Section("summary", "Summary", tiles, tuple(lines))


def _meter_tile(meter: Meter) -> Tile:
    whole = max(meter.used, meter.limit, 1)
    parts = (
        Part(f"{name} {size:,} B", size / whole, color)
        for (name, size), color in zip(meter.parts, COLORS, strict=False)
        if size
    )
    note = f"{meter.share:.1%} of {meter.limit:,} B"
    return Tile(meter.label, f"{meter.used:,} B", (note,), tuple(parts))


def _part_grid(planned: PlannedModel) -> Grid:
    return figures.part_grid(planned.report, planned.device, planned.plan.device.storage)


def _parts(grid: Grid, column: int) -> tuple[Part, ...]:
    """What parts of a training step take of a whole; a column with its share behind it."""
    whole = sum(row[column].value or 0.0 for row in grid.rows)
    return tuple(
        Part(f"{row[0].text} {row[column + 1].text}", (row[column].value or 0.0) / whole, color)
        for row, color in zip(grid.rows, _part_colors(grid), strict=True)
    )


def _part_colors(grid: Grid) -> tuple[str, ...]:
    """A storage is what paging needs."""
    return tuple(PHASE_COLORS.get(row[0].text, PHASE_COLORS["paging"]) for row in grid.rows)


def _spent(planned: PlannedModel) -> Section:
    grid = _part_grid(planned)
    table = Table(grid, (1, 3), _part_colors(grid), caption="Of a training step; predicted.")
    return Section("time", "Time and energy", tables=(table,))


def _trained(planned: PlannedModel) -> Section:
    plan = planned.plan
    lines, tables = [figures.trained_line(plan)], [Table(figures.update_grid(plan), (4,))]
    if (trial := plan.decisions.trial) is not None:
        lines.append(figures.trial_line(trial))
        tables.append(Table(figures.trial_grid(trial)))
    return Section("trained", "What is trained", lines=tuple(lines), tables=tuple(tables))


def _layers(planned: PlannedModel) -> Section:
    """Every node of forward and loss; what its gradients and updates cost is its own."""
    grid, places = layer_grid(planned)
    table = Table(
        grid,
        links=tuple(f"#node{i}" for i in places),
        caption="Forward, recompute, backward and update in cycles, predicted"
        + (", of the last micro-batch." if planned.plan.training.micro_batches > 1 else "."),
    )
    return Section("layers", "Layers", tables=(table,))

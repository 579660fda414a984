"""The terminal report of a plan. Figures are predictions unless the line says what they are.

Rich draws it; through a pipe or with NO_COLOR it is plain text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import figures
from .backends.viz.layer_table import layer_grid
from .figures import Budgeted, Grid, Line, Meter
from .planner.check import CheckReport
from .planner.device import Device, Storage
from .planner.pipeline import PlannedModel
from .planner.plan import Plan
from .planner.sizes import format_bytes, format_joules, format_seconds
from .tables import print_table

if TYPE_CHECKING:
    from .backends.c import Built

_BAR = 24
_LABEL = 10
#: Width of the report where there is no terminal to ask.
_PIPE_WIDTH = 160


def console() -> Console:
    """Standard output; plain and wide where it is no terminal."""
    plain = Console(highlight=False, soft_wrap=True)
    return plain if plain.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def print_plan(
    planned: PlannedModel,
    budgeted: Budgeted,
    files: Sequence[Path],
    built: Built | None = None,
    *,
    verbose: bool = False,
) -> None:
    """Print the report of a new plan.

    Args:
        planned: The plan.
        budgeted: Which budgets were given.
        files: What was written.
        built: What a compiler made of the emitted C.
        verbose: What the report sums up is listed by name, too.
    """
    out = console()
    plan, device = planned.plan, planned.device
    _lines(out, figures.heading(planned, budgeted))
    out.print()
    _meter(out, figures.ram_meter(plan, device, budgeted))
    _lines(out, figures.region_lines(plan))
    _meter(out, figures.flash_meter(plan, device, budgeted))
    _lines(out, figures.built_lines(plan, device, built))
    _lines(out, figures.storage_lines(plan))
    _lines(out, [figures.store_line(planned)])
    _lines(out, figures.time_lines(planned.report, device, plan.device.storage))
    _lines(out, figures.replay_lines(plan))
    if planned.no_replay:
        _line(out, "replay", f"none: {planned.no_replay}")
    out.print()
    _lines(out, [figures.trained_line(plan)])
    print_grid(out, figures.update_grid(plan))
    if (trial := plan.decisions.trial) is not None:
        _lines(out, [figures.trial_line(trial)])
        print_grid(out, figures.trial_grid(trial))
    _lines(out, [figures.saved_line(plan)])
    _lines(out, figures.precision_lines(planned))
    if verbose:
        _by_name(out, planned)
    _lines(out, figures.solver_lines(plan))
    if planned.baselines:
        out.print()
        print_grid(out, figures.baseline_grid(planned))
    if files:
        _line(out, "written", _listed(files))


def print_verified(plan_file: Path, plan: Plan, report: CheckReport) -> None:
    """Print what the replay of a plan file found."""
    out = console()
    ram = plan.claims.ram_bytes.total
    found = f"{plan_file}: {len(plan.steps)} steps replayed, all claims confirmed"
    _line(out, "ok", found, "green")
    _line(out, "RAM", f"{format_bytes(ram)} of {format_bytes(plan.device.budget.ram_bytes)}")
    _lines(out, figures.region_lines(plan))
    flash = plan.claims.flash_bytes.total
    _line(out, "flash", f"{format_bytes(flash)} of {format_bytes(plan.device.budget.flash_bytes)}")
    _line(out, "peak", figures.peak_text(report))
    _line(out, "time", f"{format_seconds(report.latency_s)} predicted per training step")
    _line(out, "energy", f"{format_joules(report.energy_j)} predicted per training step")
    _lines(out, figures.replay_lines(plan))


def verified_record(plan: Plan, report: CheckReport) -> dict[str, object]:
    """What ``verify --json`` prints."""
    return {
        "ok": True,
        "steps": len(plan.steps),
        "ram_bytes": plan.claims.ram_bytes.total,
        "arena_bytes": report.arena_bytes,
        "state_bytes": report.state_bytes,
        "regions": [r.model_dump() for r in plan.regions],
        "live_peak_bytes": report.live_peak_bytes,
        "peak_step": report.peak_step,
        "flash_weights_bytes": report.flash_weights_bytes,
        "storage_bytes": report.storage_bytes,
        "worn_bytes": report.worn_bytes,
        "life_steps": report.life_steps,
        "cycles": report.cycles,
        "latency_s": report.latency_s,
        "energy_j": report.energy_j,
        "replay": None if plan.replay is None else plan.replay.model_dump(),
    }


def _line(out: Console, label: str, text: str, style: str = "bold") -> None:
    out.print(Text.assemble((f"{label:<{_LABEL}}", style), text), soft_wrap=True)


def _lines(out: Console, lines: Sequence[Line]) -> None:
    for line in lines:
        _line(out, *line)


def _meter(out: Console, meter: Meter) -> None:
    full = min(_BAR, int(meter.share * _BAR))  # full only when nothing is left
    drawn = "[" + "=" * full + " " * (_BAR - full) + "]"
    style = "green" if meter.share < 0.9 else "yellow"
    label, text = f"{meter.label:<{_LABEL}}", f" {meter.share:6.1%}  {meter.text}"
    out.print(Text.assemble((label, "bold"), (drawn, style), text), soft_wrap=True)
    _line(out, "", meter.sum)


def print_grid(out: Console, grid: Grid, styles: Mapping[str, str] | None = None) -> None:
    """Print a table; cells with a certain text have a style."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(grid.columns):
        table.add_column(name, justify="right" if grid.numeric(i) else "left")
    for row in grid.rows:
        table.add_row(*(Text(cell.text, (styles or {}).get(cell.text, "")) for cell in row))
    print_table(out, table)


def _by_name(out: Console, planned: PlannedModel) -> None:
    """What is frozen, what becomes of each tensor that backward reads, and every layer."""
    plan = planned.plan
    decided = plan.decisions
    frozen = [u.param for u in decided.updates if not u.ratio]
    saved = [(a.value, f"{a.bytes:,} B", a.action) for a in decided.activations]
    streamed = [(n, "row by row", "") for n in decided.streamed]
    out.print()
    if frozen:
        _line(out, "frozen", ", ".join(frozen))
    for head, rows in (("saved tensor", saved), ("block", streamed)):
        if rows:
            table = Table(head, "", "", box=box.SIMPLE_HEAD, pad_edge=False)
            for row in rows:
                table.add_row(*map(Text, row))
            print_table(out, table)
    _line(out, "layers", "results in bytes; what each computes in cycles, predicted")
    print_grid(out, layer_grid(planned)[0])


def print_devices(devices: Sequence[Device]) -> None:
    """Print one row per device."""
    table = Table("id", "name", "core", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("MHz", "RAM", "flash"):
        table.add_column(name, justify="right")
    table.add_column("storage")
    for d in devices:
        mhz = f"{d.clock_hz.value / 1e6:g}"
        ram = _short(sum(r.bytes for r in d.ram_runs))
        storage = ", ".join(s.id for s in d.storage) or "none"
        cells = (d.id, d.name, d.core, mhz, ram, _short(d.flash_bytes), storage)
        table.add_row(*map(Text, cells))
    out = console()
    print_table(out, table)
    out.print("`odt-plan devices show ID` prints every number with its source.", soft_wrap=True)


def _storage_facts(s: Storage) -> Iterator[tuple[str, str, str]]:
    """Whether transfers run beside the core, what wears, and whether the chip's flash may."""
    if s.dma is not None:
        yield "  DMA", "beside the core" if s.dma.value else "none", s.dma.source
    if s.wear is not None:
        yield "  erase cycles", f"{s.wear.cycles.value:g}", s.wear.cycles.source
        how = "levelled" if s.wear.levelled else "of each tensor's own"
        yield "  erase unit", f"{format_bytes(s.wear.unit_bytes)}, {how}", s.wear.source
    if s.region is not None:
        allowed = "allowed" if s.pages else "not allowed"
        source = s.allow_paging.source if s.allow_paging else ""
        yield "  paging", f"{allowed} to this flash of the chip, {s.region}", source


def print_device(device: Device) -> None:
    """Print everything known about a device, each number with its source."""
    out = console()
    out.print(Text.assemble((device.id, "bold"), f"  {device.name}"), soft_wrap=True)
    if device.notes:
        out.print(Text(device.notes), soft_wrap=True)
    clock, cpi, power = device.clock_hz, device.cycles_per_instruction, device.power_w
    rows = [
        ("core", device.core, device.core_source or ""),
        ("clock", f"{clock.value / 1e6:g} MHz", clock.source),
        ("cycles per instruction", f"{cpi.value:g}", cpi.source),
        ("power while computing", f"{power.value:g} W", power.source),
    ]
    for r in device.regions:
        sectors = " + ".join(f"{n} x {_short(b)}" for n, b in r.sectors)
        where = f"{r.origin:#010x}  {format_bytes(r.bytes)}"
        rows.append((f"{r.kind} {r.name}", f"{where}{': ' if sectors else ''}{sectors}", r.source))
        if r.erase_cycles is not None:
            worn = r.erase_cycles
            rows.append(("  erase cycles", f"{worn.value:g} of each sector", worn.source))
        if r.program_bytes is not None:
            unit = r.program_bytes
            rows.append(("  programmed by", f"{unit.value:,} B", unit.source))
        if r.extra_cycles_per_byte is not None:
            more = r.extra_cycles_per_byte
            rows.append(("  extra", f"{more.value:g} cycles per byte touched", more.source))
    kept = device.reserve
    rows.append(("reserved RAM", format_bytes(kept.ram_bytes), kept.source))
    rows.append(("reserved flash", format_bytes(kept.flash_bytes), kept.source))
    for s in device.storage:
        rows.append((f"storage {s.id}", f"{s.name}, {format_bytes(s.bytes)}", ""))
        for what, rate, wait in (
            ("read", s.read_bytes_per_s, s.read_latency_s),
            ("write", s.write_bytes_per_s, s.write_latency_s),
        ):
            rows.append((f"  {what} rate", f"{rate.value / 1e6:g} MB/s", rate.source))
            rows.append((f"  {what} latency", format_seconds(wait.value), wait.source))
        rows.append(("  power", f"{s.power_w.value:g} W", s.power_w.source))
        rows += _storage_facts(s)
    for label, value, source in rows:
        told = Text(f"{label:<24}{value}")
        out.print(told.append(f"  ({source})" if source else "", "dim"), soft_wrap=True)
    for run, left in device.ram_budgets:
        less = ", less the reserve" * (left < run.bytes)
        extra = run.extra_cycles_per_byte
        slow = f", {extra:g} cycles per byte slower" if extra else ""
        whole = f"{format_bytes(run.bytes)} of RAM from {run.origin:#010x} ({run.name}){slow}{less}"
        out.print(Text(f"{'a plan uses':<24}{whole}"), soft_wrap=True)
    out.print(Text(f"{'':<24}all flash, less the reserve"), soft_wrap=True)


def _listed(files: Sequence[Path]) -> str:
    """The folder and its files; the kernels of the C library only by number."""
    folder = min((f.parent for f in files), key=lambda p: len(p.parts))
    names = [str(f.relative_to(folder)) for f in files]
    own = [n for n in names if not n.startswith("odtplan_")]
    kernels = len(names) - len(own)
    more = f" and {kernels} files of the kernel library" if kernels else ""
    return f"{folder}: {', '.join(own)}{more}"


def _short(n: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n / size:g} {unit}"
    return f"{n} B"

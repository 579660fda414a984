"""Curves and surveys as tables on the terminal, CSV, JSON and pictures."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import StringIO
from math import isinf

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from . import __version__
from .backends.html import Page, Section, Table
from .backends.viz.curve_svg import CurvePicture, CurvePoint, Mark, curve_drawing
from .figures import Cell, Grid, Line
from .fit import Fit
from .ir.errors import Shortfall
from .pareto import Curve, Point, Status, YName, format_x
from .planner.sizes import format_joules, format_seconds
from .report import console, print_grid
from .sweep import Figures
from .tables import print_table

#: Colours that everyone tells apart; words say the same.
_STYLES: dict[str, str] = {"optimal": "blue", "feasible": "yellow", "fits": "blue"}
_MARKS: dict[Status, Mark] = {"optimal": "optimal", "feasible": "feasible"}
_LIMITS = {"ram": "RAM", "flash": "flash", "latency": "latency", "energy": "energy"}
_WHAT: dict[YName, str] = {
    "learn": "importance learned",
    "latency": "latency per training step",
    "energy": "energy per training step",
}
#: Cells of the matrix where there is no plan.
_CELLS = {"unknown": "?", "unsupported": "-", "rejected": "x", "failed": "!"}


def table_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as CSV with a header; None is an empty cell. There is at least one row."""
    out = StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# -- curves -------------------------------------------------------------------------------------


def curve_rows(curve: Curve) -> list[dict[str, object]]:
    """One flat record per point; units stand in the names."""
    unit = "s" if curve.x == "latency" else "bytes"
    return [
        {
            f"{curve.x}_budget_{unit}": _x(curve, p.budget),
            **_figures(p.figures),
            "bound": p.bound,
            "gap": p.gap,
            "status": p.status,
            "seconds": round(p.seconds, 3),
            "made_for": None if p.made_for is None or isinf(p.made_for) else _x(curve, p.made_for),
            "reason": p.reason,
        }
        for p in curve.points
    ]


def curve_record(curve: Curve) -> dict[str, object]:
    """What ``pareto --json`` prints."""
    return {
        "model": curve.model,
        "device": curve.device,
        "x": curve.x,
        "y": curve.y,
        "device_offers": curve.own_budget,
        "solves": curve.solves,
        "seconds": round(curve.seconds, 3),
        "importance": curve.importance,
        "points": curve_rows(curve),
    }


def print_curve(curve: Curve) -> None:
    """Print one row per point, and why some have no plan."""
    out = console()
    styles: dict[str, str] = {p.status: _STYLES.get(p.status, "red") for p in curve.points}
    print_grid(out, curve_grid(curve), styles)
    for note in curve_notes(curve):
        out.print(Text(note), soft_wrap=True)


def curve_grid(curve: Curve) -> Grid:
    """One row per point."""
    rows = []
    for p in curve.points:
        known = _figures(p.figures).values()
        figures = zip(_cells(p.figures), known, strict=True)
        rows.append(
            (
                Cell(_short_x(curve, p.budget), _x(curve, p.budget)),
                *(Cell(text, value) for text, value in figures),
                Cell("-" if p.bound is None else format_y(curve.y, p.bound), p.bound),
                Cell("-" if p.gap is None else f"{p.gap:.3%}", p.gap),
                Cell(p.status),
                Cell(f"{p.seconds:.2f}" if p.seconds else "-", p.seconds),
            )
        )
    limits = (f"{_LIMITS[curve.x]} budget", "RAM", "flash", "latency", "energy", "learn")
    return Grid((*limits, f"bound of {curve.y}", "gap", "status", "s"), tuple(rows))


def curve_notes(curve: Curve) -> list[str]:
    """Why budgets have no plan, and what the curve was made of."""
    notes = [f"{_short_x(curve, p.budget)}: {p.reason}" for p in curve.points if p.reason]
    told = f"{curve.model} on {curve.device}: {len(curve.points)} budgets answered by"
    whole = f"{curve.solves} solves of {curve.seconds:.1f} s in all"
    notes.append(f"{told} {whole}; every plan checked")
    if curve.y == "learn":
        notes.append(f"importance: {curve.importance}")
    if curve.own_budget is not None:
        own = format_x(curve.x, curve.own_budget)
        notes.append(f"the device offers {own} of {_LIMITS[curve.x]}")
    return notes


def curve_page(curve: Curve) -> Page:
    """The curve for ``backends.html``."""
    picture = curve_picture(curve)
    drawn = Section(
        "curve", "Curve", drawing=curve_drawing(picture), found="marker", things="points"
    )
    budgets = Section(
        "budgets",
        "Budgets",
        lines=tuple(Line("", note) for note in curve_notes(curve)),
        tables=(Table(curve_grid(curve)),),
    )
    facts = "Every plan is checked. Times and energies are predictions."
    return Page(picture.title, facts, (drawn, budgets), f"odt-plan {__version__}")


def curve_picture(curve: Curve) -> CurvePicture:
    """The curve for ``backends.viz``."""
    return CurvePicture(
        title=f"{curve.model}: {_WHAT[curve.y]} against {_LIMITS[curve.x]} on {curve.device}",
        facts=f"{len(curve.points)} budgets, {curve.solves} solves; every plan is checked; times"
        f" and energies are predictions; importance: {curve.importance}",
        points=tuple(
            CurvePoint(p.budget, p.value, p.bound, _MARKS.get(p.status, "none"), _details(curve, p))
            for p in curve.points
        ),
        limit=curve.own_budget,
        x_label=f"budget of {_LIMITS[curve.x]}" + (" per training step" * (curve.x == "latency")),
        y_label=_WHAT[curve.y],
        x_text=lambda v: _tick_x(curve, v),
        y_text=lambda v: format_y(curve.y, v),
    )


def format_y(y: YName, value: float) -> str:
    """A value of y with its unit; importance has none."""
    if y == "learn":
        return f"{value:,.0f}"
    return format_seconds(value) if y == "latency" else format_joules(value)


def _details(curve: Curve, p: Point) -> tuple[str, ...]:
    head = f"{_LIMITS[curve.x]} budget {format_x(curve.x, p.budget)}: {p.status}"
    if p.value is None or p.bound is None:
        return (head, p.reason)
    names = ("RAM", "flash", "latency", "energy", "learn")
    figures = ", ".join(f"{n} {c}" for n, c in zip(names, _cells(p.figures), strict=True))
    return (head, figures, f"bound {format_y(curve.y, p.bound)}, gap {p.gap:.3%}")


def _x(curve: Curve, value: float) -> float | int:
    return value if curve.x == "latency" else int(value)


def _short_x(curve: Curve, value: float) -> str:
    return format_seconds(value) if curve.x == "latency" else f"{int(value):,} B"


def _tick_x(curve: Curve, value: float) -> str:
    if curve.x == "latency":
        return format_seconds(value)
    return f"{value / 1000:,.6g} kB" if value >= 1000 else f"{value:g} B"


# -- surveys ------------------------------------------------------------------------------------


def fit_rows(fits: Sequence[Fit]) -> list[dict[str, object]]:
    """One flat record per model and device."""
    return [
        {
            "model": f.model,
            "device": f.device,
            "verdict": f.verdict,
            **_figures(f.outcome.figures),
            "updated_tensors": None if (g := f.outcome.figures) is None else len(g.updates),
            "trainable_tensors": None if g is None else g.tensors,
            "share_of_unlimited": f.share,
            **{f"{name}_missing": _missing(f.outcome.shortfalls, name) for name in _LIMITS},
            "seconds": round(f.outcome.seconds, 3),
            "reason": f.outcome.reason,
        }
        for f in fits
    ]


def print_fits(fits: Sequence[Fit]) -> None:
    """Print one row per device for one model, or the matrix of models and devices."""
    models = list(dict.fromkeys(f.model for f in fits))
    if len(models) == 1:
        _print_devices(fits)
    else:
        _print_matrix(fits, models)
    out = console()
    told: set[str] = set()
    for f in fits:
        if f.verdict in _CELLS and f.outcome.reason not in told:
            told.add(f.outcome.reason)
            reason = f.outcome.reason
            line = reason if f.model in reason else f"{f.model}: {reason}"
            out.print(Text(line), soft_wrap=True)
    fitting = sum(f.verdict == "fits" for f in fits)
    out.print(f"{fitting} of {len(fits)} fit; times, energies and code sizes are predictions")


def _print_devices(fits: Sequence[Fit]) -> None:
    table = RichTable("device", "verdict", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("RAM", "flash", "latency", "energy", "learn", "share", "updated"):
        table.add_column(name, justify="right")
    table.add_column("what is missing")
    for f in fits:
        figures = f.outcome.figures
        share = "-" if f.share is None else f"{f.share:.1%}"
        updated = "-" if figures is None else f"{len(figures.updates)} of {figures.tensors}"
        table.add_row(
            Text(f.device),
            Text(f.verdict, _STYLES.get(f.verdict, "yellow")),
            *_cells(figures),
            share,
            updated,
            Text(", ".join(map(_lacks, f.outcome.shortfalls))),
        )
    print_table(console(), table)


def _print_matrix(fits: Sequence[Fit], models: Sequence[str]) -> None:
    devices = list(dict.fromkeys(f.device for f in fits))
    table = RichTable("model", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, _ in enumerate(devices, 1):
        table.add_column(str(i), justify="right")
    cells = {(f.model, f.device): _cell(f) for f in fits}
    for m in models:
        table.add_row(Text(m), *(cells.get((m, d), Text("")) for d in devices))
    out = console()
    print_table(out, table)
    out.print(Text(", ".join(f"{i} {d}" for i, d in enumerate(devices, 1))), soft_wrap=True)
    out.print(
        "a number: fits, and learns so many per cent of what it could without limits; R, F, L, E:"
        " too little RAM, flash, latency, energy; -: can't be planned; x: options or samples"
        " don't suit it; ?: none found, none excluded; !: failed",
        soft_wrap=True,
    )


def _cell(f: Fit) -> Text:
    style = _STYLES.get(f.verdict, "yellow")
    if f.verdict == "fits":
        return Text("yes" if f.share is None else f"{100 * f.share:.0f}", style)
    if f.verdict == "too large":
        return Text("".join(_LIMITS[s.limit][0].upper() for s in f.outcome.shortfalls), style)
    return Text(_CELLS[f.verdict], style)


def _lacks(short: Shortfall) -> str:
    """By how much a limit binds."""
    missing = (short.works or short.needs) - short.has
    if short.limit == "latency":
        return f"latency {format_seconds(missing)}"
    if short.limit == "energy":
        return f"energy {format_joules(missing)}"
    return f"{_LIMITS[short.limit]} {int(missing):,} B"


def _missing(shortfalls: Sequence[Shortfall], limit: str) -> float | None:
    return next(((s.works or s.needs) - s.has for s in shortfalls if s.limit == limit), None)


# -- figures ------------------------------------------------------------------------------------


def _figures(figures: Figures | None) -> dict[str, float | None]:
    names = ("ram_bytes", "flash_bytes", "latency_s", "energy_j", "learn")
    known = {} if figures is None else asdict(figures)
    return {n: known.get(n) for n in names}


def _cells(figures: Figures | None) -> tuple[str, str, str, str, str]:
    if figures is None:
        return ("-",) * 5
    return (
        f"{figures.ram_bytes:,} B",
        f"{figures.flash_bytes:,} B",
        format_seconds(figures.latency_s),
        format_joules(figures.energy_j),
        f"{figures.learn:,.0f}",
    )

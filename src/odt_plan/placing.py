"""What ``odt-plan layout FILE.csv`` does: blocks of a file -> addresses in one arena."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from .backends.viz.files import write_whole
from .ir.errors import InfeasibleError, OdtPlanError
from .planner.blocks import peak_bytes
from .planner.layout import Layout, lay_out
from .planner.layout_file import BlockFile, load_blocks, placed_csv
from .planner.sizes import format_bytes, parse_bytes
from .report import console


@dataclass(frozen=True)
class LayoutOptions:
    """The options of ``odt-plan layout`` as they were typed; see its ``--help``."""

    file: Path
    capacity: str | None
    time_limit_s: float
    seed: int
    output: Path | None
    as_json: bool


def run_layout(options: LayoutOptions) -> dict[str, object]:
    """Place the blocks, print the report, write the file.

    Returns:
        The record that ``--json`` prints.

    Raises:
        InfeasibleError: The blocks do not fit the capacity, or no layout that does was found.
        OdtPlanError: A file can't be read or written.
        UsageError: The file or the capacity is wrong.
    """
    target = options.output
    if target is not None and not target.parent.is_dir():  # before a long search
        raise OdtPlanError(f"{target}: can't write: {target.parent} is no folder")
    asked = options.capacity
    capacity = None if asked is None else parse_bytes(asked, "--capacity")
    file = load_blocks(options.file)
    begin = time.perf_counter()
    layout = lay_out(
        file.blocks, capacity,
        seconds=options.time_limit_s, deterministic=False, seed=options.seed,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    if capacity is not None and layout.arena_bytes > capacity:
        raise InfeasibleError(_why_not(file, layout, capacity, options))
    if target is not None:
        write_whole(target, placed_csv(file, layout.offsets))
    if not options.as_json:
        _print(file, layout, capacity, seconds, target)
    return {
        "blocks": len(file.blocks),
        "live_peak_bytes": peak_bytes(file.blocks),
        "bound_bytes": layout.bound_bytes,
        "arena_bytes": layout.arena_bytes,
        "capacity_bytes": capacity,
        "seconds": round(seconds, 3),
        "offsets": dict(zip(file.ids, layout.offsets, strict=True)),
    }


def _why_not(file: BlockFile, layout: Layout, capacity: int, options: LayoutOptions) -> str:
    peak, room = format_bytes(peak_bytes(file.blocks)), format_bytes(capacity)
    works = f"a --capacity that works is {layout.arena_bytes}"
    if peak_bytes(file.blocks) > capacity:
        short = peak_bytes(file.blocks) - capacity
        return (
            f"{options.file}: can't fit: {peak} live at a time, the capacity is {room},"
            f" {short:,} B too few; {works}"
        )
    if layout.bound_bytes > capacity:
        return (
            f"{options.file}: can't fit: {peak} live at a time, but it is proven that no layout of"
            f" the {len(file.blocks)} blocks keeps {room}; {works}"
        )
    return (
        f"{options.file}: no layout within {room} was found in {options.time_limit_s:g} s, and none"
        f" was ruled out: {peak} live at a time, the best arena found has"
        f" {format_bytes(layout.arena_bytes)}, {layout.arena_bytes - capacity:,} B too many; raise"
        " --time-limit or --capacity"
    )


def _print(
    file: BlockFile, layout: Layout, capacity: int | None, seconds: float, output: Path | None
) -> None:
    out = console()

    def line(label: str, text: str) -> None:
        out.print(Text.assemble((f"{label:<10}", "bold"), text), soft_wrap=True)

    peak, arena = peak_bytes(file.blocks), layout.arena_bytes
    line("blocks", f"{len(file.blocks):,}")
    line("live peak", f"{format_bytes(peak)}, the least that any layout needs")
    if arena == layout.bound_bytes:
        proof = "smallest possible" if arena > peak else "equals the live peak"
    else:
        proof = f"{arena - layout.bound_bytes:,} B above the proven bound"
    line("arena", f"{format_bytes(arena)}, {proof}")
    if capacity is not None:
        line("capacity", f"{format_bytes(capacity)}: fits, {capacity - arena:,} B left")
    line("search", f"{seconds:.2f} s, {layout.nodes:,} partial layouts")
    if output is not None:
        line("written", str(output))

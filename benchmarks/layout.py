"""Arenas against the live-byte peak: public instances of static allocation, and our own plans.

Public instances are those of MiniMalloc (github.com/google/minimalloc, benchmarks/challenging);
``ODT_PLAN_LAYOUT_INSTANCES`` names the folder with their CSV files. The number before ``.csv`` in
their names is the capacity.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from odt_plan.ir.errors import OdtPlanError, UnsupportedModelError
from odt_plan.planner.blocks import Block, peak_bytes
from odt_plan.planner.device import load_device
from odt_plan.planner.layout import lay_out
from odt_plan.planner.layout_file import load_blocks
from odt_plan.planner.pipeline import Request, make_plan

from .models import models, shared

#: Limit per instance, as work: answers do not depend on what else the machine does.
WORK_SECONDS = 120.0
#: RAM enough for every model, so that the layout alone decides the arena.
PLENTY = 1 << 28


def check(blocks: Sequence[Block], offsets: Sequence[int], size: int) -> None:
    """No two live blocks share bytes, all lie inside: compared in pairs, apart from the planner."""
    for i, (a, x) in enumerate(zip(blocks, offsets, strict=True)):
        assert 0 <= x <= size - a.bytes
        assert x % a.alignment == 0
        for b, y in zip(blocks[:i], offsets, strict=False):
            apart = a.last < b.first or b.last < a.first
            assert apart or x + a.bytes <= y or y + b.bytes <= x


def instance_table() -> Iterator[str]:
    """Markdown rows: each public instance at its capacity."""
    folder = os.environ.get("ODT_PLAN_LAYOUT_INSTANCES")
    yield "### Addresses: MiniMalloc's challenging instances (`odt-plan layout`)"
    yield ""
    if not folder:
        yield "Not measured: ODT_PLAN_LAYOUT_INSTANCES names no folder of instances."
        return
    yield (
        f"Limit {WORK_SECONDS:g} s of work, one thread, seed 0; every layout checked in pairs."
        " Seconds are of the processor; the machine was shared."
    )
    yield ""
    yield "| instance | blocks | live peak B | capacity B | arena B | answer | nodes | measured s |"
    yield "|---|---|---|---|---|---|---|---|"
    for path in sorted(Path(folder).glob("*.csv")):
        blocks, capacity = load_blocks(path).blocks, int(path.stem.rpartition(".")[2])
        begin = time.process_time()
        found = lay_out(blocks, capacity, seconds=WORK_SECONDS)
        seconds = time.process_time() - begin
        check(blocks, found.offsets, found.arena_bytes)
        answer = "fits" if found.arena_bytes <= capacity else "not found"
        if found.bound_bytes > capacity:
            answer = "proven impossible"
        elif found.arena_bytes == found.bound_bytes:
            answer += ", optimal"
        yield (
            f"| {path.stem} | {len(blocks)} | {peak_bytes(blocks):,} | {capacity:,} |"
            f" {found.arena_bytes:,} | {answer} | {found.nodes:,} | {seconds:.1f} |"
        )


def arena_table() -> Iterator[str]:
    """Markdown rows: arena and live peak of the plans of all models at hand."""
    yield "### Addresses: arena of our own plans against their live-byte peak (exact)"
    yield ""
    yield "| model | --train | blocks in the arena | live peak B | arena B | over |"
    yield "|---|---|---|---|---|---|"
    folder = shared()
    names = tuple(p.stem for p in sorted((folder / "models").glob("*.onnx"))) if folder else ()
    device = load_device("generic-cortex-m7")
    for path in models(names):
        for train in ("auto", "all", "last"):
            request = Request(
                path, device, ram_bytes=PLENTY, flash_bytes=PLENTY, train=(train,),
                with_baselines=False, time_limit_s=20.0,
            )  # fmt: skip
            try:
                report = make_plan(request).report
            except UnsupportedModelError:
                yield f"| {path.stem} | | not planned: holds operators without a gradient | | | |"
                break
            except OdtPlanError as e:
                yield f"| {path.stem} | {train} | {e} | | | |"
                continue
            over = report.arena_bytes - report.live_peak_bytes
            yield (
                f"| {path.stem} | {train} | {len(report.lifetimes)} |"
                f" {report.live_peak_bytes:,} | {report.arena_bytes:,} | {over:,} |"
            )


if __name__ == "__main__":
    for table in (instance_table, arena_table):
        print(*table(), "", sep="\n")

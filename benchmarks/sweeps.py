"""Seconds of a trade-off curve, in one process and by a pool of workers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext

from odt_plan.local_pool import InProcess, LocalPool, cores
from odt_plan.pareto import Tracer
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request

from .models import models
from .planning import DEVICE

POINTS = 10


def sweep_table() -> Iterator[str]:
    """Markdown rows: a curve of RAM against learning, serial and by worker processes."""
    yield f"### `pareto --x ram --y learn --points {POINTS}` on {DEVICE}: serial against a pool"
    yield ""
    yield "| model | workers | measured s | load before | solves | their s, summed | widest gap |"
    yield "|---|---|---|---|---|---|---|"
    names = ("mlperf_resnet8_bn",)
    for path in models(names):
        for jobs in sorted({1, 2, cores()}):
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
            request = Request(path, load_device(DEVICE))
            begin = time.perf_counter()
            with nullcontext(InProcess()) if jobs == 1 else closing(LocalPool(jobs)) as runner:
                curve = Tracer(request, "ram", "learn", points=POINTS).run(runner)
            seconds = time.perf_counter() - begin
            widest = max(p.gap for p in curve.points if p.gap is not None)
            yield (
                f"| {path.stem} | {jobs if jobs > 1 else 'none'} | {seconds:.1f} | {load:.1f} |"
                f" {curve.solves} | {curve.seconds:.1f} | {widest:.1e} |"
            )

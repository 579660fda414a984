"""Seconds of a trade-off curve: by a pool of workers, and against each budget planned alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace

from odt_plan.local_pool import InProcess, LocalPool, cores
from odt_plan.pareto import Curve, Tracer
from odt_plan.planner.device import load_device
from odt_plan.planner.known import Known
from odt_plan.planner.pipeline import Request
from odt_plan.sweep import OnDone, Task, pack, solve

from .models import models
from .planning import DEVICE
from .results import put

POINTS = 10
INHERITING = f"### `pareto --x ram --y learn` on {DEVICE}: every budget alone, and by the curve"
#: Seconds of one solve: enough for a proof on a busy machine, too; the CPU seconds tell the work.
TIME_LIMIT_S = 900.0
#: Model, number of points.
CURVES = (
    ("digits_cnn", 10),
    ("digits_cnn", 40),
    ("mlperf_resnet8_bn", 10),
    ("mbv2-w0.35-head10-qdq", 4),
)


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


class _Counting:
    """Runs tasks in this process and adds up its processor time.

    Attributes:
        points: CPU seconds of the curve's budgets.
        range: CPU seconds of finding their range.
        by_themselves: CPU seconds of the same budgets alone.
        scores: Budget -> score that was reached alone.
    """

    def __init__(self) -> None:
        self.points = self.range = self.by_themselves = 0.0
        self.scores: dict[float, float] = {}

    def run(self, tasks: Sequence[Task], on_done: OnDone) -> None:
        for i, task in enumerate(tasks):
            begin = time.process_time()
            outcome = solve(task)
            seconds = time.process_time() - begin
            if "unlimited" in task.name or " 0 B" in task.name or task.request.objective == "ram":
                self.range += seconds
            else:
                self.points += seconds
            on_done(i, outcome)

    def each_alone(self, request: Request, curve: Curve) -> None:
        """Plan every budget of a curve by itself."""
        for p in curve.points:
            task = pack(replace(request, ram_bytes=int(p.budget), known=Known()), "alone")
            begin = time.process_time()
            figures = solve(task).figures
            self.by_themselves += time.process_time() - begin
            if figures is not None:
                self.scores[p.budget] = figures.learn


def inheriting_table() -> Iterator[str]:
    """Markdown rows: processor time of curves, and of their budgets planned one by one."""
    yield INHERITING
    yield ""
    yield (
        "CPU seconds of one process, summed over the budgets. A curve solves the budgets that other"
        " ones do not answer, each with the best plan of the smaller and the tightest bound of the"
        " larger ones that earlier rounds have found. *Range*: the unlimited plan, the least RAM"
        " that works and the least that reaches the best score (within 5 %)."
    )
    yield ""
    yield (
        "| model | points | each alone CPU s | curve CPU s | range CPU s | solves, range included |"
        " widest gap | largest difference of scores |"
    )
    yield "|" + "---|" * 8
    for name, points in CURVES:
        for path in models((name,)):
            if path.stem != name:
                continue
            counting = _Counting()
            request = Request(
                path, load_device(DEVICE), with_baselines=False, time_limit_s=TIME_LIMIT_S
            )
            curve = Tracer(request, "ram", "learn", points=points).run(counting)
            counting.each_alone(request, curve)
            gaps = [p.gap for p in curve.points if p.gap is not None]
            off = [abs(p.value / counting.scores[p.budget] - 1) for p in curve.points if p.value]
            yield (
                f"| {name} | {points} | {counting.by_themselves:.1f} | {counting.points:.1f} |"
                f" {counting.range:.1f} | {curve.solves} | {max(gaps):.1e} | {max(off):.1e} |"
            )


def main() -> None:
    """Measure what budgets tell each other and put it into RESULTS.md."""
    put(INHERITING, [*inheriting_table()])


if __name__ == "__main__":
    main()

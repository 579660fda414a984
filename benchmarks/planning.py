"""Solve time, gap and RAM against the baselines, per model and budget."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from odt_plan.ir.errors import InfeasibleError
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan

from .models import models

DEVICE = "stm32f746g-disco"
BUDGETS = (None, 192 * 1024, 128 * 1024, 96 * 1024, 64 * 1024)


def plan(path: Path, ram: int | None, **options: object) -> tuple[PlannedModel | None, str, float]:
    """A plan (or the reason why there is none) and the seconds it took, import to check."""
    asked: dict[str, object] = {"ram_bytes": ram, "with_relaxations": False} | options
    request = Request(path, load_device(DEVICE), **asked)  # type: ignore[arg-type]
    begin = time.perf_counter()
    try:
        planned = make_plan(request)
    except InfeasibleError as e:
        return None, in_a_row(e), time.perf_counter() - begin
    return planned, "", time.perf_counter() - begin


def in_a_row(error: InfeasibleError) -> str:
    """The conflict and the first limit, for a cell of a table."""
    return "; ".join(line.strip() for line in str(error).splitlines()[:2])


def solve_table() -> Iterator[str]:
    """Markdown rows: each model at each budget, ``--train auto``."""
    yield f"### `--train auto` on {DEVICE}: seconds from file to checked plan, proven gaps"
    yield ""
    yield "| model | RAM budget B | measured s | learn gap | latency gap | RAM B | updated |"
    yield "|---|---|---|---|---|---|---|"
    for path in models():
        for ram in BUDGETS:
            planned, why, seconds = plan(path, ram, with_baselines=False)
            budget = "device" if ram is None else f"{ram:,}"
            if planned is None:
                yield f"| {path.stem} | {budget} | {seconds:.2f} | infeasible: {why} | | | |"
                continue
            p = planned.plan
            gaps = [f"{o.gap:.2e}" for o in p.objective]
            updated = sum(u.ratio > 0 for u in p.decisions.updates)
            yield (
                f"| {path.stem} | {budget} | {seconds:.2f} | {gaps[0]} | {gaps[1]} |"
                f" {p.claims.ram_bytes.total:,} | {updated} of {len(p.decisions.updates)} |"
            )


def solver_table() -> Iterator[str]:
    """Markdown rows: the same joint model solved by each solver, one thread."""
    yield "### The solvers on the same model (`--train auto`, gap 0.1 %, one thread)"
    yield ""
    yield "| model | RAM budget B | highs s | scip s | cp-sat s | learn, largest bound |"
    yield "|---|---|---|---|---|---|"
    for path in models():
        for ram in (None, 300_000):
            seconds, bounds = [], []
            for solver in ("highs", "scip", "cp-sat"):
                planned, _, _ = plan(path, ram, with_baselines=False, solver=solver)
                if planned is None:
                    break
                seconds.append(f"{planned.plan.solver.time_s:.2f}")
                bounds.append(planned.plan.objective[0].bound)
            if bounds:
                budget = "device" if ram is None else f"{ram:,}"
                yield f"| {path.stem} | {budget} | {' | '.join(seconds)} | {max(bounds):,.0f} |"


def baseline_table() -> Iterator[str]:
    """Markdown rows: RAM and latency of the plan and of each baseline."""
    yield "### Peak RAM against the baselines (predicted; same accounting, same kernels)"
    yield ""
    yield "| model | plan | RAM B | latency ms | importance | keeps 320 KiB |"
    yield "|---|---|---|---|---|---|"
    for path in models():
        planned, why, _ = plan(path, None)
        if planned is None:
            yield f"| {path.stem} | {why} | | | | |"
            continue
        c = planned.plan.claims
        gain = sum(u.importance for u in planned.plan.decisions.updates)
        yield (
            f"| {path.stem} | **odt-plan** | {c.ram_bytes.total:,} | {c.latency_s * 1e3:.2f} |"
            f" {gain:,.0f} | yes |"
        )
        for b in planned.baselines:
            yield (
                f"| | {b.name} | {b.ram_bytes:,} | {b.latency_s * 1e3:.2f} | {b.importance:,} |"
                f" {'yes' if b.fits else 'no'} |"
            )


def squeeze_table(steps: int = 10) -> Iterator[str]:
    """Markdown rows: ResNet-8 with everything updated, RAM from plenty down to infeasible."""
    yield "### Squeezing RAM: `--train all`, from plenty to a proven infeasible"
    yield ""
    yield "| model | storage | RAM budget B | RAM B | latency ms | keep | recompute | page | gap |"
    yield "|---|---|---|---|---|---|---|---|---|"
    path = next((p for p in models() if p.stem == "mlperf_resnet8_bn"), models()[0])
    for storage in (None, "sdcard"):
        options = {"train": ("all",), "storage": storage, "with_baselines": False, "gap": 0.0}
        plenty, why, _ = plan(path, 1 << 24, **options)
        assert plenty is not None, why
        least, why, _ = plan(path, 1 << 24, **(options | {"objective": "ram"}))
        assert least is not None, why
        top, low = (p.plan.claims.ram_bytes.total for p in (plenty, least))
        latency = 0.0
        budgets = [low + (top - low) * i // steps // 4 * 4 for i in range(steps, -1, -1)]
        for ram in [*budgets, low - 4]:
            planned, why, _ = plan(path, ram, **options)
            if planned is None:
                yield f"| {path.stem} | {storage or 'none'} | {ram:,} | {why} | | | | | |"
                continue
            p = planned.plan
            assert p.claims.latency_s >= latency * (1 - 1e-12), "latency fell as RAM fell"
            latency = p.claims.latency_s
            count = dict.fromkeys(("keep", "recompute", "page"), 0)
            for d in p.decisions.activations:
                count[d.action] += 1
            yield (
                f"| {path.stem} | {storage or 'none'} | {ram:,} | {p.claims.ram_bytes.total:,} |"
                f" {latency * 1e3:.2f} | {count['keep']} | {count['recompute']} | {count['page']} |"
                f" {p.objective[-1].gap:.1e} |"
            )

"""The commands ``pareto`` and ``fit``: many plans, on all cores or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .commands import print_json
from .ir.errors import InfeasibleError, UsageError
from .options import (
    Gap,
    Importing,
    Jobs,
    Json,
    Limit,
    Quiet,
    Seed,
    Storage,
    TimeLimit,
    Training,
    taking,
)

if TYPE_CHECKING:
    from .sweep import Executor

Models = Annotated[list[Path], typer.Argument(metavar="MODEL.onnx...", help="The models.")]
MicroBatches = Annotated[int, typer.Option(min=1, max=65536, help="Accumulated per update.")]
Scheduler = Annotated[
    str | None,
    typer.Option(metavar="tcp://HOST:PORT", help="Run on a Dask cluster; needs odt-plan[dask]."),
]
Csv = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as CSV.")]


@taking(training=Training, imported=Importing)
def pareto(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model to train.")],
    device: Annotated[str, typer.Option(metavar="ID|FILE.yaml", help="See `odt-plan devices`.")],
    x: Annotated[Literal["ram", "flash", "latency"], typer.Option(help="What is limited.")] = "ram",
    y: Annotated[
        Literal["learn", "latency", "energy"],
        typer.Option(help="What is optimized; latency and energy need a fixed update set."),
    ] = "learn",
    points: Annotated[int, typer.Option(min=2, max=1000, help="Budgets, both ends included.")] = 10,
    low: Annotated[
        str | None,
        typer.Option("--from", metavar="LIMIT", help="[default: the smallest that works]"),
    ] = None,
    high: Annotated[
        str | None,
        typer.Option("--to", metavar="LIMIT", help="[default: where y no longer improves]"),
    ] = None,
    ram: Limit = None,
    flash: Limit = None,
    latency: Limit = None,
    energy: Limit = None,
    storage: Storage = "none",
    training: Training = Training(),
    micro_batches: MicroBatches = 1,
    imported: Importing = Importing(),
    gap: Gap = 1e-3,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
    csv: Csv = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the curve.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write curve and table as a page.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Trace the exact trade-off between a limit and an objective.

    Every point is a checked plan with a proven bound. A larger budget is never worse, and budgets
    that earlier plans answer are not solved again.
    """
    from .backends.html import write_page
    from .backends.viz.curve_svg import write_curve_svg
    from .backends.viz.files import write_whole
    from .pareto import Tracer
    from .planner.sizes import parse_bytes, parse_seconds
    from .planning import PlanOptions, make_request
    from .sweep_report import (
        curve_page,
        curve_picture,
        curve_record,
        curve_rows,
        print_curve,
        table_csv,
    )

    def limit(text: str | None, option: str) -> float | None:
        if text is None:
            return None
        return parse_seconds(text, option) if x == "latency" else parse_bytes(text, option)

    if {"ram": ram, "flash": flash, "latency": latency}[x] is not None:
        raise UsageError(f"--{x}: is what the curve is over; give its range with --from and --to")
    if y != "learn" and not training.train:
        training = replace(training, train=["all"])
    options = PlanOptions(
        model=model,
        device=device,
        importing=imported.options,
        ram=ram,
        flash=flash,
        storage=storage,
        latency=latency,
        energy=energy,
        training=training,
        micro_batches=micro_batches,
        gap=gap,
        time_limit_s=time_limit,
        seed=seed,
    )
    tracer = Tracer(
        make_request(options),
        x,
        y,
        points=points,
        low=limit(low, "--from"),
        high=limit(high, "--to"),
    )
    try:
        with _executor(jobs, scheduler) as runner, _progress(quiet, model.name) as (more, done):
            tracer.run(runner, more, done)
    finally:  # also what was done before Ctrl-C
        curve = tracer.curve()
        if curve.points:
            if csv is not None:
                write_whole(csv, table_csv(curve_rows(curve)))
            if svg is not None:
                write_curve_svg(curve_picture(curve), svg)
            if html is not None:
                write_page(curve_page(curve), html)
            if as_json:
                print_json(curve_record(curve))
            elif not quiet:
                print_curve(curve)
    if all(p.figures is None for p in curve.points):
        raise InfeasibleError("no budget of this range has a plan; the table says why")


@taking(training=Training, imported=Importing)
def fit(
    models: Models,
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="ID|FILE.yaml", help="Repeatable.  [default: every bundled device]"),
    ] = None,
    training: Training = Training(),
    micro_batches: MicroBatches = 1,
    imported: Importing = Importing(),
    gap: Gap = 1e-3,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
    csv: Csv = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell which devices models can be trained on, and what is missing elsewhere.

    Exit code 0: at least one model fits on one device; 3: none does. Models that can't be planned,
    or that options or samples don't suit, are rows with the reason.
    """
    from .backends.viz.files import write_whole
    from .fit import Survey, exit_code
    from .planner.device import GENERIC_DEVICE, device_ids, load_device
    from .planner.pipeline import Request
    from .planning import PlanOptions, make_request, split_list
    from .sweep_report import fit_rows, print_fits, table_csv

    devices = [load_device(d) for d in split_list(device or ()) or device_ids()]

    def request(path: str) -> Request:
        return make_request(
            PlanOptions(
                model=Path(path),
                device=GENERIC_DEVICE,
                importing=imported.options,
                training=training,
                micro_batches=micro_batches,
                gap=gap,
                time_limit_s=time_limit,
                seed=seed,
            )
        )

    survey = Survey([str(m) for m in dict.fromkeys(models)], devices, request)
    try:
        with _executor(jobs, scheduler) as runner, _progress(quiet, "planning") as (more, done):
            more(survey.size)
            survey.run(runner, done)
    finally:  # also what was done before Ctrl-C
        fits = survey.fits()
        if fits:
            if csv is not None:
                write_whole(csv, table_csv(fit_rows(fits)))
            if as_json:
                print_json(fit_rows(fits))
            elif not quiet:
                print_fits(fits)
    raise typer.Exit(exit_code(fits))


@contextmanager
def _executor(jobs: int | None, scheduler: str | None) -> Iterator[Executor]:
    """What runs the tasks.

    Args:
        jobs: Worker processes on this machine; 1: none, tasks run here; None: one per core.
        scheduler: Address of a Dask scheduler, which is used instead.

    Raises:
        UsageError: Both are given, or there is no scheduler.
    """
    from .local_pool import InProcess, LocalPool, cores

    if scheduler is not None:
        if jobs is not None:
            raise UsageError("--jobs is for this machine and --scheduler for a cluster; give one")
        from .dask_cluster import connect

        with connect(scheduler) as cluster:
            yield cluster
    elif (jobs or cores()) == 1:
        yield InProcess()
    else:
        pool = LocalPool(jobs or cores())
        try:
            yield pool
        finally:
            pool.close()


@contextmanager
def _progress(
    quiet: bool, label: str
) -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """Two calls, for more tasks and for one that is done: a bar on stderr, only on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    if quiet or not console.is_terminal:
        yield lambda _: None, lambda: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        row = bar.add_task(label, total=0)

        def more(count: int) -> None:
            bar.update(row, total=(bar.tasks[0].total or 0) + count)

        yield more, lambda: bar.advance(row)

"""The command ``compare``."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .commands import print_json
from .ir.errors import UsageError
from .options import (
    Importing,
    Jobs,
    Json,
    Limit,
    Quiet,
    Storage,
    TimeLimit,
    Training,
    taking,
)

if TYPE_CHECKING:
    from .comparing import Comparison

_RATES = "0.003,0.01,0.03"


@taking(training=Training, imported=Importing)
def compare(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model to train.")],
    device: Annotated[str, typer.Option(metavar="ID|FILE.yaml", help="See `odt-plan devices`.")],
    data: Annotated[Path, typer.Option(metavar="TRAIN.npz", help="Arrays x and y to learn from.")],
    val: Annotated[Path, typer.Option(metavar="VAL.npz", help="Arrays x and y to judge on.")],
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Orders of the samples.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 3,
    lr: Annotated[
        str,
        typer.Option(
            metavar="RATE,...",
            help="Step sizes, of which each update set gets the one that does best on training"
            " samples that are held out.",
        ),
    ] = _RATES,
    ram: Limit = None,
    flash: Limit = None,
    storage: Storage = "none",
    training: Training = Training(),
    imported: Importing = Importing(),
    time_limit: TimeLimit = 60.0,
    jobs: Jobs = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train by the plan's choice of updates, and by the usual ones, and compare what they learn.

    Importance is measured on the training data. Trained in the NumPy runtime, inside the planned
    memory: what is told is measured, but for times, which are predictions.
    """
    from .backends.numpy.data_files import load_data
    from .backends.numpy.micro_batches import array_names_of
    from .comparing import Course
    from .comparing import compare as run
    from .ir.onnx_import import import_model
    from .live import shown
    from .local_pool import cores
    from .planner.pipeline import make_plan
    from .planning import PlanOptions, make_request
    from .sessions import Labelled
    from .trials import TRIAL, plan_by_trial

    if training.train:
        raise UsageError("--train: compare trains the usual sets beside auto; leave it out")
    rates = _rates(lr)
    options = PlanOptions(
        model=model,
        device=device,
        importing=imported.options,
        ram=ram,
        flash=flash,
        storage=storage,
        training=training,
        labelled=data,
        time_limit_s=time_limit,
    )
    with shown(quiet) as watch:
        request = make_request(options, watch, trial=True)
        names = array_names_of(import_model(model, request.importing), request.spec)
        train, tested = (Labelled(*load_data(path, *names)) for path in (data, val))
        course = Course(epochs, rates, seeds, jobs or cores())
        trial = partial(plan_by_trial, samples=data, jobs=course.jobs)
        plan = trial if training.importance == TRIAL else make_plan
        found = run(request, train, tested, course, watch, plan)
    if as_json:
        print_json(asdict(found))
    elif not quiet:
        _print(found, course.seeds)


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError:
        rates = ()
    if not rates or not all(0 < r < float("inf") for r in rates):
        raise UsageError(f"--lr: {text!r} are no step sizes; give for example {_RATES}")
    return rates


def _print(found: Comparison, seeds: int) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from .planner.sizes import format_seconds
    from .report import console
    from .tables import print_table

    percent = found.metric in ("accuracy", "auc")

    def told(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else f"{value:.4g}"

    table = Table("update set", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("before", found.metric, "±", "RAM", "time", "tensors", "step size"):
        table.add_column(name, justify="right")
    for r in found.rows:
        if r.reason:
            table.add_row(Text(r.name), Text(f"no plan: {r.reason}"))
            continue
        ram = f"{r.ram_bytes:,} B" + ("" if r.fits else ", too much")
        updated = f"{r.updated} of {found.tensors}"
        cells = (told(r.before), told(r.mean), told(r.spread) if seeds > 1 else "-", ram)
        table.add_row(
            *map(Text, (r.name, *cells, format_seconds(r.latency_s), updated, f"{r.lr:g}"))
        )
    out = console()
    print_table(out, table)
    out.print(
        Text(
            f"{found.metric} measured on the samples of --val, mean and standard deviation of"
            f" {seeds} orders of training; RAM as planned; time predicted per training step"
        )
    )
    out.print(Text(f"importance of auto: {found.importance}"))

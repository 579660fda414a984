"""What ``odt-plan MODEL.onnx ...`` does: options -> request -> plan -> files and report."""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from .contributions import Source
from .figures import Budgeted
from .ir.calibrate import SYNTHETIC, knows_activations
from .ir.errors import UsageError
from .ir.graph import Graph, Value
from .ir.import_options import PLAIN, ImportOptions
from .ir.onnx_external import external_files
from .ir.onnx_import import import_model
from .ir.training import LossName, TrainingSpec
from .live import shown
from .measuring import DEFAULT, Wanted, has_labels, importance_of
from .options import Training
from .output import PLAN_FILE, OutputFolder
from .planner.device import GENERIC_DEVICE, Device, load_device
from .planner.linear import SolverName
from .planner.micro_batches import plan_every_split
from .planner.objective import parse_objective
from .planner.pipeline import PlannedModel, Request, make_plan
from .planner.progress import Watch
from .planner.replay import Wanted as WantedReplay
from .planner.sizes import parse_bytes, parse_joules, parse_seconds
from .planner.store import Store, plan_store
from .report import print_plan
from .trials import TRIAL, plan_by_trial

if TYPE_CHECKING:
    from .backends.c import Built

#: Where --emit writes without -o.
DEFAULT_OUTPUT = Path("out")
#: Copy of the user's own device file in the output folder, for ``verify`` and ``run``.
DEVICE_FILE = "plan.device.yaml"
#: More are a mistake.
MOST_MICRO_BATCHES = 65536
#: What --emit knows beside the C library and its packages.
REPORTS = ("dot", "svg", "html")


@dataclass(frozen=True)
class PlanOptions:
    """The options of ``odt-plan plan`` as they were typed; see its ``--help``.

    ``labelled`` is no option of it: samples that importance is measured on instead of ``--calib``.
    """

    model: Path
    device: str | None
    importing: ImportOptions = PLAIN
    ram: str | None = None
    flash: str | None = None
    storage: str = "none"
    replay: int | None = None
    epochs: int | None = None
    replay_in: str | None = None
    min_steps: int | None = None
    latency: str | None = None
    energy: str | None = None
    training: Training = field(default_factory=Training)
    labelled: Path | None = None
    micro_batches: int | Literal["auto"] = 1
    objective: str = "learn"
    solver: SolverName = "auto"
    gap: float = 1e-3
    time_limit_s: float = 60.0
    seed: int = 0
    threads: int = 1
    emit: tuple[str, ...] = ()
    explain: tuple[str, ...] = ()
    output: Path | None = None
    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    force: bool = False


#: Tells why a plan, which is in this file, decides as it does, and prints it unless JSON is wanted.
Explain = Callable[[PlanOptions, PlannedModel, Path], list[dict[str, object]]]


def run_plan(options: PlanOptions, explain: Explain) -> None:
    """Plan, write and report.

    Args:
        options: As they were typed.
        explain: For ``--explain``.

    Raises:
        OdtPlanError: Everything that can go wrong, with its exit code; no file is left behind.
    """
    if options.quiet and options.verbose:
        raise UsageError("--quiet and --verbose contradict each other; give one")
    if options.quiet and options.explain and not options.as_json:
        raise UsageError("--quiet leaves --explain nothing to print; give one, or --json, too")
    with shown(options.quiet) as watch:
        request = make_request(options, watch, trial=True)
    emitted = parse_emit(options.emit)
    folder = options.output or (DEFAULT_OUTPUT if emitted else None)
    place = OutputFolder(folder, force=options.force) if folder else nullcontext()
    given = Budgeted(request.ram_bytes, request.flash_bytes, bool(request.ram_regions))
    built = None
    with place as output:
        with shown(options.quiet) as watch:
            planned = _planned(options, request, watch)
            if output is not None:
                watch.stage("writing")
                _write(planned, request, options.device, output)
                if {*emitted}.difference(REPORTS):
                    sources = _write_c(planned, emitted, output.staging)
                    if not options.quiet or "html" in emitted:
                        watch.stage("compiling")
                        built = _built(sources, planned.device)
                watch.stage("drawing")
                _draw(planned, given, built, emitted, output.staging)
        files = output.commit() if output is not None else []
    if folder is not None and folder / DEVICE_FILE not in files:
        (folder / DEVICE_FILE).unlink(missing_ok=True)  # of an earlier plan in this folder
    if options.as_json:
        record = planned.plan.model_dump(mode="json")
        if {*emitted}.difference(REPORTS):  # else it is a plan and nothing else, to be read as one
            record["store"] = _store(planned).record()
        if built is not None:
            record["built"] = asdict(built)
        try:
            if options.explain:
                record["explained"] = explain(options, planned, (folder or Path()) / PLAN_FILE)
        finally:  # the plan is told, whatever becomes of that
            sys.stdout.write(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    elif not options.quiet:
        print_plan(planned, given, files, built, verbose=options.verbose)
        if options.explain:
            explain(options, planned, (folder or Path()) / PLAN_FILE)


def _planned(options: PlanOptions, request: Request, watch: Watch) -> PlannedModel:
    if options.training.importance == TRIAL:
        return plan_by_trial(request, watch, options.training.calib)
    return (plan_every_split if options.micro_batches == "auto" else make_plan)(request, watch)


def make_request(
    options: PlanOptions, watch: Watch | None = None, *, trial: bool = False
) -> Request:
    """Check the options and turn them into a request; importance is measured here.

    Args:
        options: As they were typed.
        watch: Told what goes on.
        trial: The caller knows ``--importance trial``, which is left to it.

    Raises:
        UsageError: An option is missing, malformed or contradicts another.
        UnsupportedModelError: The model can't be imported.
    """
    device = _device(options)
    storage = None if options.storage == "none" else device.find_storage(options.storage).id
    training = options.training
    ram, regions = parse_ram(options.ram) if options.ram is not None else (None, ())
    flash = parse_bytes(options.flash, "--flash") if options.flash is not None else None
    latency = parse_seconds(options.latency, "--latency") if options.latency is not None else None
    energy = parse_joules(options.energy, "--energy") if options.energy is not None else None
    if not options.time_limit_s > 0:  # NaN passes the ranges of some versions of Typer
        raise UsageError(f"--time-limit: {options.time_limit_s:g} s is too short; give 60, say")
    if math.isnan(options.gap):
        raise UsageError("--gap: nan is no gap; give for example 0.001")
    imported = cache(partial(import_model, options.model, options.importing))
    spec, labelled = _spec(options, imported), options.labelled or training.calib
    calibration, importance, measured = training.calib, None, training.importance == TRIAL
    if measured:
        _check_trial(options, known=trial)
    elif training.importance or has_labels(labelled):
        source = Source(options.model, options.importing)
        wanted = Wanted(training.importance, labelled, tuple(training.freeze_before or ()))
        importance = importance_of(source, imported(), spec, wanted, watch or Watch())
        measured = importance is not None and importance.samples > 0
    if measured and knows_activations(imported()):
        calibration = None  # the file brings its own scales: the samples were for importance
    return Request(
        model=options.model,
        device=device,
        importing=options.importing,
        storage=storage,
        replay=_replay(options),
        min_steps=options.min_steps,
        ram_bytes=ram,
        ram_regions=regions,
        flash_bytes=flash,
        latency_s=latency,
        energy_j=energy,
        spec=spec,
        train=tuple(training.train or ("auto",)),
        freeze_before=tuple(training.freeze_before or ()),
        state=tuple(training.state or ("keep",)),
        precision=tuple(training.precision or ()),
        calibration=SYNTHETIC if calibration == Path(SYNTHETIC) else calibration,
        calibration_method=training.calib_method,
        importance=importance,
        objective=parse_objective(options.objective),
        solver=options.solver,
        gap=options.gap,
        time_limit_s=options.time_limit_s,
        seed=options.seed,
        threads=options.threads,
        with_baselines="html" in split_list(options.emit)
        or not (options.quiet or options.as_json),
    )


def _check_trial(options: PlanOptions, *, known: bool) -> None:
    if not known:
        raise UsageError(
            f"--importance {TRIAL}: chooses one plan, and here are many; give a measure for all of"
            f" them, {DEFAULT} say"
        )
    if options.micro_batches == "auto":
        raise UsageError(
            f"--micro-batches auto: a trial compares update sets in one split; give a number with"
            f" --importance {TRIAL}"
        )


def _spec(options: PlanOptions, imported: Callable[[], Graph]) -> TrainingSpec:
    training = options.training
    given, losses = parse_losses(training.loss or ())
    loss: LossName = given or "cross_entropy"
    if given is None:
        own = default_losses(imported())
        loss = next(iter(own.values()), loss)
        losses = {n: x for n, x in own.items() if x != loss} | losses
    used = {loss, *losses.values()}
    for name, its in (("delta", "huber"), ("margin", "triplet")):
        if getattr(training, name) is not None and its not in used:
            raise UsageError(f"--{name} belongs to --loss {its}; leave it out, or give both")
    if "triplet" in used and options.micro_batches == "auto":
        raise UsageError(
            "--micro-batches auto: triplets are made within a micro-batch, so the split changes the"
            " loss; give a number"
        )
    return TrainingSpec(
        loss=loss,
        optimizer=training.optimizer,
        micro_batches=1 if options.micro_batches == "auto" else options.micro_batches,
        qas=training.qas,
        rounding=training.rounding,
        delta=1.0 if training.delta is None else training.delta,
        margin=1.0 if training.margin is None else training.margin,
        bptt=training.bptt,
        losses=losses,
        loss_weights=parse_weights(training.loss_weight or ()),
    )


def parse_losses(texts: Sequence[str]) -> tuple[LossName | None, dict[str, LossName]]:
    """The loss of all outputs and those of single ones: ``mse``, ``OUTPUT=mse``.

    Raises:
        UsageError: A loss is not known, or two are given for the same outputs.
    """
    known: dict[str, LossName] = {n.replace("_", "-"): n for n in get_args(LossName)}
    found: dict[str, LossName] = {}
    for item in split_list(texts):
        output, _, loss = item.rpartition("=")
        if loss not in known:
            raise UsageError(f"--loss: {loss!r} is not one of {', '.join(known)}")
        if found.setdefault(output, known[loss]) != known[loss]:
            raise UsageError(f"--loss: two are given{output and ' for '}{output}")
    return found.pop("", None), found


def parse_weights(texts: Sequence[str]) -> dict[str, float]:
    """Factors of losses: ``OUTPUT=0.5``.

    Raises:
        UsageError: Another form, or two values for one output.
    """
    found: dict[str, float] = {}
    for item in split_list(texts):
        output, _, weight = item.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not output or math.isnan(number):
            raise UsageError(f"--loss-weight: {item!r} is not OUTPUT=WEIGHT, as scores=0.5")
        if found.setdefault(output, number) != number:
            raise UsageError(f"--loss-weight: two are given for {output}")
    return found


def _replay(options: PlanOptions) -> WantedReplay | None:
    if options.replay is None:
        for name, value in (("--epochs", options.epochs), ("--replay-in", options.replay_in)):
            if value is not None:
                raise UsageError(f"{name} is about samples that are kept; give --replay N, too")
        return None
    place = None if options.replay_in == "auto" else options.replay_in
    if options.epochs is None:
        return WantedReplay(options.replay, place=place)
    return WantedReplay(options.replay, options.epochs, place)


def parse_ram(text: str) -> tuple[int | None, tuple[tuple[str, int], ...]]:
    """A size for one region, or sizes by name of a region: ``DTCM=128KB,AXI=500KB``.

    Raises:
        UsageError: A size is none, or a region is named twice.
    """
    if "=" not in text:
        return parse_bytes(text, "--ram"), ()
    regions: dict[str, int] = {}
    for item in re.split(r",(?=[^,]*=)", text):  # a size may hold commas, too
        name, _, size = item.partition("=")
        if name.strip() in regions:
            raise UsageError(f"--ram: {name.strip()} is given twice")
        regions[name.strip()] = parse_bytes(size, f"--ram {name.strip()}")
    return None, tuple(regions.items())


def parse_micro_batches(text: str) -> int | Literal["auto"]:
    """A number of micro-batches per update, or ``auto``: whatever split of a batch is best.

    Raises:
        UsageError: Neither.
    """
    if text == "auto":
        return "auto"
    if text.isascii() and text.isdigit() and 1 <= int(text) <= MOST_MICRO_BATCHES:
        return int(text)
    raise UsageError(
        f"--micro-batches: {text!r} is neither auto nor a number from 1 to {MOST_MICRO_BATCHES}"
    )


def parse_emit(texts: Sequence[str]) -> tuple[str, ...]:
    """What is to be written beside the plan, each once.

    Raises:
        UsageError: Something is not known, or would be compiled into a package.
    """
    emitted = split_list(texts)
    if not emitted:
        return ()
    from .backends.c import ECOSYSTEMS

    known = ("c", "host", *ECOSYSTEMS, *REPORTS)
    if unknown := [e for e in emitted if e not in known]:
        raise UsageError(f"--emit: {unknown[0]!r} is not one of {', '.join(known)}")
    packages = [e for e in emitted if e in ECOSYSTEMS]
    if packages and "host" in emitted:
        raise UsageError(
            f"--emit host: its program would be compiled into the package for {packages[0]}; emit"
            " it into another folder"
        )
    return emitted


def split_list(texts: Sequence[str]) -> tuple[str, ...]:
    """Items of a repeatable option that may also hold commas, each once."""
    items = [item.strip() for text in texts for item in text.split(",")]
    return tuple(dict.fromkeys(i for i in items if i))


def default_losses(graph: Graph) -> dict[str, LossName]:
    """For each output ``output`` where the file has a loss, ``mse`` where the prediction is shaped
    like the input (autoencoders), ``bce`` behind a Sigmoid, ``mse`` for one number per sample
    (regression), ``cross_entropy`` for everything else.
    """  # noqa: D205
    if graph.loss is not None:
        return {v.name: "output" for v in graph.outputs}
    return {v.name: _default_loss(graph, v) for v in graph.outputs}


def _default_loss(graph: Graph, prediction: Value) -> LossName:
    sample, shape = graph.inputs[0].type if graph.inputs else None, prediction.type.shape
    last = prediction.producer
    one_number = len(shape) < 2 or shape[1:] == (1,) * len(shape[1:])
    same = sample is not None and shape == sample.shape and sample.dtype != "i32"
    if not same and last is not None and last.op == "Sigmoid":
        return "bce"
    return "mse" if same or one_number else "cross_entropy"


def device_of_plan(plan_file: Path, device_id: str, given: str | None) -> Device:
    """The device of a plan file: ``given``, else the copy beside the plan, else a bundled one.

    Raises:
        UsageError: The file is wrong, or the id is neither beside the plan nor bundled.
    """
    if given is not None:
        return load_device(given)
    beside = plan_file.parent / DEVICE_FILE
    if beside.is_file() and (own := load_device(str(beside))).id == device_id:
        return own
    return load_device(device_id)


def _device(options: PlanOptions) -> Device:
    if options.device is not None:
        return load_device(options.device)
    budgets = {"--ram": options.ram, "--flash": options.flash}
    missing = [name for name, text in budgets.items() if text is None]
    if missing:
        need = " and ".join(missing)
        raise UsageError(
            f"{need} or --device is missing: a plan needs the limits of a device; for example"
            f" `odt-plan {options.model} --ram 320KB --flash 1MB` or"
            f" `odt-plan {options.model} --device stm32f746g-disco`"
        )
    return load_device(GENERIC_DEVICE)


def _write(
    planned: PlannedModel, request: Request, device_option: str | None, output: OutputFolder
) -> None:
    """The plan, and what reading it needs: the model and the user's own device file."""
    output.write(PLAN_FILE, planned.plan.model_dump_json(indent=2) + "\n")
    output.copy(request.model)
    for part in external_files(request.model):
        output.copy(request.model.parent / part, part.as_posix())
    if device_option is not None and device_option != request.device.id:
        output.copy(Path(device_option), DEVICE_FILE)


def _write_c(planned: PlannedModel, emitted: Sequence[str], folder: Path) -> list[Path]:
    """The library in C, with what else is emitted around it."""
    from .backends.c import ECOSYSTEMS, emit_c

    packages = [e for e in emitted if e in ECOSYSTEMS]
    host = "host" in emitted
    return emit_c(
        planned.plan,
        planned.training,
        folder,
        host=host,
        ecosystems=packages,
        program_bytes=_store(planned).program_bytes,
    )


def _store(planned: PlannedModel) -> Store:
    return plan_store(planned.plan, planned.training, planned.device)


def _built(sources: Sequence[Path], device: Device) -> Built | None:
    """What a compiler makes of the library, where there is one; a failure is a warning."""
    from .backends.c import BuildError, measure_built

    try:
        return measure_built(sources[0].parent, sources[0].stem, device.core)
    except BuildError as e:
        warnings.warn(f"the emitted C was not measured: {e}", stacklevel=1)
        return None


def _draw(
    planned: PlannedModel,
    given: Budgeted,
    built: Built | None,
    emitted: Sequence[str],
    folder: Path,
) -> None:
    """Pictures and page."""
    if "dot" in emitted:
        from .backends.viz import write_dot

        write_dot(planned.plan, planned.training, planned.report, folder / "plan.dot")
    if "svg" in emitted:
        from .backends.viz import write_memory_svg, write_svg

        write_svg(planned.plan, planned.training, planned.report, folder / "plan.svg")
        write_memory_svg(planned.plan, planned.report, folder / "memory.svg")
    if "html" in emitted:
        from .backends.html import plan_page, write_page

        write_page(plan_page(planned, given, built), folder / "report.html")

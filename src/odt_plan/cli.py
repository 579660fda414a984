"""The command line: ``odt-plan MODEL.onnx ...`` plans; see ``odt-plan --help``.

Everything heavy (onnx, the solvers, pydantic) is imported inside the commands that need it.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from . import __version__
from .commands import PlanByDefault, devices_app, print_json, schedule
from .compare_command import compare
from .device_import import import_device
from .diff_command import diff
from .init_command import init
from .ir.errors import InfeasibleError, OdtPlanError, UnsupportedModelError
from .options import (
    EXPLAIN_S,
    FreezeBefore,
    Gap,
    Importing,
    Json,
    Quiet,
    Seed,
    Storage,
    Training,
    Verbose,
    taking,
)
from .project_file import model_of_project, place_in_project, read_project
from .sweep_commands import fit, pareto

EXIT_CODES = (
    "Exit codes: 0 done; 1 internal error, or a file that can't be read or written; 2 wrong usage,"
    " size, device or data file; 3 no plan keeps the limits; 4 the model is broken or holds what"
    " can't be planned."
)
#: What shells expect after Ctrl-C (128 + SIGINT).
INTERRUPTED = 130
#: Typer brings its own click in newer versions; both name the base of their errors so.
_ClickError: type[Any] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)


Solver = Literal["auto", "highs", "scip", "cp-sat"]


app = typer.Typer(
    cls=PlanByDefault,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)

ModelOption = Annotated[
    Path | None, typer.Option("--model", help="Model file, where it is not beside the plan.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="ID|FILE.yaml", help="Device, where its file has moved."),
]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan written by -o.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"odt-plan {__version__}")
        raise typer.Exit


@app.callback()
def _odt_plan(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Plan on-device training of an ONNX model under RAM, flash, latency and energy limits.

    `odt-plan MODEL.onnx ...` is short for `odt-plan plan MODEL.onnx ...`; its options are listed by
    `odt-plan plan --help`.
    """


@app.command(epilog=EXIT_CODES)
@taking(training=Training, imported=Importing)
def plan(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL.onnx",
            help="The model to train.  [default: that of odt-plan.yaml, whose options then hold]",
            is_eager=True,
            callback=model_of_project,
            show_default=False,
        ),
    ] = None,
    project: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="These options, by name, in a file; the command line counts before it.",
            is_eager=True,
            callback=read_project,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="ID|FILE.yaml", help="See `odt-plan devices`.")
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|REGION=SIZE,...",
            help="RAM for the plan, as 320KB in one region, or DTCM=128KB,AXI=500KB in those named."
            "  [default: all of the device's less its reserve]",
        ),
    ] = None,
    flash: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Flash for the plan, as 1MB.  [default: the device's less its reserve]",
        ),
    ] = None,
    storage: Storage = "none",
    replay: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Keep what the frozen layers make of N samples, to train from that.",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(metavar="E", help="How often each of these is used.  [default: 10]"),
    ] = None,
    replay_in: Annotated[
        str | None,
        typer.Option(
            metavar="auto|ram|NAME",
            help="Where they are kept; auto: in RAM that is left or in --storage.",
        ),
    ] = None,
    min_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps that paging may not wear the storage out in."),
    ] = None,
    latency: Annotated[
        str | None, typer.Option(metavar="TIME", help="Limit per training step, as 0.5s.")
    ] = None,
    energy: Annotated[
        str | None, typer.Option(metavar="ENERGY", help="Limit per training step, as 2mJ.")
    ] = None,
    training: Training = Training(),
    micro_batches: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Accumulated per update; auto: --batch is all of an update, split as is best.",
        ),
    ] = "1",
    imported: Importing = Importing(),
    objective: Annotated[
        str,
        typer.Option(
            metavar="NAME[=WEIGHT],...",
            help="learn (then latency), latency, energy, ram, flash, or several with weights, each"
            " relative to plain training, as latency=1,energy=0.5.",
        ),
    ] = "learn",
    solver: Annotated[Solver, typer.Option()] = "auto",
    gap: Gap = 1e-3,
    time_limit: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1e6,
            metavar="SECONDS",
            help="For the whole run, which then returns the best plan so far.",
        ),
    ] = 60.0,
    seed: Seed = 0,
    threads: Annotated[int, typer.Option(min=1, max=256)] = 1,
    emit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="c|host|arduino|platformio|zephyr|espidf|dot|svg|html,...",
            help="Also write this (repeatable). c: the library; host: it, and a program that trains"
            " by it here; arduino to espidf: it, as a package of these.",
        ),
    ] = None,
    explain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER",
            help="Also tell why the plan decides as it does about this one, as `odt-plan explain`"
            " does (repeatable).",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for plan.json, the model and what is emitted."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write over files in a folder without plan.json.")
    ] = False,
) -> None:
    """Plan the training of a model (the default command)."""
    from .explaining import explain_planned
    from .planner.infeasible import infeasible_record
    from .planning import PlanOptions, parse_micro_batches, run_plan

    assert model is not None  # its callback has seen to it
    options = PlanOptions(
        model=model,
        device=device,
        importing=imported.options,
        ram=ram,
        flash=flash,
        storage=storage,
        replay=replay,
        epochs=epochs,
        replay_in=replay_in,
        min_steps=min_steps,
        latency=latency,
        energy=energy,
        training=training,
        micro_batches=parse_micro_batches(micro_batches),
        objective=objective,
        solver=solver,
        gap=gap,
        time_limit_s=time_limit,
        seed=seed,
        threads=threads,
        emit=tuple(emit or ()),
        explain=tuple(explain or ()),
        output=output,
        as_json=as_json,
        quiet=quiet,
        verbose=verbose,
        force=force,
    )
    try:
        run_plan(options, explain_planned)
    except InfeasibleError as e:
        if as_json:
            print_json(infeasible_record(e))
        raise


@app.command(epilog=EXIT_CODES)
def run(
    plan_file: PlanFile,
    data: Annotated[
        Path,
        typer.Option(
            metavar="DATA.npz|FOLDER",
            help="Arrays x and y (x_val, y_val), several inputs by their names, several outputs as"
            " y_NAME; in an .npz file, or as x.npy, y.npy in a folder. Or a folder of pictures or"
            " WAV files for each class.",
        ),
    ],
    val: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA.npz|FOLDER",
            help="Judge by these before training and after each epoch, and keep the best.",
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            metavar="M[,M,...]", help="Of pictures and sounds: (value - mean) / std, per channel."
        ),
    ] = None,
    std: Annotated[str | None, typer.Option(metavar="S[,S,...]", help="See --mean.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates to do.  [default: 200]")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data instead.")] = None,
    online: Annotated[
        bool,
        typer.Option(
            "--online", help="One pass instead, in the order of the data, as on the device."
        ),
    ] = False,
    lr: Annotated[float, typer.Option(help="Step size, at its largest.")] = 0.001,
    schedule_: Annotated[
        Literal["constant", "linear", "cosine"],
        typer.Option("--schedule", help="How it falls to 0 over the run."),
    ] = "constant",
    warmup: Annotated[
        int, typer.Option(min=0, metavar="N", help="Updates over which it rises first.")
    ] = 0,
    weight_decay: Annotated[
        float,
        typer.Option(help="Of weights alone; coupled (L2), but decoupled for Adam (AdamW)."),
    ] = 0.0,
    clip: Annotated[
        float | None,
        typer.Option(
            metavar="NORM",
            help="Largest norm of all gradients, or of each tensor's where the plan does not have"
            " all at once.",
        ),
    ] = None,
    balance: Annotated[
        bool,
        typer.Option("--balance", help="Draw samples with replacement, all classes alike often."),
    ] = False,
    metric: Annotated[
        Literal["accuracy", "mse", "auc", "loss"] | None,
        typer.Option(
            help="Judged on the samples to validate by; auc: of an autoencoder's error against"
            " labels 0 and 1.  [default: accuracy of classes, mse of numbers, else loss, as for"
            " several outputs]"
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Stop after N epochs without anything better."),
    ] = None,
    halvings: Annotated[
        int,
        typer.Option(
            min=0,
            max=60,
            metavar="K",
            help="After a NaN go back and halve the step size, at most so often.",
        ),
    ] = 3,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz", help="Write all that --resume needs, each epoch and at the end."
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="And every N updates.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Go on from a checkpoint, to the very same bits."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Order of the samples.")] = 0,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Write the learned parameters.")
    ] = None,
    c_session: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.bin",
            help="Train nothing; write data, order and options for the program of --emit host.",
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="The bits of the emitted C; many times as slow."),
    ] = False,
    model: ModelOption = None,
    device: DeviceOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train by a plan with the NumPy runtime, inside an arena of exactly the planned bytes."""
    from .backends.numpy import SessionOptions
    from .running import RunOptions, run_training

    session = SessionOptions(
        lr=lr,
        steps=steps,
        epochs=epochs,
        online=online,
        seed=seed,
        schedule=schedule_,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        balance=balance,
        metric=metric,
        patience=patience,
        halvings=halvings,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
    )
    result = run_training(
        RunOptions(
            plan_file,
            data,
            val,
            mean,
            std,
            session,
            exact,
            model,
            device,
            save,
            c_session,
            as_json,
            quiet,
        )
    )
    if as_json:
        print_json(result)


@app.command(epilog=EXIT_CODES)
def export(
    plan_file: PlanFile,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The model to write; the .npz of --delta."
        ),
    ],
    weights: Annotated[
        Path | None,
        typer.Argument(
            metavar="[WEIGHTS]",
            help="From `run --save`, or a state (with --delta also changes) that the emitted C has"
            " written; without them only notes are written.",
        ),
    ] = None,
    delta: Annotated[
        bool,
        typer.Option(
            "--delta",
            help="Write what training has changed instead, an .npz of f32 arrays by parameter.",
        ),
    ] = False,
    model: ModelOption = None,
    device: DeviceOption = None,
    as_json: Json = False,
) -> None:
    """Write learned weights back into the model file, and the plan's decisions as notes on nodes.

    All else stays as it is in the file. The new one is imported again and compared with the plan's
    runtime before it appears.
    """
    from .exporting import ExportOptions, run_delta, run_export

    options = ExportOptions(plan_file, weights, output, model, device, as_json)
    record = run_delta(options) if delta else run_export(options)
    if as_json:
        print_json(record)


@app.command(epilog=EXIT_CODES)
def verify(
    plan_file: PlanFile,
    model: ModelOption = None,
    device: DeviceOption = None,
    as_json: Json = False,
) -> None:
    """Replay a plan independently of the planner and compare its claims."""
    from .planner.check import check as replay
    from .planner.plan import load_plan
    from .planner.rebuild import rebuild
    from .planning import device_of_plan
    from .report import print_verified, verified_record

    loaded = load_plan(plan_file)
    target = device_of_plan(plan_file, loaded.device.id, device)
    report = replay(loaded, rebuild(loaded, plan_file, model), target)
    if as_json:
        print_json(verified_record(loaded, report))
    else:
        print_verified(plan_file, loaded, report)


@app.command(epilog=EXIT_CODES)
def explain(
    plan_file: PlanFile,
    layers: Annotated[
        list[str],
        typer.Argument(metavar="LAYER...", help="Nodes, parameters or tensors; * and ? match."),
    ],
    model: ModelOption = None,
    device: DeviceOption = None,
    gap: Gap = 1e-3,
    time_limit: Annotated[
        float, typer.Option(min=0.1, max=1e6, metavar="SECONDS", help="Of one solve.")
    ] = EXPLAIN_S,
    as_json: Json = False,
) -> None:
    """Tell why a layer is frozen, recomputed, paged, mixed or i8: plan it the other way as well."""
    from .explaining import ExplainOptions, run_explain

    options = ExplainOptions(plan_file, tuple(layers), model, device, gap, time_limit, as_json)
    found = run_explain(options)
    if as_json:
        print_json(found)


@app.command(epilog=EXIT_CODES)
@taking(imported=Importing)
def check(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx")],
    imported: Importing = Importing(),
    freeze_before: FreezeBefore = None,
    as_json: Json = False,
) -> None:
    """Tell which layers can be trained, and everything that is in the way, by node name."""
    from .ir.trainability import trainability
    from .layers import layers_record, print_layers

    report = trainability(model, imported.options, freeze_before=tuple(freeze_before or ()))
    if as_json:
        print_json(layers_record(report))
    else:
        print_layers(model, report)
    if report.obstacles:
        raise typer.Exit(UnsupportedModelError.exit_code)


@app.command(epilog=EXIT_CODES)
def ops(
    as_json: Json = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page docs/ops.md.")
    ] = False,
) -> None:
    """List the ONNX operators that are supported, and what each one can do."""
    from .operators import markdown, operators_record, print_operators

    if as_json:
        print_json(operators_record())
    elif as_markdown:
        typer.echo("\n".join(markdown()))
    else:
        print_operators()


@app.command(epilog=EXIT_CODES)
def layout(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.csv", help="Columns id,lower,upper,size[,alignment].")
    ],
    capacity: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Enough, as 1MB.  [default: as few bytes as possible]"),
    ] = None,
    time_limit: Annotated[float, typer.Option(min=0.0, max=1e6, metavar="SECONDS")] = 60.0,
    seed: Seed = 0,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="PLACED.csv", help="The rows with their offsets."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Give blocks of memory with known lifetimes (lower to upper, half-open) their addresses."""
    from .placing import LayoutOptions, run_layout

    result = run_layout(LayoutOptions(file, capacity, time_limit, seed, output, as_json))
    if as_json:
        print_json(result)


app.command(epilog=EXIT_CODES)(init)
app.command(epilog=EXIT_CODES)(schedule)
app.command(epilog=EXIT_CODES)(diff)
app.command(epilog=EXIT_CODES)(compare)
app.command(epilog=EXIT_CODES)(pareto)
app.command(epilog=EXIT_CODES)(fit)
devices_app.command("import", epilog=EXIT_CODES)(import_device)
app.add_typer(devices_app, name="devices", epilog=EXIT_CODES)


def _fail(message: str, code: int) -> NoReturn:
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble(("error: ", "bold red"), message)
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)
    sys.exit(code)


def main() -> None:
    """Entry point of ``odt-plan``: every failure is told in plain lines, with its exit code."""
    try:
        _main()
    except SystemExit as e:
        solving = sys.modules.get("odt_plan.planner.solving")
        if solving is not None and solving.still_running():  # it would wake in a dying interpreter
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(e.code if isinstance(e.code, int) else 1)
        raise


def _own_stdout() -> None:
    """Keep to ourselves what others read: HiGHS prints lines of its own there, past Python."""
    plain = sys.stdout
    if not isinstance(plain, TextIOWrapper) or plain.fileno() != 1:
        return
    plain.flush()
    sys.stdout = open(os.dup(1), "w", encoding=plain.encoding)  # noqa: SIM115
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _main() -> NoReturn:
    debug = "--debug" in sys.argv[1:]
    _own_stdout()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names from model files may not be encodable
            stream.reconfigure(errors="replace")
    warnings.showwarning = _warn
    try:
        code = app(prog_name="odt-plan", standalone_mode=False)
    except OdtPlanError as e:
        if debug:
            traceback.print_exc()
        _fail(str(e), e.exit_code)
    except _ClickError as e:
        _fail(f"{place_in_project(e)}{e.format_message()}", e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as e:
        if debug:
            raise
        _fail(f"{type(e).__name__}: {e}; this is a defect, --debug shows where", 1)
    if code == INTERRUPTED:
        _fail("interrupted", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()

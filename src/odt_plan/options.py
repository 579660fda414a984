"""Options that several commands take, each written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from .ir.import_options import ImportOptions, parse_dims

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of the report.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")]
Gap = Annotated[float, typer.Option(min=0.0, max=1.0, help="Relative gap to prove.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1)]

# -- how the model is imported ---------------------------------------------------------------------

Batch = Annotated[int, typer.Option(min=1, max=1024, help="Samples per micro-batch.")]
Fold = Annotated[
    bool | None,
    typer.Option(
        "--fold-batchnorm/--no-fold-batchnorm",
        help="Fold frozen BatchNormalization into its convolution.  [default: fold at batch 1]",
    ),
]
Head = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1 << 16,
        metavar="N",
        help="Replace the last layer by a fresh one for N classes.",
    ),
]
Dim = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=N|INPUT:AXIS=N",
        help="Bind another dimension that the file leaves open (repeatable).",
    ),
]


def importing(
    batch: int, fold_batchnorm: bool | None, head: int | None, dim: list[str] | None
) -> ImportOptions:
    """What the options ``Batch``, ``Fold``, ``Head`` and ``Dim`` say."""
    return ImportOptions(batch, fold_batchnorm, head, parse_dims(dim or ()))


Storage = Annotated[
    str, typer.Option(metavar="NAME|none", help="Storage of the device to page to.")
]
FreezeBefore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NODE",
        help="Train nothing that this node depends on (repeatable); it may also be a module, as"
        " /layer4.",
    ),
]

# -- what is trained, and how ----------------------------------------------------------------------

Command = Callable[..., None]
Loss = Literal["cross-entropy", "mse", "huber", "bce", "cosine", "triplet", "output"]


@dataclass(frozen=True)
class Training:
    """What is trained, and how: the same options of ``plan``, ``pareto`` and ``fit``."""

    train: Annotated[
        list[str] | None,
        typer.Option(
            metavar="auto|all|last|bias|NAME[=RATIO],...",
            help="What to train; auto lets the solver choose.  [default: auto; pareto: auto for"
            " learn, else all]",
        ),
    ] = None
    freeze_before: FreezeBefore = None
    precision: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER=i8|mixed|f32,...",
            help="Pin layers, * and ? match names; mixed is f32 weights on i8 values."
            "  [default: the solver chooses, where scales are known]",
        ),
    ] = None
    calib: Annotated[
        Path | None,
        typer.Option(
            metavar="SAMPLES.npz|synthetic",
            help="Quantize a float model by its array x of inputs, or arrays by their names;"
            " synthetic: guess without any.",
        ),
    ] = None
    calib_method: Annotated[
        Literal["minmax", "percentile", "mse"],
        typer.Option(help="How ranges follow from the samples."),
    ] = "minmax"
    optimizer: Annotated[Literal["sgd", "momentum", "adagrad", "adam"], typer.Option()] = "sgd"
    state: Annotated[
        list[str] | None,
        typer.Option(
            metavar="auto|keep|paged|sgd[=FACTOR],...",
            help="Where the optimizer's tensors of each parameter may be: in RAM, in --storage, or"
            " given up for plain SGD, which leaves FACTOR (0.9) of its importance."
            "  [default: keep]",
        ),
    ] = None
    qas: Annotated[
        bool,
        typer.Option(
            "--qas/--no-qas", help="Scale the steps of int8 weights as float weights would move."
        ),
    ] = True
    rounding: Annotated[
        Literal["stochastic", "nearest"], typer.Option(help="Of the steps of int8 weights.")
    ] = "stochastic"
    loss: Annotated[
        Loss | None,
        typer.Option(
            help="output: the file's own.  [default: output if there is one, mse if prediction and"
            " input are alike, bce behind a Sigmoid, mse of one number per sample, else"
            " cross-entropy]"
        ),
    ] = None
    delta: Annotated[
        float | None, typer.Option(help="Of --loss huber.  [default: 1, which is SmoothL1]")
    ] = None
    margin: Annotated[
        float | None, typer.Option(help="Of --loss triplet, in squared distance.  [default: 1]")
    ] = None
    bptt: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2**31 - 1,
            metavar="STEPS",
            help="Cut gradients of recurrent layers every so many steps, from the last on.",
        ),
    ] = None


def taking(parameter: str, group: type[Any]) -> Callable[[Command], Command]:
    """Give a command an option for each field of a dataclass, which it gets as one argument.

    Args:
        parameter: Of the command; the options stand in its place in the help.
        group: The dataclass; its fields are annotated and have the defaults of options.
    """
    names = [f.name for f in fields(group)]
    hints = get_type_hints(group, include_extras=True)

    def option(name: str) -> inspect.Parameter:
        kind, default = inspect.Parameter.KEYWORD_ONLY, getattr(group, name)
        return inspect.Parameter(name, kind, default=default, annotation=hints[name])

    def decorate(command: Command) -> Command:
        @wraps(command)
        def call(**given: Any) -> None:
            given[parameter] = group(**{n: given.pop(n) for n in names})
            command(**given)

        shown: list[inspect.Parameter] = []
        for p in inspect.signature(command, eval_str=True).parameters.values():
            own = p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            shown += [option(n) for n in names] if p.name == parameter else [own]
        call.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        return call

    return decorate

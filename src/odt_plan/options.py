"""Options that several commands take, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .ir.import_options import ImportOptions, parse_dims

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of the report.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")]
Gap = Annotated[float, typer.Option(min=0.0, max=1.0, help="Relative gap to prove.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1)]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Worker processes on this machine.  [default: its cores]"),
]

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


# -- what is trained, and how ----------------------------------------------------------------------

Train = Annotated[
    list[str] | None,
    typer.Option(
        metavar="auto|all|last|bias|NAME[=RATIO],...",
        help="What to train; auto lets the solver choose.  [default: auto; pareto: auto for learn,"
        " else all]",
    ),
]
FreezeBefore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NODE",
        help="Train nothing that this node depends on (repeatable); it may also be a module, as"
        " /layer4.",
    ),
]
Precision = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LAYER=i8|mixed|f32,...",
        help="Pin layers, * and ? match names; mixed is f32 weights on i8 values."
        "  [default: the solver chooses, where scales are known]",
    ),
]
Calib = Annotated[
    Path | None,
    typer.Option(
        metavar="SAMPLES.npz|synthetic",
        help="Quantize a float model by its array x of inputs, or arrays by their names; synthetic:"
        " guess without any. With labels y, importance is measured on them, too.",
    ),
]
Importance = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD|FILE",
        help="Score of updates: gradient, fisher, magnitude or contribution, measured on --calib"
        " with labels y; prior; or a table name,score[,ratio] as CSV or JSON.  [default: gradient"
        " if --calib has y, else prior]",
    ),
]
Optimizer = Annotated[Literal["sgd", "momentum", "adagrad", "adam"], typer.Option()]
State = Annotated[
    list[str] | None,
    typer.Option(
        metavar="auto|keep|paged|sgd[=FACTOR],...",
        help="Where the optimizer's tensors of each parameter may be: in RAM, in --storage, or"
        " given up for plain SGD, which leaves FACTOR (0.9) of its importance.  [default: keep]",
    ),
]
Storage = Annotated[
    str, typer.Option(metavar="NAME|none", help="Storage of the device to page to.")
]

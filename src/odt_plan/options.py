"""Options that several commands take, each written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from .ir.import_options import ImportOptions, parse_dims, parse_lite, parse_lora

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of the report.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Report every tensor, layer and block by name, too.")
]
#: Seconds of one solve that explains a decision.
EXPLAIN_S = 20.0
Gap = Annotated[float, typer.Option(min=0.0, max=1.0, help="Relative gap to prove.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1)]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Worker processes on this machine.  [default: its cores]"),
]

# -- how the model is imported ---------------------------------------------------------------------


@dataclass(frozen=True)
class Importing:
    """How the model is imported: the same options of all commands that read one."""

    batch: Annotated[int, typer.Option(min=1, max=1024, help="Samples per micro-batch.")] = 1
    fold_batchnorm: Annotated[
        bool | None,
        typer.Option(
            "--fold-batchnorm/--no-fold-batchnorm",
            help="Fold frozen BatchNormalization into its convolution.  [default: fold at batch 1]",
        ),
    ] = None
    head: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1 << 16,
            metavar="N",
            help="Replace the last layer by a fresh one for N classes.",
        ),
    ] = None
    dim: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N|INPUT:AXIS=N",
            help="Bind another dimension that the file leaves open (repeatable).",
        ),
    ] = None
    keep_output: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Leave the other outputs out, with what they alone need (repeatable)."
            "  [default: all outputs]",
        ),
    ] = None

    lora: Annotated[
        str | None,
        typer.Option(
            metavar="RANK[:ALPHA[:SEED]]",
            help="Offer a low-rank adapter beside each frozen weight of a MatMul, Gemm or Conv,"
            " times ALPHA / RANK; see --train lora.  [default: ALPHA is RANK]",
        ),
    ] = None
    lite_residual: Annotated[
        str | None,
        typer.Option(
            metavar="K[:SEED]",
            help="Offer a lite residual module (TinyTL) with a KxK window beside each block of"
            " convolutions; see --train lite.",
        ),
    ] = None

    @property
    def options(self) -> ImportOptions:
        """What they say."""
        dims, kept = parse_dims(self.dim or ()), tuple(dict.fromkeys(self.keep_output or ()))
        lora = None if self.lora is None else parse_lora(self.lora)
        lite = None if self.lite_residual is None else parse_lite(self.lite_residual)
        return ImportOptions(self.batch, self.fold_batchnorm, self.head, dims, kept, lora, lite)


# -- what is trained, and how ----------------------------------------------------------------------

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
Limit = Annotated[str | None, typer.Option(metavar="LIMIT", help="As in plan.")]
TimeLimit = Annotated[float, typer.Option(min=0.0, max=1e6, metavar="SECONDS", help="Of one plan.")]
Command = Callable[..., None]


@dataclass(frozen=True)
class Training:
    """What is trained, and how: the same options of all commands that plan."""

    train: Annotated[
        list[str] | None,
        typer.Option(
            metavar="auto|all|last|bias|lora|lite|NAME[=RATIO],...",
            help="What to train; auto lets the solver choose; lora: the adapters of --lora, lite:"
            " the modules of --lite-residual, beside which last, bias and names may stand."
            "  [default: auto; pareto: auto for learn, else all]",
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
            " synthetic: guess without any. With labels y, importance is measured on them, too.",
        ),
    ] = None
    calib_method: Annotated[
        Literal["minmax", "percentile", "mse"],
        typer.Option(help="How ranges follow from the samples."),
    ] = "minmax"
    importance: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD|FILE",
            help="Score of updates: gradient, fisher, magnitude or contribution, measured on"
            " --calib with labels y; prior; or a table name,score[,ratio] as CSV or JSON; trial:"
            " the set by gradient, unless another cheap score's or a usual one clearly learns more."
            "  [default: gradient if --calib has y, else prior]",
        ),
    ] = None
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
        list[str] | None,
        typer.Option(
            metavar="LOSS|OUTPUT=LOSS,...",
            help="cross-entropy, mse, huber, bce, cosine, triplet, or output: the file's own; of"
            " several outputs the sum.  [default: output if there is one; for each output mse if it"
            " is like the input, bce behind a Sigmoid, mse of one number per sample, else"
            " cross-entropy]",
        ),
    ] = None
    loss_weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OUTPUT=WEIGHT,...", help="Factors of the losses in the sum.  [default: 1]"
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


def taking(**groups: type[Any]) -> Callable[[Command], Command]:
    """Give a command an option for each field of dataclasses, which it gets as one argument each.

    Args:
        groups: Parameter of the command -> the dataclass; its options stand in the parameter's
            place in the help. Its fields are annotated as options are, and have their defaults.
    """
    names = {parameter: [f.name for f in fields(g)] for parameter, g in groups.items()}
    keyword = inspect.Parameter.KEYWORD_ONLY

    def options_of(group: type[Any]) -> list[inspect.Parameter]:
        hints = get_type_hints(group, include_extras=True)
        return [
            inspect.Parameter(f.name, keyword, default=f.default, annotation=hints[f.name])
            for f in fields(group)
        ]

    def decorate(command: Command) -> Command:
        @wraps(command)
        def call(**given: Any) -> None:
            for parameter, group in groups.items():
                given[parameter] = group(**{n: given.pop(n) for n in names[parameter]})
            command(**given)

        shown: list[inspect.Parameter] = []
        for p in inspect.signature(command, eval_str=True).parameters.values():
            group = groups.get(p.name)
            shown += [p.replace(kind=keyword)] if group is None else options_of(group)
        call.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        return call

    return decorate

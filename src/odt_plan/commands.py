"""Parts of the command line beside models: the default command, ``devices``, ``schedule``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from .ir.errors import UsageError
from .options import Gap, Json, Quiet, Seed

Quantity = Literal["energy", "time"]

devices_app = typer.Typer(rich_markup_mode=None, add_completion=False)

def print_json(data: object) -> None:
    """Print data as indented JSON."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


class PlanByDefault(TyperGroup):
    """Inserts ``plan`` where the first word is no command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words before the command."""
        if not args and not ctx.resilient_parsing:  # the latter: a shell asks for completions
            args = ["--help"]
        if "--debug" in args:  # may stand anywhere
            args = ["--debug", *(a for a in args if a != "--debug")]
        own = {o for p in self.get_params(ctx) for o in p.opts}
        at = next((i for i, a in enumerate(args) if a not in own), None)
        if at is not None and args[at] not in self.commands:
            word = args[at]
            if word.isidentifier() and not Path(word).exists() and not ctx.resilient_parsing:
                known = ", ".join(self.commands)
                raise UsageError(f"{word!r} is neither a command ({known}) nor a model file")
            args = [*args[:at], "plan", *args[at:]]
        return list(super().parse_args(ctx, args))


@devices_app.callback(invoke_without_command=True)
def devices(context: typer.Context, as_json: Json = False) -> None:
    """List the bundled devices; `devices show ID` shows one with the source of each number."""
    if context.invoked_subcommand is not None:
        return
    from .planner.device import device_ids, load_device
    from .report import print_devices

    known = [load_device(i) for i in device_ids()]
    if as_json:
        print_json([d.model_dump(mode="json") for d in known])
    else:
        print_devices(known)


@devices_app.command()
def show(
    device: Annotated[str, typer.Argument(metavar="ID|FILE.yaml")], as_json: Json = False
) -> None:
    """Show one device, or check a device file of your own."""
    from .planner.device import load_device
    from .report import print_device

    found = load_device(device)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_device(found)


def schedule(
    graph: Annotated[Path, typer.Argument(metavar="GRAPH.json", help="A bare cost graph.")],
    budget: Annotated[
        str, typer.Option(metavar="SIZE|SHARE", help="Memory, or a share of keep-all: 0.5, 50%.")
    ],
    paging: Annotated[
        bool, typer.Option("--paging/--no-paging", help="Offer to write out and read back.")
    ] = False,
    objective: Annotated[
        Quantity | None, typer.Option(help="[default: energy, where the graph has it]")
    ] = None,
    gap: Gap = 0.0,
    time_limit: Annotated[float, typer.Option(min=0.0, max=1e6, metavar="SECONDS")] = 60.0,
    seed: Seed = 0,
    threads: Annotated[int, typer.Option(min=1, max=256)] = 1,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.json", help="Write the schedule.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Schedule a bare cost graph: compute, keep, recompute, page, under a memory budget."""
    from .scheduling import ScheduleOptions, run_schedule

    run_schedule(
        ScheduleOptions(
            graph, budget, paging, objective, gap, time_limit, seed, threads, output, as_json, quiet
        )
    )

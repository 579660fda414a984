"""The command ``init``: a project file for ``odt-plan plan``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .ir.errors import UsageError
from .project_file import PROJECT_FILE

_GOALS = "learn, latency, energy, ram or flash"
_HEAD = """\
# `odt-plan plan` reads this file in its folder, or by --project; paths count from here.
# Keys are the options of `odt-plan plan --help`, as train: [conv3.weight=0.25, fc.bias].
"""


def init(
    model: Annotated[
        Path | None, typer.Option(metavar="MODEL.onnx", help="The model to train.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="ID|FILE.yaml", help="The board; see `odt-plan devices`."),
    ] = None,
    ram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="RAM, instead of a board.")
    ] = None,
    flash: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Flash, instead of a board.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(metavar="NAME[=WEIGHT],...", help=f"The goal: {_GOALS}.  [default: learn]"),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE.yaml", help="The file to write.")
    ] = Path(PROJECT_FILE),
    yes: Annotated[
        bool, typer.Option("-y", "--yes", help="Ask nothing; take defaults where there are some.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file.")] = False,
) -> None:
    """Write a project file: asks for model, board and goal, unless options tell them."""
    from .backends.viz.files import write_whole
    from .planner.device import load_device
    from .planner.objective import parse_objective
    from .planner.sizes import parse_bytes
    from .planning import parse_ram

    if output.exists() and not force:
        raise UsageError(f"{output}: exists; choose another -o, or write over it: --force")
    ask = not yes and sys.stdin.isatty()
    chosen = model or _model(ask)
    if not chosen.is_file():
        raise UsageError(f"--model: {chosen} is no file")
    if device is None and (ram is None or flash is None):
        device, ram, flash = _board(ask, ram, flash)
    if device is not None:
        load_device(device)
    if ram is not None:
        parse_ram(ram)
    if flash is not None:
        parse_bytes(flash, "--flash")
    goal = objective or (typer.prompt(f"Goal ({_GOALS})", default="learn") if ask else "learn")
    parse_objective(goal)
    settings = {
        "model": _from(output, chosen),
        "device": _from(output, Path(device)) if device and Path(device).is_file() else device,
        "ram": ram,
        "flash": flash,
        "objective": goal,
    }
    write_whole(output, project_text({k: v for k, v in settings.items() if v is not None}))
    typer.echo(f"{output} is written; `odt-plan plan` plans by it in its folder")


def project_text(settings: dict[str, str]) -> str:
    """A project file with some settings."""
    import yaml

    return _HEAD + str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1 << 16))


def _model(ask: bool) -> Path:
    here = sorted(Path().glob("*.onnx"))
    only = str(here[0]) if len(here) == 1 else None
    if ask:
        return Path(typer.prompt("Model (.onnx file)", default=only))
    if only is None:
        found = f"{len(here)} .onnx files here" if here else "no .onnx file here"
        raise UsageError(f"--model is missing, and there is not one alone to take: {found}")
    return Path(only)


def _board(
    ask: bool, ram: str | None, flash: str | None
) -> tuple[str | None, str | None, str | None]:
    """The board, or RAM and flash where it is none that is known."""
    if not ask:
        raise UsageError("--device is missing, or --ram and --flash; `odt-plan devices` lists all")
    device = typer.prompt(
        "Board (id of `odt-plan devices`, or its .yaml; empty: RAM and flash)", default="",
        show_default=False,
    )  # fmt: skip
    if device:
        return device, ram, flash
    sizes = (ram or typer.prompt("RAM, as 320KB"), flash or typer.prompt("Flash, as 1MB"))
    return None, *sizes


def _from(output: Path, path: Path) -> str:
    """A path as seen from the folder of the project file."""
    try:
        return Path(os.path.relpath(path, output.parent)).as_posix()
    except ValueError:  # on another drive
        return str(path.resolve())

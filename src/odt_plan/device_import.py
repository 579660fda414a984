"""The command ``devices import``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import print_json
from .ir.errors import UsageError
from .options import Json, Quiet

if TYPE_CHECKING:
    from .planner.boards.combine import Imported

_KINDS = ("ram", "code", "flash", "none")


def import_device(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Linker script, map or ELF of your firmware; board JSON of PlatformIO; target YAML"
            " of probe-rs; .pdsc of a CMSIS-Pack.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="BOARD.yaml", help="The device file to write."),
    ] = None,
    chip: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which chip, of a file with several.")
    ] = None,
    core: Annotated[
        str | None, typer.Option(metavar="ID", help="Core to plan by, as cortex-m4.")
    ] = None,
    clock: Annotated[
        str | None, typer.Option(metavar="FREQUENCY", help="Core clock, as 72MHz.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="ID|FILE.yaml",
            help="Board that it is like, in all that no file tells; see `odt-plan devices`."
            "  [default: for times and power the bundled one of its core with the nearest clock]",
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGION=ram|code|flash|none,...",
            help="What a region is; none leaves it out (repeatable).",
        ),
    ] = None,
    defsym: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="What the linker is told so of a script (repeatable)."
        ),
    ] = None,
    stack: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Stack, where no file tells it.")
    ] = None,
    heap: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Heap, where no file tells it.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--id", metavar="ID", help="Id of the device.  [default: by -o or a file]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a device file of what you have; what your firmware already takes is subtracted.

    Several files are combined. Where they differ, the linker script counts before the map, and both
    before files of vendors; all differences are shown, and the source of every value.
    """
    from .backends.viz.files import write_whole
    from .planner.boards.combine import Given, combine
    from .planner.boards.read import read_facts
    from .planner.device import load_device
    from .planner.sizes import parse_bytes, parse_hertz

    if output is not None and output.exists() and not force:
        raise UsageError(f"{output}: exists; choose another -o, or write over it: --force")
    given = Given(
        device_id=_device_id(name or (output or files[0]).stem),
        core=core,
        clock_hz=None if clock is None else parse_hertz(clock, "--clock"),
        base=None if base is None else load_device(base),
        kinds=_kinds(kind or ()),
        stack=None if stack is None else parse_bytes(stack, "--stack"),
        heap=None if heap is None else parse_bytes(heap, "--heap"),
    )
    symbols = _symbols(defsym or ())
    found = combine([read_facts(f, chip, core, symbols) for f in files], given)
    if output is not None:
        write_whole(output, device_yaml(found))
    if as_json:
        print_json(_record(found))
    elif not quiet:
        _print(found, output)


def device_yaml(found: Imported) -> str:
    """The device as the YAML that ``--device`` takes, with conflicts and notes as comments."""
    import yaml

    class Hexadecimal(int):
        """An address."""

    class Dumper(yaml.SafeDumper):
        """Writes addresses as they are read."""

    def as_hexadecimal(dumper: yaml.SafeDumper, value: int) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:int", f"{int(value):#010x}")

    Dumper.add_representer(Hexadecimal, as_hexadecimal)
    record = found.device.model_dump(mode="json", exclude_none=True)
    for region in record["regions"]:
        region["origin"] = Hexadecimal(region["origin"])
        if not region["sectors"]:
            del region["sectors"]
    for field in ("storage", "notes"):
        if not record[field]:
            del record[field]
    lines = [*_conflict_lines(found), *found.notes]
    head = "".join(f"# {' '.join(line.split())}\n" for line in lines)  # names may hold anything
    return head + str(
        yaml.dump(
            record, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1 << 16,
            default_flow_style=None,
        )
    )  # fmt: skip


def _device_id(text: str) -> str:
    cleaned = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not cleaned:
        raise UsageError(f"--id: {text!r} has no letters or digits; give another")
    return cleaned


def _symbols(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if wrong := [name + sign for name, sign, value in pairs if not (name and value)]:
        raise UsageError(f"--defsym: {wrong[0]!r} is not NAME=VALUE")
    return {name.strip(): value for name, _, value in pairs}


def _kinds(texts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in (i for text in texts for i in text.split(",")):
        region, _, kind = item.rpartition("=")
        if not region or kind not in _KINDS:
            raise UsageError(f"--kind: {item!r} is not REGION=KIND, with {', '.join(_KINDS)}")
        found[region.strip()] = kind
    return found


def _conflict_lines(found: Imported) -> list[str]:
    return [
        f"{c.what}: {c.taken.value} ({c.taken.source}) counts;"
        f" {' and '.join(f'{t.value} ({t.source})' for t in c.others)} differs"
        for c in found.conflicts
    ]


def _record(found: Imported) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "device": found.device.model_dump(mode="json"),
        "conflicts": [asdict(c) for c in found.conflicts],
        "notes": list(found.notes),
    }


def _print(found: Imported, output: Path | None) -> None:
    from rich.text import Text

    from .report import console, print_device

    print_device(found.device)
    out = console()
    for line in _conflict_lines(found):
        out.print(Text.assemble(("conflict  ", "bold yellow"), line), soft_wrap=True)
    for line in found.notes:
        out.print(Text.assemble(("note      ", "bold"), line), soft_wrap=True)
    end = f"written   {output}" if output else "nothing is written; -o BOARD.yaml writes it"
    out.print(Text(end), soft_wrap=True)

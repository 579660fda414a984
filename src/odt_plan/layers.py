"""What ``odt-plan check`` prints: the layers of a model and what is in the way of training them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from .ir.trainability import TrainabilityReport
from .report import console
from .tables import print_table


def print_layers(path: Path, report: TrainabilityReport) -> None:
    """Print one row per node, then every obstacle by node name, the totals and the way out."""
    out = console()
    table = Table("node", "op", "output", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("parameters", justify="right")
    table.add_column("MACs", justify="right")
    table.add_column("trainable")
    for layer in report.layers:
        style = "green" if layer.trainable else "yellow" if layer.parameters else "dim"
        table.add_row(
            Text(layer.name),
            layer.op,
            Text(str(layer.output or "unknown")),
            f"{layer.parameters:,}",
            f"{layer.macs:,}",
            Text(layer.reason, style),
        )
    print_table(out, table)
    for note in report.notes:
        out.print(Text.assemble(("note: ", "bold"), note), soft_wrap=True)
    for o in report.obstacles:
        line = Text.assemble(("obstacle: ", "bold red"), f"{o.where} ({o.op}): {o.reason}")
        out.print(line, soft_wrap=True)
    for o in report.stops:
        line = Text.assemble(("frozen: ", "bold yellow"), f"{o.where} ({o.op}) {o.reason}")
        out.print(line, soft_wrap=True)
    out.print(Text(f"{path}: {report.summary()}"), soft_wrap=True)
    if report.advice:
        out.print(Text.assemble(("way out: ", "bold"), report.advice), soft_wrap=True)


def layers_record(report: TrainabilityReport) -> dict[str, object]:
    """What ``check --json`` prints."""
    return {
        "model": report.model,
        "batch": report.batch,
        "layers": [
            {
                "name": x.name,
                "op": x.op,
                "output": None if x.output is None else str(x.output),
                "parameters": x.parameters,
                "macs": x.macs,
                "trainable": x.trainable,
                "reason": x.reason,
            }
            for x in report.layers
        ],
        "obstacles": [asdict(o) for o in report.obstacles],
        "stops": [asdict(o) for o in report.stops],
        "advice": report.advice,
        "notes": list(report.notes),
    }

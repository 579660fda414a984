"""plan.dot: the decided graph in the DOT language of Graphviz."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...ir.training import TrainingGraph
from ...planner.plan import Plan
from .files import write_whole
from .picture import PLAIN, STYLES, Box, Style, draw, kib
from .svg import printable, shorten

if TYPE_CHECKING:
    from ...planner.check import CheckReport

BACKSLASH = "\u2216"


def write_dot(plan: Plan, training: TrainingGraph, report: CheckReport, path: Path) -> None:
    """Write the forward graph with its decisions as DOT text.

    Args:
        plan: A checked plan.
        training: The training graph that the plan executes.
        report: The checker's report on this plan.
        path: File to write; it appears whole or not at all.

    Raises:
        OdtPlanError: The file can't be written.
    """
    picture = draw(plan, training, report)
    heading = f"{shorten(picture.title, 120)}\n{picture.facts}"
    lines = [
        "digraph plan {",
        f"  graph [label={quoted(heading)}, labelloc=t, fontname=Helvetica, fontsize=12,"
        " bgcolor=white, rankdir=TB, nodesep=0.4, ranksep=0.5];",
        "  node [shape=box, fontname=Helvetica, fontsize=10, fontcolor=black];",
        '  edge [fontname=Helvetica, fontsize=9, color="#444444"];',
    ]
    lines += [f"  n{i} [{_attributes(b)}];" for i, b in enumerate(picture.boxes)]
    for e in picture.links:
        tip = quoted(f"{e.value}: {e.type}, {e.bytes:,} B")
        lines.append(f"  n{e.source} -> n{e.target} [label={quoted(kib(e.bytes))}, tooltip={tip}];")
    lines.append("  subgraph cluster_legend {")
    lines.append('    label="Legend"; style=solid; color="#bbbbbb"; fontsize=10;')
    legend = [*STYLES.values(), PLAIN]
    lines += [f"    k{i} [label={quoted(s.text)}, {_look((s,))}];" for i, s in enumerate(legend)]
    chain = " -> ".join(f"k{i}" for i in range(len(legend)))
    lines += [f"    {chain} [style=invis];", "  }", "}"]
    write_whole(path, "\n".join(lines) + "\n")


def quoted(text: str) -> str:
    """A DOT string that shows ``text``: no escapes, entities or markup in it take effect.

    A backslash becomes the sign U+2216: how often Graphviz resolves escapes, before or after
    entities, differs between labels and tooltips, so no real backslash shows right in both.
    """
    safe = printable(text).replace("&", "&amp;").replace('"', "&quot;")
    safe = safe.replace("\\", BACKSLASH)
    return '"' + safe.replace("\n", "\\n") + '"'


def _attributes(box: Box) -> str:
    label = "\n".join(
        part
        for part in (
            f"{box.op}  {shorten(box.name, 32)}",
            f"{box.type} · {kib(box.bytes)}",
            box.note,
        )
        if part
    )
    styles = tuple(STYLES[d] for d in box.decisions) or (PLAIN,)
    shape = ", shape=ellipse" if box.op == "input" else ""
    tip = quoted("\n".join(box.details))
    return f"label={quoted(label)}, {_look(styles, box.op == 'input')}{shape}, tooltip={tip}"


def _look(styles: tuple[Style, ...], ellipse: bool = False) -> str:
    """One stripe per decision (wedges in an ellipse); the border is the last decision's."""
    last = styles[-1]
    fill = ":".join(s.tint for s in styles)
    several = "wedged" if ellipse else "striped"
    kind = "filled" if len(styles) == 1 else several
    return (
        f'style="{kind},{last.dot}", fillcolor="{fill}", color="{last.color}",'
        f" penwidth={max(s.width for s in styles):g}"
    )

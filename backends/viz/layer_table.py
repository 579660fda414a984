"""Every node of forward and loss in a table: what is decided about it, and what it costs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ...figures import Cell, Grid
from .notes import node_cycles, node_facts
from .picture import draw

if TYPE_CHECKING:
    from ...planner.pipeline import PlannedModel

#: Columns of numbers behind the words of a row: bytes, cycles, and score of what is updated.
NUMBERS = ("bytes", "forward", "recompute", "backward, update", "importance")


def layer_grid(planned: PlannedModel) -> tuple[Grid, tuple[int, ...]]:
    """The table, and for each row the index of its box in the graph picture.

    Bytes are those of the first result; cycles are predicted. What the gradients and updates of a
    node cost is its own.
    """
    plan, training, report = planned.plan, planned.training, planned.report
    boxes = draw(plan, training, report).boxes
    names = {b.name for b in boxes if b.op != "input"}
    facts = node_facts(plan, training, names)
    cycles = node_cycles(training, report, plan, names)
    rows, places = [], []
    for i, box in enumerate(boxes):
        if box.op == "input":
            continue
        fact, spent = facts[box.name], cycles.get(box.name, Counter())
        forward, again = spent["forward"] + spent["loss"], spent["recompute"]
        learning = spent["backward"] + spent["update"]
        rows.append(
            (
                Cell(box.name),
                Cell(box.op),
                Cell(box.type),
                Cell(fact.action),
                *([Cell(", ".join(dict.fromkeys(fact.precision)))] if planned.scales else []),
                Cell(", ".join(dict.fromkeys(fact.saved))),
                *(Cell(f"{n:,}", n) for n in (box.bytes, forward, again, learning)),
                Cell(f"{fact.importance:,.0f}", fact.importance),
            )
        )
        places.append(i)
    precision = ("precision",) if planned.scales else ()
    words = ("layer", "operator", "result", "parameters", *precision, "until backward")
    return Grid((*words, *NUMBERS), tuple(rows)), tuple(places)

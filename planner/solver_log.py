"""Best solution and bound from the log lines of the solvers, which tell them in no other way."""

from __future__ import annotations

import re

_NUMBER = r"([-+]?(?:inf|[\d.']+(?:e[-+]?\d+)?))"
#: HiGHS: source, processed, in queue, leaves, explored %, bound, best.
_HIGHS = re.compile(rf"^ ?[A-Za-z]? +\d+ +\d+ +\d+ +[\d.]+% +{_NUMBER} +{_NUMBER} +\S")
#: CP-SAT: ``#3 0.10s best:20 next:[21,40]``; what is still possible lies in the brackets.
_CP_SAT = re.compile(rf"^#\S+ +[\d.]+s +best:{_NUMBER} +next:\[{_NUMBER},{_NUMBER}\]")
#: Columns of SCIP's table.
_SCIP_COLUMNS, _SCIP_BOUND, _SCIP_BEST = 18, 14, 15


def read_line(line: str, *, maximize: bool) -> tuple[float | None, float | None] | None:
    """Best objective and proven bound; None where the line tells none of them.

    Args:
        line: A line of the log of HiGHS, SCIP or CP-SAT.
        maximize: Sense of the program.
    """
    if found := _HIGHS.match(line):
        return _finite(found[2]), _finite(found[1])
    if found := _CP_SAT.match(line):
        return _finite(found[1]), _finite(found[3] if maximize else found[2])
    cells = line.split("|")
    if len(cells) == _SCIP_COLUMNS + 1 or len(cells) == _SCIP_COLUMNS:
        best, bound = _finite(cells[_SCIP_BEST]), _finite(cells[_SCIP_BOUND])
        return None if best is bound is None else (best, bound)
    return None


def _finite(text: str) -> float | None:
    try:
        x = float(text.replace("'", ""))
    except ValueError:
        return None
    return x if abs(x) < 1e18 else None

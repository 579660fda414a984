"""Why a model can't be planned: everything that is wrong with it, in one error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UnsupportedModelError


@dataclass(frozen=True)
class Obstacle:
    """One reason why a model can't be planned.

    Attributes:
        where: Node, input or initializer name.
        op: Operator type; for things that are not nodes what it is, as "initializer".
        reason: What is wrong, and the way out where there is one.
        options: Options of the command that remove it, with ``N`` for numbers.
    """

    where: str
    op: str
    reason: str
    options: tuple[str, ...] = ()


def binding(obstacles: Sequence[Obstacle]) -> str:
    """The way out of open dimensions, in one line; empty if there are none."""
    options = dict.fromkeys(option for o in obstacles for option in o.options)
    if not options:
        return ""
    return (
        f"bind the open dimensions with {' '.join(options)}, numbers in the place of N; what is"
        " behind them can be judged then"
    )


#: What helps against an operator that can't be run.
_EXPORT = (
    "the model must be exported without; freezing doesn't help, because what is frozen runs"
    " forward, too"
)


def report_obstacles(
    path: Path, obstacles: Sequence[Obstacle], way_out: str = ""
) -> UnsupportedModelError:
    """The error that lists all obstacles; nodes with the same reason share a line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for o in obstacles:
        names = groups.setdefault((o.op, o.reason), [])
        if o.where not in names:
            names.append(o.where)
    lines = [
        _printable(f"{', '.join(names)} ({op}): {reason}") for (op, reason), names in groups.items()
    ]
    if len(lines) == 1:
        return UnsupportedModelError("; ".join(filter(None, (f"{path}: {lines[0]}", way_out))))
    count = len({(o.where, o.op) for o in obstacles})
    many = f"{count} obstacles" if count > 1 else "one obstacle"
    return UnsupportedModelError(
        f"{path}: {many}; {binding(obstacles) or way_out or _EXPORT}:\n  " + "\n  ".join(lines)
    )


def _printable(text: str) -> str:
    """The text on one line: names from files may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

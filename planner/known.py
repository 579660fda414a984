"""What plans of the same request under other budgets tell: a first plan and a bound.

Both are of plans that run operators in the file's order, for the search in that order.
"""

from __future__ import annotations

from dataclasses import dataclass

from .decided import Decided
from .schedule import Schedule


@dataclass(frozen=True)
class KnownPlan:
    """A plan by its decisions; small, picklable.

    Attributes:
        decided: Its updates, precisions and blocks.
        schedule: Its program and layout.
    """

    decided: Decided
    schedule: Schedule


@dataclass(frozen=True)
class Known:
    """What is known before a search begins.

    Attributes:
        plan: One that keeps the request's limits, as one for tighter limits does.
        value: Of the first stage of the objective, in its own unit, that the plan reaches.
        bound: On the first stage of the objective, in its unit, as it is proven for looser limits.
    """

    plan: KnownPlan | None = None
    value: float = 0.0
    bound: float | None = None

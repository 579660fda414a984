"""``--state``: what may become of the optimizer's tensors of each updated parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from ..ir.errors import UsageError
from ..ir.training import StateForm, TrainingSpec
from .importance import SGD_WORTH

AUTO = "auto"


@dataclass(frozen=True)
class StateForms:
    """What the solver chooses from, parameter by parameter.

    Attributes:
        forms: What learns most comes first; one where the optimizer has no tensors.
        sgd_worth: Part of an update's importance that is left as plain SGD.
    """

    forms: tuple[StateForm, ...]
    sgd_worth: float = SGD_WORTH


def state_forms(items: Sequence[str], spec: TrainingSpec, *, pages: bool) -> StateForms:
    """The forms that ``--state`` allows.

    Args:
        items: ``auto`` (all that are possible), or names of forms; ``sgd=FACTOR`` says what plain
            SGD is worth.
        spec: The optimizer.
        pages: There is a storage to page to.

    Raises:
        UsageError: An unknown form, a factor that is not in (0, 1], or paging without storage.
    """
    known: tuple[StateForm, ...] = get_args(StateForm)
    wanted: set[StateForm] = set()
    worth = SGD_WORTH
    for item in (i.strip() for text in items for i in text.split(",") if i.strip()):
        name, given, text = item.partition("=")
        form = next((f for f in known if f == name), None)
        if given and form == "sgd":
            worth = _factor(item, text)
        elif given or (form is None and name != AUTO):
            raise UsageError(f"--state: {item!r} is not {AUTO}, {', '.join(known)} or sgd=FACTOR")
        if form == "paged" and not pages:
            raise UsageError(f"--state: {item!r} has nothing to page to; give --storage NAME, too")
        every = {f for f in known if f != "paged" or pages}
        wanted |= every if form is None else {form}
    if not spec.state_slots or not wanted:
        wanted = {"keep"}
    return StateForms(tuple(f for f in known if f in wanted), worth)


def _factor(item: str, text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor <= 1:  # also rejects NaN
        raise UsageError(f"--state: {item!r}: the factor must be above 0 and at most 1")
    return factor

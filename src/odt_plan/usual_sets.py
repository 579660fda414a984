"""Update sets that are usual without any planner: last layers, biases, adapters, TinyTL's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .ir.adapters import adapters_by_param
from .ir.candidates import param_slots
from .ir.freezing import frozen_before, untrainable
from .planner.imported import Imported
from .planner.pipeline import PlannedModel, Request

LAST, BIASES, LAYERS = "last layer", "biases", "last layers that fit"
#: Where ``--lora`` puts some beside layers, and where ``--lite-residual`` does beside blocks.
ADAPTERS, TINYTL = "adapters", "lite residual, biases, last layer"
#: Plans a named set of ``--train`` items; text: why there is no plan.
Made = Callable[[str, tuple[str, ...]], PlannedModel | str]


def usual_plans(
    imported: Imported, request: Request, made: Made
) -> Iterator[tuple[str, PlannedModel | str]]:
    """The plan of each set, or why it has none."""
    last = made(LAST, ("last",))
    yield LAST, last
    yield BIASES, made(BIASES, ("bias",))
    more = last_layers(imported, request)[1:]
    yield LAYERS, last if isinstance(last, str) else _most(last, more, made)
    if request.importing.lora is not None:
        yield ADAPTERS, made(ADAPTERS, ("lora",))
    if request.importing.lite_residual is not None:
        yield TINYTL, made(TINYTL, ("lite", "bias", "last"))


def _most(best: PlannedModel, more: list[tuple[str, ...]], made: Made) -> PlannedModel:
    """The plan of the largest set that has one, by bisection: a larger one needs more."""
    low, high = 0, len(more)  # more[:low] have plans, more[high:] have none
    while low < high:
        middle = (low + high) // 2
        tried = made(LAYERS, more[middle])
        if isinstance(tried, str):
            high = middle
        else:
            best, low = tried, middle + 1
    return best


def last_layers(imported: Imported, request: Request) -> list[tuple[str, ...]]:
    """Parameters of the last layer with a weight, of the last two, and so on to all layers."""
    forward = imported.forward
    frozen = frozen_before(forward, request.freeze_before)
    out = {*frozen, *untrainable(forward, frozen), *adapters_by_param(forward)}
    order = {n: i for i, n in enumerate(forward.nodes)}
    uses = {p: u[0] for p, u in param_slots(forward).items() if p not in out}
    begins = {order[node] for node, slot in uses.values() if slot.role == "weight"}
    return [
        tuple(p for p, (node, _) in uses.items() if order[node] >= begin)
        for begin in sorted(begins, reverse=True)
    ]

"""How the samples of an update are split into micro-batches: a choice beside all others.

An update of ``N`` samples runs in ``k`` micro-steps of ``N / k`` samples whose gradients are added
up (gradient accumulation). Small micro-batches need smaller activations, but an accumulator per
parameter and more page transfers. Every split is a problem of its own, so all are planned, and the
best plan is taken. A bound for all of them is the weakest of their bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..ir.errors import InfeasibleError
from .at_once import bound_of_all
from .decided import ProvenInfeasibleError
from .imported import import_requested
from .pipeline import PlannedModel, Planner, Request, make_plan
from .plan import Plan
from .progress import Watch


def splits(samples: int) -> Iterator[tuple[int, int]]:
    """(Samples per micro-batch, micro-batches), the largest micro-batch first."""
    for k in range(1, samples + 1):
        if samples % k == 0:
            yield samples // k, k


def plan_every_split(request: Request, watch: Watch | None = None) -> PlannedModel:
    """The best plan over all splits of the samples of an update.

    Args:
        request: The batch that it imports with is the number of samples of an update; its time
            limit is that of all.
        watch: See ``make_plan``.

    Raises:
        InfeasibleError: No split fits; that of single samples tells why.
        UsageError, UnsupportedModelError, KeyboardInterrupt: As ``make_plan``.
    """
    watch = watch or Watch()
    watch.begin(request.time_limit_s)
    whole = request.importing
    every = [
        replace(
            request,
            importing=replace(whole, batch=batch, fold_batchnorm=whole.folds),
            spec=replace(request.spec, micro_batches=k),
        )
        for batch, k in splits(whole.batch)
    ]
    found: list[PlannedModel] = []
    bounds: list[float] = []
    for i, r in enumerate(every):
        if found and watch.interrupted:
            bounds.append(_loose_bound(r, watch))
            continue
        part = watch.part(watch.left_s / (len(every) - i))
        planner = Planner(r, import_requested(r, part), part)
        try:
            found.append(planner.run())
        except ProvenInfeasibleError:
            continue
        except InfeasibleError:  # none was found, none is excluded
            bounds.append(_loose_bound(r, watch))
    if not found:
        return make_plan(every[-1], watch)
    best = min(found, key=lambda m: _rank(m.plan))
    bounds += [m.plan.objective[0].bound for m in found]
    return replace(best, plan=_with_bound(best.plan, bounds, request.gap))


def _loose_bound(request: Request, watch: Watch) -> float:
    """A bound for a split that no search has finished."""
    stages, start = Planner(request, import_requested(request, watch), watch).prepared
    return bound_of_all(stages, start.decided, start.goals[0], start.free)


def _rank(plan: Plan) -> tuple[float, ...]:
    """Lexicographic, less is better."""
    values = [-o.value if o.name == "learn" else o.value for o in plan.objective]
    return (*values, plan.claims.latency_s, plan.claims.ram_bytes.total)


def _with_bound(plan: Plan, bounds: list[float], gap: float) -> Plan:
    """The first objective with a bound that holds for every split."""
    first, *rest = plan.objective
    bound = max(bounds) if first.name == "learn" else min(bounds)
    off = abs(bound - first.value) / max(abs(first.value), 1e-9)
    whole = first.model_copy(update={"bound": bound, "gap": off})
    status = "optimal" if plan.status == "optimal" and off <= max(gap, 1e-6) else "feasible"
    return plan.model_copy(update={"objective": (whole, *rest), "status": status})

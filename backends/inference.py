"""Which steps of a plan an inference takes."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.errors import GraphError
from ..planner.plan import Plan


def inference_steps(plan: Plan, wanted: Sequence[str]) -> tuple[int, ...]:
    """Indices of the steps that the first computation of each wanted value needs, in order.

    Args:
        plan: A plan.
        wanted: Names of predictions, or of the loss.

    Raises:
        GraphError: No step computes one of them, or one depends on an update.
    """
    value = {b.id: b.value for b in plan.buffers}
    first: dict[str, int] = {}
    for i, step in enumerate(plan.steps):
        for w in step.writes:
            first.setdefault(value[w], i)
    for name in wanted:
        if name not in first:
            raise GraphError(f"no step of the plan computes {name}")
    ends = {(first[name], name) for name in wanted}
    needed: set[str] = set()
    chosen: list[int] = []
    for i in range(max(end for end, _ in ends), -1, -1):
        step = plan.steps[i]
        needed.update(w for w in step.writes if (i, value[w]) in ends)
        if step.kind == "page_wait" and step.reads[1] in needed:
            chosen.append(i)
        elif needed.intersection(step.writes):
            if step.kind == "update":
                raise GraphError(f"step {i}: an inference depends on an update of the same step")
            needed.update(r for r in step.reads if r is not None)
            chosen.append(i)
    return tuple(reversed(chosen))

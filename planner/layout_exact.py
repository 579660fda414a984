"""Layouts by CP-SAT: ``NoOverlap2D`` over time x address."""

from __future__ import annotations

from collections.abc import Sequence

from .blocks import Block, unit_bytes

#: CP-SAT's deterministic time in a second of the processor, as measured on layouts (0.01 to 0.03):
#: it counts little of what ``NoOverlap2D`` propagates.
DETERMINISTIC_PER_SECOND = 0.02


def solve_exactly(
    blocks: Sequence[Block],
    at_least: int,
    at_most: int,
    start: Sequence[int] | None = None,
    *,
    seconds: float,
    deterministic: bool,
    seed: int,
) -> tuple[list[int] | None, int]:
    """Look for a layout, or prove that there is none.

    Args:
        blocks: What to place.
        at_least: A lower bound of the arena in bytes.
        at_most: Bytes that the arena may have.
        start: A layout to improve on: an offset per block. None: the first layout found will do.
        seconds: Limit.
        deterministic: The limit is work, not wall clock: the same answer on every machine.
        seed: Seed of CP-SAT.

    Returns:
        Offset per block, or None if no layout was found; and a proven lower bound of the arena in
        bytes, beyond ``at_most`` if there is no layout.
    """
    from ortools.sat.python import cp_model

    unit = unit_bytes(blocks)
    times = sorted({t for b in blocks for t in (b.first, b.last + 1)})
    event = {t: k for k, t in enumerate(times)}
    model = cp_model.CpModel()
    places, offsets, across, along = [], [], [], []
    for i, b in enumerate(blocks):
        size, step = b.bytes // unit, max(b.alignment // unit, 1)
        places.append(model.new_int_var(0, (at_most // unit - size) // step, f"at{i}"))
        offsets.append(step * places[i])
        begin, end = event[b.first], event[b.last + 1]
        along.append(model.new_fixed_size_interval_var(begin, end - begin, f"t{i}"))
        across.append(model.new_fixed_size_interval_var(offsets[i], size, f"a{i}"))
    model.add_no_overlap_2d(along, across)
    if start is not None:
        top = model.new_int_var(-(-at_least // unit), at_most // unit, "top")
        for i, b in enumerate(blocks):
            model.add(offsets[i] + b.bytes // unit <= top)
            model.add_hint(places[i], start[i] // unit // max(b.alignment // unit, 1))
        model.minimize(top)
    solver = cp_model.CpSolver()
    if deterministic:
        solver.parameters.max_deterministic_time = seconds * DETERMINISTIC_PER_SECOND
    else:
        solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return None, (at_most // unit + 1) * unit
    bound = at_least if start is None else round(solver.best_objective_bound) * unit
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None, max(at_least, min(bound, at_most))
    return [solver.value(o) * unit for o in offsets], max(at_least, bound)

"""The smallest arena by CP-SAT: ``NoOverlap2D`` over time x address."""

from __future__ import annotations

from collections.abc import Sequence

from .blocks import Block, arena_bytes, unit_bytes


def smallest_arena(
    blocks: Sequence[Block],
    at_least: int,
    start: Sequence[int],
    *,
    seconds: float,
    deterministic: bool,
    seed: int,
) -> tuple[list[int], int]:
    """Improve a layout, or prove that nothing below it works.

    Args:
        blocks: What to place.
        at_least: A lower bound of the arena in bytes.
        start: A layout to begin with: an offset per block.
        seconds: Limit, of CP-SAT's deterministic time or of wall clock.
        deterministic: The limit is work, not time: the same answer on every machine.
        seed: Seed of CP-SAT.

    Returns:
        Offset per block, and a proven lower bound of the arena in bytes.
    """
    from ortools.sat.python import cp_model

    limit, unit = arena_bytes(blocks, start), unit_bytes(blocks)
    model = cp_model.CpModel()
    top = model.new_int_var(-(-at_least // unit), limit // unit, "top")
    offsets, across, along = [], [], []
    for i, b in enumerate(blocks):
        size, step = b.bytes // unit, max(b.alignment // unit, 1)
        at = model.new_int_var(0, (limit // unit - size) // step, f"at{i}")
        model.add_hint(at, start[i] // unit // step)
        offsets.append(step * at)
        along.append(model.new_fixed_size_interval_var(b.first, b.last - b.first + 1, f"t{i}"))
        across.append(model.new_fixed_size_interval_var(step * at, size, f"a{i}"))
        model.add(step * at + size <= top)
    model.add_no_overlap_2d(along, across)
    model.minimize(top)
    solver = cp_model.CpSolver()
    if deterministic:
        solver.parameters.max_deterministic_time = seconds
    else:
        solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    status = solver.solve(model)
    bound = max(at_least, round(solver.best_objective_bound) * unit)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return list(start), max(at_least, min(bound, limit))
    return [solver.value(o) * unit for o in offsets], bound

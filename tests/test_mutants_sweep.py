"""The checker rejects every edit of a plan, of every kind, at every place, or it is harmless."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutate import DEVICE, Json, dump, outcome, reject, repaired
from pydantic import ValidationError
from zoo import RECIPES, exhibit

from odt_plan.planner.check import CheckError, check
from odt_plan.planner.check_machine import Machine
from odt_plan.planner.check_program import resolve
from odt_plan.planner.plan import Plan

Path = tuple[str | int, ...]


@pytest.mark.parametrize("name", RECIPES)
def test_every_dropped_step(name: str) -> None:
    e = exhibit(name)
    for k in range(len(e.plan.steps)):
        d = dump(e)
        d["steps"].pop(k)
        reject(e, d)
        reject(e, repaired(d))


@pytest.mark.parametrize("name", RECIPES)
def test_every_doubled_step(name: str) -> None:
    e = exhibit(name)
    for k in range(len(e.plan.steps)):
        d = dump(e)
        d["steps"].insert(k, dict(d["steps"][k]))
        reject(e, d)
        reject(e, repaired(d))


@pytest.mark.parametrize("name", RECIPES)
def test_every_swap_of_dependent_neighbours(name: str) -> None:
    e = exhibit(name)
    swapped = 0
    for k in range(len(e.plan.steps) - 1):
        a, b = e.plan.steps[k], e.plan.steps[k + 1]
        if set(a.writes) & set(b.reads):
            d = dump(e)
            d["steps"][k], d["steps"][k + 1] = d["steps"][k + 1], d["steps"][k]
            reject(e, repaired(d))
            swapped += 1
    assert swapped > 5


@pytest.mark.parametrize("name", RECIPES)
def test_every_offset_moved_by_one_byte(name: str) -> None:
    e = exhibit(name)
    for k, b in enumerate(e.plan.buffers):
        d = dump(e)
        d["buffers"][k]["offset"] = b.offset + 1
        reject(e, d, "not a multiple of 4")


@pytest.mark.parametrize("name", RECIPES)
def test_every_lifetime_shrunk(name: str) -> None:
    """To less than the last touch; and begun a step late or early."""
    e = exhibit(name)
    touched: dict[str, int] = {}
    for i, s in enumerate(e.plan.steps):
        for t in (*s.reads, *s.writes, s.workspace, s.tile):
            if t is not None:
                touched[t] = i
    for k, b in enumerate(e.plan.buffers):
        if b.space not in ("arena", "storage"):
            continue
        if touched[b.id] > b.first:
            d = dump(e)
            d["buffers"][k]["last"] = touched[b.id] - 1
            reject(e, d, "lives from step")
        for first in (b.first - 1, b.first + 1):
            if 0 <= first <= b.last:
                d = dump(e)
                d["buffers"][k]["first"] = first
                reject(e, d)


@pytest.mark.parametrize("name", RECIPES)
def test_every_offset_moved_by_a_word(name: str) -> None:
    """Moved within bounds onto bytes that are free, a buffer may be at home; else it is rejected.

    An accepted move must be harmless: the moved plan trains to the same bits.
    """
    e = exhibit(name)
    good = outcome(e, e.plan)
    for k, b in enumerate(e.plan.buffers):
        for offset in (b.offset - 4, b.offset + 4):
            if offset < 0:
                continue
            d = dump(e)
            d["buffers"][k]["offset"] = offset
            moved = Plan.model_validate(d)
            try:
                check(moved, e.training, DEVICE)
            except CheckError:
                continue
            assert b.space in ("arena", "storage"), b
            assert outcome(e, moved) == good


@pytest.mark.parametrize("name", ["mlp-sgd", "partial-accumulate", "recompute", "paged-accumulate"])
def test_the_machine_alone_sees_every_harmful_move(name: str) -> None:
    """Without the layout rules, a buffer may move if and only if training stays the same."""
    e = exhibit(name)
    good, rng = outcome(e, e.plan), random.Random(1)
    accepted = rejected = 0
    for k, b in enumerate(e.plan.buffers):
        others = sorted({o.offset for o in e.plan.buffers if o.space == b.space} - {b.offset})
        for offset in rng.sample(others, min(len(others), 6)):
            d = dump(e)
            d["buffers"][k]["offset"] = offset
            moved = Plan.model_validate(d)
            try:
                Machine(resolve(moved, e.training)).run()
            except CheckError:
                rejected += 1
                continue
            accepted += 1
            assert outcome(e, moved) == good, (b.id, offset)
    assert min(accepted, rejected) > 0


# ---- random mutants

#: Fields that may change without any effect on what the plan does. All others must be rejected.
HARMLESS = [
    r"odt_plan_version",
    r"model\.(name|file|sha256|fold_batchnorm)",  # compared with the model file when it is loaded
    r"device\.storage",  # without paging
    r"device\.budget\.\w+",  # a wider budget is kept as well
    r"status",
    r"objective(\.\d+)?(\.(name|bound|gap|value))?",  # what solver and user say of the search
    r"solver\.\w+",
    r"decisions\.importance_source",
    r"decisions\.updates\.\d+\.importance",
    r"decisions\.activations\.\d+",  # leaving out a tensor that is not a forward tensor
    r"decisions\.precision\.[^.]+",  # leaving out a node without parameters
    r"buffers\.\d+\.last",  # a longer stay that disturbs nobody and leaves the peak as claimed
    r"buffers\.\d+\.offset",  # a move to free bytes
    r"steps\.\d+\.last_micro",  # with one micro-batch every step is in the last
]


def leaves(node: Any, path: Path = ()) -> Iterator[Path]:
    """Paths of every scalar and every list item."""
    if isinstance(node, dict):
        for k, v in node.items():
            yield from leaves(v, (*path, k))
    elif isinstance(node, list):
        for i, v in enumerate(node):
            if isinstance(v, dict | list):
                yield (*path, i)
            yield from leaves(v, (*path, i))
    else:
        yield path


def get(d: Any, path: Path) -> Any:
    for key in path:
        d = d[key]
    return d


def edit(draw: st.DrawFn, d: Json) -> Path:
    """Change one field to another value of its kind, or drop or double one item of a list."""
    path = draw(st.sampled_from(sorted(leaves(d), key=str)))
    parent, key, old = get(d, path[:-1]), path[-1], get(d, path)
    if isinstance(old, dict | list):
        if draw(st.booleans()):
            del parent[key]
        else:
            parent.insert(key, old)
        return path
    alike = [
        v
        for p in leaves(d)
        if p[-1:] == path[-1:] or (isinstance(p[-1], int) and p[-2:-1] == path[-2:-1])
        if not isinstance(v := get(d, p), dict | list) and v != old
    ]
    options = [st.sampled_from(alike)] if alike else []
    if isinstance(old, bool):
        options = [st.just(not old)]
    elif isinstance(old, int):
        options += [st.sampled_from([old + 1, old - 1, old + 4, old - 4, 0, 1, -1, 2**31, old * 2])]
    elif isinstance(old, float):
        options += [st.sampled_from([old * 1.5, old + 1e-3, -old, 0.0, 1e30, math.nan, math.inf])]
    elif isinstance(old, str):
        options += [st.sampled_from(["", "x", old + "x", old[1:]])]
    elif old is None:
        options += [st.sampled_from(["x", 1, 0.0, "sdcard"])]
    options.append(st.none())
    parent[key] = draw(st.one_of(options))
    return path


@pytest.mark.parametrize("name", ["mlp-sgd", "partial-momentum", "paged", "paged-accumulate"])
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_any_single_edit_is_rejected_or_harmless(name: str, data: st.DataObject) -> None:
    e = exhibit(name)
    d = dump(e)
    path = edit(data.draw, d)
    try:
        plan = Plan.model_validate(d)
        if plan == e.plan:
            return
        check(plan, e.training, DEVICE)
    except (ValidationError, CheckError):
        return
    field = ".".join(map(str, path))
    assert any(re.fullmatch(p, field) for p in HARMLESS), field
    assert outcome(e, plan) == outcome(e, e.plan), field

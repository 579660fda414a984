"""Edits of a plan's JSON, for the tests that the checker rejects broken plans.

A mutant is made from the JSON of a good plan. ``repaired`` first makes the lifetimes agree with the
mutated steps again, so that only the rule under test is broken.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plans
import pytest
from zoo import Exhibit

from odt_plan.backends.numpy import Runtime
from odt_plan.planner.check import CheckError, check
from odt_plan.planner.device import load_device
from odt_plan.planner.plan import Plan

DEVICE = load_device(plans.BOARD)
Json = dict[str, Any]


def dump(e: Exhibit) -> Json:
    return e.plan.model_dump(mode="json")


def reject(e: Exhibit, d: Json, pattern: str | None = None) -> None:
    with pytest.raises(CheckError, match=pattern) as caught:
        check(Plan.model_validate(d), e.training, DEVICE)
    assert "\n" not in str(caught.value)


def repaired(d: Json) -> Json:
    """Lifetimes from the steps; unused buffers dropped."""
    touched: dict[str, list[int]] = {}
    for i, s in enumerate(d["steps"]):
        for b in (*s["reads"], *s["writes"], s["workspace"], s["tile"]):
            if b is not None:
                touched.setdefault(b, []).append(i)
    last = len(d["steps"]) - 1
    kept = []
    for b in d["buffers"]:
        if b["space"] in ("state", "flash", "io"):
            b["first"], b["last"] = 0, last
        elif b["id"] in touched:
            writers = [i for i, s in enumerate(d["steps"]) if b["id"] in s["writes"]]
            b["first"] = (writers or [0])[0] if not scratch(b) else touched[b["id"]][0]
            b["last"] = max(touched[b["id"]][-1], b["first"])
            if b["value"] == "loss":
                b["last"] = last
        else:
            continue
        kept.append(b)
    d["buffers"] = kept
    return d


def scratch(b: Json) -> bool:
    return b["value"].startswith(("tile:", "workspace:"))


def buffer(d: Json, name: str) -> Json:
    return next(b for b in d["buffers"] if b["id"] == name)


def find(d: Json, **want: Any) -> int:
    """The first step whose fields are as wanted; ``node`` is part of a node's name."""
    for i, s in enumerate(d["steps"]):
        node = want.get("node")
        if all(s[k] == v for k, v in want.items() if k != "node") and (
            node is None or any(node in n for n in s["nodes"])
        ):
            return i
    raise AssertionError(want)


def outcome(e: Exhibit, plan: Plan) -> tuple[bytes, list[float], bytes]:
    """State, losses and a prediction after two updates."""
    runtime = Runtime(plan, e.training)
    rng = np.random.default_rng(5)
    t = e.training
    losses = []
    for _ in range(2 * t.spec.micro_batches):
        x = rng.standard_normal(t.sample.type.shape).astype(np.float32)
        if t.spec.loss == "mse":
            y: Any = rng.standard_normal(t.target.type.shape).astype(np.float32)
        else:
            y = rng.integers(0, 3, t.target.type.shape).astype(np.int32)
        losses.append(runtime.train_step(x, y, 0.05))
    return runtime.state_bytes(), losses, runtime.infer(x).tobytes()

"""The checker rejects plans whose precisions, streamed blocks or split weights are not as told."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import plans
import pytest
from mutate import DEVICE, Json, buffer, dump, find, reject, repaired
from test_choices import everything, planned
from zoo import Exhibit

from odt_plan.ir.autodiff import build_training
from odt_plan.ir.graph import Graph, TensorType
from odt_plan.ir.precision import lower
from odt_plan.ir.quantization import Quantization
from odt_plan.ir.training import Candidate, TrainingSpec
from odt_plan.planner.check import check
from odt_plan.planner.plan import Plan
from odt_plan.planner.precision import unchosen


@cache
def exhibit() -> Exhibit:
    """The block e1 - d1 - p1 - a1 is streamed, p2 and h are mixed, d2 is updated in part."""
    found = everything()
    of = found.plan.decisions
    assert of.streamed == ("e1/streamed",)
    assert (of.precision["p2"], of.precision["h"], of.precision["fc"]) == ("mixed", "mixed", "i8")
    return Exhibit(found.training.graph, found.training, found.plan)


def precision(name: str, told: str | None) -> Callable[[Json], None]:
    def lie(d: Json) -> None:
        if told is None:
            del d["decisions"]["precision"][name]
        else:
            d["decisions"]["precision"][name] = told

    lie.__name__ = f"precision_{name}_{told}"
    return lie


def streamed(*names: str) -> Callable[[Json], None]:
    def lie(d: Json) -> None:
        d["decisions"]["streamed"] = list(names)

    lie.__name__ = f"streamed_{len(names)}"
    return lie


def more_noise_avoided(d: Json) -> None:
    d["decisions"]["noise_avoided"] += 1000.0


def _step(d: Json, node: str) -> Json:
    return next(s for s in d["steps"] if s["nodes"] == [node])


def smaller_workspace(node: str) -> Callable[[Json], None]:
    def shrink(d: Json) -> None:
        b = buffer(d, _step(d, node)["workspace"])
        b["bytes"] -= 4
        b["shape"] = [b["bytes"]]

    shrink.__name__ = f"smaller_workspace_{node}"
    return shrink


def no_workspace(node: str) -> Callable[[Json], None]:
    def drop(d: Json) -> None:
        s = _step(d, node)
        d["buffers"].remove(buffer(d, s["workspace"]))
        s["workspace"] = None

    drop.__name__ = f"no_workspace_{node}"
    return drop


def workspace_on(node: str, side: str) -> Callable[[Json], None]:
    """The workspace lies on the operand or on the result, which live during the step."""

    def move(d: Json) -> None:
        s = _step(d, node)
        b = buffer(d, s["workspace"])
        b["offset"] = buffer(d, s[side][0])["offset"]
        top = d["claims"]["ram_bytes"]
        top["arena"] = max(top["arena"], b["offset"] + b["bytes"] + 3 & ~3)

    move.__name__ = f"workspace_on_{side}_{node}"
    return move


def swapped_parts(d: Json) -> None:
    """The forward step takes the frozen channels for the updated ones."""
    s = _step(d, "d2")
    hot, cold = (next(i for i, r in enumerate(s["reads"]) if r == n) for n in _parts(d))
    s["reads"][hot], s["reads"][cold] = s["reads"][cold], s["reads"][hot]


def swapped_spaces(d: Json) -> None:
    """The updated channels lie in flash, the frozen ones in RAM."""
    hot, cold = (buffer(d, n) for n in _parts(d))
    for key in ("space", "offset"):
        hot[key], cold[key] = cold[key], hot[key]


def frozen_part_updated(d: Json) -> None:
    hot, cold = _parts(d)
    s = d["steps"][find(d, kind="update", node="d2.weight", last_micro=True)]
    s["writes"] = [cold if w == hot else w for w in s["writes"]]


def _parts(d: Json) -> tuple[str, str]:
    """Ids of the updated and of the frozen part of d2's weight."""
    k = next(u["channels"] for u in d["decisions"]["updates"] if u["param"] == "d2.weight")
    return f"d2.weight[:{k}]", f"d2.weight[{k}:]"


def whole_instead_of_part(d: Json) -> None:
    u = next(u for u in d["decisions"]["updates"] if u["param"] == "d2.weight")
    u["channels"], u["ratio"] = None, 1.0


def swapped_layers(d: Json) -> None:
    """The streamed block reads the weights of another of its layers."""
    reads = _step(d, "e1/streamed")["reads"]
    i, j = reads.index("e1.weight"), reads.index("p1.weight")
    reads[i], reads[j] = reads[j], reads[i]


def float_sample(d: Json) -> None:
    d["decisions"]["precision"]["x"] = "f32"


#: Mutation, what the message must say.
MUTANTS: list[tuple[Callable[[Json], None], str]] = [
    (precision("p2", "i8"), "p2 computes in mixed, not i8"),
    (precision("p2", "f32"), "p2 computes in mixed, not f32"),
    (precision("fc", "mixed"), "fc computes in i8, not mixed"),
    (precision("stem", "mixed"), "stem computes in i8, not mixed"),
    (precision("d1", "mixed"), "d1 computes in i8, not mixed"),
    (precision("a1", "f32"), "a1 computes in i8, not f32"),
    (precision("ghost", "i8"), "ghost is no layer of the graph"),
    (precision("e1.relu", "i8"), "e1.relu is no layer of the graph"),
    (precision("p2", None), "p2 is missing"),
    (precision("d1", None), "d1 is missing"),
    (float_sample, "x computes in i8, not f32"),
    (streamed(), "streamed: none, but the steps stream e1/streamed"),
    (streamed("e2/streamed"), "e2/streamed, but the steps stream e1/streamed"),
    (streamed("e1/streamed", "e1/streamed"), "but the steps stream e1/streamed"),
    (streamed("e1/streamed", "ghost"), "e1/streamed, ghost, but the steps stream"),
    (more_noise_avoided, "objective learn: value is"),
    *(
        case
        for node in ("e1/streamed", "p2", "h")
        for case in (
            (smaller_workspace(node), rf"needed is workspace:{node}, u8\["),
            (no_workspace(node), "needs a workspace of"),
            (workspace_on(node, "reads"), "takes bytes .* where"),
            (workspace_on(node, "writes"), "takes bytes .* where"),
        )
    ),
    (swapped_parts, r"d2.weight\[\d*:\d*\] instead of"),
    (swapped_spaces, "has no state buffer"),
    (frozen_part_updated, "read-only space flash"),
    (whole_instead_of_part, "channels None, .*ratio 1.0 in the plan"),
    (swapped_layers, "of (e1|p1).weight instead of"),
]


@pytest.mark.parametrize(
    ("mutate", "pattern"),
    [pytest.param(*m, id=f"{m[0].__name__}-{i}") for i, m in enumerate(MUTANTS)],
)
def test_mutant(mutate: Callable[[Json], None], pattern: str) -> None:
    e = exhibit()
    d = dump(e)
    mutate(d)
    reject(e, d, pattern)


def test_the_plan_itself_is_good() -> None:
    e = exhibit()
    check(e.plan, e.training, DEVICE)
    check(Plan.model_validate(repaired(dump(e))), e.training, DEVICE)


def test_no_noise_is_avoided_without_mixed_layers() -> None:
    """Also where the objective tells the same lie."""
    found = planned(ram_bytes=5000, train=("fc.weight",), precision=("*=i8",))
    e = Exhibit(found.training.graph, found.training, found.plan)
    e.report()
    d = dump(e)
    d["decisions"]["noise_avoided"] = 5.0
    reject(e, d, r"noise_avoided is 5\.0, but no layer is mixed")


def test_layers_that_leave_no_node_of_their_own() -> None:
    """A Relu that changes nothing in i8, and a mean that is a pool."""
    g = Graph("net")
    x = g.add_input("x", TensorType((1, 3, 4, 4)))
    y = g.add_node("Relu", (x,), name="relu").out
    y = g.add_node("ReduceMean", (y,), {"axes": (2, 3), "keepdims": 1}, name="mean").out
    y = g.add_node("Reshape", (y,), {"shape": (1, 3)}, name="flat").out
    w = g.add_constant("w", np.ones((4, 3), np.float32))
    y = g.add_node("Gemm", (y, w), {"trans_b": 1}, name="fc").out
    g.outputs = [y]
    of = Quantization((0.05,), -128)
    g.quantization = {v.name: of for v in g.values.values() if v.type.dtype == "f32"}
    g.quantization["w"] = Quantization((0.02,) * 4, 0, 0)
    precision = unchosen(g, {})
    assert set(precision.values()) == {"i8"}
    training = build_training(lower(g, precision), TrainingSpec(), [Candidate("w")])
    e = Exhibit(g, training, plans.keep_all(training))
    d = dump(e)
    d["decisions"]["precision"] |= precision
    check(Plan.model_validate(d), training, DEVICE)
    for name in ("relu", "mean"):
        assert name not in {n.name for n in training.graph.nodes}
        d["decisions"]["precision"] = {**d["decisions"]["precision"], name: "mixed"}
        reject(e, d, f"{name} computes in i8, not mixed")
        d["decisions"]["precision"][name] = "i8"

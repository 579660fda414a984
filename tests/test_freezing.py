"""``--freeze-before``: what it freezes, that plans keep to it, and the checker sees to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nets
import networkx as nx
import plans
import pytest
from cli_run import Cli
from onnx_files import export
from test_choices import inverted
from test_cli import MODEL

from odt_plan.ir.errors import UsageError
from odt_plan.ir.freezing import frozen_before
from odt_plan.ir.graph import Graph
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.ops.streamed import layers_of
from odt_plan.planner.check import CheckError, check
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.replay import Wanted

BOARD = load_device(plans.BOARD)


def planned(model: Path, **options: Any) -> PlannedModel:
    base = {"with_baselines": False, "ram_bytes": 1 << 20, "flash_bytes": 1 << 20}
    return make_plan(Request(model, BOARD, **{**base, **options}))


def ancestors(graph: Graph, name: str) -> set[str]:
    """Names of the nodes before one, by networkx."""
    edges = nx.DiGraph()
    edges.add_nodes_from(n.name for n in graph.nodes)
    for n in graph.nodes:
        edges.add_edges_from(
            (v.producer.name, n.name) for v in n.operands() if v.producer is not None
        )
    return set(nx.ancestors(edges, name))


def parameters(graph: Graph, names: set[str]) -> set[str]:
    return {
        v.name
        for n in graph.nodes
        if n.name in names
        for v in n.operands()
        if v.name in graph.constants
    }


@pytest.mark.parametrize("build", [nets.resnet, nets.transformer, nets.recurrent, nets.spatial])
def test_what_is_before_a_node(build: Callable[[], Graph]) -> None:
    graph = build()
    for node in graph.nodes:
        found = frozen_before(graph, (node.name,))
        assert set(found) == parameters(graph, ancestors(graph, node.name)), node.name
        assert set(found.values()) <= {node.name}


def test_a_module_is_what_its_names_begin_with() -> None:
    """Its own layers stay trainable, whatever is before one of them does not."""
    graph = nets.mlp((4, 4, 4, 4, 4))
    for n, name in zip(graph.nodes, ("/a/fc", "/a/r", "/b/fc", "/b/r", "/b2/fc"), strict=False):
        n.name = name
    every = [sorted(parameters(graph, {n.name})) for n in graph.nodes if len(n.inputs) == 3]
    assert sorted(frozen_before(graph, ("/b",))) == every[0]
    assert sorted(frozen_before(graph, ("/b", "/b2/fc"))) == sorted(every[0] + every[1])
    with pytest.raises(UsageError, match=r"has no node /bb/fc; nearest: /b2?/fc, /b2?/fc"):
        frozen_before(graph, ("/bb/fc",))


def test_plans_train_nothing_before(odt: Cli) -> None:
    words = (MODEL, "--ram", "1MB", "--flash", "1MB", "-o", "out", "--freeze-before", "relu2")
    done = odt(*words)
    assert done.code == 0, done.err
    assert "nothing before relu2" in done.out
    plan = odt(*words, "--json").json
    assert plan["asked"]["freeze_before"] == ["relu2"]
    updated = {u["node"] for u in plan["decisions"]["updates"] if u["ratio"]}
    assert updated == {"conv3", "classifier"}
    assert odt("verify", "out/plan.json").code == 0
    (weight, _) = odt("explain", "out/plan.json", "conv2", "--json").json
    assert (weight["given"], weight["others"]) == ("--freeze-before relu2", [])
    (weight, _) = odt("explain", "out/plan.json", "classifier", "--json").json
    assert weight["given"] == ""
    plain = odt(MODEL, "--ram", "1MB", "--flash", "1MB", "--json").json
    assert "freeze_before" not in plain["asked"]


@pytest.mark.parametrize("options", [{}, {"calibration": "synthetic"}], ids=["f32", "i8"])
@pytest.mark.parametrize("layers", [("stem", "d0", "p1", "d2", "fc"), ("d1",), ("h",)])
def test_the_checker_refuses_updates_before(
    layers: tuple[str, ...], options: dict[str, Any], tmp_path: Path
) -> None:
    """Just where something updated is before a node; also where nodes are merged in i8."""
    model = export(inverted(), tmp_path)
    graph = import_model(model)
    done = planned(model, train=tuple(parameters(graph, set(layers))), **options)
    assert bool(options) == bool(done.training.graph.merged)
    updated = {u.candidate.param for u in done.training.updates}
    outcomes = Counter()
    for name in [n.name for n in graph.nodes]:
        asked = done.plan.asked.model_copy(update={"freeze_before": (name,)})
        plan = done.plan.model_copy(update={"asked": asked})
        wrong = bool(updated & parameters(graph, ancestors(graph, name)))
        outcomes[wrong] += 1
        told = pytest.raises(CheckError, match=f"is updated, which {name} depends on")
        with told if wrong else nullcontext():
            check(plan, done.training, BOARD)
    assert outcomes[False] > 0
    assert outcomes[True] > 2
    asked = done.plan.asked.model_copy(update={"freeze_before": ("none",)})
    with pytest.raises(CheckError, match="the graph has no node none"):
        check(done.plan.model_copy(update={"asked": asked}), done.training, BOARD)


@pytest.mark.parametrize("name", ["stem.relu", "d0", "a1", "h.relu"])
def test_plans_of_i8_layers_keep_to_it(name: str, tmp_path: Path) -> None:
    model = export(inverted(), tmp_path)
    frozen = parameters(import_model(model), ancestors(import_model(model), name))
    plan = planned(model, freeze_before=(name,), calibration="synthetic").plan
    updated = {u.param for u in plan.decisions.updates if u.ratio}
    assert updated
    assert not updated & frozen


def test_blocks_that_run_by_rows_are_before_what_follows(tmp_path: Path) -> None:
    done = planned(
        export(inverted(), tmp_path), train=("last",), calibration="synthetic", ram_bytes=1500
    )
    assert done.plan.decisions.streamed
    blocks = [n for n in done.training.graph.nodes if n.op == "StreamedBlock"]
    inside = [n.name for b in blocks for n in layers_of(b).nodes]
    assert {b.name for b in blocks} == set(done.plan.decisions.streamed)
    for node, updated in (*((n, False) for n in inside), ("h", False), ("out", True)):
        asked = done.plan.asked.model_copy(update={"freeze_before": (node,)})
        with pytest.raises(CheckError) if updated else nullcontext():
            check(done.plan.model_copy(update={"asked": asked}), done.training, BOARD)


def test_replay_is_that_of_the_same_updates() -> None:
    free = planned(MODEL, train=("all",), freeze_before=("conv3",), replay=Wanted(5)).plan
    names = ("conv3.weight", "conv3.bias", "classifier.weight", "classifier.bias")
    named = planned(MODEL, train=names, replay=Wanted(5)).plan
    assert free.replay is not None
    assert free.replay == named.replay
    assert free.steps == named.steps


BAD = [
    (("--freeze-before", "conv33"), "has no node conv33; nearest: conv3, "),
    (("--freeze-before", "conv3", "--train", "conv1.weight"), "conv1.weight lies before conv3"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_one_line(odt: Cli, words: tuple[str, ...], message: str) -> None:
    done = odt(MODEL, "--ram", "1MB", "--flash", "1MB", *words)
    assert done.code == 2
    assert message in done.error


def test_nothing_is_left_to_train(tmp_path: Path) -> None:
    graph = nets.mlp((4, 3))
    graph.outputs = [graph.add_node("Softmax", (graph.outputs[0],), {"axis": 1}, name="p").out]
    with pytest.raises(UsageError, match="--freeze-before p: all parameters of"):
        planned(export(graph, tmp_path), freeze_before=("p",))


def test_sweeps_and_check_take_the_same_options(odt: Cli) -> None:
    own = ("--freeze-before", "conv3", "--head", "5")
    momentum = (*own, "--optimizer", "momentum", "--state", "sgd", "--jobs", "1", "--json")
    (row,) = odt("fit", MODEL, "--device", "rp2040", *momentum).json
    words = ("--points", "2", "--from", "200KB", "--to", "220KB", *momentum)
    curve = odt("pareto", MODEL, "--device", "rp2040", *words).json
    plan = odt(MODEL, "--device", "rp2040", *momentum[:-3], "--json").json
    assert {u["state"] for u in plan["decisions"]["updates"] if u["ratio"]} == {"sgd"}
    assert plan["claims"]["ram_bytes"]["optimizer"] == 0
    assert row["learn"] == plan["objective"][0]["value"] == curve["points"][-1]["learn"]
    report = odt("check", MODEL, *own, "--json").json
    free = {x["name"]: x["parameters"] for x in report["layers"] if x["trainable"]}
    assert free == {"conv3": 32312, "classifier": 224 * 5 + 5}
    assert report["layers"][0]["reason"] == "frozen by --freeze-before conv3"

"""What can't be trained, told at once for a whole model, with advice that leads to a plan."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from cli_run import Cli
from onnx import TensorProto
from onnx_files import floats, model, node, save
from test_freezing import ancestors, parameters

from odt_plan.ir.autodiff import build_training, param_slots
from odt_plan.ir.errors import UnsupportedModelError, UsageError
from odt_plan.ir.freezing import untrainable
from odt_plan.ir.graph import Graph
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.trainability import trainability
from odt_plan.ir.training import Candidate, TrainingSpec


def random_file(seed: int, folder: Path) -> Path:
    """Layers between operators with and without gradients, in random ways; one output."""
    rng = np.random.default_rng(seed)
    nodes, constants = [], {"zero": np.zeros(1, np.float32)}
    values = ["x"]

    def add(op: str, operands: str, **attrs: Any) -> str:
        nodes.append(node(op, operands, f"v{len(nodes)}", f"n{len(nodes)}", **attrs))
        return f"v{len(nodes) - 1}"

    def constant(*shape: int) -> str:
        constants[f"w{len(constants)}"] = floats(rng, *shape)
        return f"w{len(constants) - 1}"

    for _ in range(9):
        a, b = (values[max(0, len(values) - int(rng.integers(1, 4)))] for _ in range(2))
        kind = rng.choice(["fc", "fc", "fc", "Relu", "Add", "Round", "Sign", "mask", "ids"])
        if kind == "fc":
            values.append(add("Gemm", f"{a} {constant(4, 4)} {constant(4)}"))
        elif kind == "mask":
            values.append(add("Where", f"{add('Greater', f'{b} zero')} {a} zero"))
        elif kind == "ids":
            ids = add("ArgMax", a, axis=1, keepdims=0)
            values.append(add("Gather", f"{constant(4, 4)} {ids}"))
        else:
            values.append(add(kind, f"{a} {b}" if kind == "Add" else a))
    last = add("Gemm", f"{values[-1]} {constant(4, 3)}")
    return save(model(nodes, {"x": [1, 4]}, [last], constants), folder)


def trains(graph: Graph, *names: str) -> bool:
    """A training graph can be built."""
    try:
        build_training(graph, TrainingSpec(), [Candidate(n) for n in names])
    except (UnsupportedModelError, UsageError):
        return False
    return True


def advised(text: str) -> list[str]:
    """The options that an advice tells, as a shell takes them."""
    return shlex.split(re.search(r"\((--freeze-before .*?)\): ", text)[1])


def test_the_advice_is_what_the_training_graph_needs(tmp_path: Path) -> None:
    """Alone, what is called trainable trains and nothing else; as advised, all the rest at once."""
    kinds = Counter()
    for seed in range(60):
        path = random_file(seed, tmp_path)
        graph, report = import_model(path), trainability(path)
        alone = {name for name in param_slots(graph) if trains(graph, name)}
        assert param_slots(graph).keys() - untrainable(graph).keys() == alone, seed
        told = {n for x in report.trainable for n in x.reason.split(": ")[1].split(", ")}
        assert told == alone, seed
        if not report.advice:
            kinds["free"] += 1
            assert trains(graph, *alone)
            continue
        kinds["several"] += len(report.stops) > 1
        boundaries = advised(report.advice)[1::2]
        frozen = parameters(graph, set().union(*(ancestors(graph, n) for n in boundaries)))
        rest = param_slots(graph).keys() - frozen
        kinds["exact"] += rest == alone
        assert trains(graph, *rest), seed
        again = trainability(path, freeze_before=boundaries)
        assert (again.advice, again.stops) == ("", ()), seed
        sizes = {n: graph.values[n].type.size for n in param_slots(graph)}
        share = 100 * sum(sizes[n] for n in rest) / sum(sizes.values())
        layers = len([x for x in again.layers if x.trainable])
        told = f"{share:.3g} % of the weights ({layers} of {len(again.parametric)} layers)"
        assert told in report.advice
    assert min(kinds["free"], kinds["several"], kinds["exact"]) > 5, kinds


def three_stops(folder: Path) -> Path:
    """Round, Equal and ArgMax on branches of their own, layers before and behind each of them."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Gemm", "x wt", "trunk", "/trunk/fc"),
        node("Gemm", "trunk wr", "r0", "/a/before"),
        node("Round", "r0", "r1", "/a/round it"),
        node("Gemm", "r1 wa", "r2", "/a/behind"),
        node("Gemm", "x we", "e0", "/b/before"),
        node("Equal", "e0 zero", "e1", "/b/equal"),
        node("Where", "e1 zero trunk", "e2", "/b/where"),
        node("Gemm", "trunk wi", "i0", "/c/before"),
        node("ArgMax", "i0", "i1", "/c/ids", axis=1, keepdims=0),
        node("Gather", "table i1", "i2", "/c/table"),
        node("Sum", "r2 e2 i2", "s", "/sum"),
        node("Gemm", "s wo", "y", "/out"),
    ]
    shapes = {"wt": (6, 8), "wr": (8, 8), "wa": (8, 8), "we": (6, 8), "wi": (8, 8), "wo": (8, 3)}
    constants = {k: floats(rng, *s) / 3 for k, s in shapes.items()}
    constants |= {"table": floats(rng, 8, 8), "zero": np.zeros(1, np.float32)}
    return save(model(nodes, {"x": ["N", 6]}, ["y"], constants), folder)


def test_following_the_advice_gives_a_plan_that_trains(odt: Cli, tmp_path: Path) -> None:
    path = three_stops(tmp_path)
    limits = ("--ram", "1MB", "--flash", "1MB")
    refused, report = odt(path, *limits), odt("check", path)
    assert (refused.code, report.code) == (4, 0)
    for text in (refused.err, report.out):
        for where in ("round it (Round)", "/b/equal (Equal)", "/c/ids (ArgMax)"):
            assert where in text
        assert "/trunk/fc, /a/before can't be trained" in text
    assert advised(refused.err) == advised(report.out)
    assert "40.4 % of the weights (3 of 7 layers) stay trainable" in refused.err
    done = odt(path, *limits, "-o", "out", *advised(refused.err))
    assert done.code == 0, done.err
    assert odt("verify", "out/plan.json").code == 0
    rng = np.random.default_rng(1)
    x, y = floats(rng, 40, 6), rng.integers(0, 3, 40)
    np.savez("data.npz", x=x, y=y)
    words = ("--data", "data.npz", "--steps", "150", "--lr", "0.02", "--save", "learned.npz")
    losses = odt("run", "out/plan.json", *words, "--json").json["losses"]
    assert np.mean(losses[-40:]) < 0.9 * np.mean(losses[:40])
    assert set(np.load("learned.npz")) == {"wa", "table", "wo"}


def test_what_stops_gradients_matters_only_to_what_is_trained(odt: Cli, tmp_path: Path) -> None:
    path = three_stops(tmp_path)
    limits = ("--ram", "1MB", "--flash", "1MB", "-o", "out")
    done = odt(path, *limits, "--train", "last")  # with the comparison to training all
    assert done.code == 0, done.err
    assert "keep-all" in done.out
    (found,) = odt("explain", "out/plan.json", "/b/before", "--json").json
    assert found["chosen"] == "frozen: no gradient passes /b/equal behind it"
    assert odt(path, *limits, "--train", "we").code == 4


def test_a_prediction_without_a_gradient(odt: Cli, tmp_path: Path) -> None:
    nodes = [node("Gemm", "x w", "a", "fc"), node("ArgMax", "a", "y", "pick", axis=1)]
    proto = model(nodes, {"x": [1, 4]}, ["y"], {"w": np.ones((4, 3), np.float32)})
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    done = odt(save(proto, tmp_path), "--ram", "1MB", "--flash", "1MB")
    assert done.code == 4
    told = "nothing behind pick/position can be trained; export the model without"
    assert done.error.endswith(told)


def test_all_unsupported_operators_at_once(odt: Cli, tmp_path: Path) -> None:
    """Also behind results of no known type, and behind positions."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Gemm", "x w", "a", "g1"),
        node("ArgMax", "a", "i", "position", axis=1),
        node("Bernoulli", "a", "b", "random"),
        node("ScatterElements", "b i a", "c", "elements", axis=1),
        node("Unheard", "c", "d", "unheard"),
        node("RandomUniformLike", "d", "e", "noise"),
        node("Det", "e", "y", "determinant"),
    ]
    constants = {"w": floats(rng, 6, 6)}
    path = save(model(nodes, {"x": [1, 6]}, ["y"], constants), tmp_path)
    done = odt(path, "--ram", "1MB", "--flash", "1MB")
    assert done.code == 4
    first, *lines = done.err.splitlines()
    assert "5 obstacles" in first
    assert "freezing doesn't help" in first
    assert [x.split(" (")[0].strip() for x in lines] == [n.name for n in nodes[2:]]
    assert odt("check", path).out.count("obstacle: ") == 5

"""Importance: scores against PyTorch, their laws, tables of the user, plans that hold them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import nets
import numpy as np
import pytest
from cli_run import Cli
from numpy.typing import NDArray
from onnx_files import export

from odt_plan.backends.numpy.gradients import GradientMethod, GradientScores, measure_gradients
from odt_plan.ir.candidates import candidates, param_slots
from odt_plan.ir.errors import UsageError
from odt_plan.ir.graph import Graph
from odt_plan.ir.interpreter import run
from odt_plan.ir.training import Candidate, TrainingSpec
from odt_plan.planner.importance import SCALE, gain, prior, scores
from odt_plan.planner.importance_file import load_table
from odt_plan.planner.plan import ImportanceTable, Plan

Array = NDArray[Any]
torch = pytest.importorskip("torch")
SPEC = TrainingSpec()
METHODS = get_args(GradientMethod)
CHANNELS, CLASSES, SIZE = 8, 5, 6


def small(seed: int = 0) -> Graph:
    """Conv, Relu, Conv, Relu, Gemm: layers of every kind of channel."""
    rng = np.random.default_rng(seed)
    g = Graph("small")
    x = g.add_input("x", nets.TensorType((1, 3, SIZE, SIZE)))
    x = nets.relu(g, nets.conv(g, rng, x, "c1", CHANNELS), "r1")
    x = nets.relu(g, nets.conv(g, rng, x, "c2", CHANNELS), "r2")
    g.outputs = [nets.dense(g, rng, nets.flat(g, x), "fc", CLASSES)]
    g.verify()
    return g


def data(count: int = 7, seed: int = 1) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)
    return x, rng.integers(0, CLASSES, count)


def measured(graph: Graph, x: Array, y: Array) -> GradientScores:
    return measure_gradients(graph, SPEC, list(param_slots(graph)), x, y)


class Torch:
    """The same network in PyTorch, in f64, and its gradients sample by sample."""

    def __init__(self, graph: Graph, x: Array, y: Array) -> None:
        f = torch.nn.functional
        self.leaves = {
            n: torch.tensor(a.astype(np.float64), requires_grad=True)
            for n, a in graph.constants.items()
        }
        w = self.leaves
        self.grads: list[dict[str, Array]] = []
        self.products: list[dict[str, Array]] = []  # a dL/da of each layer, summed over positions
        for one, label in zip(x, y, strict=True):
            results = {}
            a = torch.tensor(one[None].astype(np.float64))
            for layer in ("c1", "c2"):
                a = f.conv2d(a, w[f"{layer}.weight"], w[f"{layer}.bias"], padding=1)
                a.retain_grad()
                results[layer] = a
                a = torch.relu(a)
            results["fc"] = a.reshape(1, -1) @ w["fc.weight"].T + w["fc.bias"]
            results["fc"].retain_grad()
            loss = f.cross_entropy(results["fc"], torch.tensor([int(label)]))
            for leaf in w.values():
                leaf.grad = None
            loss.backward()
            self.grads.append({n: leaf.grad.numpy().copy() for n, leaf in w.items()})
            self.products.append(
                {
                    n: (r * r.grad).detach().numpy().reshape(r.shape[1], -1).sum(1)
                    for n, r in results.items()
                }
            )

    def fisher(self, layer: str) -> float:
        """Fisher potential of a layer by its definition."""
        return float(np.mean([(p[layer] ** 2).sum() for p in self.products]) / 2)

    def stacked(self, name: str) -> Array:
        return np.stack([g[name] for g in self.grads])


def test_fisher_potential_is_that_of_activations_and_their_gradients() -> None:
    graph, (x, y) = small(), data()
    other = Torch(graph, x, y)
    gains = measured(graph, x, y).gains("fisher")
    for layer in ("c1", "c2", "fc"):
        own = {r: gains[f"{layer}.{r}"][-1][1] for r in ("weight", "bias")}
        assert sum(own.values()) == pytest.approx(other.fisher(layer), rel=1e-4), layer
        energy = {r: (other.stacked(f"{layer}.{r}") ** 2).sum() for r in own}
        share = energy["bias"] / sum(energy.values())
        assert own["bias"] / sum(own.values()) == pytest.approx(share, rel=1e-4), layer


def test_input_channels_share_fisher_by_their_own_potential() -> None:
    graph, (x, y) = small(), data()
    other = Torch(graph, x, y)
    found = measured(graph, x, y).gains("fisher")["c2.weight"]
    w = graph.constants["c2.weight"].astype(np.float64)
    each = ((other.stacked("c2.weight") * w).sum((1, 3, 4)) ** 2).sum(0)
    assert [part for part, _ in found] == [1 / 8, 2 / 8, 4 / 8, 1.0]
    for part, score in found:
        want = each[: round(part * CHANNELS)].sum() / each.sum()
        assert score / found[-1][1] == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("name", ["c1.weight", "c2.weight", "c2.bias", "fc.weight", "fc.bias"])
def test_gradient_methods_are_those_of_torch(name: str) -> None:
    graph, (x, y) = small(), data()
    found, g = measured(graph, x, y), Torch(graph, x, y).stacked(name)
    n, axes = len(g), (0, 2, 3) if g.ndim == 5 else (0,)
    mean, w = g.mean(0), graph.constants[name].astype(np.float64)
    if name.endswith("bias"):
        want = np.sqrt((mean**2).sum() * (w**2).sum())
    else:
        want = np.sqrt((mean**2).sum(axes) * (w**2).sum(axes)).sum()
    assert found.gains("magnitude")[name][-1][1] == pytest.approx(want, rel=1e-4)
    flat = g.reshape(n, -1)
    pairs = [float(flat[i] @ flat[j]) for i in range(n) for j in range(n) if i != j]
    got = found.gains("gradient")[name][-1][1]
    scale = float((flat**2).sum(1).mean())
    assert got == pytest.approx(max(0.0, np.mean(pairs)), rel=1e-4, abs=1e-6 * scale)


def test_the_order_of_samples_does_not_matter() -> None:
    graph, (x, y) = small(), data()
    one, other = measured(graph, x, y), measured(graph, x[::-1].copy(), y[::-1].copy())
    for method in METHODS:
        want = one.gains(method)
        for name, points in other.gains(method).items():
            np.testing.assert_allclose(points, want[name], rtol=1e-9, atol=1e-15)


def test_channels_in_another_order_are_the_same_tensor_and_other_parts() -> None:
    graph, (x, y) = small(), data()
    order = np.random.default_rng(3).permutation(CHANNELS)
    other = small()
    c = other.constants
    c["c1.weight"], c["c1.bias"] = c["c1.weight"][order], c["c1.bias"][order]
    c["c2.weight"] = np.ascontiguousarray(c["c2.weight"][:, order])
    for method in METHODS:
        a, b = measured(graph, x, y).gains(method), measured(other, x, y).gains(method)
        for name in a:
            assert a[name][-1][1] == pytest.approx(b[name][-1][1], rel=1e-3, abs=1e-9), name
        assert a["c2.weight"][0][1] != pytest.approx(b["c2.weight"][0][1], rel=1e-3)


def table(gains: dict[str, Any], method: str = "fisher") -> ImportanceTable:
    return ImportanceTable(method=method, file="a.npz", sha256="0" * 64, samples=3, gains=gains)


def test_scores_of_all_tensors_together_are_those_of_the_prior() -> None:
    graph = small()
    every = candidates(graph)
    whole = [c for c in every if c == Candidate(c.param)]
    gains = {p: ((0.5, 1.0), (1.0, float(i + 1))) for i, p in enumerate(param_slots(graph))}
    found = scores(graph, every, table(gains))
    total = sum(prior(graph, every)[c] for c in whole)
    assert sum(found[c] for c in whole) == pytest.approx(total, abs=len(whole))
    times = {p: tuple((part, 1e-7 * s) for part, s in points) for p, points in gains.items()}
    assert scores(graph, every, table(times)) == found, "the unit of a method does not matter"
    assert found[Candidate("fc.bias")] == pytest.approx(6 * found[Candidate("c1.weight")], rel=1e-5)


def test_a_part_scores_on_the_line_between_known_parts() -> None:
    known = table({"a": ((0.25, 2.0), (1.0, 5.0))})
    assert [gain(known, "a", p) for p in (0.125, 0.25, 0.625, 1.0)] == [1.0, 2.0, 3.5, 5.0]
    assert gain(known, "b", 1.0) == 0.0


def test_what_a_table_does_not_name_scores_least() -> None:
    graph = small()
    found = scores(graph, candidates(graph), table({"fc.weight": ((1.0, 2.0),)}))
    assert found[Candidate("c1.weight")] == 1
    assert found[Candidate("fc.weight")] > SCALE


def test_only_what_is_wanted_is_computed_and_kept() -> None:
    graph, (x, _) = small(), data(1)
    whole = run(graph, {"x": x})
    result = graph.outputs[0].name
    wanted = {result, "c1.weight"}
    part = run(graph, {"x": x}, wanted)
    assert part.keys() == wanted
    assert np.array_equal(part[result], whole[result])
    first = graph.nodes[0].out.name
    assert run(graph, {"x": x}, {first}).keys() == {first}


# ---- tables of the user --------------------------------------------------------------------------


def written(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_table_of_whole_tensors_gives_parts_the_share_of_the_prior(tmp_path: Path) -> None:
    graph = small()
    text = {"fc.weight": 3.0, "c2.weight": 2}
    by_csv = load_table(written(tmp_path, "name,score\nfc.weight,3\nc2.weight,2.0\n"), graph)
    by_json = load_table(written(tmp_path, json.dumps(text), "t.json"), graph)
    assert by_csv.gains == by_json.gains
    assert by_csv.gains["c2.weight"][1] == (0.25, pytest.approx(1.0))
    assert "given by table.csv" in by_csv.source


def test_a_table_may_score_parts(tmp_path: Path) -> None:
    rows = "name,score,ratio\nfc.weight,3,\nc2.weight,2,1\nc2.weight,1.5,0.25\n"
    found = load_table(written(tmp_path, rows), small())
    assert found.gains["c2.weight"] == ((0.25, 1.5), (1.0, 2.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,score\nfc.weigt,1\n", "line 2: small has no trainable tensor fc.weigt; did you mean"
         " fc.weight"),
        ("name,score\nfc.weight,-1\n", "the score of fc.weight is -1; scores are 0 or more"),
        ("name,score\nfc.weight,nan\n", "the score of fc.weight is 'nan', not a finite number"),
        ("name,score\nfc.weight,inf\n", "not a finite number"),
        ("name,score\nfc.weight,\n", "the score of fc.weight is '', not a finite number"),
        ("name,score\nfc.weight,1\nfc.weight,2\n", "line 3: fc.weight is given twice"),
        ("name,score,ratio\nfc.weight,1,1.5\n", "the ratio 1.5 of fc.weight is not in (0, 1]"),
        ("name,score,ratio\nfc.weight,1,0.5\n", "fc.weight has no score of the whole tensor"),
        ("name,score,ratio\nfc.weight,1,1\nfc.weight,2,0.5\n", "a larger part has a smaller score"),
        ("name,score\nfc.weight,0\n", "no tensor has a score above 0"),
        ("name,score,colour\nfc.weight,1,red\n", "line 2: unknown column colour"),
        ("tensor,score\nfc.weight,1\n", "the first line must be name,score"),
        ("name,score\nfc.weight,1,1,1\n", "unknown column more columns than the header"),
        ("", "the first line must be name,score"),
        ('{"fc.weight": "much"}', "entry 1: the score of fc.weight is 'much', not a finite number"),
        ('{"fc.weight": true}', "not a finite number"),
        ('{"fc.weight": }', "is no JSON"),
        ("[3]", "entry 1 is no object with name and score"),
        ('[{"score": 3}]', "entry 1: has no name"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as e:
        load_table(written(tmp_path, text), small())
    assert message in str(e.value)
    assert str(e.value).startswith(str(tmp_path / "table.csv"))
    assert "\n" not in str(e.value)


def test_a_table_that_is_no_text_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with pytest.raises(UsageError, match="can't be read"):
        load_table(path, small())
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is no text"):
        load_table(path, small())


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setenv("ODT_PLAN_CACHE", str(tmp_path / "cache"))
    x, y = data(12)
    np.savez(tmp_path / "labelled.npz", x=x, y=y)
    return export(small(), tmp_path), tmp_path / "labelled.npz"


LIMITS = ("--ram", "64KB", "--flash", "1MB")


def test_labels_are_measured_on_and_the_plan_stands_without_them(
    odt: Cli, files: tuple[Path, Path], tmp_path: Path
) -> None:
    model, labelled = files
    out = tmp_path / "out"
    ran = odt(model, *LIMITS, "--calib", labelled, "--precision", "*=f32", "-o", out)
    assert ran.code == 0, ran.err
    assert "measured on 12 samples of labelled.npz" in ran.out
    plan = Plan.model_validate_json((out / "plan.json").read_text())
    assert plan.asked is not None
    assert plan.asked.importance is not None
    found = measured(small(), *data(12)).gains(plan.asked.importance.method)  # type: ignore[arg-type]
    for name, points in plan.asked.importance.gains.items():
        np.testing.assert_allclose(points, found[name], rtol=1e-6)
    labelled.unlink()
    assert odt("verify", out / "plan.json").code == 0
    told = odt("explain", out / "plan.json", "fc.weight", "--json").json
    chosen = {u.param: u.importance for u in plan.decisions.updates}
    assert told[0]["price"]["importance"] == chosen["fc.weight"]
    assert told[0]["price"]["source"] == plan.decisions.importance_source
    assert "scored by" in odt("explain", out / "plan.json", "fc.weight").out


def test_labels_change_the_score_and_prior_ignores_them(odt: Cli, files: tuple[Path, Path]) -> None:
    model, labelled = files
    common = (model, *LIMITS, "--calib", labelled, "--precision", "*=f32", "--json")
    by_prior = odt(*common, "--importance", "prior").json
    assert by_prior["decisions"]["importance_source"].startswith("prior")
    assert "importance" not in by_prior["asked"]
    for method in METHODS:
        plan = odt(*common, "--importance", method).json
        assert plan["asked"]["importance"]["method"] == method
        assert plan["decisions"]["updates"] != by_prior["decisions"]["updates"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, "needs labelled samples; give --calib FILE.npz with x and y"),
        ({"y": np.full(12, CLASSES)}, "4"),
        ({"y": np.zeros(11, int)}, "y has shape [11], but x has 12 samples"),
        ({"y": np.zeros((12, 5))}, "must be integer labels"),
        ({"x": np.full((12, 3, SIZE, SIZE), np.nan, np.float32)}, "NaN or infinite"),
    ],
)
def test_wrong_labels_are_told_in_one_line(
    odt: Cli, files: tuple[Path, Path], change: dict[str, Any], message: str
) -> None:
    model, labelled = files
    x, y = data(12)
    given = {k: a for k, a in ({"x": x, "y": y} | change).items() if a is not None}
    np.savez(labelled, **given)
    ran = odt(model, *LIMITS, "--calib", labelled, "--importance", "fisher")
    assert ran.code == 2
    assert message in ran.error


def test_a_method_without_samples_says_what_is_missing(odt: Cli, files: tuple[Path, Path]) -> None:
    ran = odt(files[0], *LIMITS, "--importance", "contribution")
    assert ran.code == 2
    assert ran.error == (
        "--importance contribution: needs labelled samples; give --calib FILE.npz with x and y"
    )


def test_a_table_on_the_command_line(odt: Cli, files: tuple[Path, Path], tmp_path: Path) -> None:
    rows = written(tmp_path, "name,score\nc1.weight,1\n")
    plan = odt(files[0], *LIMITS, "--importance", rows, "--json").json
    assert plan["decisions"]["importance_source"].startswith("given by table.csv (SHA-256 ")
    updates = {u["param"]: u for u in plan["decisions"]["updates"]}
    assert updates["c1.weight"]["ratio"] == 1.0
    assert updates["c1.weight"]["importance"] == pytest.approx(
        sum(prior(small(), [Candidate(p) for p in updates]).values()), abs=len(updates)
    )


# ---- contribution --------------------------------------------------------------------------------


def test_contribution_runs_are_kept_and_give_the_same(
    odt: Cli, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from odt_plan import contributions

    monkeypatch.setattr(contributions, "cores", lambda: 1)
    calls: list[Candidate] = []
    measure = contributions.contribution

    def counting(forward: Graph, spec: TrainingSpec, candidate: Candidate, *rest: Any) -> float:
        calls.append(candidate)
        return measure(forward, spec, candidate, *rest)

    monkeypatch.setattr(contributions, "contribution", counting)
    model, labelled = files
    args = (model, *LIMITS, "--calib", labelled, "--precision", "*=f32", "--json", "--importance")
    first = odt(*args, "contribution").json["asked"]["importance"]
    assert len(calls) == len({(c.param, c.channels) for c in candidates(small())})
    calls.clear()
    assert odt(*args, "contribution").json["asked"]["importance"] == first
    assert not calls
    damaged = next((tmp_path / "cache").rglob("*.json"))
    damaged.write_text('{"gain": "no')
    assert odt(*args, "contribution").json["asked"]["importance"] == first
    assert len(calls) == 1
    calls.clear()
    x, y = data(12, seed=5)
    np.savez(labelled, x=x, y=y)
    other = odt(*args, "contribution").json["asked"]["importance"]
    assert other["gains"] != first["gains"]
    assert len(calls) == len({(c.param, c.channels) for c in candidates(small())})
    for points in first["gains"].values():
        values = [score for _, score in points]
        assert values == sorted(values)


def test_contribution_is_what_torch_gains_by_the_same_steps() -> None:
    from odt_plan.backends.numpy import contribution as module
    from odt_plan.backends.numpy.micro_batches import feeds, plain
    from odt_plan.ir.autodiff import build_training

    graph, (x, y) = small(), data(12)
    batches = feeds(build_training(graph, plain(SPEC), [Candidate("c2.weight")]), x, y)
    got = module.contribution(graph, SPEC, [Candidate("c2.weight")], batches[:8], batches[4:])
    f = torch.nn.functional

    def loss(w: dict[str, Any], i: int) -> Any:
        a = torch.tensor(x[i : i + 1])
        for layer in ("c1", "c2"):
            a = torch.relu(f.conv2d(a, w[f"{layer}.weight"], w[f"{layer}.bias"], padding=1))
        out = a.reshape(1, -1) @ w["fc.weight"].T + w["fc.bias"]
        return f.cross_entropy(out, torch.tensor(y[i : i + 1]))

    after = []
    start = {n: torch.tensor(a) for n, a in graph.constants.items()}
    before = np.mean([float(loss(start, i)) for i in range(4, 12)])
    for rate in module.RATES:
        w = dict(start)
        w["c2.weight"] = w["c2.weight"].clone().requires_grad_()
        for i in range(8):
            (grad,) = torch.autograd.grad(loss(w, i), w["c2.weight"])
            w["c2.weight"] = (w["c2.weight"] - rate * grad).detach().requires_grad_()
        after.append(np.mean([loss(w, i).item() for i in range(4, 12)]))
    assert got == pytest.approx(before - min(after), rel=1e-3)
    assert got > 0


def test_a_worker_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from odt_plan.contributions import Source, Trial
    from odt_plan.ir.import_options import PLAIN

    trial = Trial("c1 whole", Source(Path("gone.onnx"), PLAIN), {}, SPEC, Candidate("c1"), (), ())
    assert trial.lost("its worker died") == "its worker died"
    assert "gone.onnx" in str(trial.run())
    assert replace(trial, name="other").name == "other"

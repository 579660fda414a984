"""``--lora``: low-rank adapters, from the imported graph through plans back into the file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import nets
import numpy as np
import plans
import pytest
from cli_run import Cli
from numpy.typing import NDArray
from onnx_files import assert_close, export, floats, model, node, runtime, save
from oracle import Unconstrained, batch

from odt_plan.backends.c.golden import random_samples
from odt_plan.backends.numpy import Runtime
from odt_plan.backends.numpy.gradients import measure_gradients
from odt_plan.ir.adapters import without_unused
from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.errors import InfeasibleError, UsageError
from odt_plan.ir.graph import Graph
from odt_plan.ir.import_options import ImportOptions, Lora, parse_lora
from odt_plan.ir.interpreter import run
from odt_plan.ir.lora import add_adapters
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.training import Candidate, TrainingGraph, TrainingSpec
from odt_plan.planner import search
from odt_plan.planner.decided import ProvenInfeasibleError
from odt_plan.planner.device import load_device
from odt_plan.planner.imported import import_requested
from odt_plan.planner.pipeline import Request, make_plan
from odt_plan.planner.plan import ImportanceTable, Plan, load_plan
from odt_plan.planner.progress import Watch
from odt_plan.planner.rebuild import rebuild, updates_of
from odt_plan.planner.stages import Stages
from odt_plan.planner.train_set import choose
from odt_plan.usual_sets import last_layers

Array = NDArray[Any]
PLAN = Path("out") / "plan.json"
LIMITS = ("--ram", "16MB", "--flash", "64MB", "--time-limit", "10")
NETS: dict[str, Callable[[], Graph]] = {
    "mlp": nets.mlp,
    "cnn": lambda: nets.cnn(layers=2, channels=6, size=7),
    "resnet": nets.resnet,
    "transformer": lambda: nets.transformer(rows=5, width=8),
}


def adapted(graph: Graph, rank: int = 2, alpha: float = 3.0, seed: int = 0) -> Graph:
    """The same graph with adapters; B may have learned something."""
    add_adapters(graph, Lora(rank, alpha, seed))
    return graph


def of_adapters(graph: Graph) -> list[Candidate]:
    return [Candidate(p) for a in graph.adapters for p in a.params]


def learned(graph: Graph) -> dict[str, Array]:
    """Other numbers for every A and B."""
    rng = np.random.default_rng(5)
    params = [p for a in graph.adapters for p in a.params]
    return {p: 0.3 * floats(rng, *graph.constants[p].shape) for p in params}


def sample(graph: Graph, seed: int = 0) -> dict[str, Array]:
    (x,) = graph.inputs
    return {x.name: floats(np.random.default_rng(seed), *x.type.shape)}


# ---- the graph -----------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
def test_the_model_computes_what_it_did(net: str) -> None:
    plain, graph = NETS[net](), adapted(NETS[net]())
    (name,) = (v.name for v in plain.outputs)
    feeds = sample(plain)
    want = run(plain, feeds)[name]
    assert np.array_equal(run(graph, feeds)[name], want)
    assert not np.allclose(run(graph, feeds | learned(graph))[name], want, 1e-2)


@pytest.mark.parametrize("net", NETS)
def test_merged_weights_do_what_weight_and_adapter_do(net: str) -> None:
    graph = adapted(NETS[net]())
    (name,) = (v.name for v in graph.outputs)
    feeds, new = sample(graph), learned(graph)
    merged = without_unused(graph, ())
    layers = {n.name: n for n in graph.nodes}
    for a in graph.adapters:
        layer = layers[a.layer]
        axis = 0 if layer.op == "Conv" or layer.int_attr("trans_b", 0) else 1
        old = graph.constants[a.weight]
        merged.constants[a.weight] = a.merged(old, new[a.down], new[a.up], axis)
    assert_close(run(merged, feeds)[name], run(graph, feeds | new)[name])


@pytest.mark.parametrize("net", NETS)
def test_without_adapters_it_is_the_graph_that_it_was(net: str) -> None:
    plain, graph = NETS[net](), adapted(NETS[net]())
    bare = without_unused(graph, ["conv0.weight", "fc.bias"])
    assert repr(bare) == repr(plain)
    assert {*bare.constants} == {*plain.constants}
    one = graph.adapters[0]
    part = without_unused(graph, [one.up])
    assert part.adapters == (one,)
    assert len(part.nodes) == len(plain.nodes) + len(one.nodes)
    assert without_unused(graph, [a.down for a in graph.adapters]) is graph


def test_a_is_drawn_from_the_seed_and_scaled_by_its_inputs() -> None:
    wide = (512, 64, 8)
    first, same, other = (adapted(nets.mlp(wide), 4, 4.0, s) for s in (1, 1, 2))
    for a in first.adapters:
        data = first.constants[a.down]
        assert np.array_equal(data, same.constants[a.down])
        assert not np.array_equal(data, other.constants[a.down])
        assert not first.constants[a.up].any()
        inputs = data.size // 4
        assert data.std() == pytest.approx(inputs**-0.5, rel=0.15)


def test_one_times_is_no_step() -> None:
    assert all(len(a.nodes) == 3 for a in adapted(nets.mlp(), 2, 2.0).adapters)
    assert all(len(a.nodes) == 4 for a in adapted(nets.mlp(), 2, 1.0).adapters)


def test_grouped_shared_and_computed_weights_have_none() -> None:
    graph = adapted(nets.spatial())
    groups = {n.name for n in graph.nodes if n.int_attr("group", 1) > 1}
    assert groups.isdisjoint(a.layer for a in graph.adapters)
    attention = adapted(NETS["transformer"]())
    layers = {n.name: n for n in attention.nodes}
    assert all(layers[a.layer].inputs[1].name in attention.constants for a in attention.adapters)


# ---- training ------------------------------------------------------------------------------------


def steps_of(graph: Graph, chosen: Sequence[Candidate], count: int = 3) -> Unconstrained:
    training = build_training(graph, TrainingSpec(), chosen)
    oracle, rng = Unconstrained(training), np.random.default_rng(1)
    for _ in range(count):
        oracle.step(*batch(training, rng), 0.1)
    return oracle


def test_gradients_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    graph = adapted(nets.cnn(layers=1, channels=6, size=7), 2, 3.0)
    oracle = steps_of(graph, of_adapters(graph), count=4)
    c = {k: torch.tensor(a) for k, a in graph.constants.items()}
    names = [p for a in graph.adapters for p in a.params]
    assert set(names) == set(oracle.state)
    for name in names:
        c[name].requires_grad_()
    (fc,) = (n for n in graph.nodes if n.name == "fc")

    def dense(x: Any, w: Any, b: Any = None) -> Any:
        return x @ (w.T if fc.int_attr("trans_b", 0) else w) + (0 if b is None else b)

    rng = np.random.default_rng(1)
    for _ in range(4):
        x, y = batch(oracle.t, rng)
        h = torch.tensor(x)
        conv, relu = functional.conv2d, torch.relu
        low = 1.5 * conv(h, c["conv0.weight.lora_A"], padding=1)
        h = conv(h, c["conv0.weight"], c["conv0.bias"], padding=1) + conv(
            low, c["conv0.weight.lora_B"]
        )
        h = relu(h)
        for n in graph.nodes:
            if n.op == "MaxPool":
                h = functional.max_pool2d(h, n.ints_attr("kernel_shape"), n.ints_attr("strides"))
            elif n.op == "GlobalAveragePool":
                h = h.mean((2, 3), keepdim=True)
        h = h.reshape(len(h), -1)
        up = dense(1.5 * dense(h, c["fc.weight.lora_A"]), c["fc.weight.lora_B"])
        h = dense(h, c["fc.weight"], c["fc.bias"]) + up
        grads = torch.autograd.grad(
            functional.cross_entropy(h, torch.tensor(y, dtype=torch.long)), [c[n] for n in names]
        )
        for name, g in zip(names, grads, strict=True):
            c[name] = (c[name].detach() - 0.1 * g).requires_grad_()
    for name in names:
        assert_close(oracle.state[name], c[name].detach().numpy(), 1e-5)
        moved = np.abs(oracle.state[name] - graph.constants[name]).max()
        assert moved > 1e-4, name


def test_adapters_learn_nothing_else_of_their_layers() -> None:
    graph = adapted(nets.mlp())
    training = build_training(graph, TrainingSpec(), of_adapters(graph))
    assert {u.candidate.param for u in training.updates} == {
        p for a in graph.adapters for p in a.params
    }
    kept = {v.name for u in training.updates for v in u.resident}
    assert kept.isdisjoint(a.weight for a in graph.adapters)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_plan_trains_them_bit_for_bit(net: str, optimizer: Any) -> None:
    graph = adapted(NETS[net]())
    spec = TrainingSpec(optimizer=optimizer, micro_batches=2 if optimizer == "adam" else 1)
    training = build_training(graph, spec, of_adapters(graph))
    plan = plans.keep_all(training) if net == "mlp" else plans.within(graph, training, 0.9, None)
    trained, oracle = Runtime(plan, training), Unconstrained(training)
    rng = np.random.default_rng(2)
    for _ in range(4):
        x, y = batch(training, rng)
        assert trained.train_step(x, y, 0.05) == oracle.step(x, y, 0.05)
    assert trained.state_bytes() == oracle.state_bytes(plan)


# ---- what is trained -----------------------------------------------------------------------------


def chosen(graph: Graph, *train: str) -> set[str]:
    found = choose(graph, train, candidates(graph))
    assert found is not None
    assert len({c.param for c in found}) == len(found)
    return {c.param for c in found}


def test_kinds_of_updates_stand_beside_each_other() -> None:
    graph = adapted(nets.mlp((8, 16, 4)))
    adapters = {p for a in graph.adapters for p in a.params}
    assert {f"fc{i}.weight.lora_{x}" for i in (0, 1) for x in "AB"} == adapters
    plain = set(nets.mlp((8, 16, 4)).constants)
    assert chosen(graph, "lora") == adapters
    assert chosen(graph, "all") == plain
    assert chosen(graph, "lora,bias") == adapters | {"fc0.bias", "fc1.bias"}
    last = {"fc1.weight", "fc1.bias", "fc0.weight.lora_A", "fc0.weight.lora_B"}
    assert chosen(graph, "lora", "last") == last
    assert chosen(graph, "last") == {"fc1.weight", "fc1.bias"}
    assert chosen(graph, "fc1.weight", "lora") == last - {"fc1.bias"}
    assert chosen(graph, "fc1.weight.lora_B") == {"fc1.weight.lora_B"}
    with pytest.raises(UsageError, match=r"--train lora: .* give --lora RANK"):
        choose(nets.mlp(), ("lora",), candidates(nets.mlp()))


def planned(path: Path, ram: int, train: str, flash: int = 1 << 24, **options: Any) -> Plan:
    request = Request(
        path,
        load_device(plans.BOARD),
        ImportOptions(lora=Lora(2, 2.0)),
        ram_bytes=ram,
        flash_bytes=flash,
        train=(train,),
        gap=0.0,
        with_baselines=False,
        with_relaxations=False,
        **options,
    )
    made = make_plan(request)
    assert {a.weight for a in made.training.graph.adapters} == {
        u.param.removesuffix(".lora_B")
        for u in made.plan.decisions.updates
        if u.ratio and u.param.endswith(".lora_B")
    }
    return made.plan


def adapters_of(plan: Plan) -> set[str]:
    steps = {name for s in plan.steps for name in s.nodes}
    return {n.split("/")[0] for n in steps if n.endswith("/lora")}


def learns(plan: Plan) -> float:
    return sum(u.importance for u in plan.decisions.updates)


@pytest.mark.parametrize(("share", "latency"), [(0.25, None), (0.35, None), (0.6, 0.7)])
def test_the_best_of_weights_and_adapters(
    tmp_path: Path, share: float, latency: float | None
) -> None:
    """No choice of whole weights and adapters learns more than what the solver chooses."""
    path = export(nets.mlp((24, 32, 8)), tmp_path)
    names = [n for n in import_model(path).constants if n.endswith("weight")]
    every = planned(path, 1 << 20, "all")
    least = planned(path, 1 << 20, "fc1.bias").claims
    top = every.claims
    ram = round(least.ram_bytes.total + share * (top.ram_bytes.total - least.ram_bytes.total))
    given: dict[str, Any] = {}
    if latency is not None:
        given["latency_s"] = least.latency_s + latency * (top.latency_s - least.latency_s)
    auto = planned(path, ram, "auto", **given)
    assert auto.objective[0].gap < 1e-6
    fitting = 0
    for forms in product(("", "whole", "adapter"), repeat=len(names)):
        items = [n for n, f in zip(names, forms, strict=True) if f == "whole"]
        for n in (n for n, f in zip(names, forms, strict=True) if f == "adapter"):
            items += [f"{n}.lora_A", f"{n}.lora_B"]
        try:
            plan = planned(path, ram, ",".join([*items, "fc1.bias"]), **given)
        except InfeasibleError:
            continue
        fitting += 1
        assert adapters_of(plan) == {
            n.removesuffix(".weight")
            for n, f in zip(names, forms, strict=True)
            if f == "adapter"
        }
        assert learns(plan) <= learns(auto) * (1 + 1e-9)
        assert learns(plan) <= auto.objective[0].bound * (1 + 1e-9)
    assert 1 < fitting < 9
    assert adapters_of(auto) or latency is not None


@pytest.mark.parametrize("train", ["bias", "last", "all", "lora", "fc1.weight,fc0.bias"])
def test_what_a_plan_takes_is_enough_for_the_choice(tmp_path: Path, train: str) -> None:
    """Steps, tensors and constants of adapters that are not chosen count for nothing."""
    path = export(nets.mlp((24, 32, 8)), tmp_path)
    given = planned(path, 1 << 20, train)
    took = given.claims
    latency = (took.cycles + 1) / load_device(plans.BOARD).clock_hz.value
    ram, flash = took.ram_bytes.total, took.flash_bytes.total
    auto = planned(path, ram, "auto", flash, latency_s=latency)
    assert learns(auto) >= learns(given)
    assert auto.objective[0].bound >= learns(given)


def test_the_way_through_an_adapter_takes_its_time(tmp_path: Path) -> None:
    """Where both adapters take a cycle too many, no bound says that both can be updated."""
    path = export(nets.mlp((24, 32, 8)), tmp_path)
    gains = {f"fc{i}.weight.lora_B": ((1.0, 1.0),) for i in (0, 1)}
    table = ImportanceTable(method="table", file="t.csv", sha256="0" * 64, gains=gains)
    took = planned(path, 1 << 20, "lora", importance=table)
    clock = load_device(plans.BOARD).clock_hz.value
    for cycles, both in ((took.claims.cycles + 1, True), (took.claims.cycles - 1, False)):
        auto = planned(path, 1 << 20, "auto", latency_s=cycles / clock, importance=table)
        assert (adapters_of(auto) == {"fc0", "fc1"}) is both
        assert (auto.objective[0].bound >= learns(took)) is both


def test_an_adapter_that_is_not_chosen_costs_nothing(tmp_path: Path) -> None:
    """Room for all weights: the plan is the one of a model without adapters."""
    path = export(nets.mlp(), tmp_path)
    with_, without = planned(path, 1 << 20, "auto"), make_plan(
        Request(path, load_device(plans.BOARD), ram_bytes=1 << 20, flash_bytes=1 << 24, gap=0.0)
    ).plan  # fmt: skip
    assert with_.steps == without.steps
    assert with_.claims == without.claims
    assert [u.param for u in with_.decisions.updates] == [
        u.param for u in without.decisions.updates
    ]
    assert learns(with_) == learns(without)


# ---- importance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gradient", "fisher", "magnitude"])
def test_scores_stand_with_b(method: Any) -> None:
    graph = adapted(nets.mlp((8, 16, 4)), 2, 4.0)
    rng = np.random.default_rng(3)
    x, y = floats(rng, 12, 8), rng.integers(0, 4, 12).astype(np.int32)
    x[:, :4] += 2 * np.eye(4, dtype=np.float32)[y]
    params = [c.param for c in candidates(graph) if c == Candidate(c.param)]
    found = measure_gradients(graph, TrainingSpec(), params, {"x": x}, {"y": y}).gains(method)
    plain = nets.mlp((8, 16, 4))
    own = [p for p in params if "lora" not in p]
    alone = measure_gradients(plain, TrainingSpec(), own, {"x": x}, {"y": y}).gains(method)
    for p in own:
        assert np.allclose(found[p], alone[p], rtol=1e-6)
    for a in graph.adapters:
        assert found[a.down] == ((1.0, 0.0),)
        ((part, score),) = found[a.up]
        assert part == 1.0
        assert score > 0 or method == "gradient"
    # a step on B moves W by A times it: its gradient is A^T times that of W, times the scale
    if method != "gradient":
        return
    assert any(found[a.up][0][1] for a in graph.adapters)
    training = build_training(plain, TrainingSpec(), [Candidate(p) for p in own])
    grads: dict[str, list[Array]] = {}
    wanted = {u.candidate.param: u.grad.name for u in training.updates}
    for i in range(12):
        feeds = {"x": x[i : i + 1], training.target.name: y[i : i + 1]}
        feeds[training.hyper.name] = np.zeros(3, np.float32)
        env = run(training.graph, feeds, frozenset(wanted.values()))
        for p, name in wanted.items():
            grads.setdefault(p, []).append(env[name].astype(np.float64))
    for a in graph.adapters:
        down = graph.constants[a.down].astype(np.float64)
        first = grads[a.weight][0].shape[0] == down.shape[0]
        each = [a.scale * (down.T @ g if first else g @ down.T) for g in grads[a.weight]]
        total = sum(each)
        pairs = (total**2).sum() - sum((g**2).sum() for g in each)
        assert found[a.up][0][1] == pytest.approx(max(0.0, pairs / (12 * 11)), rel=1e-4)


# ---- the command line ----------------------------------------------------------------------------


def file_of(tmp_path: Path) -> Path:
    """A convolution with a stride, a product with a bias over rows, one without, and a Gemm."""
    rng = np.random.default_rng(4)
    nodes = [
        node("Conv", "x k kb", "c", "conv", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Relu", "c", "r", "relu"),
        node("MatMul", "r m", "p", "rows"),
        node("Add", "p mb", "q", "rows_bias"),
        node("Relu", "q", "s", "relu2"),
        node("Flatten", "s", "f", "flat"),
        node("MatMul", "f n", "g", "product"),
        node("Gemm", "g w b", "y", "fc", transB=1),
    ]
    shapes = {
        "k": (4, 2, 3, 3), "kb": (4,), "m": (3, 5), "mb": (5,), "n": (60, 7), "w": (3, 7), "b": (3,)
    }  # fmt: skip
    weights = {name: 0.5 * floats(rng, *shape) for name, shape in shapes.items()}
    return save(model(nodes, {"x": [1, 2, 6, 6]}, ["y"], weights), tmp_path)


@pytest.mark.parametrize("train", ["lora", "lora,bias", "lora,last", "m,lora"])
def test_what_they_have_learned_is_exported_into_the_weights(
    odt: Cli, tmp_path: Path, train: str
) -> None:
    path = file_of(tmp_path)
    options = ("--lora", "2:5:3", "--train", train, "-q", "-o", "out")
    assert odt(path, *LIMITS, *options).code == 0
    plan = load_plan(PLAN)
    assert plan.model.lora == Lora(2, 5.0, 3)
    assert odt("verify", PLAN).code == 0
    trained = Runtime(plan, rebuild(plan, PLAN))
    x = {v.name: v.type.shape for v in trained.training.samples}
    rng = np.random.default_rng(6)
    np.savez("d.npz", x=floats(rng, 20, *x["x"][1:]), y=rng.integers(0, 3, 20).astype(np.int32))
    ran = odt("run", PLAN, "--data", "d.npz", "--steps", "60", "--lr", "0.03", "--save", "w.npz")
    assert ran.code == 0, ran.err
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx", "--json")
    assert done.code == 0, done.err
    changed = {"k", "m", "n", "w"}
    changed |= {"kb", "mb", "b"} if "bias" in train else {"b"} if "last" in train else set()
    assert set(done.json["changed"]) == changed
    trained.set_params(dict(np.load("w.npz")))
    for seed in range(3):
        given = random_samples(trained.training, np.random.default_rng(seed))
        got, old = runtime(Path("tuned.onnx"), given)[0], runtime(path, given)[0]
        assert_close(got, trained.infer(given), 1e-5)
        assert np.abs(got - old).max() > 1e-2 * np.abs(old).max()


@pytest.mark.parametrize("train", ["lora", "n.lora_A,n.lora_B"])
def test_a_fresh_head_and_adapters(odt: Cli, tmp_path: Path, train: str) -> None:
    path = file_of(tmp_path)
    options = ("--lora", "2", "--head", "6", "--train", train, "-q", "-o", "out")
    assert odt(path, *LIMITS, *options).code == 0
    plan = load_plan(PLAN)
    trained = Runtime(plan, rebuild(plan, PLAN))
    values = trained.params()
    rng = np.random.default_rng(7)
    values = {
        u.candidate.param: 0.3 * floats(rng, *values[u.candidate.param].shape)
        for u in trained.training.updates
    }
    trained.set_params(values)
    np.savez("w.npz", **values)
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx", "--json")
    assert done.code == 0, done.err
    given = random_samples(trained.training, rng)
    assert_close(runtime(Path("tuned.onnx"), given)[0], trained.infer(given), 1e-5)


def test_weights_that_a_file_holds_in_half_floats(odt: Cli, tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    weights = {"h": floats(rng, 6, 8).astype(np.float16), "w": floats(rng, 8, 3)}
    nodes = [
        node("Cast", "h", "c", "cast", to=1),
        node("MatMul", "x c", "p", "first"),
        node("Relu", "p", "r", "relu"),
        node("MatMul", "r w", "y", "fc"),
    ]
    path = save(model(nodes, {"x": [1, 6]}, ["y"], weights), tmp_path)
    assert odt(path, *LIMITS, "--lora", "2", "--train", "lora", "-q", "-o", "out").code == 0
    trained = Runtime(plan := load_plan(PLAN), rebuild(plan, PLAN))
    values = {u.candidate.param: floats(rng, *u.value.type.shape) for u in trained.training.updates}
    trained.set_params(values)
    np.savez("w.npz", **values)
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx", "--json")
    assert done.code == 0, done.err
    assert done.json["rounded"]
    assert done.json["rounding_difference"] > 1e-5
    given = random_samples(trained.training, rng)
    assert_close(runtime(Path("tuned.onnx"), given)[0], trained.infer(given), 1e-2)


def test_last_layers_are_those_of_the_model(tmp_path: Path) -> None:
    def layers(lora: Lora | None) -> list[tuple[str, ...]]:
        request = Request(
            file_of(tmp_path), load_device(plans.BOARD), ImportOptions(lora=lora),
            ram_bytes=1 << 20, flash_bytes=1 << 24,
        )  # fmt: skip
        return last_layers(import_requested(request, Watch()), request)

    assert layers(Lora(2, 2.0)) == layers(None)


def test_rank_and_seed_are_part_of_the_plan(odt: Cli, tmp_path: Path) -> None:
    path = file_of(tmp_path)
    assert odt(path, *LIMITS, "--lora", "2", "--train", "lora", "-q", "-o", "out").code == 0
    text = PLAN.read_text()
    assert '"lora": {\n      "rank": 2,' in text
    PLAN.write_text(text.replace('"rank": 2,', '"rank": 1,'))
    assert odt("verify", PLAN).code != 0
    PLAN.write_text(text.replace('"rank": 2,', '"rank": 0,'))
    assert odt("verify", PLAN).error.endswith("the rank must be at least 1, not 0")


def test_explaining_an_adapter_is_about_both(odt: Cli, tmp_path: Path) -> None:
    path = file_of(tmp_path)
    assert odt(path, *LIMITS, "--lora", "2", "--train", "lora", "-q", "-o", "out").code == 0
    (told,) = odt("explain", PLAN, "n.lora_B", "--json").json
    assert told["chosen"] == "100.0% updated"
    (other,) = told["others"]
    assert other["status"] == "planned"
    frozen = {f"n.lora_{x} 100.0% -> frozen" for x in "AB"}
    assert frozen <= set(other["less"])
    both = [u for u in load_plan(PLAN).decisions.updates if u.param in ("n.lora_A", "n.lora_B")]
    assert other["score_change"] == pytest.approx(-sum(u.importance for u in both))


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0", "the rank must be at least 1, not 0"),
        ("-1", "the rank must be at least 1, not -1"),
        ("4:0", "ALPHA must be above 0 and finite, not 0"),
        ("4:nan", "ALPHA must be above 0 and finite, not nan"),
        ("4:inf", "ALPHA must be above 0 and finite, not inf"),
        ("4:8:-1", "the seed must be from 0 to 2147483647, not -1"),
        ("x", "'x' is not RANK[:ALPHA[:SEED]], as 4 or 4:8"),
        ("", "'' is not RANK[:ALPHA[:SEED]], as 4 or 4:8"),
        ("4:", "'4:' is not RANK[:ALPHA[:SEED]], as 4 or 4:8"),
        ("4:8:1:2", "'4:8:1:2' is not RANK[:ALPHA[:SEED]], as 4 or 4:8"),
        ("99", "rank 99 is too large for every layer; product, with 60 x 7 weights, takes up to 7"),
    ],
)
def test_ranks_that_are_none(odt: Cli, tmp_path: Path, text: str, told: str) -> None:
    ran = odt(file_of(tmp_path), *LIMITS, f"--lora={text}")
    assert ran.code == 2
    assert ran.error.endswith(told)


def test_numbers_of_an_adapter() -> None:
    assert parse_lora("4") == Lora(4, 4.0, 0)
    assert parse_lora("4:8") == Lora(4, 8.0, 0)
    assert parse_lora("4:0.5:7") == Lora(4, 0.5, 7)


def test_layers_that_bear_a_smaller_rank_have_none(tmp_path: Path) -> None:
    graph = import_model(file_of(tmp_path), ImportOptions(lora=Lora(4, 4.0)))
    assert {a.weight for a in graph.adapters} == {"k", "n"}
    (note,) = graph.notes
    assert note.endswith("some layers: rows takes up to rank 3, fc takes up to rank 3")


def test_a_model_without_a_layer_for_them(odt: Cli, tmp_path: Path) -> None:
    scale = {"s": np.ones(4, np.float32)}
    path = save(model([node("Mul", "x s", "y", "mul")], {"x": [1, 4]}, ["y"], scale), tmp_path)
    ran = odt(path, *LIMITS, "--lora", "2")
    assert ran.code == 4
    assert ran.error.endswith("with a constant float weight of its own; the model has none")


def test_layers_with_scales(odt: Cli, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    np.savez("c.npz", x=floats(rng, 8, 2, 6, 6))
    path = file_of(tmp_path)
    ran = odt(path, *LIMITS, "--lora", "2", "--calib", "c.npz")
    assert ran.code == 2
    assert "adapters are for float ones: give --precision" in ran.error
    pinned = ("--calib", "c.npz", "--precision", "*=f32", "-q", "-o", "out")
    assert odt(path, "--ram", "9KB", "--flash", "1MB", "--lora", "2", *pinned).code == 0
    assert odt("verify", PLAN).code == 0


def test_integer_layers_of_a_file(odt: Cli, tmp_path: Path) -> None:
    numbers = {
        "w": np.ones((4, 3), np.int8),
        "s": np.array(0.1, np.float32),
        "z": np.array(0, np.int8),
    }
    nodes = [
        node("QuantizeLinear", "x s z", "q", "q"),
        node("DequantizeLinear", "q s z", "d", "d"),
        node("DequantizeLinear", "w s z", "e", "e"),
        node("MatMul", "d e", "m", "fc"),
        node("QuantizeLinear", "m s z", "r", "r"),
        node("DequantizeLinear", "r s z", "y", "t"),
    ]
    ran = odt(save(model(nodes, {"x": [1, 4]}, ["y"], numbers), tmp_path), *LIMITS, "--lora", "2")
    assert ran.code == 4
    assert ran.error.endswith("the model has integer ones alone, whose weights are quantized")


def updates(training: TrainingGraph) -> set[str]:
    return {u.candidate.param for u in training.updates}


def test_a_plan_is_rebuilt_with_its_adapters_alone(odt: Cli, tmp_path: Path) -> None:
    path = file_of(tmp_path)
    train = ("--train", "n.lora_A,n.lora_B,kb")
    assert odt(path, *LIMITS, "--lora", "2", *train, "-q", "-o", "out").code == 0
    plan = load_plan(PLAN)
    training = rebuild(plan, PLAN)
    wanted = {"n.lora_A", "n.lora_B", "kb"}
    assert updates(training) == {c.param for c in updates_of(plan)} == wanted
    assert [a.weight for a in training.graph.adapters] == ["n"]
    assert not {n for n in training.graph.constants if "lora" in n} - {"n.lora_A", "n.lora_B"}


def test_a_choice_that_does_not_fit_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice leaves some bytes of adapters out; where a plan lacks them, it takes less RAM."""
    path = export(nets.mlp((24, 32, 8)), tmp_path)
    limits: list[int] = []
    choose_again, schedule = Stages.learn, search.schedule

    def learn(stages: Stages, start: Any, **options: Any) -> Any:
        if any("lora" in c.param for c in start.updates):  # not the plans without adapters
            limits.append(options["limits"].ram_bytes)
        return choose_again(stages, start, **options)

    def fails_once(*args: Any) -> Any:
        if len(limits) <= 1:
            raise ProvenInfeasibleError("no plan fits")
        return schedule(*args)

    monkeypatch.setattr(Stages, "learn", learn)
    monkeypatch.setattr(search, "schedule", fails_once)
    monkeypatch.setattr(search, "at_once", lambda *_, **__: None)
    monkeypatch.setattr(search.Search, "_jointly", lambda _: False)
    plan = planned(path, 1600, "auto")
    first, second = limits
    assert first == 1600
    assert first - second == 128  # the gradient of 32 numbers that passes the adapter of fc1
    assert adapters_of(plan)

"""``--lite-residual``: TinyTL's modules, from the imported graph through plans into the file."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import plans
import pytest
import test_conv_blocks
from cli_run import Cli
from numpy.typing import NDArray
from onnx_files import assert_close, export, floats, model, node, runtime, save
from oracle import Unconstrained, batch
from test_conv_blocks import BLOCKS, plain
from test_lora import LIMITS, PLAN, chosen, learned, learns, of_adapters, sample

from odt_plan import contributions
from odt_plan.backends.c.golden import random_samples
from odt_plan.backends.numpy import Runtime
from odt_plan.backends.numpy.gradients import measure_gradients
from odt_plan.ir.adapters import without_unused
from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.errors import InfeasibleError, UnsupportedModelError, UsageError
from odt_plan.ir.graph import Graph, TensorType
from odt_plan.ir.import_options import ImportOptions, Lite, Lora, parse_lite
from odt_plan.ir.interpreter import run
from odt_plan.ir.lite_residual import LiteResidual, add_lite_residuals
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.training import Candidate, TrainingSpec
from odt_plan.planner.device import load_device
from odt_plan.planner.importance import prior
from odt_plan.planner.pipeline import Request, make_plan
from odt_plan.planner.plan import ImportanceTable, Plan, load_plan
from odt_plan.planner.rebuild import rebuild
from odt_plan.planner.search import Search
from odt_plan.planner.tensors import Storage
from odt_plan.planner.train_set import choose

Array = NDArray[Any]


NETS: dict[str, Callable[[], Graph]] = {
    **test_conv_blocks.NETS,
    "normalized": lambda: nets.batch_normalized(batch=2),
}
def modular(graph: Graph, kernel: int = 3, seed: int = 0) -> Graph:
    """The same graph with modules."""
    add_lite_residuals(graph, Lite(kernel, seed))
    return graph


def modules(graph: Graph) -> list[LiteResidual]:
    return [a for a in graph.adapters if isinstance(a, LiteResidual)]


# ---- the graph -----------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
def test_the_model_computes_what_it_did(net: str) -> None:
    bare, graph = NETS[net](), modular(NETS[net]())
    (name,) = (v.name for v in bare.outputs)
    feeds = sample(bare)
    want = run(bare, feeds)[name]
    assert np.array_equal(run(graph, feeds)[name], want)
    assert not np.allclose(run(graph, feeds | learned(graph))[name], want, 1e-2)


@pytest.mark.parametrize("net", [n for n in NETS if n != "normalized"])
def test_an_imported_file_computes_what_it_did(net: str, tmp_path: Path) -> None:
    path = export(NETS[net](), tmp_path)
    graph = import_model(path, ImportOptions(lite_residual=Lite(3)))
    assert modules(graph)
    feeds = sample(graph)
    assert_close(run(graph, feeds)[graph.outputs[0].name], runtime(path, feeds)[0])


@pytest.mark.parametrize("net", NETS)
def test_without_modules_it_is_the_graph_that_it_was(net: str) -> None:
    bare, graph = NETS[net](), modular(NETS[net]())
    none = without_unused(graph, [*bare.constants])
    assert repr(none) == repr(bare)
    assert {*none.constants} == {*bare.constants}
    last = graph.adapters[-1]
    part = without_unused(graph, [last.up])
    assert part.adapters == (last,)
    assert len(part.nodes) == len(bare.nodes) + len(last.nodes)
    assert without_unused(graph, [a.down for a in graph.adapters]) is graph


def test_what_a_module_is_made_of() -> None:
    graph = modular(nets.bottlenecks(), kernel=5)
    nodes = {n.name: n for n in graph.nodes}
    a = modules(graph)[1]  # 4 channels of 7x7 pixels, with a stride
    pool, down, act, up, resize, total = (nodes[name] for name in a.nodes)
    ops = ["AveragePool", "Conv", "Relu", "Conv", "Resize", "Add"]
    assert [nodes[name].op for name in a.nodes] == ops
    assert pool.inputs[0] is graph.values["b0.project"]
    assert pool.out.type.shape == (1, 4, 3, 3)
    assert graph.constants[a.down].shape == (4, 2, 5, 5)
    assert (down.attrs["group"], down.attrs["strides"]) == (2, (2, 2))
    assert act.out.type.shape == (1, 4, 2, 2)
    assert graph.constants[a.up].shape == (4, 4, 1, 1)
    assert up.out.type.shape == (1, 4, 2, 2)
    assert resize.out.type.shape == total.out.type.shape == (1, 4, 4, 4)
    assert total.out.name == "b1.project"
    assert a.layer == "b1.project"


def test_one_group_for_an_odd_number_of_channels() -> None:
    graph = modular(plain())
    groups = [n.int_attr("group", 1) for n in graph.nodes if n.name.endswith("/lite_down")]
    assert groups == [1, 1, 2]


def test_an_axis_of_one_pixel_is_left_alone() -> None:
    rng, g = np.random.default_rng(0), Graph("line")
    x = g.add_input("x", TensorType((1, 2, 1, 8)))
    x = nets.relu(g, nets.conv(g, rng, x, "c0", 4), "r0")
    x = nets.relu(g, nets.conv(g, rng, x, "c1", 4), "r1")
    g.outputs = [nets.dense(g, rng, nets.flat(g, x), "fc", 3)]
    (a,) = modules(modular(g))
    assert g.values["c1/lite_pool"].type.shape == (1, 4, 1, 4)
    assert g.constants[a.down].shape == (4, 2, 1, 3)


def test_the_first_weight_is_drawn_from_the_seed_and_scaled_by_its_inputs() -> None:
    def made(seed: int) -> Graph:
        return modular(nets.resnet(channels=32, size=8), 5, seed)

    first, same, other = made(1), made(1), made(2)
    for a in modules(first):
        data = first.constants[a.down]
        assert np.array_equal(data, same.constants[a.down])
        assert not np.array_equal(data, other.constants[a.down])
        assert not first.constants[a.up].any()
        assert not first.constants[a.bias].any()
        assert data.std() == pytest.approx(np.sqrt(2 / (16 * 25)), rel=0.05)
    assert len({first.constants[a.down].tobytes() for a in modules(first)}) == 2


# ---- training ------------------------------------------------------------------------------------


def test_gradients_are_those_of_torch() -> None:
    """Odd sizes, one group, strides; biases and the last layer train beside the modules."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    graph = modular(plain(size=14))
    assert [graph.values[f"c{i}/lite_pool"].type.shape[-1] for i in (1, 3, 4)] == [7, 3, 3]
    chosen = choose(graph, ("lite,bias,last",), candidates(graph))
    assert chosen
    oracle = Unconstrained(build_training(graph, TrainingSpec(), chosen))
    c = {k: torch.tensor(a) for k, a in graph.constants.items()}
    names = [u.param for u in chosen]
    assert {p for a in graph.adapters for p in a.params} < {*names}
    for name in names:
        c[name].requires_grad_()

    def lite(x: Any, y: Any, i: int, stride: int) -> Any:
        w = f"c{i}.weight.lite_"
        groups = x.shape[1] // c[w + "down"].shape[1]
        h = f.conv2d(f.avg_pool2d(x, 2), c[w + "down"], c[w + "bias"], stride, 1, 1, groups)
        h = f.conv2d(torch.relu(h), c[w + "up"])
        return y + f.interpolate(h, y.shape[2:], mode="bilinear")

    def conv(x: Any, i: int, stride: int = 1) -> Any:
        return f.conv2d(x, c[f"c{i}.weight"], c[f"c{i}.bias"], stride, 1)

    rng, again = np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(4):
        oracle.step(*batch(oracle.t, rng), 0.05)
        x, y = batch(oracle.t, again)
        h = torch.relu(conv(torch.tensor(x), 0))
        h = f.max_pool2d(torch.relu(lite(h, conv(h, 1), 1, 1)), 2)
        h = torch.relu(lite(h, conv(torch.relu(conv(h, 2)), 3), 3, 1))
        h = torch.relu(lite(h, conv(h, 4, 2), 4, 2))
        h = h.reshape(len(h), -1) @ c["fc.weight"].T + c["fc.bias"]
        loss = f.cross_entropy(h, torch.tensor(y, dtype=torch.long))
        grads = torch.autograd.grad(loss, [c[n] for n in names])
        for name, g in zip(names, grads, strict=True):
            c[name] = (c[name].detach() - 0.05 * g).requires_grad_()
    for name in names:
        assert_close(oracle.state[name], c[name].detach().numpy(), 1e-5)
        moved = np.abs(oracle.state[name] - graph.constants[name]).max()
        assert moved > 1e-5, name


def test_backward_reads_nothing_of_the_block() -> None:
    """Maps of a quarter of the pixels, and bits of Relus."""
    graph = modular(nets.resnet(size=8))
    chosen = choose(graph, ("lite,bias",), candidates(graph))
    assert chosen
    training = build_training(graph, TrainingSpec(), chosen)
    forward = {v for n in training.graph.nodes if n.phase == "forward" for v in n.outputs}
    kept = {
        v
        for n in training.graph.nodes
        if n.phase in ("backward", "update")
        for v in n.operands()
        if v in forward and v.type.dtype == "f32"
    }
    assert kept == {
        training.graph.values[f"b{i}.conv2/lite_{what}"]
        for i in (0, 1)
        for what in ("pool", "relu")
    }


@pytest.mark.parametrize("net", NETS)
def test_the_sum_takes_over_what_the_block_makes(net: str) -> None:
    """Whatever is trained: no map of the block's size is there for the module's sake."""
    graph = modular(NETS[net]())
    every = [*plans.whole(graph)]
    storage = Storage(build_training(graph, TrainingSpec(), every))
    values = storage.training.graph.values
    for a in modules(graph):
        total = next(n for n in graph.nodes if n.name == a.nodes[-1])
        frozen, beside = (values[v.name] for v in total.operands())
        assert storage.aliases[values[total.out.name]] is frozen
        assert storage.of[beside] is not storage.of[frozen]


@pytest.mark.parametrize("net", [n for n in NETS if n != "normalized"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_plan_trains_them_bit_for_bit(net: str, optimizer: Any) -> None:
    graph = modular(NETS[net]())
    spec = TrainingSpec(optimizer=optimizer, micro_batches=2 if optimizer == "adam" else 1)
    training = build_training(graph, spec, of_adapters(graph))
    plan = plans.within(graph, training, 0.9, None)
    trained, oracle = Runtime(plan, training), Unconstrained(training)
    rng = np.random.default_rng(2)
    for _ in range(4):
        x, y = batch(training, rng)
        assert trained.train_step(x, y, 0.05) == oracle.step(x, y, 0.05)
    assert trained.state_bytes() == oracle.state_bytes(plan)


# ---- what is trained -----------------------------------------------------------------------------


def test_kinds_of_updates_stand_beside_each_other() -> None:
    graph = modular(nets.resnet(blocks=1))
    lite = {f"b0.conv2.weight.lite_{what}" for what in ("down", "bias", "up")}
    biases = {f"{n}.bias" for n in ("stem", "b0.conv1", "b0.conv2", "fc")}
    assert chosen(graph, "lite") == lite
    assert chosen(graph, "all") == {*nets.resnet(blocks=1).constants}
    assert chosen(graph, "bias") == biases
    assert chosen(graph, "last") == {"fc.weight", "fc.bias"}
    assert chosen(graph, "lite,bias", "last") == lite | biases | {"fc.weight"}
    assert chosen(graph, "b0.conv2.weight", "lite") == lite | {"b0.conv2.weight"}
    up = "b0.conv2.weight.lite_up"
    assert chosen(graph, up) == {up}
    assert chosen(graph, "b0.conv2.weight.lite_down", "lite") == lite
    with pytest.raises(UsageError, match=r"--train lite: .* give --lite-residual K, too"):
        choose(nets.resnet(), ("lite",), candidates(nets.resnet()))
    with pytest.raises(UsageError, match=r"--train lora: there are no adapters"):
        choose(graph, ("lora",), candidates(graph))


def planned(path: Path, ram: int, train: str, flash: int = 1 << 24, **options: Any) -> Plan:
    request = Request(
        path,
        load_device(plans.BOARD),
        ImportOptions(lite_residual=Lite(3)),
        ram_bytes=ram,
        flash_bytes=flash,
        train=(train,),
        gap=0.0,
        with_baselines=False,
        with_relaxations=False,
        **options,
    )
    made = make_plan(request)
    assert {a.up for a in made.training.graph.adapters} == {
        u.param for u in made.plan.decisions.updates if u.ratio and u.param.endswith(".lite_up")
    }
    return made.plan


def modules_of(plan: Plan) -> set[str]:
    steps = {name for s in plan.steps for name in s.nodes}
    return {n.split("/")[0] for n in steps if n.endswith("/lite")}


def small(tmp_path: Path) -> Path:
    return export(nets.resnet(blocks=1, channels=4, size=6), tmp_path)


UNITS: dict[str, tuple[str, ...]] = {
    "b0.conv2": ("b0.conv2.weight",),
    "b0.conv1": ("b0.conv1.weight",),
    "module": tuple(f"b0.conv2.weight.lite_{what}" for what in ("down", "bias", "up")),
}


def table_of(**scores: float) -> ImportanceTable:
    """Scores of a table, with ``_`` for the dots of names."""
    names = ["b0.conv1.weight", "b0.conv2.weight", "b0.conv2.weight.lite_up", "fc.bias"]
    gains = {n: ((1.0, scores[n.replace(".", "_")]),) for n in names}
    return ImportanceTable(method="table", file="t.csv", sha256="0" * 64, gains=gains)


@pytest.mark.parametrize(("share", "latency"), [(0.4, None), (0.7, None), (0.8, 0.8)])
def test_the_best_of_weights_and_modules(
    tmp_path: Path, share: float, latency: float | None
) -> None:
    """No choice of whole weights and modules learns more than what the solver chooses."""
    path = small(tmp_path)
    table = table_of(
        b0_conv1_weight=1.0, b0_conv2_weight=1.5, b0_conv2_weight_lite_up=2.0, fc_bias=0.1
    )
    every = planned(path, 1 << 20, "all", importance=table).claims
    least = planned(path, 1 << 20, "fc.bias", importance=table).claims
    ram = round(least.ram_bytes.total + share * (every.ram_bytes.total - least.ram_bytes.total))
    given: dict[str, Any] = {"importance": table}
    if latency is not None:
        given["latency_s"] = least.latency_s + latency * (every.latency_s - least.latency_s)
    auto = planned(path, ram, "auto", **given)
    assert auto.objective[0].gap < 1e-6
    fitting = 0
    for taken in product((False, True), repeat=len(UNITS)):
        items = [p for unit, yes in zip(UNITS.values(), taken, strict=True) if yes for p in unit]
        try:
            plan = planned(path, ram, ",".join([*items, "fc.bias"]), **given)
        except InfeasibleError:
            continue
        fitting += 1
        assert modules_of(plan) == ({"b0.conv2"} if taken[2] else set())
        assert learns(plan) <= learns(auto) * (1 + 1e-9)
        assert learns(plan) <= auto.objective[0].bound * (1 + 1e-9)
    assert 1 < fitting < 8
    assert modules_of(auto)


def test_where_no_choice_of_modules_is_found_there_is_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, improve = small(tmp_path), Search._improve

    def without_luck(self: Search) -> None:
        if any(".lite_" in c.param for c in self.start.decided.updates):
            raise InfeasibleError("none was found")
        improve(self)

    bare = make_plan(
        Request(path, load_device(plans.BOARD), ram_bytes=2032, flash_bytes=1 << 24, gap=0.0)
    ).plan
    monkeypatch.setattr(Search, "_improve", without_luck)
    auto = planned(path, 2032, "auto")
    assert learns(auto) == learns(bare) > 0
    assert auto.objective[0].bound > learns(auto)


@pytest.mark.parametrize("train", ["bias", "last", "all", "lite", "lite,fc.bias"])
def test_what_a_plan_takes_is_enough_for_the_choice(tmp_path: Path, train: str) -> None:
    """Steps, tensors and constants of modules that are not chosen count for nothing."""
    path = small(tmp_path)
    given = planned(path, 1 << 20, train)
    took = given.claims
    latency = (took.cycles + 1) / load_device(plans.BOARD).clock_hz.value
    ram, flash = took.ram_bytes.total, took.flash_bytes.total
    auto = planned(path, ram, "auto", flash, latency_s=latency)
    assert learns(auto) >= learns(given)
    assert auto.objective[0].bound >= learns(given)


def test_the_way_through_a_module_takes_its_time(tmp_path: Path) -> None:
    """Where both modules take a cycle too many, no bound says that both can be updated."""
    path = export(nets.resnet(), tmp_path)
    gains = {f"b{i}.conv2.weight.lite_up": ((1.0, 1.0),) for i in (0, 1)}
    table = ImportanceTable(method="table", file="t.csv", sha256="0" * 64, gains=gains)
    took = planned(path, 1 << 20, "lite", importance=table)
    clock = load_device(plans.BOARD).clock_hz.value
    for cycles, both in ((took.claims.cycles + 1, True), (took.claims.cycles - 1, False)):
        auto = planned(path, 1 << 20, "auto", latency_s=cycles / clock, importance=table)
        assert (modules_of(auto) == {"b0.conv2", "b1.conv2"}) is both
        assert (auto.objective[0].bound >= learns(took)) is both


def test_a_module_that_is_not_chosen_costs_nothing(tmp_path: Path) -> None:
    """The plan of biases is that of the model without modules."""
    path = small(tmp_path)
    with_, without = planned(path, 1 << 20, "bias"), make_plan(
        Request(
            path, load_device(plans.BOARD), ram_bytes=1 << 20, flash_bytes=1 << 24, gap=0.0,
            train=("bias",),
        )
    ).plan  # fmt: skip
    assert with_.steps == without.steps
    assert with_.claims == without.claims


def test_where_there_is_room_everything_is_updated(tmp_path: Path) -> None:
    path = small(tmp_path)
    auto = planned(path, 1 << 20, "auto")
    assert modules_of(auto) == {"b0.conv2"}
    assert {u.param for u in auto.decisions.updates if u.ratio == 1} == {
        *import_model(path, ImportOptions(lite_residual=Lite(3))).constants
    } - {"b0.conv2/lite_positions"}
    assert auto.objective[0].bound >= learns(auto)


def test_the_prior_of_a_module_is_that_of_one_tensor() -> None:
    """It may be larger than the weight that it stands beside, and scores more then."""
    graph = modular(nets.resnet(), kernel=5)
    scores = {c.param: n for c, n in prior(graph, plans.whole(graph)).items()}
    size = {p: graph.values[p].type.size for p in scores}
    for a in modules(graph):
        weights = [p for p in a.params if p != a.bias]
        whole = sum(scores[p] for p in weights) + 2 * scores[a.bias]  # half of it, as of any bias
        every = sum(size[p] for p in a.params)
        assert every > size[a.weight]
        ratio = np.sqrt(every / size[a.weight])
        assert whole / scores[a.weight] == pytest.approx(ratio, rel=1e-4)
        assert scores[a.down] / scores[a.up] == pytest.approx(size[a.down] / size[a.up], rel=1e-4)


def test_a_contribution_is_of_all_of_it(
    odt: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ODT_PLAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(contributions, "cores", lambda: 1)
    rng = np.random.default_rng(3)
    y = rng.integers(0, 3, 24).astype(np.int32)
    x = floats(rng, 24, 2, 6, 6) + y[:, None, None, None].astype(np.float32)
    np.savez("c.npz", x=x, y=y)
    options = ("--calib", "c.npz", "--precision", "*=f32", "--importance", "contribution")
    path = small(tmp_path)
    assert odt(path, *LIMITS, *options, "--lite-residual", "3", "-q", "-o", "out").code == 0
    asked = load_plan(PLAN).asked
    assert asked is not None
    table = asked.importance
    assert table is not None
    gains = {p: g[-1][1] for p, g in table.gains.items() if ".lite_" in p}
    assert gains.pop("b0.conv2.weight.lite_up") > 0
    assert gains == {f"b0.conv2.weight.lite_{what}": 0 for what in ("down", "bias")}


@pytest.mark.parametrize("method", ["gradient", "fisher", "magnitude"])
def test_scores_stand_with_the_last_weight(method: Any) -> None:
    graph, bare = modular(nets.resnet()), nets.resnet()
    rng = np.random.default_rng(3)
    x, y = floats(rng, 12, 2, 6, 6), rng.integers(0, 3, 12).astype(np.int32)
    x += y[:, None, None, None]
    params = [c.param for c in candidates(graph) if c == Candidate(c.param)]
    found = measure_gradients(graph, TrainingSpec(), params, {"x": x}, {"y": y}).gains(method)
    own = [p for p in params if "lite" not in p]
    alone = measure_gradients(bare, TrainingSpec(), own, {"x": x}, {"y": y}).gains(method)
    for p in own:
        assert np.allclose(found[p], alone[p], rtol=1e-6)
    for a in modules(graph):
        assert found[a.down] == found[a.bias] == ((1.0, 0.0),)
        assert found[a.up][0][1] > 0


# ---- the command line ----------------------------------------------------------------------------


def opset_of(path: Path, opset: int) -> Path:
    """The same file of another opset and, before 10, of an old format; the batch is open."""
    proto = onnx.load(path)
    proto.opset_import[0].version = opset
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    if opset < 10:
        proto.ir_version = 3
        for t in proto.graph.initializer:
            info = onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
            proto.graph.input.append(info)
    onnx.save(proto, path)
    return path


def filled(file: Path) -> tuple[Runtime, dict[str, Array]]:
    """A plan that has learned other numbers, and these."""
    plan = load_plan(file)
    trained, rng = Runtime(plan, rebuild(plan, file)), np.random.default_rng(6)
    first = trained.params()
    names = [u.candidate.param for u in trained.training.updates]
    values = {n: 0.3 * floats(rng, *first[n].shape) for n in names}
    trained.set_params(values)
    return trained, values


@pytest.mark.parametrize(
    ("net", "opset"), [*((n, 17) for n in BLOCKS), ("plain", 8), ("resnet", 11)]
)
def test_modules_that_have_learned_are_part_of_the_exported_file(
    odt: Cli, tmp_path: Path, net: str, opset: int
) -> None:
    path = opset_of(export(NETS[net](), tmp_path), opset)
    options = ("--lite-residual", "3:4", "--train", "lite,bias,last", "-q", "-o", "out")
    assert odt(path, *LIMITS, *options).code == 0
    plan = load_plan(PLAN)
    assert plan.model.lite_residual == Lite(3, 4)
    assert odt("verify", PLAN).code == 0
    trained = Runtime(plan, rebuild(plan, PLAN))
    rng, (x,) = np.random.default_rng(6), trained.training.samples
    data = {"x": floats(rng, 20, *x.type.shape[1:]), "y": rng.integers(0, 3, 20).astype(np.int32)}
    np.savez("d.npz", **data)
    ran = odt("run", PLAN, "--data", "d.npz", "--steps", "60", "--lr", "0.05", "--save", "w.npz")
    assert ran.code == 0, ran.err
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx", "--json")
    assert done.code == 0, done.err
    written = onnx.load("tuned.onnx")
    if written.ir_version < 4:
        tensors = {t.name for t in written.graph.initializer}
        assert tensors <= {v.name for v in written.graph.input}
    values = dict(np.load("w.npz"))
    of_module = {n for n in values if ".lite_" in n}
    assert {*done.json["changed"]} == {*values} - of_module
    assert of_module <= {*done.json["added"]}
    trained.set_params(values)
    without = trained.params() | {n: np.zeros_like(values[n]) for n in values if "lite_up" in n}
    for seed in range(3):
        given = random_samples(trained.training, np.random.default_rng(seed))
        got = runtime(Path("tuned.onnx"), given)[0]
        assert_close(got, trained.infer(given), 1e-5)
    trained.set_params({n: a for n, a in without.items() if n in values})
    assert np.abs(got - trained.infer(given)).max() > 1e-3 * np.abs(got).max()


def test_an_exported_file_is_valid_and_trains_by_names(odt: Cli, tmp_path: Path) -> None:
    path = export(nets.bottlenecks(), tmp_path)
    options = ("--lite-residual", "3", "--train", "lite", "-q", "-o", "out")
    assert odt(path, *LIMITS, *options).code == 0
    trained, values = filled(PLAN)
    np.savez("w.npz", **values)
    assert odt("export", PLAN, "w.npz", "-o", "tuned.onnx").code == 0
    proto = onnx.load("tuned.onnx")
    proto.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 1
    proto.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 3
    onnx.checker.check_model(proto, full_check=True)
    assert {t.name for t in proto.graph.initializer} >= values.keys()
    graph = import_model(Path("tuned.onnx"))
    for name, data in values.items():
        assert np.array_equal(graph.constants[name], data)
    names = ",".join(values)
    assert odt("tuned.onnx", *LIMITS, "--train", names, "-q", "-o", "again").code == 0
    again = Path("again") / "plan.json"
    (x,) = trained.training.samples
    given = {x.name: sample(graph)["x"]}
    other = Runtime(load_plan(again), rebuild(load_plan(again), again))
    assert_close(other.infer(given), trained.infer(given), 1e-6)


@pytest.mark.parametrize("last", ["b0.add", "b0.relu2"])
def test_a_block_inside_a_function(odt: Cli, tmp_path: Path, last: str) -> None:
    """A module stands beside the call, where both of its ends are; else it has no place."""
    proto = onnx.load(export(nets.resnet(blocks=1), tmp_path))
    nodes = [*proto.graph.node]
    end = [n.name for n in nodes].index(last) + 1
    operands = ["stem.relu", *(f"b0.conv{i}.{what}" for i in (1, 2) for what in ("weight", "bias"))]
    opsets = [onnx.helper.make_opsetid("", 17)]
    proto.functions.append(
        onnx.helper.make_function("own", "Block", operands, [last], nodes[2:end], opsets)
    )
    proto.opset_import.append(onnx.helper.make_opsetid("own", 1))
    call = onnx.helper.make_node("Block", operands, ["sum"], "block", domain="own")
    nodes[end].input[0] = "sum"
    del proto.graph.node[2:]
    proto.graph.node.extend([call, *nodes[end:]])
    options = ("--lite-residual", "3", "--train", "lite", "-q", "-o", "out")
    assert odt(save(proto, tmp_path), *LIMITS, *options).code == 0
    trained, values = filled(PLAN)
    np.savez("w.npz", **values)
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx")
    if last == "b0.relu2":
        assert done.code == 4
        assert "lite_up can't be written: the file has no value" in done.error
        return
    assert done.code == 0, done.err
    given = random_samples(trained.training, np.random.default_rng(0))
    assert_close(runtime(Path("tuned.onnx"), given)[0], trained.infer(given), 1e-5)


def test_a_fresh_head_and_modules(odt: Cli, tmp_path: Path) -> None:
    path = export(nets.resnet(), tmp_path)
    options = ("--lite-residual", "3", "--head", "5", "--train", "lite,last", "-q", "-o", "out")
    assert odt(path, *LIMITS, *options).code == 0
    trained, values = filled(PLAN)
    np.savez("w.npz", **values)
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx", "--json")
    assert done.code == 0, done.err
    given = random_samples(trained.training, np.random.default_rng(0))
    assert_close(runtime(Path("tuned.onnx"), given)[0], trained.infer(given), 1e-5)


def test_a_weight_in_half_floats_beside_a_module(odt: Cli, tmp_path: Path) -> None:
    proto = onnx.load(export(nets.resnet(blocks=1), tmp_path))
    (weight,) = (t for t in proto.graph.initializer if t.name == "b0.conv2.weight")
    half = onnx.numpy_helper.to_array(weight).astype(np.float16)
    weight.CopyFrom(onnx.numpy_helper.from_array(half, "half"))
    proto.graph.node.insert(0, node("Cast", "half", "b0.conv2.weight", "cast", to=1))
    path = save(proto, tmp_path)
    params = [n for n in import_model(path).constants if n.endswith("weight")]
    (beside,) = (n for n in params if n not in ("stem.weight", "b0.conv1.weight", "fc.weight"))
    options = ("--lite-residual", "3", "--train", f"lite,{beside}", "-q", "-o", "out")
    assert odt(path, *LIMITS, *options).code == 0
    trained, values = filled(PLAN)
    np.savez("w.npz", **values)
    done = odt("export", PLAN, "w.npz", "-o", "tuned.onnx", "--json")
    assert done.code == 0, done.err
    assert done.json["rounded"]
    given = random_samples(trained.training, np.random.default_rng(0))
    assert_close(runtime(Path("tuned.onnx"), given)[0], trained.infer(given), 1e-2)


def test_window_and_seed_are_part_of_the_plan(odt: Cli, tmp_path: Path) -> None:
    path = export(nets.resnet(), tmp_path)
    ran = odt(path, *LIMITS, "--lite-residual", "3", "--train", "lite", "-o", "out")
    assert ran.code == 0
    assert "lite residual modules of 3x3 offered" in ran.out
    assert "modules are offered beside stem.relu .. b0.add, b0.relu2 .. b1.add" in ran.out
    text = PLAN.read_text()
    assert '"lite_residual": {\n      "kernel": 3,' in text
    PLAN.write_text(text.replace('"kernel": 3,', '"kernel": 5,'))
    assert odt("verify", PLAN).code != 0
    PLAN.write_text(text.replace('"kernel": 3,', '"kernel": 4,'))
    assert odt("verify", PLAN).error.endswith("the window must be odd and from 1 to 31, not 4")


def test_explaining_a_module_is_about_all_of_it(odt: Cli, tmp_path: Path) -> None:
    path = export(nets.resnet(), tmp_path)
    options = ("--lite-residual", "3", "--train", "lite", "-q", "-o", "out")
    assert odt(path, *LIMITS, *options).code == 0
    (told,) = odt("explain", PLAN, "b1.conv2.weight.lite_up", "--json").json
    assert told["chosen"] == "100.0% updated"
    (other,) = told["others"]
    assert other["status"] == "planned"
    parts = [f"b1.conv2.weight.lite_{x}" for x in ("down", "bias", "up")]
    assert {f"{p} 100.0% -> frozen" for p in parts} <= set(other["less"])
    every = [u for u in load_plan(PLAN).decisions.updates if u.param in parts]
    assert other["score_change"] == pytest.approx(-sum(u.importance for u in every))


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0", "the window must be odd and from 1 to 31, not 0"),
        ("4", "the window must be odd and from 1 to 31, not 4"),
        ("33", "the window must be odd and from 1 to 31, not 33"),
        ("-3", "the window must be odd and from 1 to 31, not -3"),
        ("3:-1", "the seed must be from 0 to 2147483647, not -1"),
        ("x", "'x' is not K[:SEED], as 3 or 5:1"),
        ("", "'' is not K[:SEED], as 3 or 5:1"),
        ("3:", "'3:' is not K[:SEED], as 3 or 5:1"),
        ("3:1:2", "'3:1:2' is not K[:SEED], as 3 or 5:1"),
    ],
)
def test_windows_that_are_none(odt: Cli, tmp_path: Path, text: str, told: str) -> None:
    ran = odt(export(nets.resnet(), tmp_path), *LIMITS, f"--lite-residual={text}")
    assert ran.code == 2
    assert ran.error.endswith(told)


def test_numbers_of_a_module() -> None:
    assert parse_lite("3") == Lite(3, 0)
    assert parse_lite("5:7") == Lite(5, 7)
    with pytest.raises(UsageError, match="--lora and --lite-residual do not go together"):
        ImportOptions(lora=Lora(1, 1.0), lite_residual=Lite(3))


@pytest.mark.parametrize("net", ["mlp", "transformer", "one layer", "1x1", "one pixel"])
def test_a_model_without_a_block(odt: Cli, tmp_path: Path, net: str) -> None:
    rng, g = np.random.default_rng(0), Graph(net)
    if net in ("mlp", "transformer"):
        g = {"mlp": nets.mlp, "transformer": nets.transformer}[net]()
        with pytest.raises(UnsupportedModelError, match="the model has none"):
            modular(g)
        return
    x = g.add_input("x", TensorType((1, 2, 4, 4)))
    x = nets.conv(g, rng, x, "stem", 4, stride=1 if net == "1x1" else 2)
    x = nets.relu(g, x, "stem.relu")
    if net == "1x1":
        x = nets.relu(g, nets.conv(g, rng, x, "narrow", 4, kernel=1), "narrow.relu")
    if net == "one pixel":
        x = nets.conv(g, rng, nets.pool(g, "MaxPool", x, "pool"), "wide", 4)
    g.outputs = [nets.dense(g, rng, nets.flat(g, x), "fc", 3)]
    ran = odt(export(g, tmp_path), *LIMITS, "--lite-residual", "3")
    assert ran.code == 4
    assert ran.error.endswith("wider than 1x1; the model has none")


def test_layers_with_scales(odt: Cli, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    np.savez("c.npz", x=floats(rng, 8, 2, 6, 6))
    path = export(nets.resnet(), tmp_path)
    ran = odt(path, *LIMITS, "--lite-residual", "3", "--calib", "c.npz")
    assert ran.code == 2
    assert "modules are for float models: give --precision" in ran.error
    pinned = ("--calib", "c.npz", "--precision", "*=f32", "--train", "lite", "-q", "-o", "out")
    assert odt(path, "--ram", "64KB", "--flash", "1MB", "--lite-residual", "3", *pinned).code == 0
    assert odt("verify", PLAN).code == 0


def test_a_quantized_file(odt: Cli, tmp_path: Path) -> None:
    numbers = {"w": np.ones((4, 2, 3, 3), np.int8), "s": np.array(0.1, np.float32)}
    numbers |= {"z": np.array(0, np.int8)}
    nodes = [
        node("DequantizeLinear", "w s z", "e", "e"),
        node("Conv", "x e", "y", "conv"),
    ]
    path = save(model(nodes, {"x": [1, 2, 6, 6]}, ["y"], numbers), tmp_path)
    ran = odt(path, *LIMITS, "--lite-residual", "3")
    assert ran.code == 4
    assert "--lite-residual is for float models" in ran.error

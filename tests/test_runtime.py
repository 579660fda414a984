"""The NumPy back end trains to the very bits of unconstrained training in the planned bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plans
import pytest
from numpy.typing import NDArray
from oracle import Unconstrained, batch
from test_c_backend import CASES
from zoo import RECIPES, Exhibit, exhibit

from odt_plan.backends.numpy import Runtime, load_data, save_learned, train
from odt_plan.backends.numpy.data import checked_samples
from odt_plan.backends.numpy.memory import Memory
from odt_plan.ir import opdef
from odt_plan.ir.errors import OdtPlanError, UsageError
from odt_plan.ir.interpreter import run
from odt_plan.ir.opdef import get_op
from odt_plan.ir.training import TrainingSpec
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request, make_plan
from odt_plan.planner.plan import Plan
from odt_plan.planner.rebuild import rebuild

Array = NDArray[Any]
DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits_cnn.onnx"


@pytest.mark.parametrize("name", RECIPES)
def test_trains_bit_for_bit_like_unconstrained_training(name: str) -> None:
    e = exhibit(name)
    runtime, oracle = Runtime(e.plan, e.training), Unconstrained(e.training)
    initial = runtime.state_bytes()
    assert initial == oracle.state_bytes(e.plan)
    rng = np.random.default_rng(1)
    for _ in range(3 * e.training.spec.micro_batches + 1):
        x, y = batch(e.training, rng)
        assert runtime.train_step(x, y, 0.02) == oracle.step(x, y, 0.02)
        assert runtime.state_bytes() == oracle.state_bytes(e.plan)
    assert runtime.state_bytes() != initial
    assert runtime.updates == 3 + (e.training.spec.micro_batches == 1)


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        ("st_har", TrainingSpec(optimizer="adam", micro_batches=2)),
        ("tinymaix_mnist_cnn", TrainingSpec()),
        ("cntk_mnist", TrainingSpec(optimizer="momentum")),
        ("mlperf_ad_autoencoder", TrainingSpec(loss="mse")),
    ],
)
def test_real_models_train_bit_for_bit(shared: Path, model: str, spec: TrainingSpec) -> None:
    request = Request(
        model=shared / "models" / f"{model}.onnx",
        device=load_device("stm32f746g-disco"),
        flash_bytes=4 << 20,
        spec=spec,
        with_baselines=False,
    )
    planned = make_plan(request)
    e = Exhibit(planned.training.graph, planned.training, planned.plan)
    runtime, oracle = Runtime(e.plan, e.training), Unconstrained(e.training)
    rng = np.random.default_rng(19)
    for _ in range(2 * spec.micro_batches):
        x, y = batch(e.training, rng)
        assert runtime.train_step(x, y, 1e-3) == oracle.step(x, y, 1e-3)
        assert runtime.state_bytes() == oracle.state_bytes(e.plan)
    assert runtime.arena_nbytes == planned.report.arena_bytes


@pytest.mark.parametrize("name", RECIPES)
def test_memory_is_exactly_what_the_plan_claims(name: str) -> None:
    e = exhibit(name)
    runtime, ram = Runtime(e.plan, e.training), e.plan.claims.ram_bytes
    assert runtime.arena_nbytes == ram.arena
    assert runtime.state_nbytes == len(runtime.state_bytes()) == ram.total - ram.arena


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", RECIPES)
def test_evaluation_is_inference_and_the_loss_of_a_step(name: str, exact: bool) -> None:
    e = exhibit(name)
    runtime, rng = Runtime(e.plan, e.training, exact=exact), np.random.default_rng(3)
    for _ in range(e.training.spec.micro_batches):
        x, y = batch(e.training, rng)
        before = runtime.snapshot()
        predicted, loss = runtime.evaluate(x, y)
        assert runtime.snapshot() == before
        assert np.array_equal(predicted[e.training.prediction.name], runtime.infer(x))
        assert loss == runtime.train_step(x, y, 0.02)


# ---- PyTorch


def torch_model(e: Exhibit) -> tuple[Any, dict[str, Any]]:
    """The forward graph in PyTorch: a function of the sample, and its parameters by name."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    params = {
        name: torch.tensor(data, requires_grad=True) for name, data in e.forward.constants.items()
    }

    def forward(x: Any) -> Any:
        env = {e.forward.inputs[0].name: x, **params}
        for n in e.forward.nodes:
            a = [env[v.name] for v in n.operands()]
            ops: dict[str, Callable[[], Any]] = {
                "Conv": lambda a=a, n=n: f.conv2d(
                    *a, stride=n.attrs["strides"], padding=n.ints_attr("pads")[:2]
                ),
                "Gemm": lambda a=a: f.linear(*a),
                "Relu": lambda a=a: f.relu(a[0]),
                "Reshape": lambda a=a, n=n: a[0].reshape(n.attrs["shape"]),
                "Add": lambda a=a: a[0] + a[1],
                "GlobalAveragePool": lambda a=a: a[0].mean((2, 3), keepdim=True),
            }
            env[n.out.name] = ops[n.op]()
        return env[e.forward.outputs[0].name]

    return forward, params


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", RECIPES)
def test_trains_like_pytorch(name: str, exact: bool) -> None:
    torch = pytest.importorskip("torch")
    e = exhibit(name)
    spec, lr = e.training.spec, 0.02
    forward, params = torch_model(e)
    chosen = {u.candidate.param: u for u in e.training.updates}
    trained = [params[name] for name in chosen]
    optimizer = {
        "sgd": lambda: torch.optim.SGD(trained, lr=lr),
        "momentum": lambda: torch.optim.SGD(trained, lr=lr, momentum=spec.momentum),
        "adagrad": lambda: torch.optim.Adagrad(trained, lr=lr, eps=spec.epsilon),
        "adam": lambda: torch.optim.Adam(
            trained, lr=lr, betas=(spec.beta1, spec.beta2), eps=spec.epsilon
        ),
    }[spec.optimizer]()
    runtime = Runtime(e.plan, e.training, exact=exact)
    rng = np.random.default_rng(2)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(spec.micro_batches):
            x, y = batch(e.training, rng)
            out = forward(torch.tensor(x))
            target = torch.tensor(y if spec.loss == "mse" else y.astype(np.int64))
            f = torch.nn.functional
            criterion = f.mse_loss if spec.loss == "mse" else f.cross_entropy
            loss = criterion(out, target)
            (loss / spec.micro_batches).backward()
            assert runtime.train_step(x, y, lr) == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
        for param, u in chosen.items():
            k = u.candidate.channels
            if k is not None:  # the leading input channels only
                params[param].grad[:, k:] = 0
        optimizer.step()
    learned = runtime.params()
    assert set(learned) == set(params)
    for param, tensor in params.items():
        np.testing.assert_allclose(
            learned[param], tensor.detach().numpy(), rtol=1e-5, atol=1e-5, err_msg=param
        )
        changed = not np.array_equal(learned[param], e.forward.constants[param])
        assert changed == (param in chosen), param


# ---- inference


@pytest.mark.parametrize("name", RECIPES)
def test_inference_runs_only_what_the_prediction_needs(name: str) -> None:
    e = exhibit(name)
    runtime = Runtime(e.plan, e.training)
    x, y = batch(e.training, np.random.default_rng(3))
    before = runtime.state_bytes()
    expected = run(e.forward, {e.forward.inputs[0].name: x})[e.forward.outputs[0].name]
    assert runtime.infer(x).tobytes() == expected.tobytes()
    assert runtime.state_bytes() == before
    assert (runtime.updates, runtime.micro_steps) == (0, 0)
    nodes = {n for i in runtime.inference_steps for n in e.plan.steps[i].nodes}
    assert nodes == {n.name for n in e.forward.nodes}
    for _ in range(e.training.spec.micro_batches):
        runtime.train_step(x, y, 0.05)
    assert runtime.infer(x).tobytes() != expected.tobytes()


# ---- poison


def test_dead_bytes_are_poisoned() -> None:
    e = exhibit("recompute")
    memory = Memory(e.plan)
    (arena,) = memory.arena
    arena[:] = 0
    for index in range(len(e.plan.steps)):
        memory.retire(index)
        live = np.zeros(arena.size, bool)
        for b in e.plan.buffers:
            if b.space == "arena" and b.first <= index < b.last:
                live[b.offset : b.offset + -(-b.bytes // 4) * 4] = True
        assert not arena[live].any(), "live bytes are left alone"
        arena[~live] = 0
        for b in e.plan.buffers:
            if b.space == "arena" and b.last == index:
                arena[b.offset : b.offset + b.bytes] = 1
        arena[live] = 0
        dying = arena == 1
        memory.retire(index)
        assert (arena[dying] == 0xFF).all()
        arena[:] = 0


def test_a_stale_read_shows_as_nan() -> None:
    """A tensor that dies before its last reader: the checker would refuse, the poison shows it."""
    e = exhibit("mlp-sgd")
    d = e.plan.model_dump(mode="json")
    kept = next(b for b in d["buffers"] if b["value"] == "relu0")
    kept["last"] = next(i for i, s in enumerate(d["steps"]) if s["nodes"] == ["fc1"])
    runtime = Runtime(Plan.model_validate(d), e.training)
    x, y = batch(e.training, np.random.default_rng(4))
    assert np.isfinite(runtime.train_step(x, y, 0.1))
    assert any(np.isnan(p).any() for p in runtime.params().values())


def test_nothing_survives_in_the_arena() -> None:
    e = exhibit("cnn-momentum")
    one, two = Runtime(e.plan, e.training), Runtime(e.plan, e.training)
    rng = np.random.default_rng(5)
    x, y = batch(e.training, rng)
    two.infer(batch(e.training, rng)[0])
    assert one.train_step(x, y, 0.1) == two.train_step(x, y, 0.1)
    assert one.state_bytes() == two.state_bytes()


# ---- parameters and state


@pytest.mark.parametrize("name", ["partial-accumulate", "paged-accumulate"])
def test_state_can_be_saved_and_continued(name: str) -> None:
    e = exhibit(name)
    rng = np.random.default_rng(6)
    micro = e.training.spec.micro_batches
    data = [batch(e.training, rng) for _ in range(4 * micro)]
    whole, first = Runtime(e.plan, e.training), Runtime(e.plan, e.training)
    for x, y in data:
        whole.train_step(x, y, 0.01)
    for x, y in data[: 2 * micro]:
        first.train_step(x, y, 0.01)
    second = Runtime(e.plan, e.training)
    second.load_state(first.state_bytes(), updates=first.updates)
    for x, y in data[2 * micro :]:
        second.train_step(x, y, 0.01)
    assert second.state_bytes() == whole.state_bytes()
    with pytest.raises(UsageError, match="the state has 3 B, the plan has"):
        second.load_state(b"abc")


def test_going_back_to_an_older_state_takes_its_bias_correction() -> None:
    e = exhibit("resnet-adam-accumulate")
    rng = np.random.default_rng(17)
    data = [batch(e.training, rng) for _ in range(9)]
    runtime, losses = Runtime(e.plan, e.training), []
    for x, y in data[:3]:
        runtime.train_step(x, y, 0.01)
    saved = runtime.state_bytes()
    for _ in range(2):
        runtime.load_state(saved, updates=1)
        losses.append([runtime.train_step(x, y, 0.01) for x, y in data[3:]])
    assert losses[0] == losses[1]
    assert runtime.updates == 3


def test_a_kernel_that_breaks_its_type_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    relu = get_op("Relu")
    broken = replace(relu, kernel=lambda n, a: [k.astype(np.float64) for k in relu.kernel(n, a)])
    monkeypatch.setitem(opdef.OPS, "Relu", broken)
    e = exhibit("mlp-sgd")
    x, _ = batch(e.training, np.random.default_rng(18))
    with pytest.raises(TypeError, match=r"relu0: the kernel of Relu gave float64\(1, 16\)"):
        Runtime(e.plan, e.training).infer(x)


def test_parameters_can_be_loaded() -> None:
    e = exhibit("partial-momentum")
    runtime, other = Runtime(e.plan, e.training), Runtime(e.plan, e.training)
    x, y = batch(e.training, np.random.default_rng(7))
    runtime.train_step(x, y, 0.1)
    learned = runtime.params()
    assert {n: a.shape for n, a in learned.items()} == {
        n: a.shape for n, a in e.forward.constants.items()
    }
    other.set_params(learned)
    assert other.infer(x).tobytes() == runtime.infer(x).tobytes()
    weight = learned["conv1.weight"].copy()
    weight[:, 3] += 1  # channels 0 and 1 are updated
    with pytest.raises(UsageError, match=r"conv1.weight: the plan keeps part of it frozen"):
        other.set_params({"conv1.weight": weight})
    with pytest.raises(UsageError, match=r"conv0.bias: the plan keeps it frozen"):
        other.set_params({"conv0.bias": learned["conv0.bias"] + 1})
    with pytest.raises(UsageError, match="no parameter ghost"):
        other.set_params({"ghost": weight})
    with pytest.raises(UsageError, match=r"conv2.bias is float32\[2\], the plan needs f32\[4\]"):
        other.set_params({"conv2.bias": np.zeros(2, np.float32)})
    assert other.infer(x).tobytes() == runtime.infer(x).tobytes(), "a refused load changes nothing"


def test_the_model_is_not_modified() -> None:
    e = exhibit("cnn-momentum")
    before = {k: v.tobytes() for k, v in e.training.graph.constants.items()}
    runtime = Runtime(e.plan, e.training)
    x, y = batch(e.training, np.random.default_rng(8))
    runtime.train_step(x, y, 1.0)
    for a in runtime.params().values():
        a[...] = 0
    assert {k: v.tobytes() for k, v in e.training.graph.constants.items()} == before
    assert runtime.infer(x).any()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((1, 9)), [0], r"the sample is float64\[1, 9\], the plan needs f32\[1,8\]"),
        (np.array([["a"] * 8]), [0], "the sample is <U1"),
        (np.zeros((1, 8)), [4], "labels from 4 to 4, but the model has classes 0 to 3"),
        (np.zeros((1, 8)), [-1], "labels from -1 to -1"),
        (np.zeros((1, 8)), [0.5], "the target is float64"),
        (np.zeros((1, 8)), [2**40], "values that i32 can't hold"),
        (np.zeros((1, 8)), [0, 1], r"the target is int64\[2\]"),
    ],
)
def test_operands_that_do_not_fit(x: Array, y: Any, message: str) -> None:
    e = exhibit("mlp-sgd")
    with pytest.raises(UsageError, match=message):
        Runtime(e.plan, e.training).train_step(x, y, 0.1)


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf")])
def test_step_sizes_that_make_no_sense(lr: float) -> None:
    e = exhibit("mlp-sgd")
    with pytest.raises(UsageError, match="step size"):
        Runtime(e.plan, e.training).train_step(np.zeros((1, 8)), [0], lr)


# ---- the training loop


def blobs(count: int = 64, seed: int = 9) -> tuple[Array, Array]:
    """Four classes around four centres."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, count).astype(np.int64)
    centres = np.random.default_rng(10).standard_normal((4, 8)) * 2
    return centres[y] + 0.3 * rng.standard_normal((count, 8)), y


def test_training_learns() -> None:
    e = exhibit("mlp-sgd")
    runtime = Runtime(e.plan, e.training)
    x, y = blobs()
    seen: list[int] = []
    history = train(runtime, x, y, epochs=6, lr=0.05, seed=1, on_step=lambda k, _: seen.append(k))
    assert history.stopped is None
    assert seen == list(range(1, 6 * 64 + 1))
    assert np.mean(history.losses[-64:]) < 0.2 * np.mean(history.losses[:32])
    fresh_x, fresh_y = blobs(seed=11)
    right = [runtime.infer(a[None]).argmax() == b for a, b in zip(fresh_x, fresh_y, strict=True)]
    assert np.mean(right) > 0.9
    again = Runtime(e.plan, e.training)
    assert train(again, x, y, epochs=6, lr=0.05, seed=1) == history
    assert again.state_bytes() == runtime.state_bytes()


def test_micro_batches_make_one_update() -> None:
    e = exhibit("resnet-adam-accumulate")
    runtime = Runtime(e.plan, e.training)
    rng = np.random.default_rng(12)
    x, y = rng.standard_normal((7, 2, 6, 6)), rng.integers(0, 3, 7)
    history = train(runtime, x, y, epochs=2, batch=3, lr=0.01)
    assert len(history.losses) == runtime.updates == 5  # 14 samples in groups of 3
    with pytest.raises(UsageError, match=r"takes 3 samples \(batch 1 x 3 micro-batches\), not 4"):
        train(runtime, x, y, steps=1, batch=4, lr=0.01)


def test_stops_at_nan_and_keeps_the_last_good_state() -> None:
    e = exhibit("cnn-mse-batch")
    runtime = Runtime(e.plan, e.training)
    rng = np.random.default_rng(13)
    x, y = rng.standard_normal((8, 2, 6, 6)), rng.standard_normal((8, 3))
    states: list[bytes] = []
    history = train(
        runtime, x, y, steps=50, lr=3.0,
        on_step=lambda *_: states.append(runtime.state_bytes()),
    )  # fmt: skip
    assert history.stopped == "not_finite"
    assert 0 < len(history.losses) < 50
    assert runtime.state_bytes() == states[-1]
    assert all(np.isfinite(p).all() for p in runtime.params().values())
    assert f"the state after update {len(states)} is kept" in history.message


def test_an_interrupt_keeps_the_last_update() -> None:
    e = exhibit("paged-accumulate")
    runtime = Runtime(e.plan, e.training)
    rng = np.random.default_rng(14)
    x, y = rng.standard_normal((4, 2, 6, 6)), rng.integers(0, 3, 4)
    states: list[bytes] = []

    def stop(step: int, loss: float) -> None:
        states.append(runtime.state_bytes())
        if step == 3:
            raise KeyboardInterrupt

    history = train(runtime, x, y, steps=10, lr=0.01, on_step=stop)
    assert history.stopped == "interrupted"
    assert len(history.losses) == 3
    assert runtime.state_bytes() == states[-1]
    assert history.message == "interrupted: the state after update 3 is kept"
    assert runtime.micro_steps == 0


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((5, 7)), np.zeros(5, int), r"x is float64\[5, 7\], must be numbers \[count, 8\]"),
        (np.zeros((5, 8), complex), np.zeros(5, int), "x is complex128"),
        (np.zeros((0, 8)), np.zeros(0, int), "x has no samples"),
        (np.full((5, 8), np.nan), np.zeros(5, int), "sample 0 has a NaN"),
        (np.full((5, 8), 1e300), np.zeros(5, int), "sample 0 has a NaN or infinite"),
        (np.zeros((5, 8)), np.zeros(4, int), r"y has shape \[4\], but x has 5 samples"),
        (np.zeros((5, 8)), np.array(3), r"y has shape \[\]"),
        (np.zeros((5, 8)), np.zeros(5), r"y is float64\[5\], must be integer labels \[5\]"),
        (np.zeros((5, 8)), np.full(5, 4), "y has labels from 4 to 4"),
        (np.zeros((5, 8)), np.full(5, -2), "y has labels from -2"),
    ],
)
def test_data_that_does_not_fit(x: Array, y: Array, message: str) -> None:
    e = exhibit("mlp-sgd")
    with pytest.raises(UsageError, match=message):
        train(Runtime(e.plan, e.training), x, y, steps=1, lr=0.1)


def test_targets_that_do_not_fit() -> None:
    e = exhibit("cnn-mse-batch")
    runtime, x = Runtime(e.plan, e.training), np.zeros((4, 2, 6, 6))
    with pytest.raises(UsageError, match=r"y is float64\[4, 2\], must be numbers \[4, 3\]"):
        train(runtime, x, np.zeros((4, 2)), steps=1, lr=0.1)
    with pytest.raises(UsageError, match="y has a NaN or infinite value"):
        train(runtime, x, np.full((4, 3), np.inf), steps=1, lr=0.1)


@pytest.mark.parametrize("amount", [{}, {"steps": 1, "epochs": 1}, {"steps": 0}, {"epochs": -1}])
def test_an_amount_of_training_is_needed(amount: dict[str, int]) -> None:
    e = exhibit("mlp-sgd")
    x, y = blobs(4)
    with pytest.raises(UsageError, match="steps"):
        train(Runtime(e.plan, e.training), x, y, lr=0.1, **amount)


def test_learned_parameters_are_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    e = exhibit("partial-momentum")
    runtime = Runtime(e.plan, e.training)
    x, y = batch(e.training, np.random.default_rng(15))
    runtime.train_step(x, y, 0.1)
    path = tmp_path / "learned.npz"
    save_learned(runtime, path)
    with np.load(path) as data:
        assert set(data.files) == {"conv1.weight", "conv2.bias", "fc.weight"}
        for name in data.files:
            assert data[name].tobytes() == runtime.params()[name].tobytes()
            assert data[name].shape == e.forward.constants[name].shape
    with pytest.raises(OdtPlanError, match="can't write the learned parameters"):
        save_learned(runtime, tmp_path / "nowhere" / "learned.npz")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OdtPlanError, match="can't write"):
        save_learned(runtime, tmp_path / "taken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["learned.npz", "taken"]


def test_data_files(tmp_path: Path) -> None:
    x, y = blobs(6)
    np.savez(tmp_path / "good.npz", x=x, y=y)
    a, b = load_data(tmp_path / "good.npz")
    assert list(a) == ["x"]
    assert np.array_equal(a["x"], x)
    assert list(b) == ["y"]
    assert np.array_equal(b["y"], y)
    np.savez(tmp_path / "no_y.npz", x=x, labels=y)
    np.save(tmp_path / "single.npy", x)
    (tmp_path / "text.npz").write_text("x,y")
    (tmp_path / "empty.npz").write_bytes(b"")
    good = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(good[: len(good) // 2])
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object), y=y)
    for name, message in {
        "no_y.npz": "has no array y, only x, labels",
        "single.npy": "is one array",
        "text.npz": "can't be read as .npz",
        "empty.npz": "can't be read as .npz",
        "cut.npz": "can't be read as .npz",
        "objects.npz": "can't be read as .npz",
        "missing.npz": "can't be read as .npz",
    }.items():
        with pytest.raises(UsageError, match=message) as caught:
            load_data(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_the_planner_and_the_plain_builder_train_alike() -> None:
    """Recomputing and paging change where numbers are kept, never the numbers."""
    e = exhibit("paged")
    plain = plans.keep_all(e.training)
    one, two = Runtime(e.plan, e.training), Runtime(plain, e.training)
    assert one.arena_nbytes < 0.7 * two.arena_nbytes
    rng = np.random.default_rng(16)
    for _ in range(3):
        x, y = batch(e.training, rng)
        assert one.train_step(x, y, 0.05) == two.train_step(x, y, 0.05)
    assert {k: v.tobytes() for k, v in one.params().items()} == {
        k: v.tobytes() for k, v in two.params().items()
    }


def test_samples_of_an_int8_input() -> None:
    training = CASES["cnn-i8-input"]()[1]
    shape = (3, *training.sample.type.shape[1:])
    stored = (np.arange(np.prod(shape)).reshape(shape) % 256 - 128).astype(np.int8)
    (found,) = checked_samples(training, stored).values()
    assert np.array_equal(found, stored)
    with pytest.raises(UsageError, match="x is int64, the plan needs i8"):
        checked_samples(training, stored.astype(int))


def test_gradient_tiles_are_those_of_the_device() -> None:
    """Larger where the core's cache holds more; the plan counts them, and learns the same bits."""
    states = []
    for device, most in (("stm32f746g-disco", 512), ("raspberry-pi-4b", 16384)):
        request = Request(
            DIGITS,
            load_device(device),
            ram_bytes=1 << 20,
            flash_bytes=1 << 20,
            train=("all",),
            with_baselines=False,
        )
        done = make_plan(request)
        tiles = {b.value: b.bytes for b in done.plan.buffers if b.value.startswith("tile:")}
        for u in (u for u in done.training.updates if u.grad_node is not None):
            whole = u.grad.type.nbytes
            row = whole // u.grad.type.shape[0]
            assert tiles[f"tile:{u.grad_node.name}"] == min(whole, max(most // row, 1) * row)
        again = rebuild(Plan.model_validate_json(done.plan.model_dump_json()), DIGITS, DIGITS)
        runtime = Runtime(done.plan, again)
        for x, y in (batch(again, np.random.default_rng(i)) for i in range(2)):
            runtime.train_step(x, y, 0.1)
        states.append({n: a.tobytes() for n, a in runtime.params().items()})
    assert states[0] == states[1]

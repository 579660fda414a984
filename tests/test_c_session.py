"""The training session of the emitted C: equal to NumPy's bit for bit, and what it refuses."""

from __future__ import annotations

import ctypes
import json
import struct
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import nets
import numpy as np
import plans
import pytest
import test_autodiff
import test_file_loss
import test_int8_training
import test_optimizer_state
import test_replay
import test_several_outputs
from board import lane
from board.objects import link
from c_cases import KERNELS
from test_c_backend import CASES, needs_gcc, planned
from test_optimizer_state import BOARD
from test_session import samples
from zoo import exhibit

from odt_plan.backends.c import clips, decays, emit_c, session_file
from odt_plan.backends.c.golden import random_samples
from odt_plan.backends.c.saved import load_saved
from odt_plan.backends.numpy import (
    DataSet,
    History,
    Runtime,
    SessionOptions,
    clipped_by,
    data_set,
    reconstruction_set,
    train_session,
)
from odt_plan.backends.numpy.metrics import evaluate
from odt_plan.backends.numpy.schedule import Schedule
from odt_plan.ir.errors import GraphError, UsageError
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.targets import random_target, target_names
from odt_plan.ir.training import TrainingGraph, TrainingSpec
from odt_plan.planner.plan import Plan

Planned = tuple[Plan, TrainingGraph]
REGULARIZED = ["-DODTPLAN_WEIGHT_DECAY=1", "-DODTPLAN_CLIP=1"]


def batches(training: TrainingGraph, count: int, seed: int) -> DataSet:
    """Random samples with random targets, of any inputs and outputs."""
    rng, size = np.random.default_rng(seed), training.sample.type.shape[0]
    some = [random_samples(training, rng) for _ in range(-(-count // size))]
    wanted = [
        [random_target(training.graph, t, rng) for t in training.targets] for _ in some
    ]
    x = {n: np.concatenate([s[n] for s in some])[:count] for n in some[0]}
    y = {
        n: np.concatenate([w[i] for w in wanted])[:count]
        for i, n in enumerate(target_names(training))
    }
    return data_set(training, x, y)


@dataclass(frozen=True)
class Host:
    """A host program, built once."""

    plan: Plan
    training: TrainingGraph
    program: Path

    def run(self, content: bytes, folder: Path) -> tuple[int, list[dict[str, Any]], Runtime]:
        """Exit code, what it told, and a runtime with what it learned."""
        source, learned = folder / "session.bin", folder / "learned.bin"
        source.write_bytes(content)
        learned.unlink(missing_ok=True)
        done = subprocess.run([self.program, source, learned], capture_output=True, text=True)
        runtime = Runtime(self.plan, self.training)
        if done.returncode == 0:
            load_saved(runtime, learned)
        else:
            assert "error: status" in done.stderr, done.stderr
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], runtime


def build(case: Planned, folder: Path) -> Host:
    files = emit_c(*case, folder, host=True)
    sources = [f for f in files if f.suffix == ".c" and not f.stem.endswith("_selftest")]
    command = ["gcc", *lane.STRICT, *lane.CHECKED, *REGULARIZED]
    target = folder / "host"
    folders = [f"-I{folder}", f"-I{lane.FIRMWARE}"]
    link(command, [*sources, lane.FIRMWARE / "host.c"], folders, target)
    return Host(*case, target)


def compare(
    host: Host,
    data: DataSet,
    options: SessionOptions,
    validation: DataSet | None,
    folder: Path,
) -> History:
    """The same session by NumPy and by C: what it tells and what it leaves."""
    runtime = Runtime(host.plan, host.training)
    history = train_session(runtime, data, options, validation=validation)
    content = session_file(host.plan, host.training, data, options, validation)
    code, told, learned = host.run(content, folder)
    assert code == 0
    check_told(history, told, runtime, learned)
    return history


def check_told(
    history: History, told: list[dict[str, Any]], runtime: Runtime, learned: Runtime
) -> None:
    losses: list[float] = []
    back = False
    for line in told:
        if "update" in line:
            if back:
                del losses[line["update"] - 1 :]
            losses.append(line["loss"])
            assert line["update"] == len(losses)
        back = "halved" in line
    if history.losses:  # else the last way back led to the start, which no update tells
        assert losses == list(history.losses)
    epochs = [line for line in told if "epoch" in line]
    for line, e in zip(epochs, history.epochs, strict=True):
        assert (line["epoch"], line["updates"]) == (e.number, e.updates)
        if e.number:
            assert line["loss"] == pytest.approx(e.loss, rel=1e-13)
            assert line["lr"] == pytest.approx(e.lr, rel=1e-13)
        if (found := e.validation) is not None:
            assert line["metric"] == found.metric
            for key, value in (("value", found.value), ("validation_loss", found.loss)):
                same = pytest.approx(value, rel=1e-13) if np.isfinite(value) else None
                assert line[key] == same
    end = told[-1]
    assert end["ended"]
    assert end["stopped"] == history.stopped
    assert end["kept"] == history.kept
    assert end["halvings"] == history.halvings
    assert end.get("replayed", 0) == history.replayed
    assert learned.state_bytes() == runtime.state_bytes()
    assert learned.updates == runtime.updates


# ---- the same as NumPy


MADE: dict[str, Callable[[], Planned]] = {
    **{n: CASES[n] for n in (
        "mlp-mse", "mlp-bce", "mlp-triplet", "mlp-adagrad", "resnet-adam",
        "cnn-momentum-batch2", "batch-normalized-micro", "cnn-micro", "cnn-paged", "cnn-overlapped",
        "resnet-overlapped-micro", "cnn-i8-input", "resnet-i8-middle", "functions-i8",
        "resnet-modules",
    )},
    **{f"replay {n}": c for n, c in test_replay.CASES.items()},
}  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Host]:
    """Host programs by the name of their exhibit."""

    @cache
    def made(name: str) -> Host:
        e = exhibit(name)
        return build((e.plan, e.training), tmp_path_factory.mktemp(name))

    return made


@needs_gcc
@pytest.mark.parametrize("case", MADE)
def test_equals_numpy_bit_for_bit(case: str, tmp_path: Path) -> None:
    host = build(MADE[case](), tmp_path)
    data, validation = batches(host.training, 13, 0), batches(host.training, 9, 1)
    o = SessionOptions(lr=0.03, epochs=4, schedule="cosine", warmup=3, seed=5, halvings=2)
    history = compare(host, data, o, validation, tmp_path)
    assert len(history.losses) > 4 * 13 // 6
    assert (history.replayed > 0) == case.startswith("replay")
    online = replace(o, epochs=None, online=True, schedule="linear", warmup=1)
    compare(host, data, online, None, tmp_path)


DECAYED: dict[str, Callable[[], Planned]] = {
    **{n: CASES[n] for n in (
        "mlp-adagrad", "cnn-momentum-batch2", "cnn-micro", "cnn-partly", "resnet-large-tiles",
    )},
    "tied": lambda: planned(test_autodiff.tied_net()),
    **{f"i8 {n}": test_int8_training.CASES[n] for n in ("sgd", "momentum-accumulate", "paged")},
}  # fmt: skip


@needs_gcc
@pytest.mark.parametrize("case", DECAYED)
def test_weights_decay_bit_for_bit(case: str, tmp_path: Path) -> None:
    """Floats and integers, streamed, accumulated and whole gradients, of every optimizer."""
    plan, training = DECAYED[case]()
    o = SessionOptions(lr=0.03, epochs=2, seed=5, weight_decay=2.0)
    data, validation = batches(training, 13, 0), batches(training, 9, 1)
    host = build((plan, training), tmp_path)
    decayed = compare(host, data, o, validation, tmp_path)
    free = compare(host, data, replace(o, weight_decay=0.0), validation, tmp_path)
    assert decayed.losses != free.losses


CLIPPED: dict[str, Callable[[], Planned]] = {
    "cnn-micro": CASES["cnn-micro"],
    "i8": test_int8_training.CASES["momentum-accumulate"],
    "own norms": CASES["resnet-overlapped-micro"],
    "statistics": lambda: planned(nets.batch_normalized(batch=2), TrainingSpec(micro_batches=2)),
}


@needs_gcc
@pytest.mark.parametrize("case", CLIPPED)
def test_gradients_are_clipped_bit_for_bit(case: str, tmp_path: Path) -> None:
    """By a common norm or by their own, decay behind it; also norms too small to be clipped."""
    plan, training = CLIPPED[case]()
    assert clips(plan, training)
    assert clipped_by(plan, training) == ("tensor" if case == "own norms" else "global")
    o = SessionOptions(lr=0.03, epochs=2, seed=5, weight_decay=0.5, clip=0.3)
    data, validation = batches(training, 13, 0), batches(training, 9, 1)
    host = build((plan, training), tmp_path)
    told = [
        compare(host, data, replace(o, clip=clip), validation, tmp_path).losses
        for clip in (0.3, 1e-3, 1e9, None)
    ]
    assert told[2] == told[3]
    assert len({*told}) == 3


@needs_gcc
def test_clipping_that_c_can_not_do(tmp_path: Path) -> None:
    """Weights change while their gradients are made."""
    plan, training = CASES["mlp-adagrad"]()
    assert not clips(plan, training)
    host, data = build((plan, training), tmp_path), batches(training, 5, 0)
    content = session_file(plan, training, data, SessionOptions(lr=0.03, epochs=1))
    assert host.run(content, tmp_path)[0] == 0
    for clip in (0.1, -0.1, np.nan):
        wrong = signed(content, HEADER + 68, struct.pack("<d", clip))
        assert host.run(wrong, tmp_path)[0] == 1


@needs_gcc
def test_square_roots_are_rounded_right(tmp_path: Path) -> None:
    """As those of the host, in all sizes, squares among them."""
    target = tmp_path / "clip.so"
    command = ["gcc", *lane.STRICT, *lane.OPTIMISED, *REGULARIZED]
    link(command, [KERNELS / "odtplan_clipping.c"], ["-shared"], target)
    root = ctypes.CDLL(str(target)).odtplan_sqrt
    root.restype, root.argtypes = ctypes.c_double, [ctypes.c_double]
    rng = np.random.default_rng(0)
    some = rng.integers(0, 0x7FF << 52, 20_000, dtype=np.uint64).view(np.float64)
    subnormal = rng.integers(0, 1 << 52, 2000, dtype=np.uint64).view(np.float64)
    squares = rng.integers(0, 1 << 26, 2000).astype(np.float64) ** 2
    near = np.nextafter(squares, rng.choice([0.0, np.inf], 2000))
    for x in np.concatenate([some, subnormal, squares, near, [0.0, np.inf]]).tolist():
        assert root(x) == np.sqrt(x), x
    assert np.isnan(root(float("nan")))
    assert np.isnan(root(-1.0))


@needs_gcc
def test_decay_that_c_can_not_do(tmp_path: Path) -> None:
    """Of integers by Adam; of a gradient that is read after its update."""
    plan, training = test_int8_training.CASES["f32-classifier"]()
    data, o = batches(training, 5, 0), SessionOptions(lr=0.03, epochs=1)
    host = build((plan, training), tmp_path)
    content = session_file(plan, training, data, o)
    assert host.run(signed(content, HEADER + 60, struct.pack("<d", 0.1)), tmp_path)[0] == 1
    with pytest.raises(UsageError, match="stored in i8 and trained by Adam"):
        session_file(plan, training, data, replace(o, weight_decay=0.1))
    plan, training = DECAYED["tied"]()
    (step,) = (s for s in plan.steps if s.kind == "update" and s.nodes == ("w/update",))
    later = [
        b.model_copy(update={"last": len(plan.steps)}) if b.id == step.reads[1] else b
        for b in plan.buffers
    ]
    assert decays(plan, training)
    plan = plan.model_copy(update={"buffers": tuple(later)})
    with pytest.raises(UsageError, match="uses a weight's gradient elsewhere"):
        session_file(plan, training, batches(training, 5, 0), replace(o, weight_decay=0.1))


@needs_gcc
def test_the_best_epoch_is_kept_and_patience_ends_it(
    hosts: Callable[[str], Host], tmp_path: Path
) -> None:
    """A step size that first helps, then destroys."""
    host = hosts("mlp-sgd")
    data, validation = samples(host.training, 60), samples(host.training, 40, seed=1)
    o = SessionOptions(lr=0.3, epochs=8, seed=2)
    kept = compare(host, data, o, validation, tmp_path).kept
    assert kept is not None
    assert 0 < kept < 8
    patient = compare(host, data, replace(o, patience=2), validation, tmp_path)
    assert patient.stopped == "patience"
    assert len(patient.epochs) < 9
    by_loss = replace(o, metric="loss", patience=1, lr=0.2)
    assert compare(host, data, by_loss, validation, tmp_path).stopped == "patience"


@needs_gcc
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_worse_is_rolled_back(metric: Any, hosts: Callable[[str], Host], tmp_path: Path) -> None:
    host = hosts("mlp-sgd")
    data, validation = samples(host.training, 60), samples(host.training, 40, seed=1)
    truth = Runtime(host.plan, host.training).infer  # what is judged by is what the model says
    (x,) = validation.x.values()
    said = np.array([truth(a[None]).argmax() for a in x], np.int32)
    o = SessionOptions(lr=0.1, epochs=2, metric=metric)
    history = compare(host, data, o, replace(validation, y={"y": said}), tmp_path)
    assert history.rolled_back


@needs_gcc
@pytest.mark.parametrize("name", ["cnn-mse-batch", "resnet-adam-accumulate", "paged-accumulate"])
@pytest.mark.parametrize("judged", [True, False])
@pytest.mark.parametrize(("lr", "halvings"), [(1e6, 20), (3e9, 2), (1e5, 0), (3e13, 1)])
def test_values_that_are_not_finite(
    name: str, judged: bool, lr: float, halvings: int, hosts: Callable[[str], Host], tmp_path: Path
) -> None:
    """One way back for each halving; then the last good state, if none was judged the best."""
    host = hosts(name)
    lr = lr * 1e25 if host.training.spec.optimizer == "adam" else lr
    validation = samples(host.training, 12, seed=1) if judged else None
    o = SessionOptions(lr=lr, epochs=3, halvings=halvings)
    history = compare(host, samples(host.training, 40), o, validation, tmp_path)
    assert history.stopped == "not_finite" or history.halvings > 0


@needs_gcc
@pytest.mark.parametrize("judged", [True, False])
@pytest.mark.parametrize("bad", [(0,), (8,), (29,), (8, 20), (8, 9, 20), (28, 29)])
def test_online_goes_on_with_the_next_sample(
    bad: tuple[int, ...], judged: bool, hosts: Callable[[str], Host], tmp_path: Path
) -> None:
    host = hosts("cnn-mse-batch")
    data = samples(host.training, 30)
    data.y["y"][list(bad)] = 3e20  # whose square is infinite
    validation = samples(host.training, 12, seed=1) if judged else None
    for halvings in (0, 1, 2):
        o = SessionOptions(lr=0.01, online=True, halvings=halvings, schedule="linear")
        history = compare(host, data, o, validation, tmp_path)
        assert history.halvings == min(halvings, len({b // 2 for b in bad}))


@needs_gcc
@pytest.mark.parametrize(("name", "lr"), [("cnn-mse-batch", 2.0), ("mlp-sgd", 1e3)])
def test_later_divergence_goes_back_to_the_start_of_its_epoch(
    name: str, lr: float, hosts: Callable[[str], Host], tmp_path: Path
) -> None:
    """A step size that rises: the first epoch is fine."""
    host = hosts(name)
    data, validation = samples(host.training, 24), samples(host.training, 9, seed=1)
    updates = 4 * 24 // host.plan.model.batch
    for halvings in (0, 1, 4):
        for held_out in (validation, None):
            o = SessionOptions(lr=lr, epochs=4, warmup=updates - 1, halvings=halvings)
            history = compare(host, data, o, held_out, tmp_path)
            assert history.halvings > 0 or history.stopped == "not_finite"
            assert history.epochs[-1].number >= 1
            assert len(history.losses) > updates // 4


@needs_gcc
def test_samples_may_come_again_and_micro_batches_not_be_full(
    hosts: Callable[[str], Host], tmp_path: Path
) -> None:
    """Draws with replacement; judging by a set whose last micro-batch is filled up."""
    host = build(CASES["cnn-momentum-batch2"](), tmp_path)
    data, validation = batches(host.training, 21, 0), batches(host.training, 7, 1)
    o = SessionOptions(lr=0.02, steps=25, balance=True, seed=3)
    history = compare(host, data, o, validation, tmp_path)
    assert history.before is not None
    runtime = Runtime(host.plan, host.training)
    whole = replace(validation, x={k: a[:6] for k, a in validation.x.items()},
                    y={k: a[:6] for k, a in validation.y.items()})  # fmt: skip
    six = evaluate(runtime, whole, "accuracy")
    assert history.before.loss == six.loss
    assert (history.before.value * 7 - six.value * 6) in (0.0, pytest.approx(1.0))


@needs_gcc
@pytest.mark.parametrize("case", ["weighted", "binary", "column"])
def test_losses_of_the_file(case: str, tmp_path: Path) -> None:
    """A label that counts nothing, labels in a column, a prediction that the loss is made of."""
    path = test_file_loss.CASES[case][0](tmp_path)
    forward = import_model(path, ImportOptions(batch=test_file_loss.BATCH))
    training = plans.training_of(forward, TrainingSpec(loss="output"))
    host = build((plans.keep_all(training), training), tmp_path)
    data, validation = batches(training, 17, 0), batches(training, 13, 1)
    compare(host, data, SessionOptions(lr=0.05, epochs=2), validation, tmp_path)
    if case == "weighted":
        only = replace(validation, y={"y": np.full(13, 1, np.int32)})  # accuracy of nothing
        o = SessionOptions(lr=0.05, epochs=1)
        assert np.isnan(train_session(Runtime(host.plan, training), data, o, validation=only)
                        .epochs[0].validation.value)  # fmt: skip
        code, told, _ = host.run(session_file(host.plan, training, data, o, only), tmp_path)
        assert code == 0
        assert told[0]["value"] is None


@needs_gcc
def test_several_outputs_are_judged_by_their_loss(tmp_path: Path) -> None:
    path = test_several_outputs.detector(tmp_path)
    forward = import_model(path, ImportOptions(batch=1))
    training = plans.training_of(forward, test_several_outputs.SUM)
    host = build((plans.keep_all(training), training), tmp_path)
    data, validation = batches(training, 11, 0), batches(training, 5, 1)
    compare(host, data, SessionOptions(lr=0.01, epochs=2), validation, tmp_path)
    o = SessionOptions(lr=0.01, epochs=2, metric="accuracy")
    with pytest.raises(UsageError, match="--metric accuracy: the emitted C judges this model by l"):
        session_file(host.plan, training, data, o, validation)


@needs_gcc
def test_autoencoders_are_judged_by_auc(tmp_path: Path) -> None:
    """Also with the same samples twice, which tie, and ways back and a checkpoint between."""
    training = plans.training_of(nets.mlp((8, 3, 8), batch=2), TrainingSpec(loss="mse"))
    host = build((plans.keep_all(training), training), tmp_path)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((60, 2)) @ rng.standard_normal((2, 8))
    mixed = np.concatenate([x[:15], rng.standard_normal((11, 8)), x[:4]])
    label = np.repeat([0, 1], [15, 15])
    data = reconstruction_set(training, x[20:])
    validation = reconstruction_set(training, mixed, label, suffix="_val")
    o = SessionOptions(lr=0.05, epochs=6, metric="auc")
    history = compare(host, data, o, validation, tmp_path)
    assert history.before is not None
    assert history.after is not None
    assert history.before.value != history.after.value
    for kind in (0, 1):
        content = session_file(host.plan, training, data, o, validation)
        assert host.run(signed(content, len(content) - 30, bytes([kind] * 30)), tmp_path)[0] == 1
    assert compare(host, data, replace(o, metric="loss"), validation, tmp_path).kept is not None
    compare(host, data, o, None, tmp_path)
    wrong = replace(o, lr=1e25, halvings=1)
    assert compare(host, data, wrong, validation, tmp_path).stopped == "not_finite"


@needs_gcc
@pytest.mark.parametrize("overlap", [True, False])
def test_optimizer_tensors_in_storage(overlap: bool, tmp_path: Path) -> None:
    """They are saved and come back with the state, and are looked at for values not finite."""
    device = BOARD if overlap else plans.without_dma(BOARD)
    asked = {"storage": "sdcard", "ram_bytes": 2000, "state": ("paged,sgd",)}
    done = test_optimizer_state.planned(tmp_path, nets.mlp((6, 8, 4)), device, **asked)
    assert any(u.paged for u in done.training.updates)
    host = build((done.plan, done.training), tmp_path / "c")
    data, validation = samples(host.training, 20), samples(host.training, 9, seed=1)
    compare(host, data, SessionOptions(lr=0.02, epochs=3), validation, tmp_path)
    for lr in (1e19, 1e37):
        o = SessionOptions(lr=lr, epochs=2, halvings=3)
        assert compare(host, data, o, validation, tmp_path).halvings > 0
    data.x["x"][:] *= np.float32(1e21)  # whose squared gradient is infinite, in storage alone
    o = SessionOptions(lr=0.02, epochs=2, halvings=1)
    history = compare(host, data, o, validation, tmp_path)
    assert (history.stopped, history.halvings) == ("not_finite", 1)


# ---- step sizes, sums of the library


class COptions(ctypes.Structure):
    _fields_ = [("lr", ctypes.c_double)] + [
        (n, ctypes.c_uint32)
        for n in ("epochs", "updates", "online", "samples", "judged", "schedule", "warmup",
                  "metric", "patience", "halvings")
    ]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("library")
    target = folder / "session.so"
    sources = [KERNELS / f"odtplan_{name}.c" for name in ("session", "runtime")]
    link(["gcc", *lane.STRICT, *lane.OPTIMISED], sources, ["-shared"], target)
    found = ctypes.CDLL(str(target))
    found.odtplan_rate.restype = ctypes.c_double
    return found


@needs_gcc
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_step_sizes_are_those_of_numpy(name: Any, library: ctypes.CDLL) -> None:
    """As fp32 all are; as double all but some of the cosine."""
    rng, number = np.random.default_rng(0), ("constant", "linear", "cosine").index(name)
    totals = [1, 2, 3, 7, 200, 9973, *rng.integers(2, 10**6, 20).tolist()]
    for total in totals:
        warmup = int(rng.integers(0, min(total, 50)))
        lr = float(10 ** rng.uniform(-5, 1))
        schedule = Schedule(name, lr, total, warmup)
        given = COptions(lr, schedule=number, warmup=warmup)
        some = rng.integers(0, total, 3000).tolist()
        for t in range(total) if total < 10**4 else {*range(60), *range(total - 60, total), *some}:
            found = library.odtplan_rate(ctypes.byref(given), total, t)
            wanted = schedule.rate(t)
            assert np.float32(found) == np.float32(wanted), (total, t)
            assert abs(found - wanted) <= (lr * 2.0**-52 if name == "cosine" else 0.0), (total, t)


@needs_gcc
def test_hits_are_those_of_argmax(library: ctypes.CDLL) -> None:
    """Of equal ones the first, a NaN before all others, and none where a label counts nothing."""
    rng = np.random.default_rng(0)
    for classes, inner in ((2, 1), (5, 1), (3, 4), (1, 2)):
        y = rng.integers(0, 3, (50, classes, inner)).astype(np.float32)
        y[rng.uniform(size=y.shape) < 0.1] = np.nan
        labels = rng.integers(0, classes, (50, inner)).astype(np.int32)
        score = CScore()
        pointers = y.ctypes.data_as(ctypes.c_void_p), labels.ctypes.data_as(ctypes.c_void_p)
        library.odtplan_score_classes(ctypes.byref(score), *pointers, 40, classes, inner, 1)
        counted = labels[:40] != 1
        assert score.count == counted.sum()
        assert score.sum == ((y.argmax(1) == labels)[:40] & counted).sum()


class CScore(ctypes.Structure):
    _fields_ = [("sum", ctypes.c_double), ("count", ctypes.c_uint32)]


@needs_gcc
def test_what_is_not_finite_is_found_at_every_place(library: ctypes.CDLL) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        for at in range(7):
            x = np.full(7, np.finfo("f4").max, np.float32)
            assert library.odtplan_all_finite(x.ctypes.data_as(ctypes.c_void_p), 7) == 1
            x[at] = bad
            assert library.odtplan_all_finite(x.ctypes.data_as(ctypes.c_void_p), 7) == 0
            assert library.odtplan_all_finite(x.ctypes.data_as(ctypes.c_void_p), at) == 1


# ---- files


#: Bytes of the header, of the options behind it, and what these hold after the step size.
HEADER, OPTIONS = 24, 76
WORDS = ["epochs", "updates", "online", "samples", "judged", "schedule", "warmup", "metric",
         "patience", "halvings", "order", "sample_bytes", "target_bytes"]  # fmt: skip


def signed(content: bytes, at: int, data: bytes) -> bytes:
    """A session file with other bytes, and the checksum that belongs to them."""
    changed = content[:at] + data + content[at + len(data) :]
    return changed[:20] + struct.pack("<I", zlib.crc32(changed[24:])) + changed[24:]


@needs_gcc
def test_files_that_are_refused(hosts: Callable[[str], Host], tmp_path: Path) -> None:
    host = hosts("cnn-mse-batch")
    data, validation = samples(host.training, 8), samples(host.training, 5, seed=1)
    o = SessionOptions(lr=0.05, epochs=1)
    good = session_file(host.plan, host.training, data, o, validation)
    foreign, damaged = 6, 7

    def word(name: str, value: int) -> bytes:
        return edited(good, **{name: value})

    wrong: dict[str, tuple[bytes, int]] = {
        "nothing": (b"", 5),
        "cut header": (good[:23], foreign),
        "magic": (b"ODTP" + good[4:], foreign),
        "version": (good[:4] + struct.pack("<I", 1) + good[8:], foreign),
        "plan": (good[:8] + bytes(4) + good[12:], foreign),
        "plan, high": (good[:12] + bytes(4) + good[16:], foreign),
        "cut": (good[:-1], damaged),
        "cut options": (good[:60], damaged),
        "longer": (good + b"\0", damaged),
        "a bit": (good[:200] + bytes([good[200] ^ 1]) + good[201:], damaged),
        "size": (good[:16] + struct.pack("<I", len(good)) + good[20:], damaged),
        "bytes of a sample": (word("sample_bytes", 4), damaged),
        "more samples": (word("samples", 9), damaged),
        "step size": (signed(good, 24, struct.pack("<d", np.nan)), 1),
        "negative step size": (signed(good, 24, struct.pack("<d", -0.1)), 1),
        "large step size": (signed(good, 24, struct.pack("<d", 1e39)), 1),
        "large decay": (signed(good, HEADER + 60, struct.pack("<d", 1e39)), 1),
        "decay": (signed(good, HEADER + 60, struct.pack("<d", -0.1)), 1),
        "decay, no number": (signed(good, HEADER + 60, struct.pack("<d", np.nan)), 1),
        "two amounts": (word("updates", 3), 1),
        "no amount": (word("epochs", 0), 1),
        "too many epochs": (word("epochs", 2**29 + 1), 1),
        "schedule": (word("schedule", 3), 1),
        "warm-up": (word("warmup", 4), 1),
        "metric": (word("metric", 2), 1),
    }
    for name, (content, status) in wrong.items():
        assert host.run(content, tmp_path)[0] == status, name
    no_number = struct.pack("<I", 8)
    assert host.run(signed(good, HEADER + OPTIONS, no_number), tmp_path)[0] == 10, "order"


def edited(content: bytes, *, drop: int = 0, **values: int) -> bytes:
    """A session file with other options, without some bytes behind them, and sizes that agree."""
    words = list(struct.unpack_from("<13I", content, HEADER + 8))
    for name, value in values.items():
        words[WORDS.index(name)] = value
    rest = content[HEADER + OPTIONS + drop :]
    decay = content[HEADER + 60 : HEADER + OPTIONS]
    changed = content[: HEADER + 8] + struct.pack("<13I", *words) + decay + rest
    return signed(changed, 16, struct.pack("<I", len(changed) - HEADER))


@needs_gcc
def test_too_few_samples_and_wrong_labels(hosts: Callable[[str], Host], tmp_path: Path) -> None:
    host = hosts("cnn-mse-batch")
    o, samples_status = SessionOptions(lr=0.05, epochs=1), 11

    def status(content: bytes) -> int:
        return host.run(content, tmp_path)[0]

    one = session_file(host.plan, host.training, samples(host.training, 1), o)
    assert status(one) == 0, "an update is filled with the sample again"
    assert status(edited(one, epochs=0, online=1)) == samples_status
    each = len(one) - HEADER - OPTIONS - 2 * 4
    assert status(edited(one, samples=0, order=0, drop=each + 8)) == samples_status
    assert status(edited(one, samples=0, judged=1)) == samples_status
    two = session_file(host.plan, host.training, samples(host.training, 2), o)
    assert status(edited(two, samples=1, judged=1)) == samples_status, "fills no micro-batch"
    labels = hosts("mlp-sgd")
    data = samples(labels.training, 4)
    for bad in (-1, 4):
        data.y["y"][2] = bad
        content = session_file(labels.plan, labels.training, data, o)
        code, told, _ = labels.run(content, tmp_path)
        assert code == 3
        assert len(told) < 4
        content = session_file(labels.plan, labels.training, samples(labels.training, 4), o, data)
        code, told, _ = labels.run(content, tmp_path)
        assert (code, told) == (3, [])


def test_what_the_c_session_can_not_do(tmp_path: Path) -> None:
    e = exhibit("mlp-sgd")
    data = samples(e.training)

    def refused(told: str, **options: Any) -> None:
        with pytest.raises(UsageError, match=told):
            session_file(e.plan, e.training, data, SessionOptions(**{"lr": 0.1, **options}), data)

    refused("--clip: this plan changes weights while", epochs=1, clip=1.0)
    refused("takes its checkpoint as an argument", epochs=1, checkpoint=tmp_path / "c.npz")
    refused("judges this model by accuracy or loss", epochs=1, metric="mse")
    refused("judges this model by accuracy or loss", epochs=1, metric="auc")
    refused("--warmup: 23 of 23 updates", epochs=1, warmup=23)
    refused("give either steps or epochs", epochs=1, steps=3)


def test_a_model_whose_samples_do_not_lie_apart_has_no_session(tmp_path: Path) -> None:
    plan, training = CASES["recurrent"]()
    files = emit_c(plan, training, tmp_path)
    assert not any("_train" in f.name or "session" in f.name for f in files)
    with pytest.raises(GraphError, match="recurrent: samples or targets have no common first axis"):
        emit_c(plan, training, tmp_path, host=True)

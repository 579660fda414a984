"""The training session of the emitted C: equal to NumPy's bit for bit, and what it refuses."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_replay
from board import lane
from board.objects import link
from test_c_backend import CASES, needs_gcc

from odt_plan.backends.c import emit_c, session_file
from odt_plan.backends.c.golden import random_samples
from odt_plan.backends.c.saved import load_saved
from odt_plan.backends.numpy import (
    DataSet,
    History,
    Runtime,
    SessionOptions,
    data_set,
    train_session,
)
from odt_plan.ir.targets import random_target, target_names
from odt_plan.ir.training import TrainingGraph
from odt_plan.planner.plan import Plan

Planned = tuple[Plan, TrainingGraph]
CHECKS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DODTPLAN_POISON"]


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
    command = ["gcc", *lane.STRICT, "-O1", "-ffp-contract=off", *CHECKS]
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
    for line in told:  # some are trained again after a way back
        if "update" in line:
            del losses[line["update"] - 1 :]
            losses.append(line["loss"])
    assert losses[: len(history.losses)] == list(history.losses)
    epochs = [line for line in told if "epoch" in line]
    for line, e in zip(epochs, history.epochs, strict=True):
        assert (line["epoch"], line["updates"]) == (e.number, e.updates)
        if e.number:
            assert line["loss"] == pytest.approx(e.loss, rel=1e-13, nan_ok=True)
            assert line["lr"] == pytest.approx(e.lr, rel=1e-13)
        if e.validation is not None:
            assert line["metric"] == e.validation.metric
            assert line["value"] == pytest.approx(e.validation.value, rel=1e-13)
            assert line["validation_loss"] == pytest.approx(e.validation.loss, rel=1e-13)
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
    )},
    **{f"replay {n}": c for n, c in test_replay.CASES.items()},
}  # fmt: skip


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

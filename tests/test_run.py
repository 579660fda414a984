"""``odt-plan run`` as a user sees it: what is told, kept, written and refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
from cli_run import Cli
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_files import export

ROOT = Path(__file__).resolve().parents[1]
CALL = (sys.executable, "-c", "from odt_plan.cli import main; main()")
Array = NDArray[Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planned network of 4 classes, and data that it can learn: d.npz, v.npz."""
    home = tmp_path_factory.mktemp("run")
    model = export(nets.mlp((8, 16, 4)), home)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    limits = ("--ram", "64KB", "--flash", "1MB", "-q", "-o", str(home / "out"))
    subprocess.run([*CALL, str(model), *limits], env=environment, check=True)
    x, y = samples(80, 0)
    np.savez(home / "d.npz", x=x, y=y)
    x, y = samples(40, 1)
    np.savez(home / "v.npz", x=x, y=y)
    return home


def samples(count: int, seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(10).standard_normal((4, 8)) * 2
    y = rng.integers(0, 4, count)
    return (centres[y] + rng.standard_normal((count, 8))).astype(np.float32), y


def test_a_run_is_told_epoch_by_epoch(odt: Cli, folder: Path) -> None:
    words = ("--data", folder / "d.npz", "--val", folder / "v.npz", "--epochs", "3", "--lr", "0.05")
    done = odt("run", folder / "out/plan.json", *words, "--schedule", "cosine", "--clip", "2")
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "before training", "epoch 1", "epoch 2", "epoch 3",
    ]  # fmt: skip
    assert "best so far" in lines[1]
    assert "clipping  each tensor by its own norm" in done.out
    assert "240 updates done; mean loss" in done.out
    assert f"accuracy on {folder / 'v.npz'}: " in done.out
    assert "which is kept" in done.out
    record = odt("run", folder / "out/plan.json", *words, "--schedule", "cosine", "--json")
    assert record.err == ""
    told = record.json
    assert [e["number"] for e in told["epochs"]] == [0, 1, 2, 3]
    assert told["after"] == told["epochs"][told["kept_epoch"]]["validation"]["accuracy"]
    assert told["accuracy_after"] == told["after"] > told["before"] + 0.3
    assert told["epochs"][3]["lr"] < 1e-4
    silent = odt("run", folder / "out/plan.json", *words, "-q")
    assert (silent.code, silent.out, silent.err) == (0, "", "")


def test_a_bar_on_a_terminal(odt: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what Rich takes for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    words = ("--data", folder / "d.npz", "--epochs", "2", "--lr", "0.05")
    done = odt("run", folder / "out/plan.json", *words)
    assert done.code == 0
    assert "160/160" in done.err
    assert "epoch 1" not in done.err


def test_the_same_seed_makes_the_same_weights(odt: Cli, folder: Path) -> None:
    words = ("--data", folder / "d.npz", "--epochs", "1", "--lr", "0.05", "-q", "--balance")
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        save = ("--seed", seed, "--save", f"{name}.npz")
        assert odt("run", folder / "out/plan.json", *words, *save).code == 0
    a, b, c = (dict(np.load(f"{name}.npz")) for name in "abc")
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert not all(np.array_equal(a[k], c[k]) for k in a)


@pytest.mark.skipif(os.name == "nt", reason="a process can't send Ctrl-C alone to another")
def test_ctrl_c_keeps_and_resumes(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: the state is written, and goes on to the very same bits."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    plan, data = str(folder / "out/plan.json"), str(folder / "d.npz")
    words = [*CALL, "run", plan, "--data", data, "--epochs", "40", "--lr", "0.01", "--schedule",
             "linear", "--val", str(folder / "v.npz")]  # fmt: skip
    kept = ["--checkpoint", "c.npz", "--save", "part.npz"]
    with subprocess.Popen(
        [*words, *kept], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        for _ in range(3000):
            if (tmp_path / "c.previous.npz").exists():
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "interrupted after update" in out
    assert (tmp_path / "part.npz").exists()
    for extra in (["--resume", "c.npz", "--save", "a.npz"], ["--save", "b.npz"]):
        subprocess.run([*words, "-q", *extra], env=environment, cwd=tmp_path, check=True)
    a, b = dict(np.load(tmp_path / "a.npz")), dict(np.load(tmp_path / "b.npz"))
    assert all(a[k].tobytes() == b[k].tobytes() for k in b)


def test_a_full_disk_leaves_the_old_checkpoint(odt: Cli, folder: Path) -> None:
    resource = pytest.importorskip("resource")  # which Windows does not have
    words = ("--data", folder / "d.npz", "--epochs", "1", "--lr", "0.01", "-q")
    kept = ("--checkpoint", "c.npz")
    assert odt("run", folder / "out/plan.json", *words, *kept).code == 0
    old = Path("c.npz").read_bytes()
    names = {p.name for p in Path().iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, hard))
    try:
        done = odt("run", folder / "out/plan.json", *words, *kept)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.code == 1
    assert done.error.startswith("c.npz: can't write the checkpoint: File too large")
    assert Path("c.npz").read_bytes() == old
    assert {p.name for p in Path().iterdir()} == names


def test_a_damaged_checkpoint_is_told(odt: Cli, folder: Path) -> None:
    words = ("--data", folder / "d.npz", "--epochs", "2", "--lr", "0.01")
    whole = (*words, "--checkpoint", "c.npz", "--save", "whole.npz")
    assert odt("run", folder / "out/plan.json", *whole).code == 0
    Path("c.npz").write_bytes(Path("c.npz").read_bytes()[:1000])
    again = (*words, "--resume", "c.npz", "--save", "again.npz")
    done = odt("run", folder / "out/plan.json", *again)
    assert done.code == 0
    first = done.err.splitlines()[0]
    assert first.startswith("warning: c.npz: can't be read")
    assert first.endswith("going on from c.previous.npz, after update 80")
    assert Path("again.npz").read_bytes() == Path("whole.npz").read_bytes()
    Path("c.previous.npz").unlink()
    done = odt("run", folder / "out/plan.json", *words, "--resume", "c.npz")
    assert done.code == 2
    assert done.error.startswith("c.npz: can't be read")


def test_worse_is_rolled_back(odt: Cli, folder: Path) -> None:
    x, y = samples(40, 1)
    words = ("--val", folder / "v.npz", "--epochs", "2", "--lr", "0.05")
    start = odt("run", folder / "out/plan.json", *words, "--data", folder / "d.npz", "--json").json
    rarest = np.bincount(y).argmin()
    assert start["before"] > (y == rarest).mean(), "else there is nothing to lose"
    np.savez("wrong.npz", x=x, y=np.full(40, rarest))
    words = (*words, "--data", "wrong.npz", "--save", "after.npz")
    done = odt("run", folder / "out/plan.json", *words)
    assert (
        f"{start['before']:.1%} -> {(y == rarest).mean():.1%}, which is worse: rolled" in done.out
    )
    learned = dict(np.load("after.npz"))
    model = {
        t.name: numpy_helper.to_array(t) for t in onnx.load(folder / "model.onnx").graph.initializer
    }
    assert learned
    assert all(np.array_equal(a, model[name]) for name, a in learned.items())
    assert "warning: all samples are of class" in done.err
    assert "warning: 40 of 40 samples to validate by are also trained on" in done.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--patience", "2"), "--patience needs samples to validate by; give --val, or x_val"),
        (("--metric", "accuracy"), "--metric needs samples to validate by"),
        (("--online", "--epochs", "2"), "give either steps or epochs, or train online"),
        (("--warmup", "200"), "--warmup: 200 of 200 updates"),
        (("--mean", "0.5"), "--mean and --std are of pictures and sounds"),
        (("--std", "0"), "--std: 0 must be finite, and above 0"),
        (("--mean", "a,b"), "--mean: 'a,b' is no list of numbers"),
        (("--clip", "-1"), "--clip: -1.0 is no norm above 0"),
        (("--weight-decay", "nan"), "--weight-decay: nan"),
        (("--checkpoint", "none/c.npz"), "none/c.npz: can't write: none is no folder"),
        (("--resume", "c.npz"), "c.npz: can't be read"),
        (("--val", "none.npz"), "none.npz: can't be read"),
    ],
)
def test_words_that_make_no_sense(
    odt: Cli, folder: Path, words: tuple[str, ...], told: str
) -> None:
    done = odt("run", folder / "out/plan.json", "--data", folder / "d.npz", *words)
    assert done.code == (1 if "no folder" in told else 2)
    assert told in done.error

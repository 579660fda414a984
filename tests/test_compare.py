"""``odt-plan compare``: update sets that are planned, trained and judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from cli_run import Cli
from onnx_files import export
from test_importance import CLASSES, SIZE, Array, small

from odt_plan.backends.numpy import Runtime, SessionOptions, data_set, train_session
from odt_plan.backends.numpy.metrics import evaluate
from odt_plan.planner.device import load_device
from odt_plan.planner.imported import Imported
from odt_plan.planner.pipeline import Request, make_plan
from odt_plan.usual_sets import last_layers

NAMES = ["auto", "last layer", "biases", "last layers that fit", "all"]
#: Less than all tensors need.
RAM = 9000


def labelled(count: int, seed: int) -> tuple[Array, Array]:
    """Classes that differ in the mean of a row of pixels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, count)
    x = rng.standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)
    x[np.arange(count), y % 3, y // 3] += 3
    return x, y


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    for name, count, seed in (("train", 40, 0), ("val", 30, 1)):
        x, y = labelled(count, seed)
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    return export(small(), tmp_path), tmp_path / "train.npz", tmp_path / "val.npz"


def test_rows_are_what_sessions_by_the_plans_reach(
    odt: Cli, files: tuple[Path, Path, Path]
) -> None:
    model, train, val = files
    common = ("compare", model, "--device", "nrf52840", "--data", train, "--val", val)
    ran = odt(*common, "--ram", RAM, "--seeds", 2, "--epochs", 2, "--jobs", 1, "--json")
    assert ran.code == 0, ran.err
    rows = {r["name"]: r for r in ran.json["rows"]}
    assert list(rows) == NAMES
    x, y = labelled(30, 1)
    session = onnxruntime.InferenceSession(model)
    name = session.get_inputs()[0].name
    hits = [session.run(None, {name: a[None]})[0].argmax() == b for a, b in zip(x, y, strict=True)]
    for r in rows.values():
        assert r["before"] == pytest.approx(np.mean(hits))
        assert len(r["values"]) == 2
        assert r["lr"] in (0.003, 0.01, 0.03)
        assert r["fits"] == (r["ram_bytes"] <= RAM)
    assert not rows["all"]["fits"]
    assert all(rows[n]["fits"] for n in NAMES[:-1])
    assert rows["all"]["updated"] == ran.json["tensors"] == 6
    assert np.mean(rows["auto"]["values"]) > rows["auto"]["before"] + 0.1
    assert ran.json["importance"].endswith("…)")
    assert "measured on 40 samples of train.npz" in ran.json["importance"]

    request = Request(
        model, load_device("nrf52840"), ram_bytes=RAM, train=("last",), with_baselines=False
    )
    planned = make_plan(request)
    for seed in range(2):
        runtime = Runtime(planned.plan, planned.training, exact=False)
        options = SessionOptions(rows["last layer"]["lr"], epochs=2, seed=seed, schedule="cosine")
        train_session(runtime, data_set(planned.training, *labelled(40, 0)), options)
        tested = data_set(planned.training, *labelled(30, 1))
        reached = evaluate(runtime, tested, "accuracy").value
        assert reached == rows["last layer"]["values"][seed]


def test_the_table_tells_what_is_measured_and_what_predicted(
    odt: Cli, files: tuple[Path, Path, Path]
) -> None:
    model, train, val = files
    ran = odt(
        "compare", model, "--device", "nrf52840", "--data", train, "--val", val,
        "--lr", "0.01", "--seeds", 1, "--epochs", 1, "--jobs", 1, "--importance", "prior",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert all(name in ran.out for name in NAMES)
    assert "accuracy measured on the samples of --val" in ran.out
    assert "time predicted" in ran.out
    assert "importance of auto: prior" in ran.out


def test_last_layers_grow_from_the_end() -> None:
    graph = small()
    request = Request(Path("m.onnx"), load_device("nrf52840"))
    found = last_layers(Imported(graph, frozenset(), {}, ""), request)
    assert [set(names) for names in found] == [
        {"fc.weight", "fc.bias"},
        {"fc.weight", "fc.bias", "c2.weight", "c2.bias"},
        {f"{n}.{r}" for n in ("c1", "c2", "fc") for r in ("weight", "bias")},
    ]


def test_sets_are_the_usual_ones(odt: Cli, files: tuple[Path, Path, Path]) -> None:
    model, train, val = files
    words = ("--device", "nrf52840", "--data", train, "--val", val, "--train", "last")
    done = odt("compare", model, *words)
    assert done.code == 2
    assert "--train: compare trains the usual sets beside auto" in done.error


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "0.1,fast"])
def test_step_sizes_that_are_none(odt: Cli, files: tuple[Path, Path, Path], text: str) -> None:
    model, train, val = files
    ran = odt("compare", model, "--device", "nrf52840", "--data", train, "--val", val, "--lr", text)
    assert ran.code == 2
    assert ran.error.startswith("--lr: ")


def test_data_that_do_not_fit_or_leave_no_plan(
    odt: Cli, files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, train, val = files
    common = ("compare", model, "--device", "nrf52840", "--data", train, "--jobs", 1)
    ran = odt(*common, "--val", tmp_path / "gone.npz")
    assert ran.code == 2
    assert "gone.npz" in ran.error
    x, y = labelled(5, 2)
    np.savez(tmp_path / "odd.npz", x=x, y=y + 10)
    ran = odt(*common, "--val", tmp_path / "odd.npz", "--lr", "0.01", "--epochs", 1)
    assert ran.code == 2
    assert "classes 0 to 4" in ran.error
    ran = odt(*common, "--val", val, "--ram", 100)
    assert ran.code == 3

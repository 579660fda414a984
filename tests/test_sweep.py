"""Many plans at once: pools whose workers die, a real Dask cluster, surveys of devices."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
from cli_run import Cli
from onnx_files import export, model, node, save
from test_cli import MODEL

from odt_plan.local_pool import InProcess, LocalPool
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request
from odt_plan.sweep import Executor, Outcome, Task, pack, solve

BOARD = load_device("stm32f746g-disco")


def tasks(path: Path, *budgets: int) -> list[Task]:
    request = Request(path, BOARD, with_baselines=False)
    return [pack(replace(request, ram_bytes=b), f"budget {b}") for b in budgets]


def outcomes(executor: Executor, todo: Sequence[Task]) -> list[Outcome]:
    """Outcomes in the order of the tasks, without their times."""
    found: dict[int, Outcome] = {}

    def done(i: int, outcome: Outcome) -> None:
        assert i not in found
        found[i] = replace(outcome, seconds=0.0)

    executor.run(todo, done)
    return [found[i] for i in range(len(todo))]


def test_a_task_needs_no_file_of_its_maker(tmp_path: Path) -> None:
    path = export(nets.mlp(), tmp_path)
    outside = onnx.load(path)
    onnx.save(
        outside, path, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    (tmp_path / "weights.bin").stat()
    task = pickle.loads(pickle.dumps(tasks(path, 1 << 20, 10)))
    for p in tmp_path.iterdir():
        p.unlink()
    good, small = outcomes(InProcess(), task)
    assert good.figures is not None
    assert good.figures.updates
    assert small.exit_code == 3
    assert small.shortfalls[0].limit == "ram"


def test_messages_name_the_file_of_the_user(tmp_path: Path) -> None:
    path = export(nets.mlp(), tmp_path)
    (task,) = tasks(path, 1 << 20)
    broken = replace(task, model_files={path.name: b"no model"})
    outcome = solve(broken)
    assert outcome.exit_code == 4
    assert outcome.reason.startswith(f"{path}: not an ONNX model")


class Killer(threading.Thread):
    """Kills the first workers that it sees, as many as told."""

    def __init__(self, victims: int) -> None:
        super().__init__(daemon=True)
        self.left, self.killed = victims, set[int]()

    def run(self) -> None:
        end = time.monotonic() + 60
        while self.left and time.monotonic() < end:
            for child in multiprocessing.active_children():
                if child.pid is not None and child.pid not in self.killed and self.left:
                    os.kill(child.pid, signal.SIGKILL)
                    self.killed.add(child.pid)
                    self.left -= 1
            time.sleep(0.01)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_pool_loses_nothing_when_a_worker_is_killed(tmp_path: Path) -> None:
    todo = tasks(export(nets.cnn(), tmp_path), 1 << 20, 2600, 100)
    killer = Killer(1)
    pool = LocalPool(2)
    killer.start()
    try:
        found = outcomes(pool, todo)
    finally:
        pool.close()
    killer.join()
    assert len(killer.killed) == 1
    assert found == outcomes(InProcess(), todo)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_task_that_kills_its_workers_is_named(tmp_path: Path) -> None:
    todo = tasks(export(nets.mlp(), tmp_path), 1 << 20)
    killer = Killer(3)
    pool = LocalPool(2)
    killer.start()
    try:
        (found,) = outcomes(pool, todo)
    finally:
        pool.close()
    killer.join()
    assert found.exit_code == 1
    assert found.reason == "budget 1048576: its worker died 3 times, last by SIGKILL"


# ---- Dask ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        processes=True, n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as found:
        yield found


@pytest.mark.filterwarnings("default")
def test_a_cluster_finds_the_same_and_survives_a_worker(
    cluster: Any, odt: Cli, tmp_path: Path
) -> None:
    path = export(nets.resnet(), tmp_path)
    words = ("pareto", path, "--device", "rp2040", "--y", "latency", "--points", "4", "--json")
    here = odt(*words, "--jobs", "1")
    killed: list[int] = []

    def kill_one_at_work() -> None:
        while not killed:
            for w in list(cluster.scheduler.workers.values()):
                if w.processing:
                    killed.extend(n.pid for n in cluster.workers.values() if n.name == w.name)
                    os.kill(killed[0], signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
                    return
            time.sleep(0.005)

    killer = threading.Thread(target=kill_one_at_work, daemon=True)
    killer.start()
    there = odt(*words, "--scheduler", cluster.scheduler_address)
    killer.join(timeout=1)
    assert killed
    assert here.code == there.code == 0, there.err
    assert _timeless(here.json) == _timeless(there.json)


def _timeless(record: dict[str, object]) -> dict[str, object]:
    assert isinstance(record["points"], list)
    points = [{**p, "seconds": None} for p in record["points"]]
    return {**record, "seconds": None, "points": points}


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:{port}", "nowhere", "gopher://a:1", ""])
def test_an_unreachable_scheduler_is_one_line(odt: Cli, address: str, closed_port: int) -> None:
    pytest.importorskip("distributed")
    address = address.format(port=closed_port)
    begin = time.monotonic()
    done = odt("fit", MODEL, "--device", "rp2040", "--scheduler", address)
    assert time.monotonic() - begin < 20
    assert done.code == 2
    assert f"no Dask scheduler answers at '{address}'" in done.error
    assert "leave --scheduler out" in done.error


def test_without_dask_the_way_to_it_is_told(odt: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    done = odt("fit", MODEL, "--device", "rp2040", "--scheduler", "tcp://127.0.0.1:1")
    assert done.code == 2
    assert "pip install 'odt-plan[dask]'" in done.error


# ---- fit ----------------------------------------------------------------------------------------


def test_one_model_on_some_devices(odt: Cli, tmp_path: Path) -> None:
    devices = ("--device", "samd21-mkr1000,stm32h743", "--jobs", "1")
    done = odt("fit", MODEL, *devices, "--csv", "f.csv", "--json")
    assert done.code == 0, done.err
    small, large = done.json
    assert (small["device"], small["verdict"]) == ("samd21-mkr1000", "too large")
    assert small["flash_missing"] > 0
    assert small["ram_missing"] > 0
    assert small["learn"] is None
    assert (large["device"], large["verdict"]) == ("stm32h743", "fits")
    assert large["share_of_unlimited"] == 1.0
    assert large["updated_tensors"] == large["trainable_tensors"] == 8
    with (tmp_path / "f.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["verdict"] for r in rows] == ["too large", "fits"]
    assert int(rows[1]["ram_bytes"]) == large["ram_bytes"]


def test_what_is_missing_suffices(odt: Cli) -> None:
    """The bytes that a device lacks are those that make the model fit."""
    (row,) = odt("fit", MODEL, "--device", "samd21-mkr1000", "--jobs", "1", "--json").json
    device = load_device("samd21-mkr1000")
    ram = device.ram_region()[1] - device.reserve.ram_bytes + int(row["ram_missing"])
    flash = device.flash_bytes - device.reserve.flash_bytes + int(row["flash_missing"])
    words = (MODEL, "--device", "samd21-mkr1000", "--ram", ram, "--flash", flash, "-q")
    assert odt(*map(str, words)).code == 0
    words = (MODEL, "--device", "samd21-mkr1000", "--ram", ram - 4, "--flash", flash, "-q")
    assert odt(*map(str, words)).code == 3


@pytest.fixture
def zoo(tmp_path: Path) -> list[Path]:
    """A model that fits, one that holds what can't be planned, one that is no model."""
    strange = save(
        model([node("Det", "x", "y")], {"x": (1, 3, 3)}, ["y"]), tmp_path, "strange.onnx"
    )
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    return [export(nets.mlp(), tmp_path), strange, broken]


def test_a_matrix_goes_on_past_models_that_cannot_be_planned(odt: Cli, zoo: list[Path]) -> None:
    done = odt("fit", *zoo, "--jobs", "1", "--device", "rp2040", "--device", "samd21-mkr1000")
    assert done.code == 0, done.err
    assert "1 rp2040, 2 samd21-mkr1000" in done.out
    lines = [line.split() for line in done.out.splitlines() if line.startswith(f" {zoo[0].parent}")]
    assert [line[1:] for line in lines] == [["100", "100"], ["-", "-"], ["-", "-"]]
    assert "broken.onnx: not an ONNX model" in done.out
    assert "2 of 6 fit" in done.out


def test_options_that_suit_no_model_are_a_usage_error_and_else_a_row(
    odt: Cli, zoo: list[Path]
) -> None:
    where = ("--device", "rp2040", "--jobs", "1")
    done = odt("fit", MODEL, zoo[0], *where, "--train", "conv2.weight", "--json")
    assert done.code == 0
    assert [r["verdict"] for r in done.json] == ["fits", "rejected"]
    assert "no trainable parameter conv2.weight" in done.json[1]["reason"]


def test_samples_that_suit_one_model_alone(odt: Cli, zoo: list[Path]) -> None:
    """Labelled samples are measured on before any plan; who can't take them is a row."""
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
    np.savez("l.npz", x=x, y=np.arange(3))
    where = ("--device", "rp2040", "--jobs", "1", "--calib", "l.npz", "--json")
    done = odt("fit", zoo[0], "none.onnx", MODEL, zoo[1], *where)
    assert done.code == 0, done.err
    assert [r["verdict"] for r in done.json] == ["rejected", "rejected", "fits", "unsupported"]
    assert "l.npz: x is float32[3, 1, 8, 8], must be numbers" in done.json[0]["reason"]
    assert done.json[1]["reason"] == "none.onnx: no such file"
    assert odt("fit", *zoo[:2], *where).code == 3
    done = odt("fit", zoo[0], "none.onnx", *where)
    assert done.code == 2
    assert "l.npz: x is" in done.error


def test_nothing_fits(odt: Cli, zoo: list[Path]) -> None:
    done = odt("fit", *zoo[1:], "--jobs", "1", "--device", "rp2040", "--json")
    assert done.code == 3
    assert [r["verdict"] for r in done.json] == ["unsupported"] * 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("none.onnx",), 2, "none.onnx"),
        ((MODEL, "--device", "rp2041"), 2, "did you mean rp2040"),
        ((MODEL, "--device", "rp2040", "--train", "conv9"), 2, "no trainable parameter conv9"),
        ((MODEL, "--jobs", "0"), 2, "--jobs"),
        ((MODEL, "--device", "rp2040", "--jobs", "1", "--csv", "no/f.csv"), 1, "no/f.csv"),
    ],
)
def test_bad_input_is_one_line(
    odt: Cli, words: tuple[str | Path, ...], code: int, message: str
) -> None:
    done = odt("fit", *words, *(() if "--jobs" in words else ("--jobs", "1")))
    assert done.code == code
    assert message in done.error


def test_devices_of_the_user(odt: Cli, tmp_path: Path) -> None:
    text = json.dumps(BOARD.model_dump(mode="json") | {"id": "mine"})
    (tmp_path / "mine.yaml").write_text(text)
    done = odt("fit", MODEL, "--device", "mine.yaml", "--jobs", "1", "--json")
    assert [r["device"] for r in done.json] == ["mine"]
    assert done.code == 0
    (tmp_path / "twin.yaml").write_text(text)
    done = odt("fit", MODEL, "--device", "mine.yaml,twin.yaml", "--jobs", "1")
    assert done.code == 2
    assert "two devices have the id mine" in done.error



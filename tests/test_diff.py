"""``odt-plan diff``: two plans of the planner, and plans that were changed in known ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_run import Cli

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "digits_cnn.onnx"
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Plans of the last layer, and of the biases with less RAM."""
    folder = tmp_path_factory.mktemp("plans")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    for train, ram in (("last", "64KB"), ("bias", "60KB")):
        command = [sys.executable, "-m", "odt_plan.cli", str(MODEL), "--ram", ram, "--flash", "1MB",
                   "--train", train, "-q", "-o", str(folder / train)]  # fmt: skip
        subprocess.run(command, env=env, check=True)
    return folder / "last" / "plan.json", folder / "bias" / "plan.json"


def edited(plan: Path, folder: Path, edit: Edit) -> Path:
    data = json.loads(plan.read_text(encoding="utf-8"))
    edit(data)
    path = folder / "edited.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_a_plan_is_the_same_as_itself(
    odt: Cli, plans: tuple[Path, Path], tmp_path: Path
) -> None:
    def slower(data: dict[str, Any]) -> None:
        data["solver"]["time_s"] += 5

    done = odt("diff", plans[0], edited(plans[0], tmp_path, slower))
    assert (done.code, done.out) == (0, "the plans are the same\n")
    assert odt("diff", plans[0], plans[0], "--json").json["same"] is True


def test_two_plans_of_a_model(odt: Cli, plans: tuple[Path, Path]) -> None:
    first, second = (json.loads(p.read_text(encoding="utf-8")) for p in plans)
    found = odt("diff", *plans, "--json").json
    assert not found["same"]
    assert found["same_model"]
    settings = {s["field"]: (s["before"], s["after"]) for s in found["settings"]}
    assert settings == {
        "asked.train": (["last"], ["bias"]),
        "device.budget.ram_bytes": (64 << 10, 60 << 10),
    }
    figures = {f["name"]: f for f in found["figures"]}
    for name, of in (
        ("RAM", lambda p: p["claims"]["ram_bytes"]["total"]),
        ("RAM: arena", lambda p: p["claims"]["ram_bytes"]["arena"]),
        ("flash", lambda p: p["claims"]["flash_bytes"]["total"]),
        ("latency", lambda p: p["claims"]["latency_s"]),
        ("energy", lambda p: p["claims"]["energy_j"]),
        ("importance", lambda p: sum(u["importance"] for u in p["decisions"]["updates"])),
    ):
        row, before, after = figures[name], of(first), of(second)
        assert (row["before"], row["after"]) == (before, after)
        assert row["change"] == after - before
        assert row["relative"] == pytest.approx((after - before) / before)
    updates = {d["name"]: (d["before"], d["after"])
               for d in found["decisions"] if d["subject"] == "update"}  # fmt: skip
    ratios = {u["param"]: u["ratio"] for u in first["decisions"]["updates"]}
    for u in second["decisions"]["updates"]:
        assert (u["param"] in updates) == (ratios[u["param"]] != u["ratio"]), u["param"]
    assert updates["classifier.weight"] == ("100.0%", "frozen")
    assert found["steps"] == [len(first["steps"]), len(second["steps"])]
    assert found["peaks"][0].startswith(f"step {first['claims']['ram_bytes']['peak_step']} of ")


def test_the_report_shows_absolute_and_relative_changes(
    odt: Cli, plans: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = odt("diff", *plans)
    assert done.code == 0
    assert "\x1b" not in done.out
    rows = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert rows["setting"].split() == ["setting", "last/plan.json", "bias/plan.json"]
    found = {f["name"]: f for f in odt("diff", *plans, "--json").json["figures"]}
    change, share = found["RAM"]["change"], found["RAM"]["relative"]
    assert f"{change:+,} B" in rows["RAM"]
    assert f"{share:+.1%}" in rows["RAM"]
    assert "asked.train" in rows
    assert "the models differ" not in done.out
    assert odt("diff", *plans, "-q").out == ""


def swap_steps(data: dict[str, Any]) -> None:
    """The first two steps with nodes change places."""
    at = [i for i, s in enumerate(data["steps"]) if s["nodes"]][:2]
    steps = data["steps"]
    steps[at[0]], steps[at[1]] = steps[at[1]], steps[at[0]]


def move_a_buffer(data: dict[str, Any]) -> None:
    data["buffers"][0]["offset"] += 4


def stream(data: dict[str, Any]) -> None:
    data["decisions"]["streamed"] = ["block1"]


def page(data: dict[str, Any]) -> None:
    data["decisions"]["activations"][0]["action"] = "page"


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (swap_steps, "nodes at another place in the order: 2"),
        (move_a_buffer, "buffers at another address: 1"),
        (stream, "streamed   block1   -"),
        (page, "keep"),
    ],
)
def test_each_change_is_told_alone(
    odt: Cli, plans: tuple[Path, Path], tmp_path: Path, edit: Edit, told: str
) -> None:
    path = edited(plans[0], tmp_path, edit)
    assert told in odt("diff", plans[0], path).out
    found = odt("diff", plans[0], path, "--json").json
    assert not found["same"]
    changed = (found["order"] > 0, found["addresses"] > 0, len(found["decisions"]) > 0)
    assert sum(changed) == 1
    assert not found["settings"]
    assert all(f["before"] == f["after"] for f in found["figures"])


def test_other_models_are_compared_by_name(
    odt: Cli, plans: tuple[Path, Path], tmp_path: Path
) -> None:
    def other(data: dict[str, Any]) -> None:
        data["model"]["sha256"] = "0" * 64
        data["decisions"]["updates"][0]["param"] = "renamed"

    done = odt("diff", plans[0], edited(plans[0], tmp_path, other))
    assert "the models differ; layers and tensors are compared by their names" in done.out
    assert f"decisions only in {plans[0]}: 1, as about conv1.weight" in done.out
    assert f"decisions only in {tmp_path / 'edited.json'}: 1, as about renamed" in done.out


def test_what_is_no_plan_is_refused(odt: Cli, plans: tuple[Path, Path], tmp_path: Path) -> None:
    done = odt("diff", plans[0], tmp_path / "none.json")
    assert done.code == 2
    assert "can't read the plan" in done.error

"""The command line as a user sees it: output, exit codes, one-line errors, files or no files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_run import Cli

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "digits_cnn.onnx"
KINDS = ("children_user", "children_system")
BUDGET = ("--ram", "100KB", "--flash", "1MB")


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the outputs of one plan."""
    out = tmp_path_factory.mktemp("planned") / "out"
    command = [sys.executable, "-m", "odt_plan.cli", str(MODEL), *BUDGET, "-o", str(out), "-q"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
    return out


# ---- help, version, default command ------------------------------------------------------------


def test_help_lists_commands_and_exit_codes(odt: Cli) -> None:
    done = odt("--help")
    assert done.code == 0
    assert all(c in done.out for c in ("plan", "run", "verify", "check", "devices"))
    assert "Exit codes: 0 done; 1 internal" in done.out


@pytest.mark.filterwarnings("default::odt_plan.ir.errors.ModelWarning")
def test_an_opset_newer_than_known_is_tried(odt: Cli, tmp_path: Path) -> None:
    """A warning of one line, and the report."""
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(MODEL)
    proto.opset_import[0].version = onnx.defs.onnx_opset_version() + 1
    onnx.save(proto, tmp_path / "tomorrow.onnx")
    done = odt("check", tmp_path / "tomorrow.onnx")
    assert done.code == 0
    assert "conv3" in done.out
    (line,) = done.err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'tomorrow.onnx'}: opset ")
    assert "is newer than" in line


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['odt-plan', '--help']\n"
        "from odt_plan.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'onnx', 'ortools', 'pydantic', 'networkx', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_solvers_print_past_python_is_not_in_the_output() -> None:
    code = (
        "import os, sys; sys.argv = ['odt-plan', 'devices', '--json']\n"
        "from odt_plan import cli\n"
        "app = cli.app\n"
        "cli.app = lambda **k: (os.write(1, b'from a solver'), app(**k))[1]\n"
        "cli.main()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)


def test_version(odt: Cli) -> None:
    assert odt("--version").out == "odt-plan 0.1.0\n"


def test_no_arguments_show_the_help(odt: Cli) -> None:
    done = odt()
    assert done.code == 0
    assert done.out.startswith("Usage: odt-plan")


@pytest.mark.parametrize("words", [(MODEL, *BUDGET), ("plan", MODEL, *BUDGET), (*BUDGET, MODEL)])
def test_planning_is_the_default_command(odt: Cli, words: tuple[str | Path, ...]) -> None:
    done = odt(*words, "--json")
    assert done.code == 0, done.err
    assert done.json["model"]["name"] == "digits_cnn"


def test_a_mistyped_command_is_told(odt: Cli) -> None:
    done = odt("verfy", "out/plan.json")
    assert done.code == 2
    assert done.error.startswith("'verfy' is neither a command (")


# ---- plan ---------------------------------------------------------------------------------------


def test_report_says_what_was_understood_and_adds_up(odt: Cli) -> None:
    done = odt(MODEL, *BUDGET)
    assert done.code == 0, done.err
    assert done.err == ""
    assert "\x1b" not in done.out
    assert "102,400 B (100.00 KiB) as given" in done.out
    assert "generic-cortex-m7" in done.out
    assert "estimate" in done.out
    assert "prior" in done.out
    assert "predicted per training step" in done.out
    for name in ("keep-all", "last-layer", "bias-only", "sqrt(n)", "greedy"):
        assert name in done.out
    (ram,) = (line for line in done.out.splitlines() if line.startswith("RAM "))
    (parts,) = (line for line in done.out.splitlines() if "= arena" in line)
    total = int(ram.split("%")[1].split()[0].replace(",", ""))
    assert total == sum(int(w.replace(",", "")) for w in parts.split() if w[0].isdigit())


def test_report_counts_the_reserve_of_a_device(odt: Cli) -> None:
    done = odt(MODEL, "--device", "stm32f746g-disco")
    assert "of 327,680 B (320.00 KiB)" in done.out
    assert "reserve 8,192" in done.out


def test_report_tells_a_budget_beyond_the_device(odt: Cli) -> None:
    done = odt(MODEL, "--device", "stm32f746g-disco", "--ram", "1MB")
    assert "RAM 1,048,576 B (1.00 MiB) as given, more than the device's 327,680 B" in done.out
    assert "flash 1,032,192 B (1008.00 KiB) after the reserve" in done.out


def test_report_tells_paging_and_its_storage(odt: Cli) -> None:
    done = odt(MODEL, "--ram", "340KB", "--flash", "1MB", "--train", "all", "--storage", "sdcard")
    assert done.code == 0, done.err
    assert "paging to sdcard" in done.out
    assert "of sdcard" in done.out


def test_no_paging_to_the_flash_of_the_chip(odt: Cli, tmp_path: Path) -> None:
    """Refused in one line, unless the spec allows it; then with the steps until it is worn out."""
    spec = (ROOT / "specs" / "devices" / "stm32f746g-disco.yaml").read_text(encoding="utf-8")
    own = spec.replace("0x7000_0000", "0x2_0000\n    region: FLASH")
    own = own.replace("levelled: true", "levelled: false")
    board = tmp_path / "board.yaml"
    board.write_text(own, encoding="utf-8")
    options = (MODEL, "--device", board, "--ram", "340KB", "--train", "all", "--storage", "sdcard")
    done = odt(*options)
    assert done.code == 2
    assert "sdcard is flash of the chip itself" in done.error
    assert "(allow_paging); choose none, sdram" in done.error
    allowed = "    region: FLASH\n    allow_paging: {value: true, source: a test}"
    board.write_text(own.replace("    region: FLASH", allowed), encoding="utf-8")
    done = odt(*options, "--min-steps", "900")
    assert done.code == 0, done.err
    assert "paging to sdcard that lasts 900 steps" in done.out



def test_report_survives_an_ascii_pipe(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "odt_plan.cli", str(MODEL), *BUDGET]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout.isascii()
    assert b"compared with" in done.stdout


def test_json_is_the_plan(odt: Cli) -> None:
    plan = odt(MODEL, *BUDGET, "--json").json
    ram = plan["claims"]["ram_bytes"]
    assert plan["schema_version"] == 1
    assert plan["status"] == "optimal"
    assert ram["total"] <= 102_400
    parts = ("arena", "weights", "optimizer", "accumulators")
    assert ram["total"] == sum(ram[k] for k in parts)


def test_output_folder_holds_plan_model_and_pictures(odt: Cli, tmp_path: Path) -> None:
    done = odt(MODEL, *BUDGET, "-o", "out", "--emit", "dot,svg", "--emit", "c")
    assert done.code == 0, done.err
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"plan.json", MODEL.name, "plan.dot", "plan.svg", "memory.svg"} <= names
    assert {"digits_cnn.c", "digits_cnn.h"} <= names
    assert not [n for n in names if n.startswith(".")]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / MODEL.name).read_bytes() == MODEL.read_bytes()


def test_emit_without_folder_writes_to_out(odt: Cli, tmp_path: Path) -> None:
    assert odt(MODEL, *BUDGET, "--emit", "dot", "-q").code == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"plan.json", "plan.dot"}


def test_without_output_nothing_is_written(odt: Cli, tmp_path: Path) -> None:
    assert odt(MODEL, *BUDGET).code == 0
    assert list(tmp_path.iterdir()) == []


def test_same_input_gives_the_same_bytes(odt: Cli, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert odt(MODEL, *BUDGET, "-o", name, "--emit", "c,dot,svg", "-q").code == 0
    first, second = (
        {p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (tmp_path / "a", tmp_path / "b")
    )
    plans = [json.loads(files.pop("plan.json")) for files in (first, second)]
    for plan in plans:
        del plan["solver"]["time_s"]
    assert plans[0] == plans[1]
    assert first == second


def test_a_plan_may_be_written_again_but_foreign_files_stay(odt: Cli, tmp_path: Path) -> None:
    assert odt(MODEL, *BUDGET, "-o", "out", "-q").code == 0
    assert odt(MODEL, *BUDGET, "-o", "out", "-q").code == 0
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "plan.dot").write_text("mine")
    done = odt(MODEL, *BUDGET, "-o", "mine", "--emit", "dot")
    assert done.code == 2
    assert "plan.dot: exists" in done.error
    assert "--force" in done.error
    assert [p.name for p in foreign.iterdir()] == ["plan.dot"]
    assert (foreign / "plan.dot").read_text() == "mine"
    assert odt(MODEL, *BUDGET, "-o", "mine", "--emit", "dot", "--force", "-q").code == 0
    assert (foreign / "plan.dot").read_text() != "mine"


def test_output_that_cannot_be_written_is_exit_1(odt: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = odt(MODEL, *BUDGET, "-o", "file/out")
    assert done.code == 1
    assert "file/out: can't write" in done.error
    done = odt(MODEL, *BUDGET, "-o", "/proc/nowhere/out")
    assert done.code == 1
    assert "can't write" in done.error
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_exit_1(odt: Cli, tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir(mode=0o500)
    done = odt(MODEL, *BUDGET, "-o", "ro/out")
    assert done.code == 1
    assert "Permission denied" in done.error


def test_infeasible_is_exit_3_and_leaves_nothing(odt: Cli, tmp_path: Path) -> None:
    done = odt(MODEL, "--ram", "4KB", "--flash", "1MB", "-o", "out")
    assert done.code == 3
    first, there, *ways = done.refusal
    assert first.startswith("no plan fits: RAM: needs 32,808 B (32.04 KiB) at step 2 of 14 (conv2")
    assert "has 4,096 B (4.00 KiB), 28,712 B too few" in first
    assert "the smallest --ram that works is" in first
    assert there.startswith("  largest there: conv2_out 16,384 B, relu1_out 16,384 B, ")
    assert ways[0] == "  ways out, cheapest first:"
    assert "--ram 32808: +28,712 B of RAM (+701.0%)" in ways[1]
    assert list(tmp_path.iterdir()) == []


def test_smallest_budget_that_is_told_works(odt: Cli) -> None:
    told = odt(MODEL, "--ram", "4KB", "--flash", "1MB").refusal[0].split()[-1].replace(",", "")
    assert odt(MODEL, "--ram", told, "--flash", "1MB", "-q").code == 0
    less = odt(MODEL, "--ram", str(int(told) - 1), "--flash", "1MB", "-q")
    assert less.refusal[0].endswith(f"the smallest --ram that works is {told}")


def test_infeasible_as_json(odt: Cli) -> None:
    done = odt(MODEL, "--ram", "100KB", "--flash", "1MB", "--train", "all", "--json")
    told = done.json
    assert told["ok"] is False
    assert told["error"].splitlines() == done.refusal
    why = told["explanation"]
    (conflict,) = why["conflicts"]
    assert conflict == {"members": ["--train all", "--ram 102400"], "irreducible": True}
    (limit,) = why["limits"]
    assert limit["limit"] == "ram"
    assert limit["needs"] == limit["works"] == sum(r["bytes"] for r in why["peak"]["residents"])
    assert why["relaxations"][0]["options"] == "--train auto"
    assert [r["price"] for r in why["relaxations"]] == sorted(
        r["price"] for r in why["relaxations"]
    )


def test_every_way_out_works_as_it_is_typed(odt: Cli) -> None:
    asked = {"--ram": "100KB", "--flash": "1MB", "--train": "all"}
    for extra in ({}, {"--ram": "300KB", "--device": "stm32f746g-disco"}, {"--latency": "120ms"}):
        typed = asked | extra
        why = odt(MODEL, *(x for pair in typed.items() for x in pair), "--json").json
        ways = why["explanation"]["relaxations"]
        assert len(ways) == 3, ways
        for way in ways:
            words = way["options"].split()
            changed = typed | dict(zip(words[::2], words[1::2], strict=True))
            done = odt(MODEL, *(x for pair in changed.items() for x in pair), "--json")
            assert done.code == 0, way
            assert done.json["claims"]["ram_bytes"]["total"] == way["ram_bytes"]
            assert done.json["claims"]["latency_s"] == way["latency_s"]


def test_limits_of_latency_and_energy(odt: Cli) -> None:
    free = odt(MODEL, *BUDGET, "--json").json["claims"]
    limit = free["latency_s"] * 0.6
    tight = odt(MODEL, *BUDGET, "--latency", f"{limit * 1e3:.3f}ms", "--json").json["claims"]
    assert tight["latency_s"] <= limit
    limit = free["energy_j"] * 0.6
    tight = odt(MODEL, *BUDGET, "--energy", f"{limit * 1e3:.3f}mJ", "--json").json["claims"]
    assert tight["energy_j"] <= limit
    done = odt(MODEL, *BUDGET, "--latency", "1us")
    assert done.refusal[0].startswith("no plan fits: latency: needs 0.0547199 s, has 1e-06 s")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ((MODEL,), "--ram and --flash or --device is missing"),
        ((MODEL, "--ram", "320KB"), "--flash or --device is missing"),
        ((MODEL, "--flash", "1MB"), "--ram or --device is missing"),
        ((MODEL, "--ram", "320 kb/s", "--flash", "1MB"), "--ram: '320 kb/s' is not a size"),
        ((MODEL, "--ram=-5KB", "--flash", "1MB"), "--ram: '-5KB' is not a size"),
        ((MODEL, "--ram", "", "--flash", "1MB"), "--ram: '' is not a size"),
        ((MODEL, *BUDGET, "--latency", "fast"), "--latency: 'fast' can't be read"),
        ((MODEL, *BUDGET, "--energy", "0mJ"), "--energy: '0mJ'"),
        ((MODEL, *BUDGET, "--latency", "0"), "--latency: '0' can't be kept by any plan"),
        ((MODEL, *BUDGET, "--ram", "0"), "--ram: '0' is outside 1 byte to"),
        ((MODEL, *BUDGET, "--ram", str(2**53 + 1)), "--ram: '9007199254740993' is outside"),
        ((MODEL, "--device", "nope"), "device 'nope' is not known"),
        ((MODEL, "--device", "nope.yaml"), "nope.yaml: can't read the file"),
        ((MODEL, *BUDGET, "--storage", "tape"), "has no storage 'tape'; it knows none, sdcard"),
        (
            (MODEL, *BUDGET, "--emit", "pdf"),
            "--emit: 'pdf' is not one of c, host, arduino, platformio, zephyr, espidf, dot, svg",
        ),
        ((MODEL, *BUDGET, "--train", "conv9.weight"), "no trainable parameter conv9.weight"),
        ((MODEL, *BUDGET, "--train", "conv2.weight=2"), "ratio 2 of conv2.weight"),
        ((MODEL, *BUDGET, "--optimizer", "lion"), "'--optimizer'"),
        ((MODEL, *BUDGET, "--micro-batches", "0"), "--micro-batches: '0'"),
        ((MODEL, *BUDGET, "--micro-batches", "99999999999999999999"), "--micro-batches: '9"),
        ((MODEL, *BUDGET, "--batch", "100000000"), "'--batch'"),
        ((MODEL, *BUDGET, "--seed", "99999999999"), "'--seed'"),
        ((MODEL, *BUDGET, "--threads", "99999"), "'--threads'"),
        ((MODEL, *BUDGET, "--gap", "nan"), "--gap"),
        ((MODEL, *BUDGET, "--gap", "2"), "'--gap'"),
        ((MODEL, *BUDGET, "--time-limit", "0"), "--time-limit: 0 s"),
        ((MODEL, *BUDGET, "--time-limit", "nan"), "--time-limit"),
        ((MODEL, *BUDGET, "--time-limit", "inf"), "'--time-limit'"),
        ((MODEL, *BUDGET, "--objective", "ram"), "needs a fixed update set"),
        ((MODEL, *BUDGET, "--objective", "ram=2,flash"), "objective ram, flash needs a fixed"),
        ((MODEL, *BUDGET, "--objective", "latenci"), "'latenci' is not known; did you mean lat"),
        ((MODEL, *BUDGET, "--objective", "x"), "'x' is not known; it is one of learn, latency,"),
        ((MODEL, *BUDGET, "--objective", ""), "'' is not known"),
        ((MODEL, *BUDGET, "--objective", "latency=-1"), "weight '-1' of latency is no number"),
        ((MODEL, *BUDGET, "--objective", "latency=0"), "weight '0' of latency"),
        ((MODEL, *BUDGET, "--objective", "learn,ram=inf"), "weight 'inf' of ram"),
        ((MODEL, *BUDGET, "--objective", "learn,ram="), "weight '' of ram"),
        ((MODEL, *BUDGET, "--objective", "ram=1,ram=2"), "ram is given twice"),
        ((MODEL, *BUDGET, "--nonsense"), "No such option: --nonsense"),
        ((MODEL, "other.onnx", *BUDGET), "unexpected extra argument"),
        (("missing.onnx", *BUDGET), "missing.onnx: no such file"),
        ((".", *BUDGET), "is a folder, not an ONNX file"),
        ((*BUDGET,), "Missing argument 'MODEL.onnx'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    odt: Cli, tmp_path: Path, args: tuple[str | Path, ...], told: str
) -> None:
    done = odt(*args)
    assert (done.code, done.out) == (2, "")
    assert told in done.error
    assert list(tmp_path.iterdir()) == []


def test_missing_budgets_come_with_an_example(odt: Cli) -> None:
    error = odt(MODEL).error
    assert "--ram 320KB --flash 1MB" in error
    assert "--device stm32f746g-disco" in error


@pytest.mark.parametrize("cut", [0, 1, 100, 5000])
def test_broken_model_is_exit_4(odt: Cli, tmp_path: Path, cut: int) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(MODEL.read_bytes()[:cut])
    done = odt(broken, *BUDGET, "-o", "out")
    assert done.code == 4
    assert "broken.onnx" in done.error
    assert [p.name for p in tmp_path.iterdir()] == ["broken.onnx"]


def test_unexpected_failure_is_one_line_and_exit_1(
    odt: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[str]:
        raise RuntimeError("out of paper")

    monkeypatch.setattr("odt_plan.planner.device.device_ids", broken)
    done = odt("devices")
    assert done.code == 1
    assert done.error.startswith("RuntimeError: out of paper")
    assert "--debug" in done.error


def test_train_takes_names_with_ratios_and_keywords(odt: Cli) -> None:
    args = ("--train", "conv3.weight=0.25,classifier.weight", "--train", "classifier.bias")
    updates = odt(MODEL, *BUDGET, *args, "--json").json["decisions"]["updates"]
    ratios = {u["param"]: u["ratio"] for u in updates if u["ratio"]}
    assert ratios == {"conv3.weight": 0.25, "classifier.weight": 1.0, "classifier.bias": 1.0}
    updates = odt(MODEL, *BUDGET, "--train", "last", "--json").json["decisions"]["updates"]
    assert {u["node"] for u in updates if u["ratio"]} == {"classifier"}


def test_own_device_file_goes_with_the_plan(odt: Cli, tmp_path: Path) -> None:
    text = (ROOT / "specs" / "devices" / "nucleo-f411re.yaml").read_text(encoding="utf-8")
    own = tmp_path / "board.yaml"
    own.write_text(text.replace("id: nucleo-f411re", "id: my-board"), encoding="utf-8")
    assert odt(MODEL, "--device", own, "-o", "out", "-q").code == 0
    own.unlink()
    assert odt("verify", "out/plan.json").code == 0
    assert odt(MODEL, *BUDGET, "-o", "out", "-q").code == 0
    assert not (tmp_path / "out" / "plan.device.yaml").exists()
    assert odt("verify", "out/plan.json").code == 0


def test_weights_beside_the_model_are_copied(odt: Cli, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    (tmp_path / "in").mkdir()
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save_model(onnx.load(MODEL), tmp_path / "in" / "split.onnx", **options)
    assert odt("in/split.onnx", *BUDGET, "-o", "out", "-q").code == 0
    shutil.rmtree(tmp_path / "in")
    assert odt("verify", "out/plan.json").code == 0


def test_interrupt_is_one_line(odt: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("odt_plan.planner.device.device_ids", interrupted)
    done = odt("devices")
    assert (done.code, done.error) == (130, "interrupted")


# ---- verify, run, check, devices ----------------------------------------------------------------


def test_verify_confirms_a_plan(odt: Cli, planned: Path) -> None:
    done = odt("verify", planned / "plan.json")
    assert done.code == 0, done.err
    assert "all claims confirmed" in done.out
    record = odt("verify", planned / "plan.json", "--json").json
    assert record["ok"] is True
    assert record["arena_bytes"] + record["state_bytes"] == record["ram_bytes"]


def tampered(planned: Path, to: Path, change: dict[str, Any]) -> Path:
    """A copy of the output folder with changes in plan.json (dotted keys)."""
    shutil.copytree(planned, to)
    plan = json.loads((to / "plan.json").read_text(encoding="utf-8"))
    for key, value in change.items():
        *path, last = key.split(".")
        place = plan
        for p in path:
            place = place[int(p)] if isinstance(place, list) else place[p]
        place[last] = value
    (to / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return to / "plan.json"


@pytest.mark.parametrize(
    ("change", "told", "code"),
    [
        ({"schema_version": 2}, "schema_version 2 is not 1", 2),
        ({"model.batch": 10**30}, "model.batch", 2),
        ({"training.momentum": -1}, "momentum must be from 0 to below 1", 2),
        ({"objective": []}, "objective", 2),
        ({"claims.cycles": -1}, "claims.cycles", 2),
        ({"surprise": 1}, "surprise", 2),
        ({"model.sha256": "0" * 64}, "not the planned model", 2),
        ({"claims.ram_bytes.arena": 4}, "arena", 1),
        ({"claims.latency_s": 1e-6}, "latency", 1),
        ({"steps": []}, "", 1),
    ],
)
def test_tampered_plan_is_told(
    odt: Cli, planned: Path, tmp_path: Path, change: dict[str, Any], told: str, code: int
) -> None:
    done = odt("verify", tampered(planned, tmp_path / "copy", change))
    assert done.code == code
    assert told in done.error


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"schema_version": 1}'])
def test_what_is_no_plan_is_exit_2(odt: Cli, tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    done = odt("verify", "plan.json")
    assert done.code == 2
    assert "plan.json" in done.error


def test_plan_of_no_version_is_told(odt: Cli, planned: Path, tmp_path: Path) -> None:
    plan = json.loads((planned / "plan.json").read_text(encoding="utf-8"))
    del plan["schema_version"]
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    done = odt("verify", "plan.json")
    assert done.code == 2
    assert done.error.startswith("plan.json: schema_version is missing; plan the model again")


def test_plan_without_its_model_is_told(odt: Cli, planned: Path, tmp_path: Path) -> None:
    shutil.copy(planned / "plan.json", tmp_path)
    done = odt("verify", "plan.json")
    assert done.code == 2
    assert "--model" in done.error
    assert odt("verify", "plan.json", "--model", MODEL).code == 0


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first samples of the bundled data, a held-out part included."""
    path = tmp_path_factory.mktemp("data") / "few.npz"
    with np.load(ROOT / "examples" / "digits.npz") as data:
        few = {name: data[name][:8] for name in ("x", "y", "x_val", "y_val")}
    np.savez(path, **few)  # type: ignore[arg-type]  # (names of arrays, not options)
    return path


def test_run_trains_and_saves(odt: Cli, planned: Path, few_digits: Path, tmp_path: Path) -> None:
    args = ("--data", few_digits, "--steps", "5", "--lr", "0.001", "--save", "learned.npz")
    done = odt("run", planned / "plan.json", *args)
    assert done.code == 0, done.err
    assert "as planned" in done.out
    assert "5 updates done" in done.out
    assert "accuracy on x_val: " in done.out
    plan = json.loads((planned / "plan.json").read_text(encoding="utf-8"))
    chosen = {u["param"] for u in plan["decisions"]["updates"] if u["ratio"]}
    with np.load(tmp_path / "learned.npz") as learned:
        assert set(learned.files) == chosen


def test_run_tells_its_losses_as_json(odt: Cli, planned: Path, few_digits: Path) -> None:
    args = ("--data", few_digits, "--epochs", "1", "--lr", "0.001", "--json")
    record = odt("run", planned / "plan.json", *args).json
    assert record["updates"] == len(record["losses"]) == 8
    assert all(np.isfinite(record["losses"]))
    assert 0 <= record["accuracy_before"] <= 1
    ram = json.loads((planned / "plan.json").read_text(encoding="utf-8"))["claims"]["ram_bytes"]
    assert record["arena_bytes"] == ram["arena"]


def test_saving_into_a_missing_folder_is_exit_1(odt: Cli, planned: Path, few_digits: Path) -> None:
    args = ("--data", few_digits, "--steps", "1", "--save", "none/learned.npz")
    done = odt("run", planned / "plan.json", *args)
    assert done.code == 1
    assert done.error == "none/learned.npz: can't write: none is no folder"


@pytest.mark.parametrize(
    ("arrays", "args", "told"),
    [
        (None, (), "can't be read"),
        ({"a": np.zeros(3)}, (), "has no array x and y"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(4, int)}, (), "must be numbers [count, 1, 8, 8]"),
        ({"x": np.zeros((4, 1, 8, 8)), "y": np.full(4, 10)}, (), "classes 0 to 9"),
        ({"x": np.full((4, 1, 8, 8), np.nan), "y": np.zeros(4, int)}, (), "NaN"),
        ({"x": np.zeros((4, 1, 8, 8)), "y": np.zeros(4, int)}, ("--lr", "0"), "--lr: 0.0"),
        ({"x": np.zeros((4, 1, 8, 8)), "y": np.zeros(4, int)}, ("--lr", "nan"), "--lr: nan"),
    ],
)
def test_wrong_data_are_exit_2(
    odt: Cli,
    planned: Path,
    tmp_path: Path,
    arrays: dict[str, Any] | None,
    args: tuple[str, ...],
    told: str,
) -> None:
    if arrays is None:
        (tmp_path / "data.npz").write_text("no arrays")
    else:
        np.savez(tmp_path / "data.npz", **arrays)
    done = odt("run", planned / "plan.json", "--data", "data.npz", *args)
    assert done.code == 2
    assert told in done.error


def test_check_lists_layers(odt: Cli) -> None:
    done = odt("check", MODEL)
    assert done.code == 0
    assert "4 of 4 layers with parameters can be trained" in done.out
    record = odt("check", MODEL, "--json").json
    assert [x["name"] for x in record["layers"] if x["trainable"]] == [
        "conv1",
        "conv2",
        "conv3",
        "classifier",
    ]


def test_check_lists_all_obstacles_by_name(odt: Cli, shared: Path) -> None:
    proto = onnx.load(shared / "models" / "tflm_mnist_lstm.onnx")
    proto.graph.node[1].attribute.append(onnx.helper.make_attribute("clip", 3.0))
    Path("clipped.onnx").write_bytes(proto.SerializeToString())
    done = odt("check", "clipped.onnx")
    assert done.code == 4
    assert done.out.count("obstacle: ") == 1
    assert "LSTM_1 (LSTM)" in done.out


def test_devices_are_listed_and_shown(odt: Cli) -> None:
    done = odt("devices")
    assert done.code == 0
    assert "stm32f746g-disco" in done.out
    done = odt("devices", "show", "stm32f746g-disco")
    assert "4 x 32 KiB + 1 x 128 KiB + 3 x 256 KiB" in done.out
    assert "POET" in done.out
    assert len(odt("devices", "--json").json) == 13
    assert odt("devices", "show", "rp2040", "--json").json["core"] == "cortex-m0plus"
    told = odt("devices", "show", "rp2040").out.splitlines()
    (row,) = [line for line in told if line.strip().startswith("programmed by")]
    assert "256 B" in row
    assert "FLASH_PAGE_SIZE" in row
    assert odt("devices", "show", "nope").code == 2


# ---- layout -------------------------------------------------------------------------------------

#: Best fit misses the smallest arena, 84 bytes, of the first twelve rows.
BLOCKS = """id,lower,upper,size
a,4,7,36
b,0,4,16
c,0,2,8
d,5,9,16
e,6,10,8
f,9,10,4
g,3,7,20
h,2,6,12
i,1,3,32
j,2,4,4
k,0,2,16
l,2,4,20
"""


def test_layout_writes_what_was_given_and_the_offsets(odt: Cli) -> None:
    Path("blocks.csv").write_text(BLOCKS)
    done = odt("layout", "blocks.csv", "--capacity", "84", "-o", "placed.csv")
    assert done.code == 0, done.err
    assert "live peak 84 B" in done.out
    assert "capacity  84 B: fits, 0 B left" in done.out
    given = BLOCKS.splitlines()
    placed = Path("placed.csv").read_text().splitlines()
    assert placed[0] == given[0] + ",offset"
    assert [row.rpartition(",")[0] for row in placed[1:]] == given[1:]
    offsets = odt("layout", "blocks.csv", "--json").json["offsets"]
    assert [f"{row},{offsets[row[0]]}" for row in given[1:]] == placed[1:]


def test_layout_says_that_it_is_impossible_and_why(odt: Cli) -> None:
    Path("blocks.csv").write_text(BLOCKS)
    done = odt("layout", "blocks.csv", "--capacity", "80", "-o", "placed.csv")
    assert done.code == 3
    assert "can't fit: 84 B live at a time, the capacity is 80 B, 4 B too few; a" in done.error
    aligned = "id,lower,upper,size,alignment\na,0,1,3,1\nb,0,2,1,4\nc,1,2,3,4\n"
    Path("blocks.csv").write_text(aligned)
    done = odt("layout", "blocks.csv", "--capacity", "4")
    assert done.code == 3
    assert "4 B live at a time, but it is proven that no layout of the 3 blocks" in done.error
    assert done.error.endswith("a --capacity that works is 5")
    assert not Path("placed.csv").exists()


def test_layout_says_that_it_found_none(odt: Cli) -> None:
    Path("blocks.csv").write_text(BLOCKS)
    done = odt("layout", "blocks.csv", "--capacity", "84", "--time-limit", "0")
    assert done.code == 3
    assert "no layout within 84 B was found in 0 s, and none was ruled out" in done.error
    assert done.error.endswith("16 B too many; raise --time-limit or --capacity")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty; the first line names the columns id,lower,upper,size"),
        ("id,lower,upper\n", "column size is missing; needed are id,lower,upper,size"),
        ("id,lower,upper,size\n", "has no block below the header"),
        ("id,lower,begin,upper,size\n", "column lower is there twice"),
        ("id,lower,upper,size,color\n", "unknown column 'color'; known are id, lower,"),
        ("id,lower,upper,size\na,0,1\n", "2: has 3 fields, the header names 4"),
        ("id,lower,upper,size\na,0,1,x\n", "2 (id a): size 'x' is no integer"),
        ("id,lower,upper,size\na,0,1,1.5\n", "2 (id a): size '1.5' is no integer"),
        ("id,lower,upper,size\na,2,2,8\n", "2 (id a): ends at 2, not after its start at 2"),
        ("id,lower,upper,size\na,0,1,-8\n", "2 (id a): size -8 is negative"),
        ("id,lower,upper,size\na,0,1,8\n\na,1,2,8\n", "4: id 'a' stands in line 2 too"),
        ("id,lower,upper,size\na,0,1,9007199254740993\n", "size 9007199254740993 is beyond 2^53"),
        (
            "id,lower,upper,size\na,0,1,9007199254740992\nb,0,1,9007199254740992\n",
            "more than 2^53 bytes live at a time",
        ),
        ("id,lower,upper,size,alignment\na,0,1,8,0\n", "alignment 0 is below 1"),
        ("id,lower,upper,size,gaps\na,0,9,8,2-4\n", "gaps 2-4 is not supported; remove"),
        ("id,lower,upper,size,offset\na,0,9,8,0\n", "offset 0 is not supported; remove"),
        ("id,lower,upper,size,hint\na,0,9,8,16\n", "hint 16 is not supported; remove"),
    ],
)
def test_bad_block_files_are_one_line(odt: Cli, text: str, said: str) -> None:
    Path("blocks.csv").write_text(text)
    done = odt("layout", "blocks.csv", "--capacity", "64")
    assert done.code == 2
    assert done.error.startswith("blocks.csv:")
    assert said in done.error


@pytest.mark.parametrize("capacity", ["0", "-1", "many", "9007199254740993"])
def test_bad_capacities_are_one_line(odt: Cli, capacity: str) -> None:
    Path("blocks.csv").write_text(BLOCKS)
    done = odt("layout", "blocks.csv", f"--capacity={capacity}")
    assert done.code == 2
    assert done.error.startswith("--capacity: ")


def test_a_layout_that_cant_be_written_is_told_before_the_search(odt: Cli) -> None:
    Path("blocks.csv").write_text(BLOCKS)
    done = odt("layout", "blocks.csv", "-o", "nowhere/placed.csv")
    assert done.code == 1
    assert done.error == "nowhere/placed.csv: can't write: nowhere is no folder"
    done = odt("layout", "absent.csv")
    assert done.code == 1
    assert done.error.startswith("absent.csv: can't read:")


def test_block_files_with_the_other_names_of_columns(odt: Cli) -> None:
    Path("blocks.csv").write_text("buffer,start,end,size,gaps,hint\na,0,2,8,,-1\nb,2,3,8,,\n")
    done = odt("layout", "blocks.csv", "--json")
    assert done.json["live_peak_bytes"] == done.json["arena_bytes"] == 16

"""The project file, and ``odt-plan init``: the same options as on the command line, by name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import typer
from cli_run import Cli

from odt_plan import cli, planning
from odt_plan.ir.errors import UsageError
from odt_plan.planning import PlanOptions
from odt_plan.project_file import load_project, project_keys

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "digits_cnn.onnx"


class Planned:
    """Runs ``plan`` and keeps the options that it would plan by."""

    def __init__(self, odt: Cli, patch: pytest.MonkeyPatch) -> None:
        self._odt, self._seen = odt, list[PlanOptions]()
        patch.setattr(planning, "run_plan", lambda options, _: self._seen.append(options))

    def __call__(self, *words: str | Path) -> PlanOptions:
        done = self._odt(*words)
        assert done.code == 0, done.err
        return self._seen.pop()


@pytest.fixture
def planned(odt: Cli, monkeypatch: pytest.MonkeyPatch) -> Planned:
    return Planned(odt, monkeypatch)


def project(folder: Path, text: str, name: str = "odt-plan.yaml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ram: 320KB\nflash: 0x10_0000", ("--ram", "320KB", "--flash", "0x10_0000")),
        ("device: rp2040\nbatch: 8", ("--device", "rp2040", "--batch", "8")),
        ("train: [last, 'fc*=0.5']", ("--train", "last", "--train", "fc*=0.5")),
        ("train: last", ("--train", "last")),
        ("keep-output: [yes, 1]", ("--keep-output", "yes", "--keep-output", "1")),
        ("fold-batchnorm: false", ("--no-fold-batchnorm",)),
        ("qas: no", ("--no-qas",)),
        ("json: true\nquiet: true\nforce: yes", ("--json", "-q", "--force")),
        ("latency: 0.5\ngap: 1e-2", ("--latency", "0.5", "--gap", "1e-2")),
        ("micro-batches: auto", ("--micro-batches", "auto")),
        ("min-steps: 1_000", ("--min-steps", "1000")),
        ("objective: learn=1,ram=0.5", ("--objective", "learn=1,ram=0.5")),
        ("explain: conv2", ("--explain", "conv2")),
        ("calib: synthetic", ("--calib", "synthetic")),
    ],
)
def test_a_file_says_what_the_command_line_says(
    planned: Planned, tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    project(tmp_path, text, "x.yaml")
    assert planned("--project", "x.yaml", MODEL) == planned(MODEL, *words)


def test_keys_are_the_names_of_all_options(odt: Cli, tmp_path: Path) -> None:
    """Those of the help; one that is none is refused, with its line and the nearest name."""
    listed = re.findall(r"^  (?:-\w, )?--([a-z-]+)", odt("plan", "--help").out, re.MULTILINE)
    keys = {*listed, "model"} - {"project", "help"}
    assert {"micro-batches", "freeze-before", "output", "json", "seed"} <= keys
    plan = cast(Any, typer.main.get_command(cli.app)).commands["plan"]
    assert set(project_keys(plan)) == keys
    for key in keys:
        path = project(tmp_path, f"# line 1\n{key}: {{a: 1}}\n", "x.yaml")
        with pytest.raises(UsageError) as e:
            load_project(path, project_keys(plan))
        assert str(e.value).startswith(f"{path}:2: {key}: ")
        assert "is no option" not in str(e.value)
    for key in ("project", "help", "as-json", "fold_batchnorm", "no-qas"):
        error = odt("plan", "--project", project(tmp_path, f"{key}: 1\n", "x.yaml")).error
        assert f"x.yaml:1: {key}: is no option of plan; " in error
    wrong = project(tmp_path, "model: m.onnx\nmicro-batchs: 2\n", "x.yaml")
    told = f"{wrong}:2: micro-batchs: is no option of plan; did you mean micro-batches?"
    assert odt("plan", "--project", wrong).error == told


def test_the_command_line_counts_before_the_file(planned: Planned, tmp_path: Path) -> None:
    project(tmp_path, f"model: {MODEL}\nseed: 3\ntrain: [last]\nqas: false\nram: 1MB\n")
    options = planned("plan", "--train", "bias", "--qas", "--seed", "4")
    assert (options.seed, options.training.train, options.training.qas) == (4, ["bias"], True)
    assert (options.ram, options.model) == ("1MB", MODEL)


def test_paths_are_relative_to_the_file(planned: Planned, tmp_path: Path) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    text = "model: m.onnx\ndevice: b.yaml\noutput: out\ncalib: c.npz\nimportance: t.csv\n"
    options = planned("--project", project(folder, text))
    given = Path("sub") if not options.model.is_absolute() else folder
    assert options.model == given / "m.onnx"
    assert options.device == str(given / "b.yaml")
    assert options.output == given / "out"
    assert options.training.calib == given / "c.npz"
    assert options.training.importance == str(given / "t.csv")
    text = "model: m.onnx\ndevice: rp2040\nimportance: prior\ncalib: synthetic"
    names = planned("--project", project(folder, text))
    assert (names.device, names.training.importance) == ("rp2040", "prior")
    assert names.training.calib == Path("synthetic")
    absolute = planned("--project", project(folder, f"model: {MODEL}\n"))
    assert absolute.model == MODEL


def test_a_file_here_is_read_only_without_a_model(planned: Planned, tmp_path: Path) -> None:
    project(tmp_path, f"model: {MODEL}\nseed: 3\n")
    assert planned("plan").seed == 3
    assert planned("plan", "--gap", "0.5").seed == 3
    assert planned("plan", MODEL).seed == 0
    assert planned(MODEL).seed == 0


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("seed: 3\n", "odt-plan.yaml: names no model; add"),
        ("qas: 1\n", "odt-plan.yaml:1: qas: is true or false"),
        ("seed: [1, 2]\n", "odt-plan.yaml:1: seed: takes one value, not a list"),
        ("seed:\n", "odt-plan.yaml:1: seed: takes a value, as on the command line"),
        ("train: [{a: 1}]\n", "odt-plan.yaml:1: train: takes a value, or a list of values, as"),
        ("model: m\nseed: x\n", "odt-plan.yaml:2: Invalid value for '--seed': "),
        ("model: m\nsolver: best\n", "odt-plan.yaml:2: Invalid value for '--solver': "),
        ("model: m\ngap: 7\n", "odt-plan.yaml:2: Invalid value for '--gap': "),
        ("- seed\n", "odt-plan.yaml:1: a project is a mapping of fields"),
        ("seed: 1\nseed: 2\n", "odt-plan.yaml:2: seed: given twice (first in line 1)"),
        ("seed: [\n", "odt-plan.yaml:2: broken YAML: "),
        ("a: &a 1\nb: *a\n", "odt-plan.yaml:2: alias *a; write the value itself"),
    ],
)
def test_a_wrong_file_is_told_with_its_line(
    odt: Cli, tmp_path: Path, text: str, error: str
) -> None:
    project(tmp_path, text)
    done = odt("plan")
    assert done.code == 2
    assert done.error.startswith(error)


def test_a_wrong_word_on_the_command_line_is_not_the_files(odt: Cli, tmp_path: Path) -> None:
    project(tmp_path, f"model: {MODEL}\nseed: 3\n")
    assert odt("plan", "--seed", "x").error.startswith("Invalid value for '--seed': ")


def test_no_model_and_no_file(odt: Cli, tmp_path: Path) -> None:
    done = odt("plan", "--ram", "1MB")
    assert done.code == 2
    assert "Missing argument 'MODEL.onnx', and there is no odt-plan.yaml here" in done.error
    assert "No such file" in odt("plan", "--project", "none.yaml").error
    empty = project(tmp_path, "seed: 1\n", "x.yaml")
    assert "the file names no model" in odt("plan", "--project", empty).error


# ---- init ---------------------------------------------------------------------------------------


def test_init_writes_what_plan_reads(odt: Cli, planned: Planned, tmp_path: Path) -> None:
    shutil.copy(MODEL, tmp_path / "net: 1.onnx")  # a name that YAML has to quote
    done = odt("init", "--yes", "--device", "rp2040", "--objective", "latency")
    assert (done.code, done.err) == (0, "")
    options = planned("plan")
    assert (options.model, options.device) == (Path("net: 1.onnx"), "rp2040")
    assert options.objective == "latency"

    before = (tmp_path / "odt-plan.yaml").read_bytes()
    words = ("init", "--yes", "--ram", "A=64KB,B=1KB", "--flash", "1MB")
    assert odt(*words).error.startswith("odt-plan.yaml: exists; choose another -o")
    assert (tmp_path / "odt-plan.yaml").read_bytes() == before
    assert odt(*words, "--force").code == 0
    options = planned("plan")
    assert (options.device, options.ram, options.flash) == (None, "A=64KB,B=1KB", "1MB")

    (tmp_path / "sub").mkdir()
    assert odt(*words, "-o", "sub/p.yaml").code == 0
    assert planned("--project", "sub/p.yaml").model == Path("sub/../net: 1.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net: 1.onnx", "odt-plan.yaml", "sub"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "--model is missing, and there is not one alone to take: no .onnx file here"),
        (("--model", "none.onnx"), "--model: none.onnx is no file"),
        (("--model", MODEL), "--device is missing, or --ram and --flash"),
        (("--model", MODEL, "--ram", "1MB"), "--device is missing, or --ram and --flash"),
        (("--model", MODEL, "--device", "rp2041"), "device 'rp2041' is not known; did you mean"),
        (("--model", MODEL, "--ram", "much", "--flash", "1MB"), "--ram: 'much' is not a size"),
        (("--model", MODEL, "--device", "rp2040", "--objective", "fun"), "--objective: "),
    ],
)
def test_init_writes_nothing_that_is_wrong(
    odt: Cli, tmp_path: Path, words: tuple[str | Path, ...], error: str
) -> None:
    done = odt("init", *words)  # no terminal: nothing is asked
    assert done.code == 2
    assert done.error.startswith(error)
    assert not list(tmp_path.iterdir())


def test_init_asks_on_a_terminal(tmp_path: Path) -> None:
    shutil.copy(MODEL, tmp_path / "net.onnx")
    pty = pytest.importorskip("pty")  # Windows has none
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "odt_plan.cli", "init"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    os.write(ours, b"\n\n256KB\n1MB\nram\n")  # the model offered, no board, sizes, the goal
    done = subprocess.run(
        command, cwd=tmp_path, env=env, stdin=theirs, capture_output=True, text=True
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0, done.stderr
    assert "Model (.onnx file) [net.onnx]" in done.stdout
    text = (tmp_path / "odt-plan.yaml").read_text(encoding="utf-8")
    assert text.endswith("\nmodel: net.onnx\nram: 256KB\nflash: 1MB\nobjective: ram\n")

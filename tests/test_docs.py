"""What the documents show: every console session is run, every option that they name exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import typer
from board import lane
from cli_run import Cli
from onnx import TensorProto, helper, numpy_helper, save

from odt_plan.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Lines that hang on the compiler that is there, or on the clock.
VARIES = ("solver", "built", "board", "measured")
needs_board = pytest.mark.skipif(not lane.has_zig_lane(), reason="needs ziglang and unicorn")


class Session(NamedTuple):
    """A console block: its commands, each with the lines that it shows."""

    title: str
    commands: list[tuple[str, list[str]]]


def blocks(page: Path, language: str) -> Iterator[tuple[str, list[str]]]:
    """The fenced blocks of a language, each with the heading above it."""
    title, inside, lines = "", None, list[str]()
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if inside == language:
                yield title, lines
            inside, lines = (line[3:] if inside is None else None), []
        elif inside is None and line.startswith("#"):
            title = line.lstrip("# ")
        else:
            lines.append(line)


def sessions(page: Path) -> list[Session]:
    found = []
    for title, lines in blocks(page, "console"):
        commands: list[tuple[str, list[str]]] = []
        for line in lines:
            if line.startswith("$ "):
                commands.append((line[2:], []))
            else:
                commands[-1][1].append(line)
        found.append(Session(title, commands))
    return found


def matches(shown: str, line: str, *, numbers: bool) -> bool:
    """Whether a line is what a page shows; ``...`` stands for anything."""
    if shown.split(" ")[0] in VARIES:
        return line.split(" ")[0] == shown.split(" ")[0]
    pattern = ".*".join(map(re.escape, shown.rstrip().split("...")))
    if not numbers:  # of training in the host's order of sums
        pattern = re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", pattern)
    return re.fullmatch(pattern, line.rstrip()) is not None


def compare(command: str, shown: list[str], told: list[str]) -> None:
    """All lines that are shown are told in this order; between ``...`` no other ones are."""
    numbers = not command.startswith("odt-plan run")
    at, free = 0, False
    for line in shown:
        if line == "...":
            free = True
            continue
        while at < len(told) and free and not matches(line, told[at], numbers=numbers):
            at += 1
        assert at < len(told), f"{command}\n{line}\nis not told:\n" + "\n".join(told)
        assert matches(line, told[at], numbers=numbers), f"{command}\n{line}\n{told[at]}"
        at, free = at + 1, False
    assert free or at == len(told), f"{command}\nnot shown: {told[at:]}"


def model(folder: Path, name: str, op: str, shape: list[int | str]) -> None:
    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "fc"),
        helper.make_node(op, ["a"], ["b"], "where"),
        helper.make_node("Cast", ["b"], ["y"], "cast", to=TensorProto.FLOAT),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, name, [x], [y], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save(made, folder / f"{name}.onnx")


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with what the commands of docs/faq.md name."""
    for example in (ROOT / "examples").glob("digits*"):
        shutil.copy(example, tmp_path)
    model(tmp_path, "picks", "NonZero", [1, 4])
    model(tmp_path, "lengths", "Relu", ["batch", "length", 4])
    (tmp_path / "typo.yaml").write_text("model: digits_cnn.onnx\nram: 320KB\nflsh: 1MB\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "plan.svg").write_text("mine")
    (tmp_path / "dump.bin").write_bytes(b"ODTP" + bytes(range(60)))
    return tmp_path


def run(odt: Cli, command: str, shown: list[str]) -> None:
    done = odt(*shlex.split(command)[1:])
    told = [line.rstrip() for line in (done.err + done.out).splitlines()]
    compare(command, shown, told)


def test_answers(odt: Cli, workplace: Path) -> None:
    """docs/faq.md, from the first command to the last: the later ones use what is there then."""
    found = sessions(ROOT / "docs" / "faq.md")
    assert len(found) > 12
    for session in found:
        for command, shown in session.commands:
            run(odt, command, shown)


@needs_board
def test_demo(odt: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README shows of ``make demo``, whose commands these are."""
    (session,) = sessions(ROOT / "README.md")
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ndemo:")[2]
    lines = re.findall(r"\t\$\(BIN\)/(.*)\n", recipe.partition("\n\n")[0] + "\n")
    assert [command for command, _ in session.commands] == lines
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command, shown in session.commands:
        if command.startswith("odt-plan"):
            run(odt, command, shown)
            continue
        words = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        compare(command, shown, done.stdout.splitlines())
    assert {"plan.json", "plan.svg", "memory.svg", "report.html", "digits_cnn.c"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


def options(words: list[str]) -> tuple[str, set[str]]:
    """The command of a line, and the options that it knows."""
    command = typer.main.get_command(app)
    path = []
    for word in words:
        children = getattr(command, "commands", {})
        if word not in children:
            break
        command, path = children[word], [*path, word]
    if not path:
        command, path = command.commands["plan"], ["plan"]
    return " ".join(path), {o for p in command.params for o in (*p.opts, *p.secondary_opts)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_of_all_commands_exist(page: Path) -> None:
    """Of each command line in a block; those in a console session are run besides."""
    for language in ("", "console"):
        for _, lines in blocks(page, language):
            for line in lines:
                if not (line := line.removeprefix("$ ")).startswith("odt-plan "):
                    continue
                words = shlex.split(line, comments=True)
                name, known = options(words[1:])
                given = {w.partition("=")[0] for w in words if re.match(r"--?[a-z]", w)}
                assert given <= known | {"--help"}, f"{page.name}: {name} has no {given - known}"

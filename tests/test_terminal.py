"""The report on any terminal: width, colours, completion, and how much is told."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_run import Cli
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from odt_plan.tables import print_table

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "digits_cnn.onnx"
NAME = "features.10.block.conv.weight"


def printed(width: int) -> str:
    """A table of long names and numbers, on a terminal of a width."""
    table = Table("layer", "tensor", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("importance", justify="right")
    table.add_row(Text("features.10"), Text(NAME), Text("1,234,567,890.8"))
    out = io.StringIO()
    print_table(Console(file=out, width=width, color_system=None), table)
    return out.getvalue()


@pytest.mark.parametrize("width", [20, 40, 45, 50, 60, 80, 200])
def test_tables_lose_nothing(width: int) -> None:
    """Numbers stay whole, and so do names when the lines of a cell are joined."""
    text = printed(width)
    assert "…" not in text
    assert "1,234,567,890.8" in text
    lines = text.splitlines()
    if "tensor:" not in text:  # a table
        begin = lines[1].index("tensor")
        end = next(line.index("1,234,567,890.8") for line in lines if "1,234,567,890.8" in line)
        assert "".join(line[begin:end].strip() for line in lines[3:]) == NAME
        assert max(map(len, lines)) <= width
    else:
        assert f"tensor: {NAME}\n" in text
    assert ("tensor:" in text) == (width < 46)


def test_a_table_that_does_not_fit_becomes_lines() -> None:
    lines = [line for line in printed(30).splitlines() if line]
    assert lines == ["features.10", f"  tensor: {NAME}", "  importance: 1,234,567,890.8"]


@pytest.mark.parametrize("width", [24, 40, 80])
def test_long_heads_fold_before_their_numbers(width: int) -> None:
    head = "a/folder/with/a/long/name/plan.json"
    table = Table("figure", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(head, justify="right")
    table.add_row(Text("RAM"), Text("1,234,567 B"))
    out = io.StringIO()
    print_table(Console(file=out, width=width, color_system=None), table)
    heads, rows = out.getvalue().split("─")[0], out.getvalue().splitlines()
    row = next(line for line in rows if "RAM" in line)
    assert row.split() == ["RAM", "1,234,567", "B"]
    assert "".join(heads.replace("figure", "").split()) == head
    assert max(map(len, rows)) <= width


def on_a_terminal(*words: str, columns: int, **env: str) -> str:
    pty = pytest.importorskip("pty")  # Windows has none
    ours, theirs = pty.openpty()
    inherited = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    told = {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": str(columns), "TERM": "xterm", **env}
    command = [sys.executable, "-m", "odt_plan.cli", *words]
    process = subprocess.Popen(command, env={**inherited, **told}, stdout=theirs, stderr=theirs)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert process.wait() == 0
    return b"".join(parts).decode()


def test_forty_columns_and_colours() -> None:
    text = on_a_terminal("devices", columns=40)
    assert "…" not in text
    for name in ("stm32f746g-disco", "cortex-m0plus", "Raspberry Pi Pico (RP2040)"):
        assert name in text
    assert "\x1b[" in text


def test_no_color_is_without_colours() -> None:
    """As no-color.org has it: bold may stay, colours may not."""
    text = on_a_terminal("devices", columns=200, NO_COLOR="1")
    codes = {c.split("m")[0] for c in text.split("\x1b[")[1:]}
    assert codes <= {"0", "1", "2"}


def test_verbose_tells_all_by_name(odt: Cli) -> None:
    words = (MODEL, "--ram", "64KB", "--flash", "1MB", "--train", "last")
    short, long = odt(*words), odt(*words, "-v")
    assert short.code == long.code == 0
    assert "frozen    conv1.weight, conv1.bias" in long.out
    assert "saved tensor" in long.out
    rows = [line.split() for line in long.out.splitlines()]
    assert ["layer", "operator", "result", "parameters"] in [row[:4] for row in rows]
    (layer,) = (row for row in rows if row[:2] == ["classifier", "Gemm"])
    assert layer[2:5] == ["f32[1,10]", "updated", "40"]
    assert layer[-1] == "326,792"  # of weight and bias, which the other table tells apart
    assert ["conv1", "Conv", "f32[1,64,8,8]", "frozen"] in [row[:4] for row in rows]
    assert "Gemm" not in short.out
    assert "frozen    conv1" not in short.out
    assert len(short.out) < len(long.out)
    both = odt(*words, "-v", "-q")
    assert both.code == 2
    assert both.error == "--quiet and --verbose contradict each other; give one"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("odt-plan di", ["diff"]),
        ("odt-plan model.onnx --micro", ["--micro-batches"]),
        ("odt-plan plan --solver h", ["highs"]),
        ("odt-plan nonsense --micro", ["--micro-batches"]),
    ],
)
def test_shells_complete(
    odt: Cli, monkeypatch: pytest.MonkeyPatch, line: str, offered: list[str]
) -> None:
    monkeypatch.setenv("_ODT_PLAN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    done = odt()
    assert (done.code, done.out.split(), done.err) == (0, offered, "")


def test_completion_is_offered(odt: Cli) -> None:
    assert "--install-completion" in odt("--help").out

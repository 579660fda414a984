"""The table of supported operators: ``odt-plan ops`` and docs/ops.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_run import Cli

from odt_plan.ir.onnx_ops import RULES
from odt_plan.ir.onnx_support import WRITTEN_AS, Support, supported
from odt_plan.ir.onnx_unroll import CONTROL_FLOW, DEFINED
from odt_plan.ir.opdef import all_ops
from odt_plan.operators import markdown

NAMES = sorted((*RULES, *CONTROL_FLOW, *DEFINED))
PAGE = Path(__file__).parents[1] / "docs" / "ops.md"


def row(name: str) -> Support:
    return next(r for r in supported() if r.operator == name)


def test_page_is_up_to_date() -> None:
    """``odt-plan ops --markdown > docs/ops.md`` makes it anew."""
    assert PAGE.read_text(encoding="utf-8").splitlines() == "\n".join(markdown()).splitlines()


def test_every_rule_has_a_row_of_known_operators() -> None:
    assert [r.operator for r in supported()] == NAMES
    assert {o for r in supported() for o in r.written_as} <= set(all_ops())
    assert set(WRITTEN_AS) <= set(NAMES)


def test_rows_tell_facts() -> None:
    assert row("Conv") == Support("Conv", ("Conv",), False, True, True, 8, None)
    assert row("Floor") == Support("Floor", ("Floor",), False, False, False, 8, None)
    assert row("Upsample") == Support("Upsample", ("Resize",), False, True, False, 8, 9)
    assert row("GroupNormalization").last_opset is None  # gone in 18, back in 21
    assert all(r.last_opset is None or r.first_opset <= r.last_opset for r in supported())
    assert row("Range").constant
    assert not row("Range").gradient


@pytest.mark.parametrize("option", ["--json", "--markdown", None])
def test_command(odt: Cli, option: str | None) -> None:
    ran = odt("ops", *([option] if option else []))
    assert ran.code == 0, ran.err
    if option == "--json":
        assert [r["operator"] for r in ran.json] == NAMES
    elif option == "--markdown":
        assert ran.out.splitlines() == "\n".join(markdown()).splitlines()
    else:
        assert "SpaceToDepth" in ran.out
        assert f"{len(NAMES)} operators of ONNX" in ran.out

"""Damaged files, a sample of ``benchmarks/fuzz.py``: no crash, no hang, no wrong success."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from benchmarks import fuzz, fuzz_judge, fuzz_mutants
from benchmarks.fuzz_judge import Verdict, judge
from onnx import helper
from onnx_files import model, node, save

from odt_plan.ir.errors import UnsupportedModelError, UsageError
from odt_plan.ir.graph import Graph


def test_a_sample_of_mutants() -> None:
    """In a subprocess: one that a mutant ends counts as a defect."""
    numbers = range(10_000, 10_200)
    found = list(fuzz.verdicts(numbers))
    defects = [f"{number} ({what}): {v.text}" for number, what, v in found if v.kind == "defect"]
    assert not defects, "\n".join(defects)
    assert sorted(number for number, _, _ in found) == sorted(numbers)
    kinds = Counter(v.kind for _, _, v in found)
    assert kinds["agrees"] >= 10, kinds  # some changes don't hurt
    assert kinds["refused"] >= 100, kinds


def test_mutants_have_numbers() -> None:
    """The same number is the same file; every kind of change occurs, and changes something."""
    assert fuzz_mutants.mutant(7) == fuzz_mutants.mutant(7)
    done = {
        part for i in range(600) for part in fuzz_mutants.mutant(i)[0].split(": ")[1].split(", ")
    }
    assert done == {m.__name__.strip("_") for m in fuzz_mutants.MUTATIONS} | {"bytes"}
    seeds = fuzz_mutants.all_seeds()
    changed = sum(fuzz_mutants.mutant(i)[1] not in seeds.values() for i in range(100))
    assert changed > 85


def test_own_seeds_are_right(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for name, data in fuzz_mutants.all_seeds().items():
        if name.endswith(" 0"):
            path = tmp_path / "seed.onnx"
            path.write_bytes(data)
            assert judge(path) == Verdict("agrees", "onnxruntime"), name


# -- the judge -------------------------------------------------------------------------------------


def _relu(tmp_path: Path) -> Path:
    return save(model([node("Relu", "x", "y")], {"x": [1, 4]}, ["y"]), tmp_path)


def test_what_the_judge_calls_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _relu(tmp_path)
    assert judge(path).kind == "agrees"

    def imported(error: Exception | None) -> Verdict:
        def replacement(path: Path) -> Graph:
            if error is not None:
                raise error
            return wrong

        monkeypatch.setattr(fuzz_judge, "import_model", replacement)
        return judge(path)

    wrong = Graph("wrong")
    x = wrong.add_input("x", fuzz_judge.import_model(path).inputs[0].type)
    wrong.outputs.append(wrong.add_node("Tanh", (x,), name="y").out)
    verdict = imported(None)
    assert verdict.kind == "defect"
    assert "differs from onnxruntime: result 0 is" in verdict.text
    assert imported(KeyError("w")) == Verdict("defect", "import raises KeyError: 'w'")
    clear = UnsupportedModelError(f"{path}: y (Relu): is refused")
    assert imported(clear) == Verdict("refused", "FILE: y (Relu): is refused")
    for text in (
        "",
        "no file",
        f"{path}: two\nlines",
        f"{path}: Traceback",
        f"{path}: {'x' * 30_000}",
    ):
        assert imported(UnsupportedModelError(text)).kind == "defect", text


def test_a_process_that_ends_or_never_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages tell whose fault it is."""
    assert fuzz._ended(-11, "import").kind == "defect"
    assert fuzz._ended(-11, "oracle").kind == "unjudged"
    stages: list[str] = []
    judge(_relu(tmp_path), stages.append)
    assert stages == ["import", "run", "oracle"]


def test_opsets_newer_than_known_are_judged(tmp_path: Path) -> None:
    """They import with a warning, which is none of the strange ones."""
    proto = model([node("Relu", "x", "y")], {"x": [1, 4]}, ["y"])
    newest = onnx.defs.onnx_opset_version()
    proto.opset_import[0].CopyFrom(helper.make_opsetid("", newest + 1))
    assert judge(save(proto, tmp_path)).kind == "agrees"


def test_samples_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an oracle refuses them, too, as positions outside; else that is a defect."""
    nodes = [node("TopK", "x k", "v i"), node("GatherElements", "x i", "y", axis=0)]
    outside = model(nodes, {"x": [1, 4]}, ["y"], {"k": np.array([3])})
    verdict = judge(save(outside, tmp_path))
    assert verdict.kind == "refused"
    assert "is not in -1..0" in verdict.text

    def refuses(*_: object) -> None:
        raise UsageError("this sample is not taken")

    monkeypatch.setattr(fuzz_judge, "run", refuses)
    text = "running raises this sample is not taken; onnxruntime runs it"
    assert judge(_relu(tmp_path)) == Verdict("defect", text)

"""KWT-1, a transformer with public weights: outputs, a plan for a board, its C and its firmware."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from board import lane
from onnx_files import assert_close, outputs
from test_board import COMPILER, check_prediction, needs_zig, on_board
from test_c_backend import reference, samples

from odt_plan.backends.c import emit_c
from odt_plan.ir.errors import InfeasibleError
from odt_plan.ir.onnx_import import import_model
from odt_plan.planner.check import check
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request, make_plan

#: Parts of the last block: both normalizations, one product of each kind, the head.
TRAINED = (
    *("b.11.n1.weight", "b.11.n1.bias", "b.11.n2.weight", "b.11.n2.bias"),
    *("b.11.f1.bias", "b.11.o.bias", "head.weight", "head.bias"),
)


@pytest.fixture(scope="module")
def model(shared: Path) -> Path:
    return shared / "models" / "kwt1_op17.onnx"


@pytest.fixture(scope="module")
def last_block(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last block and the head as a model of their own."""
    path = tmp_path_factory.mktemp("kwt") / "last_block.onnx"
    whole = onnx.load(model)
    before = next(n for n in whole.graph.node if n.name == "/b.10/n2/LayerNormalization").output[0]
    onnx.utils.extract_model(str(model), str(path), [before], ["logits"])
    return path


def test_spoken_words(model: Path) -> None:
    """Features of real recordings give the logits of the original."""
    known = np.load(model.with_name("kwt1_real_audio_ref.npz"))
    graph = import_model(model)
    for mfcc, logits in zip(known["mfcc"], known["logits"], strict=True):
        (got,) = outputs(graph, {"mfcc": mfcc[None]})
        assert_close(got[0], logits)


def test_flash_takes_it_in_i8_only(model: Path) -> None:
    """607,304 parameters in f32 are more than 2 MiB."""
    request = Request(
        model,
        load_device("nucleo-u575zi-q"),
        train=("last",),
        with_baselines=False,
        with_relaxations=False,
    )
    with pytest.raises(InfeasibleError, match=r"flash: weights need 2,4\d\d,\d{3} B"):
        make_plan(request)
    layers = import_model(model).nodes
    pinned = tuple(f"{n.name}=i8" for n in layers if n.op == "Gemm" and n.name != "/head/Gemm")
    assert len(pinned) == 73
    done = make_plan(replace(request, calibration="synthetic", precision=(*pinned, "/head/*=f32")))
    assert done.plan.claims.flash_bytes.total < 900_000


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_plan_and_its_c(model: Path, tmp_path: Path) -> None:
    """With flash beside the chip's; within its RAM, sanitized, bit for bit as in NumPy."""
    board = load_device("stm32h743")
    done = make_plan(
        Request(model, board, train=TRAINED, flash_bytes=4 << 20, with_baselines=False)
    )
    plan, training = done.plan, done.training
    assert {u.candidate.param for u in training.updates} == set(TRAINED)
    assert plan.claims.ram_bytes.total <= board.ram_region()[1] - board.reserve.ram_bytes
    assert plan.claims.cycles == check(plan, training, board).cycles
    name = emit_c(plan, training, tmp_path)[0].stem
    program = lane.build_host(tmp_path, name)
    result = lane.run_host(program, lane.training_input(*samples(training, 2), 0.05))
    assert result.exit_code == 0, result.stdout
    assert result.value("selftest_exact") == 1
    assert result.files["output.bin"] == reference(plan, training, 2, 0.05)


@needs_zig
def test_last_block_on_the_board(last_block: Path, tmp_path: Path) -> None:
    """All of it trained, in three RAM regions: the bits of NumPy, the predicted instructions."""
    device = load_device("stm32h743")
    done = make_plan(Request(last_block, device, train=("all",), with_baselines=False))
    limits = lane.Limits.of(device)
    case = (done.plan, done.training)
    _, result = on_board(case, tmp_path, compiler=COMPILER, limits=limits)
    check_prediction(case, result, COMPILER)

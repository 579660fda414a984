"""Programs around the session of the emitted C: checkpoints, faults, the command line, a board."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import test_replay
from board import lane
from board.elf import Elf
from board.objects import link
from cli_run import Cli
from test_c_backend import needs_gcc, planned
from test_c_session import MADE, Host, batches, build, compare
from test_replay import DATA, DIGITS
from test_session import samples
from zoo import exhibit

from odt_plan.backends.c import emit_c, session_file
from odt_plan.backends.numpy import SessionOptions
from odt_plan.ir.training import TrainingSpec

ADAM2 = TrainingSpec(optimizer="adam", micro_batches=2)


# ---- checkpoints


@needs_gcc
@pytest.mark.parametrize("case", ["resnet-adam", "cnn-paged", "replay mlp-last"])
def test_a_checkpoint_is_gone_on_from(case: str, tmp_path: Path) -> None:
    """The last one before the end: its last epoch again, to the bits of the run without a break."""
    host = build(MADE[case](), tmp_path)
    data, validation = batches(host.training, 13, 0), batches(host.training, 9, 1)
    o = SessionOptions(lr=0.03, epochs=4, schedule="cosine", warmup=3, seed=5)
    history = compare(host, data, o, validation, tmp_path)
    whole = (tmp_path / "learned.bin").read_bytes()
    names = [tmp_path / f for f in ("session.bin", "again.bin", "checkpoint.bin")]

    def told() -> list[dict[str, Any]]:
        done = subprocess.run([host.program, *names], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert names[1].read_bytes() == whole
        return [json.loads(line) for line in done.stdout.splitlines()]

    first = told()
    second = told()
    assert first[-len(second) : -1] == second[:-1]
    assert [line["epoch"] for line in second if "epoch" in line] == [4]
    losses = [line["loss"] for line in second if "update" in line]
    assert losses == list(history.losses[-len(losses) :])
    assert not names[2].with_suffix(".bin.new").exists()
    good = names[2].read_bytes()
    for changed, status in ((good[:-1], 7), (good[:2], 6), (good[:90] + b"x" + good[91:], 7)):
        names[2].write_bytes(changed)
        done = subprocess.run([host.program, *names], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (status, "")
    names[2].write_bytes(good)
    names[0].write_bytes(session_file(host.plan, host.training, data, replace(o, seed=6), None))
    assert subprocess.run([host.program, *names], capture_output=True).returncode == 6


# ---- faults


@needs_gcc
@pytest.mark.parametrize("case", ["mlp", "paged-accumulate", "replay"])
def test_faults_change_nothing(case: str, tmp_path: Path) -> None:
    """Samples, slots and pages that fail, calls that end too early: the same bits, or a status."""
    e = exhibit("paged-accumulate")
    plan, training = e.plan, e.training
    if case != "paged-accumulate":
        plan, training = (
            planned(nets.mlp(), ADAM2) if case == "mlp" else test_replay.CASES["mlp-last"]()
        )
    name = emit_c(plan, training, tmp_path)[0].stem
    program = lane.build_host(
        tmp_path,
        name,
        selftest=False,
        defines=[f'SESSION_HEADER="{name}_train.h"'],
        main=lane.FIRMWARE / "session.c",
    )
    result = lane.run_host(program, {})
    assert result.exit_code == 0, result.stdout
    got = [line.split("=") for line in result.stdout.splitlines()]
    pages = [
        ["pages_fail", "1"], ["error_pages", "1"], ["halved", "0"], ["pages_fail_unjudged", "1"],
        ["pages_fail_anywhere", "0"],
        ["pages_fail_for_good", "5"], ["and_again", "5"], ["and_at_the_end", "5"],
    ]  # fmt: skip
    kept = dict(got[:42])["kept"]
    assert int(kept) > 0
    replay, paged = case == "replay", case == "paged-accumulate"
    assert got == [
        ["begin_null", "1"], ["step_null", "1"], ["run_null", "1"], ["end_null", "1"],
        ["step_before", "2"], ["run_before", "2"], ["end_before", "2"],
        ["no_net", "1"], ["no_sample", "1"], ["no_read", "4"],
        ["halvings_without_slots", "4"], ["judged_without_slots", "4"],
        ["patience_without_judging", "1"], ["no_samples", "11"],
        ["begin", "0"], ["order_outside", "10"],
        ["begin", "0"], ["not_ready", "2"],
        ["ram_slot_null", "1"], ["ram_slot_end", "1"], ["ram_slot_far", "1"],
        ["ram_slot_past", "1"],
        ["half_done", "1"],
        ["evaluate", "0"], ["evaluate_nothing", "0"], ["evaluate_pages", "0"],
        ["evaluate_changes", "0"], ["evaluate_loss", "1"], ["evaluate_label", "3"],
        ["evaluate_no_label", "1"], ["evaluate_no_sample", "1"], ["evaluate_null", "1"],
        ["kept", kept], ["differ", "0" if kept == "5" else "1"],
        ["cached", "24" if replay else "0"],  # 6 entries, 4 times again
        ["calls", "65" if replay else "66"],  # the last update of two is filled
        ["saves_more_than_better", "0"], ["slot_2", "0"], ["saves_unjudged", "4"],
        ["sample_fails", "1"], ["error_sample", "1"],
        *[["write_fails", "1"], ["error_storage", "1"]] * 6,
        ["write_fails_unjudged", "1"], ["reads", "1"],
        *(pages if paged else []),
        ["inference_between", "1"], ["after_the_end", "0"],
        ["order_matters", "1"], ["order_again", "1"], ["other_samples", "1"],
        ["interrupted_wrong", "0"], ["interrupted", "30"],
        ["in_pieces_wrong", "0"], ["in_pieces", "1"],
        ["no_storage_wrong", "0"], ["no_storage_better", "1"],
        ["no_storage_older", "0" if replay else "1"],  # whose epochs all get better
        ["rolled_back", "1"], ["slot_2", "79"], ["kept", "0"],
        ["not_finite", "12"], ["and_again", "12"], ["and_at_the_end", "12"], ["stopped", "1"],
        ["resumed_wrong", "0"], ["resumed", "1"],
        ["save_null", "1"], ["save_nowhere", "1"], ["resume_null", "1"], ["resume_nowhere", "1"],
        ["save_ended", "2"], ["resume_ended", "2"],
        ["save_fails", "1"], ["foreign", "1"], ["damaged", "1"], ["cut", "1"],
        ["other_options", "6"], ["not_begun", "2"], ["refused", "7"], ["begins_anew", "1"],
        ["refused_wrong", "0"],
    ]  # fmt: skip


# ---- the command line, and a board


@needs_gcc
@pytest.mark.parametrize("replay", [False, True])
def test_digits_by_the_command_line(replay: bool, odt: Cli, tmp_path: Path) -> None:
    """200 updates of the bundled model; what was learned goes back into the model file."""
    with np.load(DATA) as whole:
        some = {k: a[:40] if k.endswith("_val") else a[:100] for k, a in whole.items()}
    np.savez("some.npz", **some)
    words = ("--train", "last", "--replay", "100") if replay else ()
    made = odt(DIGITS, "--ram", "320KB", "--flash", "1MB", "--emit", "host", "-o", "out", *words)
    assert made.code == 0, made.err
    given = ("run", "out/plan.json", "--data", "some.npz", "--epochs", "2", "--lr", "0.02",
             "--schedule", "cosine", "--warmup", "20", "--seed", "3")  # fmt: skip
    wanted = odt(*given, "--exact", "--json", "--save", "numpy.npz").json
    written = odt(*given, "--c-session", "session.bin", "--json")
    assert written.json["file"] == "session.bin"
    assert (written.json["samples"], written.json["judged"]) == (100, 40)
    assert written.json["bytes"] == Path("session.bin").stat().st_size
    sources = [f for f in Path("out").glob("*.c") if not f.stem.endswith("_selftest")]
    command = ["gcc", *lane.STRICT, *lane.OPTIMISED]
    link(command, sources, [], Path("host"))
    done = subprocess.run(["./host", "session.bin", "learned.bin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["loss"] for line in told if "update" in line] == wanted["losses"]
    assert len(wanted["losses"]) == 200
    epochs = [line for line in told if "epoch" in line]
    assert [e["value"] for e in epochs] == [e["validation"]["accuracy"] for e in wanted["epochs"]]
    assert told[-1]["kept"] == wanted["kept_epoch"]
    assert told[-1].get("replayed", 0) == wanted["replayed"]
    assert (wanted["replayed"] > 0) == replay
    assert wanted["accuracy_after"] > wanted["accuracy_before"]
    for weights, target in (("learned.bin", "c.onnx"), ("numpy.npz", "numpy.onnx")):
        assert odt("export", "out/plan.json", weights, "-o", target).code == 0
    assert Path("c.onnx").read_bytes() == Path("numpy.onnx").read_bytes()
    for weights, target in (("learned.bin", "c.npz"), ("numpy.npz", "n.npz")):
        assert odt("export", "out/plan.json", weights, "--delta", "-o", target).code == 0
    with np.load("c.npz") as by_c, np.load("n.npz") as by_numpy, np.load("numpy.npz") as learned:
        assert set(by_c) == set(by_numpy) == set(learned)
        assert all(by_c[n].tobytes() == by_numpy[n].tobytes() and np.any(by_c[n]) for n in by_c)
    assert odt(*given, "--weight-decay", "0.1", "--c-session", "session.bin").code == 0
    done = subprocess.run(["./host", "session.bin"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "build everything with -DODTPLAN_WEIGHT_DECAY=1" in done.stderr


def test_command_line_refuses(odt: Cli, tmp_path: Path) -> None:
    assert odt(DIGITS, "--ram", "320KB", "--flash", "1MB", "-o", "out").code == 0
    delta = ("export", "out/plan.json", "--delta", "-o", "d.npz")
    assert odt(*delta).error == "--delta needs what was learned; give WEIGHTS behind the plan"
    Path("d.bin").write_bytes(b"ODTC" + bytes(20))
    assert "changes by a library of another plan" in odt(*delta, "d.bin").error
    told = odt("export", "out/plan.json", "d.bin", "-o", "t.onnx")
    assert told.error == "d.bin: holds changes, not weights; give --delta"
    given = ("run", "out/plan.json", "--data", DATA, "--c-session")
    assert odt(*given, "s.bin", "--save", "w.npz").error.startswith("--c-session trains nothing")
    assert odt(*given, "s.bin", "--clip", "1").error.startswith("--clip: this plan changes")
    assert odt(*given, "no/s.bin").error == "no/s.bin: can't write: no is no folder"
    told = odt(*given, "out", "--quiet")
    assert told.code == 1
    assert told.error.startswith("out: can't write the session: ")
    assert not Path("s.bin").exists()
    told = odt(*given, "s.bin")
    assert told.out.startswith("session of 320 samples, 180 to judge by, written to s.bin: ")


@pytest.mark.skipif(not lane.has_gcc(), reason="needs arm-none-eabi-gcc")
def test_a_cortex_m4_needs_no_libm(tmp_path: Path) -> None:
    """The session links into a firmware without any library but the compiler's own."""
    plan, training = test_replay.CASES["resnet-adam-accumulate"]()
    name = emit_c(plan, training, tmp_path)[0].stem
    image = lane.build(
        tmp_path, name, "cortex-m4", "gcc", selftest=False, main=lane.FIRMWARE / "session.c",
        optimise="-Os", defines=[f'SESSION_HEADER="{name}_train.h"'],
    )  # fmt: skip
    symbols = Elf(image).symbols
    assert {f"{name}_session_begin", f"{name}_session_step", "odtplan_session_step"} <= set(symbols)
    assert sum(s.bytes for n, s in symbols.items() if n.startswith("odtplan_session")) < 4096


@pytest.mark.skipif(
    not (lane.has_gcc() and lane.has_zig_lane()), reason="needs arm-none-eabi-gcc and unicorn"
)
def test_faults_on_a_board(tmp_path: Path) -> None:
    """The same program on an emulated Cortex-M4 as on this machine, checksums included."""
    plan, training = planned(nets.mlp(), ADAM2)
    name = emit_c(plan, training, tmp_path)[0].stem
    defines = [f'SESSION_HEADER="{name}_train.h"', "TELL_CHECKSUMS"]
    options: Any = {"selftest": False, "main": lane.FIRMWARE / "session.c", "defines": defines}
    here = lane.run_host(lane.build_host(tmp_path, name, **options), {})
    image = lane.build(tmp_path, name, "cortex-m4", "gcc", **options)
    there = lane.run(image, "cortex-m4", "unicorn")
    assert there.exit_code == 0, there.stdout
    assert there.stdout == here.stdout
    assert here.stdout.count("checksum=0x") > 20


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_cmake_builds_the_host_program(tmp_path: Path) -> None:
    plan, training = planned(nets.mlp())
    emit_c(plan, training, tmp_path / "src", host=True)
    made = ["cmake", "-S", tmp_path / "src", "-B", tmp_path / "build"]
    for word, there in (("OFF", False), ("ON", True)):
        subprocess.run([*made, f"-DMLP_HOST={word}"], check=True)
        subprocess.run(["cmake", "--build", tmp_path / "build"], check=True)
        assert (tmp_path / "build" / "mlp_host").exists() == there
    data, o = samples(training, 9), SessionOptions(lr=0.05, epochs=1, weight_decay=0.5)
    host = Host(plan, training, tmp_path / "build" / "mlp_host")
    compare(host, data, o, None, tmp_path)

"""What the emitted C keeps in flash: the last good state, wherever power is lost; what it sends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nets
import numpy as np
import plans
import pytest
import test_int8_training
import test_optimizer_state
from board import lane
from test_c_backend import CASES, Planned, needs_gcc, planned
from test_optimizer_state import BOARD

from odt_plan.backends.c import emit_c
from odt_plan.backends.c.saved import load_delta, load_saved
from odt_plan.backends.numpy import Runtime
from odt_plan.ir.errors import UsageError
from odt_plan.ir.training import TrainingSpec
from odt_plan.planner.store import saved_bytes, written_bytes

#: What flash is programmed by, and the sectors that are erased, as in store.c: any byte, with ECC,
#: pages and sectors of a QSPI NOR (RP2040), sectors of one page each.
GEOMETRIES = ((1, 128), (8, 128), (32, 128), (256, 4096), (256, 256))


def adam(_: Path) -> Planned:
    return planned(nets.mlp((2, 3, 2)), TrainingSpec(optimizer="adam"))


def pages(_: Path) -> Planned:
    """A state of several pages, whose tensors do not end where these do."""
    return planned(nets.mlp((2, 6, 4)), TrainingSpec(optimizer="adam"))


def stored(folder: Path) -> Planned:
    """Optimizer tensors in the storage are saved, too."""
    asked = {"storage": "sdcard", "ram_bytes": 500, "state": ("paged,sgd",)}
    board = plans.without_dma(BOARD)
    done = test_optimizer_state.planned(folder, nets.mlp((2, 3, 2)), board, **asked)
    assert all(u.paged for u in done.training.updates)
    return done.plan, done.training


@needs_gcc
@pytest.mark.parametrize(
    ("case", "program_bytes"), [(adam, 32), (stored, 32), (stored, 256), (pages, 256)]
)
def test_power_is_lost_at_every_byte(
    case: Callable[[Path], Planned], program_bytes: int, tmp_path: Path
) -> None:
    """Each byte that is written, each sector that is erased, three ways to leave it."""
    plan, training = case(tmp_path)
    name = emit_c(plan, training, tmp_path / "c", program_bytes=program_bytes)[0].stem
    least = 256 if case is pages else 1
    defines = [f'STORE_HEADER="{name}_store.h"', f"LEAST_UNIT={least}u"]
    main = lane.FIRMWARE / "store.c"
    program = lane.build_host(tmp_path / "c", name, selftest=False, defines=defines, main=main)
    result = lane.run_host(program, {})
    assert result.exit_code == 0, result.stdout
    ram = plan.claims.ram_bytes
    homes = {v.name for u in training.updates for v in u.paged}
    paged = [b for b in plan.buffers if b.space == "storage" and b.value in homes]
    image = 24 + 16 + ram.total - ram.arena + max((b.offset + b.bytes for b in paged), default=0)

    assert saved_bytes(plan, training) == image

    def units(size: int, unit: int) -> int:
        return -(-size // unit) * unit

    expected = []
    for unit, sector in GEOMETRIES:
        if not least <= unit <= program_bytes:
            continue
        sectors = units(units(image, max(unit, 32)) + max(unit, 32), sector) // sector
        written = units(image, unit) + units(8, unit)
        assert written == written_bytes(image, unit)
        expected += [["unit", str(unit)], ["written", str(written)], ["erased", str(sectors)]]
        expected += [["cuts", str(4 * 3 * (written + sectors))], ["foreign", "1"], ["wrong", "0"]]
    refused = ("null", "nowhere", "no_unit", "no_power_of_2", "large_unit", "small_slot")
    expected += [[key, "11"] for key in (*refused, "no_whole_units")]
    expected += [[key, "44"] for key in ("no_erase", "no_write", "no_read")]
    assert [line.split("=") for line in result.stdout.splitlines()] == [
        *expected, ["not_ready", "2"],
    ]  # fmt: skip
    dump = tmp_path / "slot.bin"
    dump.write_bytes(result.files["slot.bin"])
    runtime = Runtime(plan, training)
    load_saved(runtime, dump)  # a slot is a saved state
    assert runtime.updates == 3


@needs_gcc
@pytest.mark.parametrize(
    "case",
    [CASES["cnn-micro"], CASES["cnn-partly"], CASES["cnn-adapters"], CASES["resnet-modules"],
     test_int8_training.CASES["momentum-accumulate"]],
)  # fmt: skip
def test_changes_are_those_of_the_saved_state(
    case: Callable[[], Planned], tmp_path: Path
) -> None:
    """Bit for bit; floats, parts of weights, adapters, modules, integers."""
    plan, training = case()
    name = emit_c(plan, training, tmp_path)[0].stem
    defines = [f'DELTA_HEADER="{name}_delta.h"']
    main = lane.FIRMWARE / "delta.c"
    program = lane.build_host(tmp_path, name, selftest=False, defines=defines, main=main)
    result = lane.run_host(program, {})
    assert result.exit_code == 0, result.stdout
    size = str(24 + 4 * sum(u.value.type.size for u in training.updates))
    steps = 3 * plan.training.micro_batches
    assert [line.split("=") for line in result.stdout.splitlines()] == [
        ["not_ready", "2"], ["init", "0"], *[["train", "0"]] * steps, ["null", "1"],
        ["nowhere", "1"], ["delta", "0"], ["bytes", size], ["size", size], ["gaps", "0"],
        ["fails", "1"], ["save", "0"],
    ]  # fmt: skip
    for file, data in result.files.items():
        (tmp_path / file).write_bytes(data)
    sent = load_delta(plan, training, tmp_path / "delta.bin")
    runtime = Runtime(plan, training)
    before = runtime.params()
    load_saved(runtime, tmp_path / "saved.bin")
    after, changes = runtime.params(), runtime.changes()
    assert set(sent) == {u.candidate.param for u in training.updates}
    for param, change in changes.items():
        assert sent[param].tobytes() == change.tobytes(), param
        np.testing.assert_allclose(change, after[param] - before[param], rtol=1e-4, atol=1e-6)
    assert all(np.any(change) for change in changes.values())
    good = result.files["delta.bin"]
    wrong = {
        "it is cut": good[:20],
        "another plan": good[:8] + bytes(4) + good[12:],
        "cut or damaged": good[:-1],
        "cut or damaged; read": good[:40] + bytes([good[40] ^ 1]) + good[41:],
    }
    for told, content in wrong.items():
        (tmp_path / "wrong.bin").write_bytes(content)
        with pytest.raises(UsageError, match=told):
            load_delta(plan, training, tmp_path / "wrong.bin")

"""The emitted firmware on emulated boards: exact limits, faults, equality with NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nets
import pytest
from board import lane, stack
from board.elf import Elf
from board.emulate import BoardResult
from board.lane import Compiler, Emulator, Limits
from board.objects import BuildError
from test_c_backend import CASES, Planned, planned, reference, samples

from odt_plan.backends.c import emit_c, measure_built
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request, make_plan

needs_zig = pytest.mark.skipif(not lane.has_zig_lane(), reason="needs ziglang and unicorn")
needs_gcc = pytest.mark.skipif(not lane.has_gcc(), reason="needs arm-none-eabi-gcc")
needs_qemu = pytest.mark.skipif(
    not (lane.has_gcc() and lane.has_qemu()), reason="needs arm-none-eabi-gcc and qemu-system-arm"
)
STEPS, LR = 2, 0.05
#: Least and most executed instructions of a step, relative to the predicted ones: those of
#: gcc -O2. Clang's code is longer where fp32 convolutions of 3x3 prevail.
PREDICTED = {"gcc": (0.85, 1.15), "zig": (0.85, 1.5)}
#: What the real models are compiled by.
COMPILER: Compiler = "gcc" if lane.has_gcc() else "zig"


def on_board(
    case: Planned,
    folder: Path,
    core: str = "cortex-m7",
    compiler: Compiler = "zig",
    emulator: Emulator = "unicorn",
    **options: Any,
) -> tuple[Elf, BoardResult]:
    """Emit, build, run; the output is compared with NumPy bit for bit."""
    plan, training = case
    name = emit_c(plan, training, folder)[0].stem
    limits = options.get("limits", Limits())
    image = lane.build(folder, name, core, compiler, **options)
    files = lane.training_input(*samples(training, STEPS), LR)
    result = lane.run(image, core, emulator, files=files, limits=limits)
    assert result.exit_code == 0, result.stdout
    assert result.value("selftest") == 0
    assert result.value("selftest_exact") == 1
    assert result.files["output.bin"] == reference(plan, training, STEPS, LR)
    elf = Elf(image)
    ram = plan.claims.ram_bytes
    for space, size in (("arena", ram.arena), ("state", ram.total - ram.arena)):
        arrays = [s for n, s in elf.symbols.items() if n.startswith(f"{name}_{space}")]
        assert sum(s.bytes for s in arrays) == size
    assert 0 < result.stack_bytes < limits.stack_bytes
    doubles = {s for s in elf.symbols if s.startswith("__aeabi_d") or s.endswith("df3")}
    assert doubles == set()
    return elf, result


@needs_zig
@pytest.mark.parametrize(
    "case",
    ["resnet-adam", "cnn-micro", "cnn-paged", "cnn-overlapped", "cnn-i8", "cnn-i8-input"],
)
def test_cortex_m7(case: str, tmp_path: Path) -> None:
    _, result = on_board(CASES[case](), tmp_path)
    assert result.entries == {"infer": 1, "train": STEPS}
    assert result.instructions["train"] > result.instructions["infer"] > 0
    assert sum(result.functions["train"].values()) == result.instructions["train"]


def check_prediction(case: Planned, result: BoardResult, compiler: Compiler) -> None:
    """Instructions of the training steps are those that the plan predicts; it does not page."""
    plan = case[0]
    device = load_device(plan.device.id)
    predicted = plan.claims.cycles / device.cycles_per_instruction.value
    micro_steps = result.instructions["train"] / STEPS
    low, high = PREDICTED[compiler]
    assert low < micro_steps * plan.training.micro_batches / predicted < high


@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("gcc", marks=[needs_gcc, needs_zig]),  # zig's lane brings the emulator
        pytest.param("zig", marks=needs_zig),
    ],
)
@pytest.mark.parametrize(
    "case",
    [
        *("mlp-sgd", "cnn-momentum-batch2", "cnn-partly", "cnn-i8-input", "resnet-i8-middle"),
        *("transformer", "recurrent"),
    ],
)
def test_instructions_are_predicted(case: str, compiler: Compiler, tmp_path: Path) -> None:
    """Of small networks, where loops are short and starts and calls weigh most."""
    made = CASES[case]()
    _, result = on_board(made, tmp_path, compiler=compiler)
    check_prediction(made, result, compiler)


@needs_zig
@pytest.mark.parametrize("core", ["cortex-m4", "cortex-m33", "cortex-m0plus", "rv32imac"])
def test_other_cores(core: str, tmp_path: Path) -> None:
    on_board(planned(nets.mlp()), tmp_path, core)


@needs_zig
@pytest.mark.parametrize("core", ["cortex-m4", "cortex-m33", "cortex-m0plus", "rv32imac"])
def test_integer_layers_on_other_cores(core: str, tmp_path: Path) -> None:
    on_board(CASES["cnn-i8-input"](), tmp_path, core)


@needs_zig
def test_a_step_that_can_decay_weights_needs_no_double(tmp_path: Path) -> None:
    """What ``on_board`` looks for; without decay its bits are those of any step."""
    defines = ["ODTPLAN_WEIGHT_DECAY=1"]
    for name in ("cnn-micro", "cnn-i8"):
        elf, _ = on_board(CASES[name](), tmp_path / name, "cortex-m4", defines=defines)
        assert any(s in elf.symbols for s in ("odtplan_shrink_weights_f32", "odtplan_decay_f32"))


@needs_gcc
@needs_zig
def test_stack_has_a_bound(tmp_path: Path) -> None:
    """Of all that is linked, of what ran, and what was written to, but for a word never used."""
    elf, result = on_board(
        CASES["recurrent"](), tmp_path, "cortex-m33", "gcc", flags=stack.FLAGS
    )
    image = stack.Stack(elf.path, "arm-none-eabi-objdump")
    linked, ran = image.bound("start"), image.bound("start", result.blocks)
    assert linked.bytes >= ran.bytes >= result.stack_bytes > ran.bytes - 8
    assert ran.path[:2] == ("start", "main")
    assert len(ran.path) > 5
    told = measure_built(tmp_path, "recurrent", "cortex-m33")  # from objects, not from the image
    assert told is not None
    assert told.stack_bytes >= image.bound("recurrent_train_step").bytes > told.stack_bytes - 64


@needs_zig
@pytest.mark.parametrize("core", ["cortex-m3", "cortex-m4", "cortex-m7", "cortex-m33", "rv32imac"])
@pytest.mark.parametrize("case", ["recurrent", "cnn-i8", "transformer"])
def test_the_painted_stack_is_what_instructions_write(
    case: str, core: str, tmp_path: Path
) -> None:
    """To the byte: the deepest word that an instruction which ran writes, from calls and frames."""
    if not lane.has_gcc(core):
        pytest.skip(f"needs {lane.CORES[core].gcc_program}")
    elf, result = on_board(CASES[case](), tmp_path, core, "gcc", flags=stack.FLAGS)
    objdump = lane.CORES[core].gcc_program.removesuffix("gcc") + "objdump"
    image = stack.Stack(elf.path, objdump)
    written = image.bound("start", result.blocks, written=True)
    assert result.stack_bytes == written.bytes, written.path
    assert 0 <= image.bound("start", result.blocks).bytes - written.bytes < 16


@needs_gcc
def test_recursion_has_no_bound(tmp_path: Path) -> None:
    source = tmp_path / "main.c"
    source.write_text(
        "int main(void);\nstatic int f(volatile int n) {\n"
        "    return n > 1 ? n * f(n - 1) : 1;\n}\nint main(void) {\n    return f(4);\n}\n"
    )
    image = lane.build_program(
        tmp_path, [source], "cortex-m33", "gcc", flags=stack.FLAGS, optimise="-O0"
    )
    with pytest.raises(ValueError, match="f calls itself"):
        stack.Stack(image, "arm-none-eabi-objdump").bound("start")


@needs_zig
def test_instruction_counts_repeat(tmp_path: Path) -> None:
    first = on_board(planned(nets.mlp()), tmp_path)[1]
    second = on_board(planned(nets.mlp()), tmp_path)[1]
    assert first.functions == second.functions


@needs_qemu
@pytest.mark.parametrize(
    ("core", "case"),
    [
        ("cortex-m7", "cnn-paged"),
        ("cortex-m7", "cnn-i8"),
        ("cortex-m4", "mlp-sgd"),
        ("cortex-m3", "mlp-sgd"),
    ],
)
def test_qemu_with_the_mpu_on(core: str, case: str, tmp_path: Path) -> None:
    on_board(CASES[case](), tmp_path, core, "gcc", "qemu", mpu=True)


@needs_zig
@pytest.mark.parametrize("core", ["cortex-m7", "cortex-m33", "rv32imac"])
def test_two_emulators_count_the_same(core: str, tmp_path: Path) -> None:
    if not (lane.has_gcc(core) and lane.has_qemu(core)):
        pytest.skip(f"needs {lane.CORES[core].gcc_program} and {lane.CORES[core].qemu_program}")
    machine = lane.CORES[core].machine
    assert machine is not None
    limits = Limits().on(machine)
    case = planned(nets.resnet() if core == "cortex-m7" else nets.mlp())
    qemu = on_board(case, tmp_path, core, "gcc", "qemu", limits=limits)[1]
    unicorn = on_board(case, tmp_path, core, "gcc", limits=limits)[1]
    assert qemu.functions == unicorn.functions
    assert qemu.stack_bytes == unicorn.stack_bytes


@pytest.mark.parametrize(
    "compiler",
    [pytest.param("zig", marks=needs_zig), pytest.param("gcc", marks=needs_gcc)],
)
def test_ram_that_is_too_small_fails_at_link(compiler: Compiler, tmp_path: Path) -> None:
    plan, training = planned(nets.mlp())
    emit_c(plan, training, tmp_path)
    small = Limits(ram_bytes=Limits.stack_bytes + plan.claims.ram_bytes.total)
    with pytest.raises(BuildError, match=r"(?s)RAM.*overflow"):
        lane.build(tmp_path, "mlp", "cortex-m7", compiler, limits=small)  # no byte for the program
    lane.build(tmp_path, "mlp", "cortex-m7", compiler)


@pytest.mark.parametrize(
    ("emulator", "code"),
    [
        pytest.param("unicorn", 121, marks=needs_zig),
        pytest.param("qemu", 120, marks=needs_qemu),
    ],
)
@pytest.mark.parametrize("address", ["0x20050000u", "0x1ffffffcu", "0x00000100u"])
def test_a_store_outside_ram_faults(
    emulator: Emulator, code: int, address: str, tmp_path: Path
) -> None:
    emit_c(*planned(nets.mlp()), tmp_path)
    mpu = emulator == "qemu"
    compiler: Compiler = "gcc" if mpu else "zig"
    store = [f"OUT_OF_BOUNDS={address}"]
    image = lane.build(
        tmp_path, "mlp", "cortex-m7", compiler, defines=store, mpu=mpu, selftest=False
    )
    result = lane.run(image, "cortex-m7", emulator)
    assert result.exit_code == code, result.stdout
    assert "survived" not in result.stdout


@needs_zig
@pytest.mark.parametrize(
    "model", ["mlperf_resnet8_bn", "st_har", "cntk_mnist", "tinymaix_mnist_cnn"]
)
def test_real_models_on_the_disco_board(model: str, shared: Path, tmp_path: Path) -> None:
    device = load_device("stm32f746g-disco")
    done = make_plan(Request(shared / "models" / f"{model}.onnx", device, with_baselines=False))
    limits = Limits.of(device)
    case = (done.plan, done.training)
    _, result = on_board(case, tmp_path, compiler=COMPILER, limits=limits)
    check_prediction(case, result, COMPILER)


@needs_zig
@pytest.mark.parametrize(
    "model", ["mcunet-5fps-head10-qdq", "mlperf_resnet8_int8", "mlperf_dscnn_kws_int8"]
)
def test_int8_models_on_the_disco_board(model: str, shared: Path, tmp_path: Path) -> None:
    device = load_device("stm32f746g-disco")
    file = shared / "models" / f"{model}.onnx"
    done = make_plan(Request(file, device, train=("last",), with_baselines=False))
    limits = Limits.of(device)
    case = (done.plan, done.training)
    _, result = on_board(case, tmp_path, compiler=COMPILER, limits=limits)
    check_prediction(case, result, COMPILER)

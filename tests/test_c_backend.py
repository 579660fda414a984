"""The emitted C: equal to NumPy bit for bit on this machine, sanitized; its API; its files."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import nets
import numpy as np
import plans
import pytest
from board import lane

from odt_plan.backends.c import emit, emit_c
from odt_plan.backends.c.ctext import comment, identifier
from odt_plan.backends.c.golden import random_sample
from odt_plan.backends.numpy import Runtime
from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.calibrate import calibrate
from odt_plan.ir.errors import OdtPlanError
from odt_plan.ir.graph import Graph
from odt_plan.ir.import_options import Lite, Lora
from odt_plan.ir.lite_residual import add_lite_residuals
from odt_plan.ir.lora import add_adapters
from odt_plan.ir.precision import all_i8, lower
from odt_plan.ir.targets import random_target
from odt_plan.ir.training import Candidate, TrainingGraph, TrainingSpec
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request, make_plan
from odt_plan.planner.plan import Plan
from odt_plan.planner.train_set import choose

Planned = tuple[Plan, TrainingGraph]
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


def planned(forward: Graph, spec: TrainingSpec | None = None) -> Planned:
    training = build_training(forward, spec or TrainingSpec(), plans.whole(forward))
    return plans.keep_all(training), training


def partly(forward: Graph) -> Planned:
    """Weights by a part of their input channels, biases whole."""
    best: dict[str, Candidate] = {}
    for c in candidates(forward):
        best.setdefault(c.param, c)
    training = build_training(forward, TrainingSpec(optimizer="momentum"), list(best.values()))
    return plans.keep_all(training), training


def paged(
    forward: Graph, spec: TrainingSpec | None = None, *, storage: str = "sdcard"
) -> Planned:
    """So little RAM that the plan pages; to the SDRAM with transfers beside the core."""
    training = build_training(forward, spec or TrainingSpec(), plans.whole(forward))
    roomy = plans.squeezed(forward, training, ram_bytes=10**6)
    ram = roomy.claims.ram_bytes
    plan = roomy
    for ram_bytes in range(ram.total - 256, ram.total - ram.arena, -256):
        try:
            plan = plans.squeezed(
                forward, training, ram_bytes=ram_bytes, storage=storage, overlap=storage == "sdram"
            )
        except AssertionError:
            break
        if plan.claims.storage_bytes:
            return plan, training
    raise AssertionError("no budget made the plan page")


def quantized(forward: Graph, *, i8_input: bool, trained: tuple[str, ...] = ("fc",)) -> Planned:
    """Calibrated, all layers but the trained ones in i8; gradients pass the frozen integers."""
    x = forward.inputs[0]
    rng = np.random.default_rng(3)
    calibrate(forward, rng.standard_normal((8, *x.type.shape[1:])).astype("f4"))
    precision = all_i8(forward, inputs=i8_input)
    low = lower(forward, {n: p for n, p in precision.items() if n not in trained})
    assert low.inputs[0].type.dtype == ("i8" if i8_input else "f32")
    assert any(n.op == "QConv" for n in low.nodes)
    chosen = [c for c in plans.whole(low) if c.param.rpartition(".")[0] in trained]
    training = build_training(low, TrainingSpec(), chosen)
    passes = any(n.op == "QConvGradInput" for n in training.graph.nodes)
    assert passes == (trained != ("fc",))
    return plans.keep_all(training), training


def adapted(forward: Graph) -> Planned:
    """Low-rank adapters beside frozen weights, with a scale of their own."""
    add_adapters(forward, Lora(2, 3.0))
    params = [Candidate(p) for a in forward.adapters for p in a.params]
    training = build_training(forward, TrainingSpec(optimizer="momentum"), params)
    return plans.within(forward, training, 0.9, None), training


def modular(forward: Graph, train: str = "lite,bias,last") -> Planned:
    """Lite residual modules beside frozen blocks."""
    add_lite_residuals(forward, Lite(3))
    chosen = choose(forward, (train,), candidates(forward))
    assert chosen
    training = build_training(forward, TrainingSpec(optimizer="momentum"), chosen)
    return plans.within(forward, training, 0.9, None), training


CASES: dict[str, Callable[[], Planned]] = {
    "mlp-sgd": lambda: planned(nets.mlp()),
    "mlp-mse": lambda: planned(nets.mlp(), TrainingSpec(loss="mse")),
    "mlp-bce": lambda: planned(nets.ending(nets.mlp(), "Sigmoid"), TrainingSpec(loss="bce")),
    "mlp-triplet": lambda: planned(nets.mlp(batch=6), TrainingSpec(loss="triplet")),
    "cnn-momentum-batch2": lambda: planned(nets.cnn(batch=2), TrainingSpec(optimizer="momentum")),
    "mlp-adagrad": lambda: planned(nets.mlp(), TrainingSpec(optimizer="adagrad")),
    "resnet-adam": lambda: planned(nets.resnet(), TrainingSpec(optimizer="adam")),
    "resnet-large-tiles": lambda: planned(nets.resnet(), TrainingSpec(tile_bytes=1 << 14)),
    "transformer": lambda: planned(nets.transformer(rows=9, width=16)),
    "spatial": lambda: planned(nets.spatial(batch=2), TrainingSpec(optimizer="momentum")),
    "spatial-paged": lambda: paged(nets.spatial(size=8)),
    "spatial-i8": lambda: quantized(nets.spatial(), i8_input=False),
    "batch-normalized": lambda: planned(nets.batch_normalized(), TrainingSpec(optimizer="adam")),
    "batch-normalized-micro": lambda: planned(
        nets.batch_normalized(batch=2), TrainingSpec(micro_batches=2)
    ),
    "recurrent": lambda: planned(nets.recurrent(9, 16, batch=2), TrainingSpec(optimizer="adam")),
    "recurrent-bptt": lambda: planned(nets.recurrent(9, 16, batch=2), TrainingSpec(bptt=4)),
    "cnn-micro": lambda: planned(nets.cnn(), TrainingSpec(optimizer="adam", micro_batches=2)),
    "cnn-partly": lambda: partly(nets.cnn(channels=8)),
    "cnn-adapters": lambda: adapted(nets.cnn(channels=8)),
    "transformer-adapters": lambda: adapted(nets.transformer(rows=9, width=16)),
    "resnet-modules": lambda: modular(nets.resnet(channels=6, size=9)),
    "bottlenecks-modules": lambda: modular(nets.bottlenecks(), "lite"),
    "cnn-paged": lambda: paged(nets.cnn(size=8)),
    "cnn-overlapped": lambda: paged(nets.cnn(size=8), storage="sdram"),
    "resnet-overlapped-micro": lambda: paged(
        nets.resnet(2, 8, 12), TrainingSpec(optimizer="adam", micro_batches=2), storage="sdram"
    ),
    "functions": lambda: planned(nets.functions()),
    "functions-i8": lambda: quantized(
        nets.functions(), i8_input=False, trained=("conv0", "conv2", "fc")
    ),
    "cnn-i8": lambda: quantized(nets.cnn(), i8_input=False),
    "cnn-i8-input": lambda: quantized(nets.cnn(), i8_input=True),
    "resnet-i8-middle": lambda: quantized(
        nets.resnet(), i8_input=False, trained=("b0.conv1", "fc")
    ),
}


def samples(training: TrainingGraph, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(7)
    xs = [random_sample(training.graph, training.sample, rng) for _ in range(count)]
    return xs, [random_target(training.graph, training.target, rng) for _ in range(count)]


def reference(plan: Plan, training: TrainingGraph, count: int, lr: float) -> bytes:
    """What the main program must write: prediction, losses, state."""
    xs, targets = samples(training, count)
    runtime = Runtime(plan, training)
    parts = [np.asarray(runtime.infer(xs[0]), "<f4").tobytes()]
    for x, t in zip(xs, targets, strict=True):
        parts.append(np.float32(runtime.train_step(x, t, lr)).tobytes())
    return b"".join([*parts, runtime.state_bytes()])


@needs_gcc
@pytest.mark.parametrize("case", CASES)
def test_host_equals_numpy_bit_for_bit(case: str, tmp_path: Path) -> None:
    plan, training = CASES[case]()
    name = emit_c(plan, training, tmp_path)[0].stem
    overlaps = "overlapped" in case
    for extreme in (1, 2) if overlaps else (0,):  # transfers move at their start, at their wait
        program = lane.build_host(
            tmp_path, name, defines=[f"MODEL_OVERLAPS={extreme}"] if overlaps else []
        )
        result = lane.run_host(program, lane.training_input(*samples(training, 5), 0.05))
        assert result.exit_code == 0, result.stdout
        assert result.value("selftest_exact") == 1
        assert result.files["output.bin"] == reference(plan, training, 5, 0.05)
        if overlaps or case == "cnn-paged":
            assert len(result.files["page.bin"]) > 0


@needs_gcc
def test_model_with_an_int8_input(shared: Path, tmp_path: Path) -> None:
    model = shared / "models" / "mlperf_resnet8_int8.onnx"
    device = load_device("stm32f746g-disco")
    done = make_plan(Request(model, device, train=("last",), with_baselines=False))
    assert done.training.sample.type.dtype == "i8"
    name = emit_c(done.plan, done.training, tmp_path)[0].stem
    program = lane.build_host(tmp_path, name)
    result = lane.run_host(program, lane.training_input(*samples(done.training, 2), 0.05))
    assert result.exit_code == 0, result.stdout
    assert result.value("selftest_exact") == 1
    assert result.files["output.bin"] == reference(done.plan, done.training, 2, 0.05)


def test_interface_of_an_int8_input(tmp_path: Path) -> None:
    files = emit_c(*CASES["cnn-i8-input"](), tmp_path)
    header = files[0].read_text()
    assert "int cnn_infer(cnn_t *net, const int8_t *x, float *y);" in header
    assert "#define CNN_SAMPLE(net) ((int8_t *)" in header
    assert "#define CNN_PREDICTION(net) ((float *)" in header
    weights = (tmp_path / "cnn_weights.h").read_text()
    assert re.search(r"extern const int8_t cnn_W\d+_conv1_weight\[", weights)
    assert re.search(r"extern const int32_t cnn_W\d+_conv1_bias\w*\[", weights)


@needs_gcc
def test_a_lifetime_that_ends_early_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, training = planned(nets.mlp())
    kept = next(b for b in plan.buffers if b.value == "relu0")
    assert kept.last > kept.first + 2
    cut = [b.model_copy(update={"last": b.first + 1}) if b is kept else b for b in plan.buffers]
    golden = emit.run_golden(plan, training)
    monkeypatch.setattr(emit, "run_golden", lambda _plan, _training: golden)
    emit_c(plan.model_copy(update={"buffers": tuple(cut)}), training, tmp_path)
    program = lane.build_host(tmp_path, "mlp")
    result = lane.run_host(program, lane.training_input(*samples(training, 1), 0.05))
    assert result.exit_code != 0
    assert "use-after-poison" in result.stdout


@needs_gcc
@pytest.mark.parametrize("static", [0, 1])
def test_api(static: int, tmp_path: Path) -> None:
    check_api(planned(nets.mlp(), TrainingSpec(optimizer="adam")), tmp_path, static)


def check_api(case: Planned, tmp_path: Path, static: int = 1) -> None:
    """What the functions return for good and bad arguments, and that a saved state comes back."""
    plan, training = case
    emit_c(plan, training, tmp_path)
    main = lane.FIRMWARE / "api.c"
    define = [f"MLP_STATIC_ARENA={static}"]
    program = lane.build_host(tmp_path, "mlp", selftest=False, defines=define, main=main)
    result = lane.run_host(program, {})
    assert result.exit_code == 0, result.stdout
    got = [line.split("=") for line in result.stdout.splitlines()]
    argument, ok, yes = "1", "0", "1"
    no_arena = [["init_no_arena", argument], ["init_misaligned", argument]]
    saved = 24 + 16 + plan.claims.ram_bytes.total - plan.claims.ram_bytes.arena
    assert got == [
        ["infer_before_init", "2"],
        ["init_null", argument],
        *(no_arena if not static else []),
        ["init", ok],
        ["infer_null", argument],
        ["infer", ok],
        ["label_low", "3"],
        ["label_high", "3"],
        ["lr_nan", argument],
        ["lr_negative", argument],
        ["lr_infinite", argument],
        ["labels_null", argument],
        ["refused_changed_nothing", yes],
        ["train", ok],
        ["trained", yes],
        ["save_fails", "5"],
        ["save", ok],
        ["saved_bytes", str(saved)],
        ["init_again", ok],
        ["load", ok],
        ["loaded", yes],
        ["load_cut", "7"],
        ["load_damaged", "7"],
        *[["load_foreign", "6"]] * 5,
        ["refused_kept_state", yes],
        ["load_torn", "5"],
        ["torn_is_initial", yes],
    ]


@needs_gcc
def test_selftest_finds_a_wrong_weight(tmp_path: Path) -> None:
    plan, training = planned(nets.mlp())
    emit_c(plan, training, tmp_path)
    weights = tmp_path / "mlp_weights.c"
    text, n = re.subn(r"^    (-?[\d.]+)f,", r"    \1e1f,", weights.read_text(), count=1, flags=re.M)
    assert n == 1
    weights.write_text(text)
    result = lane.run_host(lane.build_host(tmp_path, "mlp"), {})
    assert result.exit_code == 1
    assert result.value("selftest") == 8  # ODTPLAN_ERROR_SELFTEST


@needs_gcc
def test_paging_without_callbacks_is_refused(tmp_path: Path) -> None:
    plan, training = CASES["cnn-paged"]()
    emit_c(plan, training, tmp_path)
    main = tmp_path / "no_callbacks.txt"
    main.write_text(
        '#include "cnn.h"\n#include "board.h"\nint main(void) {\n'
        "    static cnn_t net;\n    static float x[CNN_SAMPLE_SIZE];\n    int32_t label = 0;\n"
        "    cnn_init(&net);\n"
        '    board_value("train", (uint32_t)cnn_train_step(&net, x, &label, 0.1f, NULL));\n'
        "    return 0;\n}\n"
    )
    source = main.rename(tmp_path.parent / f"{tmp_path.name}_main.c")
    result = lane.run_host(lane.build_host(tmp_path, "cnn", selftest=False, main=source), {})
    assert result.value("train") == 4, result.stdout


def test_needs_nothing_but_three_memory_functions(tmp_path: Path) -> None:
    plan, training = CASES["cnn-micro"]()
    files = emit_c(plan, training, tmp_path)
    included = {
        name for f in files for name in re.findall(r"#include <(.+)>", f.read_text("ascii"))
    }
    assert included <= {"stdint.h", "stddef.h", "string.h"}
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        pytest.skip("needs gcc and nm to look at the symbols")
    sources = [str(f) for f in files if f.suffix == ".c"]
    command = ["gcc", "-std=c99", "-O2", "-r", "-nostdlib", "-fno-stack-protector", *sources]
    subprocess.run([*command, "-o", str(tmp_path / "all.o")], check=True)
    listed = subprocess.run(["nm", tmp_path / "all.o"], check=True, capture_output=True, text=True)
    symbols = [line.split()[-2:] for line in listed.stdout.splitlines()]
    undefined = {name for kind, name in symbols if kind == "U"}
    assert undefined <= {"memcpy", "memset", "memcmp", "_GLOBAL_OFFSET_TABLE_"}
    outside = {name for kind, name in symbols if kind in "TDBRVC"}
    assert {n for n in outside if not n.startswith(("cnn_", "odtplan_"))} == set()
    writable = {name for kind, name in symbols if kind in "dDbBC"}
    assert writable == {"cnn_arena", "cnn_state"}


def test_headers_are_cplusplus(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    files = emit_c(*planned(nets.resnet()), tmp_path)
    lines = [f'#include "{f.name}"' for f in files if f.suffix == ".h" and "weights" not in f.name]
    (tmp_path / "all.cpp").write_text("\n".join([*lines, "resnet_t net;", ""]))
    flags = ["-std=c++11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    subprocess.run(["g++", *flags, str(tmp_path / "all.cpp")], check=True)


@pytest.mark.skipif(not lane.has_zig_lane(), reason="needs ziglang")
def test_clang_finds_nothing_to_warn_about(tmp_path: Path) -> None:
    files = emit_c(*planned(nets.resnet()), tmp_path)
    sources = [str(f) for f in files if f.suffix == ".c"]
    subprocess.run([*lane.ZIG, *lane.STRICT, "-c", *sources], cwd=tmp_path, check=True)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_cmake_builds_it(tmp_path: Path) -> None:
    emit_c(*planned(nets.mlp()), tmp_path / "src")
    subprocess.run(["cmake", "-S", tmp_path / "src", "-B", tmp_path / "build"], check=True)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    plan, training = planned(nets.resnet())
    later = plan.model_copy(update={"solver": plan.solver.model_copy(update={"time_s": 99.0})})
    again = build_training(nets.resnet(), TrainingSpec(), plans.whole(nets.resnet()))
    first = emit_c(plan, training, tmp_path / "a")
    second = emit_c(later, again, tmp_path / "b")
    assert [f.name for f in first] == [f.name for f in second]
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MobileNet-v2 0.35", "mobilenet_v2_0_35"),
        ("8bit", "model_8bit"),
        ("odtplan_conv", "model_odtplan_conv"),
        ("string", "model_string"),
        ("int8", "model_int8"),
        ("clean", "model_clean"),
        ("all-", "model_all"),
        ("Arduino net", "model_arduino_net"),
        ("Server", "model_server"),
        ("net weights", "net_weights_model"),
        ("../../etc/passwd", "etc_passwd"),
        ("模型", "model"),
    ],
)
def test_identifier(text: str, expected: str) -> None:
    assert identifier(text) == expected


def test_comment_stays_a_comment() -> None:
    text = comment("a */ int evil; /* ??/ \\")
    assert "*/" not in text
    assert "/*" not in text
    assert not text.endswith("\\")
    assert comment("a//b///*c") == "a/ /b/ / / *c"  # names of nodes may be joined like this
    assert comment("tab\tnew\nline é") == "tab?new?line ?"


@needs_gcc
def test_hostile_names_compile(tmp_path: Path) -> None:
    forward = nets.mlp()
    for i, node in enumerate(forward.nodes):
        node.name = f"{i} */ \n#error \\"
    plan, training = planned(forward)
    files = emit_c(plan, training, tmp_path, name="2 */ evil\n")
    assert files[0].name == "model_2_evil.h"
    lane.build_host(tmp_path, "model_2_evil", sanitize=False)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OdtPlanError, match="can't write the C files"):
        emit_c(*planned(nets.mlp()), tmp_path / "file" / "out")


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    original = Path.write_text

    def failing(self: Path, *args: object, **kwargs: object) -> int:
        written.append(self)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(OdtPlanError, match="No space left on device"):
        emit_c(*planned(nets.mlp()), tmp_path)
    assert list(tmp_path.iterdir()) == []

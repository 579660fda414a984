"""Runs that are stopped by Ctrl-C or the time limit, progress, determinism, plans of heuristics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import nets
import numpy as np
import onnx
import plans
import pytest
from onnx_files import export

from odt_plan.ir.graph import Graph
from odt_plan.live import described, shown
from odt_plan.planner import solving
from odt_plan.planner.device import load_device
from odt_plan.planner.linear import LinearProgram, SolverName, SolverOptions
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.plan import Plan
from odt_plan.planner.progress import Progress, Watch
from odt_plan.planner.search import Search

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.build_models import BUILDERS

ROOT = Path(__file__).resolve().parent.parent

#: Seconds for one command on a busy machine.
PATIENCE_S = 300.0
#: Too little for all updates of the large model, and for a proof within minutes.
LARGE_RAM = "320KB"
#: Of commands: this checkout, wide lines.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MobileNetV2 for 64 x 64 pixels, f32: some 100 nodes."""
    file = tmp_path_factory.mktemp("large") / "mbv2.onnx"
    onnx.save(BUILDERS["mbv2"](width=0.35, resolution=64, classes=10), file)
    return file


def request_of(folder: Path, net: Graph, **options: object) -> Request:
    base: dict[str, object] = {
        "ram_bytes": 10**6, "with_baselines": False, "gap": 0.0, "time_limit_s": 600.0,
    }  # fmt: skip
    return Request(export(net, folder), load_device(plans.BOARD), **{**base, **options})  # type: ignore[arg-type]


def command(model: Path, folder: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "odt_plan.cli", str(model), "--ram", LARGE_RAM, "--flash", "4MB",
        "-o", str(folder), *options,
    ]  # fmt: skip


def verified(folder: Path) -> Plan:
    """The plan of a folder, which ``odt-plan verify`` accepts."""
    file = folder / "plan.json"
    done = subprocess.run(
        [sys.executable, "-m", "odt_plan.cli", "verify", str(file), "--json"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return Plan.model_validate_json(file.read_text())


def honest(plan: Plan) -> None:
    """Feasible, stopped, with bounds on their side and gaps that are open."""
    assert plan.status == "feasible"
    learn, latency = plan.objective
    assert learn.name == "learn"
    assert latency.name == "latency"
    assert 0 < learn.value <= learn.bound
    assert latency.bound <= latency.value
    assert max(learn.gap, latency.gap) > 1e-3


# ---- the command line ---------------------------------------------------------------------------


class OnTerminal:
    """A command whose stderr is a terminal."""

    def __init__(self, args: list[str]) -> None:
        import pty

        self._mine, its = pty.openpty()
        self.process = subprocess.Popen(
            args, stdout=subprocess.PIPE, stderr=its, text=True, env=ENVIRONMENT
        )
        os.close(its)
        self.shown = ""

    def read_until(self, text: str) -> None:
        """Read what it shows until a text appears."""
        while text not in self.shown:
            try:
                more = os.read(self._mine, 4096)
            except OSError:  # it has ended
                more = b""
            assert more, f"{text!r} was never shown: {self.shown}"
            self.shown += more.decode(errors="replace")

    def end(self) -> tuple[int, str]:
        """Wait; exit code and standard output."""
        out, _ = self.process.communicate(timeout=PATIENCE_S)
        os.close(self._mine)
        return self.process.returncode, out


@needs_terminal
def test_ctrl_c_while_a_solver_runs_returns_the_best_checked_plan(
    large: Path, tmp_path: Path
) -> None:
    run = OnTerminal(command(large, tmp_path / "out"))
    run.read_until("bound")  # of the solver
    assert "Ctrl-C for the best plan" in run.shown
    run.process.send_signal(signal.SIGINT)
    code, out = run.end()
    assert code == 0
    assert "feasible (interrupted)" in out
    plan = verified(tmp_path / "out")
    assert plan.solver.stopped == "interrupted"
    honest(plan)


@needs_terminal
def test_ctrl_c_before_there_is_a_plan_is_130(large: Path, tmp_path: Path) -> None:
    run = OnTerminal(command(large, tmp_path / "out"))
    run.read_until("planning by heuristics")
    run.process.send_signal(signal.SIGINT)
    assert run.end() == (130, "")
    assert not (tmp_path / "out").exists()


def test_a_second_of_a_large_model_gives_a_checked_plan(large: Path, tmp_path: Path) -> None:
    args = command(large, tmp_path / "out", "--time-limit", "1", "--json")
    done = subprocess.run(
        args, capture_output=True, text=True, timeout=PATIENCE_S, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "progress is for terminals"
    plan = verified(tmp_path / "out")
    assert json.loads(done.stdout)["solver"]["stopped"] == "time limit"
    honest(plan)


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
def test_the_first_ctrl_c_stops_and_the_second_aborts() -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell runs in the background
    with shown(quiet=True) as watch:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert not watch.interrupted
        watch.has_plan = True
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.interrupted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_line_of_progress() -> None:
    p = Progress("choosing", 12.5, "latency", 110.0, 100.0, has_plan=True)
    assert p.gap == pytest.approx(1 / 11)
    told = "choosing | 12.5 s | latency 110 cycles | bound 100 cycles | gap 9.09%"
    assert described(p) == f"{told} | Ctrl-C for the best plan"
    assert described(Progress("import", 0.5)) == "import | 500 ms"


# ---- solvers ------------------------------------------------------------------------------------


def knapsacks(size: int, rows: int) -> tuple[LinearProgram, list[tuple[int, float]]]:
    """A program that no solver proves in seconds if it is large."""
    rng, program = np.random.default_rng(0), LinearProgram()
    columns = [program.column(integer=True) for _ in range(size)]
    for _ in range(rows):
        weights = rng.integers(1, 1000, size)
        program.row(zip(columns, weights, strict=True), upper=weights.sum() // 2)
    gains = rng.integers(1, 1000, size)
    return program, [(c, float(x)) for c, x in zip(columns, gains, strict=True)]


def stopped_by_a_solution(told: list[Progress] | None = None) -> Watch:
    """A watch that ends the run once a solution and a bound are known that are not far apart."""

    def listen(p: Progress) -> None:
        if told is not None:
            told.append(p)
        if p.gap is not None and p.gap < 1.0:
            watch.stop()

    watch = Watch(listen)
    return watch


@pytest.fixture(autouse=True)
def _joined() -> Iterator[None]:
    """No solver that was left behind disturbs what follows."""
    yield
    for thread in solving._threads:
        thread.join()


@pytest.mark.parametrize("solver", ["highs", "scip", "cp-sat"])
def test_a_stopped_solver_returns_its_best_solution(solver: SolverName) -> None:
    size, rows = 200, 60
    program, gains = knapsacks(size, rows)
    watch = stopped_by_a_solution()
    result = program.solve(
        gains, SolverOptions(solver, gap=0.0, time_limit_s=15), maximize=True, watch=watch
    )
    assert watch.interrupted
    assert result.status == "feasible"
    assert result.values is not None
    assert result.time_s < 14
    assert np.allclose(result.values, np.round(result.values))
    matrix = np.zeros((rows, size))
    matrix[program.rows, program.columns] = program.coefficients
    assert (matrix @ result.values <= np.array(program.row_upper) + 1e-6).all()
    value = sum(g * result.values[c] for c, g in gains)
    assert 0 < value <= result.bound <= sum(g for _, g in gains)


@pytest.mark.parametrize("solver", ["highs", "scip", "cp-sat"])
@pytest.mark.parametrize("maximize", [True, False])
def test_progress_encloses_the_optimum(solver: SolverName, maximize: bool) -> None:
    program, gains = knapsacks(30, 20)
    if not maximize:  # the same, seen from the columns that stay out
        program.row_lower = [-u for u in program.row_upper]
        program.row_upper = [float("inf")] * len(program.row_upper)
        program.coefficients = [-a for a in program.coefficients]
        gains = [(c, -g) for c, g in gains]
    told: list[Progress] = []
    result = program.solve(
        gains, SolverOptions(solver, gap=0.0), maximize=maximize, watch=Watch(told.append)
    )
    assert result.values is not None
    optimum = sum(g * result.values[c] for c, g in gains)
    bounds = [p.bound for p in told if p.bound is not None]
    bests = [p.best for p in told if p.best is not None]
    assert bounds
    assert bests
    slack = 1e-6 * abs(optimum)
    sign = 1 if maximize else -1
    assert all(sign * (b - optimum) >= -slack for b in bounds)
    assert all(sign * (optimum - b) >= -slack for b in bests)


def test_a_hint_is_where_the_solver_starts() -> None:
    """The first solution that it tells is the hint's or better."""
    program, gains = knapsacks(80, 40)
    good = program.solve(gains, SolverOptions("highs", time_limit_s=5), maximize=True).values
    assert good is not None
    start = {c: round(x) for c, x in enumerate(good)}
    value = sum(g * start[c] for c, g in gains)
    for solver in ("highs", "scip", "cp-sat"):
        told: list[Progress] = []
        program.solve(
            gains, SolverOptions(solver, time_limit_s=30), maximize=True, hint=start,  # type: ignore[arg-type]
            watch=stopped_by_a_solution(told),
        )  # fmt: skip
        first = next(p.best for p in told if p.best is not None)
        assert first >= value - 1e-6, solver


# ---- heuristics ---------------------------------------------------------------------------------


CASES: list[tuple[Callable[[], Graph], dict[str, object], tuple[float, ...]]] = [
    (nets.mlp, {}, (0.5, 0.7, 0.9, 1.0)),
    (nets.cnn, {}, (0.4, 0.6, 0.8, 1.0)),
    (nets.resnet, {}, (0.4, 0.6, 0.8, 1.0)),
    (nets.resnet, {"train": ("all",)}, (0.91, 0.95, 1.0)),
    (nets.resnet, {"train": ("all",), "storage": "sdcard"}, (0.91, 0.95)),
    (nets.cnn, {"calibration": "synthetic"}, (0.5, 0.8, 1.0)),
]


@pytest.mark.parametrize(("net", "options", "shares"), CASES)
def test_heuristics_stay_below_the_optimum_and_within_their_bounds(
    net: Callable[[], Graph],
    options: dict[str, object],
    shares: tuple[float, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = request_of(tmp_path, net(), **options)
    most = make_plan(request).plan.claims.ram_bytes.total
    for share in shares:
        tight = replace(request, ram_bytes=int(share * most))
        best = merit(make_plan(tight))
        with monkeypatch.context() as patch:
            patch.setattr(Search, "_improve", lambda self: None)
            quick = make_plan(tight)
        assert quick.plan.claims.ram_bytes.total <= int(share * most)
        assert merit(quick) <= best
        for o in quick.plan.objective:  # the checker has compared them with the plan
            assert o.value <= o.bound if o.name == "learn" else o.bound <= o.value
        assert merit(quick)[0] >= 0.8 * best[0]


def merit(planned: PlannedModel) -> tuple[float, float]:
    """Importance, then fewer cycles."""
    reached = {o.name: o.value for o in planned.plan.objective}
    return round(reached.get("learn", 0.0), 6), -float(planned.plan.claims.cycles)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ram_bytes": 6000},
        {"ram_bytes": 6000, "seed": 7},
        {"ram_bytes": 8000, "train": ("all",), "objective": {"latency": 1.0, "ram": 0.5}},
        {"calibration": "synthetic", "ram_bytes": 5000},
    ],
)
def test_same_input_and_seed_give_the_same_plan(options: dict[str, object], tmp_path: Path) -> None:
    request = request_of(tmp_path, nets.resnet(), **options)
    first, second = (make_plan(request).plan.model_dump(exclude={"solver"}) for _ in range(2))
    assert first == second


def test_a_run_that_is_stopped_at_once_is_a_keyboard_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("odt_plan.planner.search.at_once", lambda *args, **options: None)
    watch = Watch()
    watch.stop()
    with pytest.raises(KeyboardInterrupt):
        make_plan(request_of(tmp_path, nets.cnn()), watch)

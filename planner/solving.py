"""Runs a solver in a thread of its own, so that it can be stopped and its best solution kept.

SCIP and CP-SAT end when they are asked to. HiGHS can't be asked through math_opt, and looks at its
time limit only now and then: it is left behind, and its best solution so far is read from the file
that it writes every better one to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from time import monotonic

import numpy as np
from numpy.typing import NDArray
from ortools.math_opt.python import mathopt
from ortools.util.python.solve_interrupter import SolveInterrupter

from .progress import Watch

#: Seconds beyond its time limit after which a solver is left behind.
GRACE_S = 0.5
#: How often it is looked whether to stop.
_TICK_S = 0.05
_threads: list[Thread] = []


@dataclass(frozen=True)
class Left:
    """What is known of a solver that was left behind.

    Attributes:
        values: Of its best solution, by column; None without one.
        time_s: Seconds until then.
    """

    values: NDArray[np.float64] | None
    time_s: float


def still_running() -> bool:
    """A solver that was left behind still runs: the process is to end without waiting for it."""
    return any(t.is_alive() for t in _threads)


def run(
    model: mathopt.Model,
    solver: mathopt.SolverType,
    parameters: mathopt.SolveParameters,
    hint: mathopt.SolutionHint | None,
    on_lines: Callable[[list[str]], None],
    watch: Watch,
) -> mathopt.SolveResult | Left:
    """Solve until the end, the time limit, or the wish to stop.

    Args:
        model: To solve.
        solver: Which solver.
        parameters: With a time limit.
        hint: Where to start.
        on_lines: Told the solver's log, in the solver's thread.
        watch: Carries the wish to stop.

    Raises:
        Exception: What the binding raises.
    """
    highs = solver == mathopt.SolverType.HIGHS
    folder = TemporaryDirectory(prefix="odt-plan-", ignore_cleanup_errors=True)
    file = Path(folder.name) / "solutions"
    if highs:
        parameters.highs.bool_options["mip_improving_solution_save"] = True
        parameters.highs.string_options["mip_improving_solution_file"] = str(file)
    model_parameters = mathopt.ModelSolveParameters(solution_hints=[hint] if hint else [])
    interrupter = SolveInterrupter()
    done: list[mathopt.SolveResult | Exception] = []
    listening = True

    def solve() -> None:
        try:
            done.append(
                mathopt.solve(
                    model,
                    solver,
                    params=parameters,
                    model_params=model_parameters,
                    msg_cb=lambda lines: on_lines(lines) if listening else None,
                    interrupter=interrupter,
                )
            )
        except Exception as e:  # raised again below, in the caller's thread
            done.append(e)

    begin = monotonic()
    assert parameters.time_limit is not None
    last = begin + parameters.time_limit.total_seconds() + GRACE_S
    thread = Thread(target=solve, daemon=True)
    thread.start()
    _threads[:] = [*(t for t in _threads if t.is_alive()), thread]
    while thread.is_alive() and not (highs and (watch.interrupted or monotonic() > last)):
        thread.join(_TICK_S)
        if watch.interrupted:
            interrupter.interrupt()
    if done:
        folder.cleanup()
        if isinstance(done[0], Exception):
            raise done[0]
        return done[0]
    listening = False
    values = _last_solution(file)
    folder.cleanup()
    return Left(values, monotonic() - begin)


def _last_solution(file: Path) -> NDArray[np.float64] | None:
    """The last solution that the file holds whole: ``# Columns n``, then a value per line."""
    try:
        lines = file.read_text().split("\n")[:-1]  # a line without its end may be cut short
    except OSError:
        return None
    for i in reversed([i for i, line in enumerate(lines) if line.startswith("# Columns ")]):
        n = int(lines[i].split()[-1])
        values = lines[i + 1 : i + 1 + n]
        if len(values) == n:
            return np.array([float(v) for v in values])
    return None

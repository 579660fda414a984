"""The options of training mean the same in ``plan``, ``pareto`` and ``fit``."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest
from cli_run import Cli
from test_cli import MODEL

from odt_plan import planning
from odt_plan.ir.errors import UsageError
from odt_plan.ir.training import TrainingSpec
from odt_plan.options import Training, taking
from odt_plan.planner.pipeline import Request
from odt_plan.planner.progress import Watch
from odt_plan.planning import make_request

COMMANDS = {
    "plan": ("--ram", "1MB", "--flash", "1MB"),
    "pareto": ("--device", "rp2040", "--jobs", "1"),
    "fit": ("--device", "rp2040", "--jobs", "1"),
}
#: One value of each option that is not its default -> where a request holds it, as what.
GIVEN: dict[tuple[str, ...], tuple[str, Any]] = {
    ("--train", "conv3.*,classifier.*"): ("train", ("conv3.*,classifier.*",)),
    ("--freeze-before", "conv2"): ("freeze_before", ("conv2",)),
    ("--precision", "conv1=i8"): ("precision", ("conv1=i8",)),
    ("--calib", "synthetic"): ("calibration", "synthetic"),
    ("--calib-method", "mse"): ("calibration_method", "mse"),
    ("--optimizer", "adam"): ("spec.optimizer", "adam"),
    ("--state", "sgd=0.8"): ("state", ("sgd=0.8",)),
    ("--no-qas",): ("spec.qas", False),
    ("--rounding", "nearest"): ("spec.rounding", "nearest"),
    ("--loss", "huber"): ("spec.loss", "huber"),
    ("--delta", "0.25"): ("spec.delta", 0.25),
    ("--bptt", "3"): ("spec.bptt", 3),
}


def asked(odt: Cli, patch: pytest.MonkeyPatch, command: str, words: tuple[str, ...]) -> Request:
    """The request that a command makes of these words."""
    made: list[Request] = []

    def caught(
        options: planning.PlanOptions, watch: Watch | None = None, *, trial: bool = False
    ) -> Request:
        made.append(make_request(options, watch, trial=trial))
        raise UsageError("that is enough")

    patch.setattr(planning, "make_request", caught)
    assert odt(command, MODEL, *COMMANDS[command], *words).error == "that is enough"
    return made[0]


def held(request: Request, where: str) -> Any:
    spec, _, name = where.rpartition(".")
    return getattr(request.spec if spec else request, name)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_reaches_the_request(
    odt: Cli, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    words = tuple(w for option in GIVEN for w in option)
    request, plain = (asked(odt, monkeypatch, command, w) for w in (words, ()))
    for where, value in GIVEN.values():
        assert held(request, where) == value, where
        assert held(plain, where) != value, where
    assert plain.spec == TrainingSpec()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_margin_reaches_the_request(
    odt: Cli, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    words = ("--loss", "triplet", "--margin", "0.5")
    assert asked(odt, monkeypatch, command, words).spec.margin == 0.5


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--delta", "0.5"), "--delta belongs to --loss huber"),
        (("--margin", "0.5"), "--margin belongs to --loss triplet"),
        (("--bptt", "3"), "--bptt: digits_cnn has no recurrent layer"),
        (("--loss", "huber", "--delta", "0"), "delta must be above 0"),
        (("--loss", "output"), "is a scalar that depends on an input"),
    ],
)
def test_what_does_not_suit_is_one_line(
    odt: Cli, command: str, words: tuple[str, ...], message: str
) -> None:
    done = odt(command, MODEL, *COMMANDS[command], *words)
    assert done.code == 2
    assert message in done.error


def test_a_device_takes_the_bytes_of_the_loss_that_was_asked_for(odt: Cli) -> None:
    words = ("--device", "stm32h743", "--loss", "triplet", "--batch", "4", "--train", "all")
    plan = odt(MODEL, *words, "--json").json
    (row,) = odt("fit", MODEL, *words, "--jobs", "1", "--json").json
    assert row["verdict"] == "fits"
    (plain,) = odt("fit", MODEL, *words[:2], *words[4:], "--jobs", "1", "--json").json
    assert row["flash_bytes"] == plan["claims"]["flash_bytes"]["total"] != plain["flash_bytes"]


def test_a_group_becomes_options_of_its_fields() -> None:
    @taking(training=Training)
    def command(model: str, training: Training = Training(), force: bool = False) -> None:
        got.append((model, training, force))

    got: list[tuple[str, Training, bool]] = []
    names = list(inspect.signature(command).parameters)
    assert names == ["model", *(f.name for f in fields(Training)), "force"]
    command(model="m", **(vars(Training()) | {"delta": 2.0}), force=True)
    assert got == [("m", Training(delta=2.0), True)]

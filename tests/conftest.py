"""Fixtures that several test modules use."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from board import objects
from cli_run import Cli


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of models and data: ``ODT_PLAN_SHARED`` or beside the checkout; skips if absent."""
    folder = os.environ.get("ODT_PLAN_SHARED")
    path = Path(folder) if folder else Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"{path} is not here; set ODT_PLAN_SHARED to the folder of models")
    return path


@pytest.fixture
def odt(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Cli:
    """Runs ``odt-plan`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    return Cli(capfd, monkeypatch)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--graphs``: how many random networks; ``--seconds``: how long each plan is searched."""
    parser.addoption("--graphs", type=int, default=5, help="seeds of each test of random networks")
    parser.addoption("--seconds", type=float, default=20.0, help="time limit of their plans")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``graph_seed`` runs once per random network."""
    if "graph_seed" in metafunc.fixturenames:
        metafunc.parametrize("graph_seed", range(metafunc.config.getoption("graphs")))


def pytest_configure(config: pytest.Config) -> None:
    """One folder of compiled objects for all processes of a run."""
    if objects.SHARED not in os.environ:
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        os.environ[objects.SHARED] = folder.name
        config.add_cleanup(folder.cleanup)

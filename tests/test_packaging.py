"""The package as users get it: sdist, wheel, clean environment, a run outside the checkout."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import odt_plan

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ir", "planner", "backends", "specs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def sources(folder: Path) -> set[str]:
    """Files of a source folder that belong into a wheel, relative to its parent."""
    found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(folder.parent).as_posix() for p in found}


def run(command: list[str | Path], folder: Path, **env: str) -> str:
    """Run a command in a folder; its output stands in the failure message."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}
    words = list(map(str, command))
    env = {**inherited, **env}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {n for n in archive.namelist() if ".dist-info/" not in n}


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling is missing")
@pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="build is missing")
def test_wheel_from_sdist_runs_outside_the_checkout(tmp_path: Path) -> None:
    dist, away = tmp_path / "dist", tmp_path / "away"
    away.mkdir()
    # Without a choice, `build` makes the wheel from the sdist, never from the checkout.
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ROOT], tmp_path)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        packed = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    assert {"pyproject.toml", "README.md", "tests/test_packaging.py"} <= packed

    package = {f"odt_plan/{p.name}" for p in (ROOT / "src" / "odt_plan").glob("*.*")}
    wanted = package.union(*({f"odt_plan/{n}" for n in sources(ROOT / f)} for f in FOLDERS))
    assert wheel_names(wheel) == wanted
    assert {Path(n).suffix for n in wanted} >= {".py", ".c", ".h", ".yaml", ".typed"}

    # A clean environment: the wheel, and what it depends on from the running one, whose own .pth
    # files (an editable installation of this checkout) are not followed.
    home = tmp_path / "env"
    venv.EnvBuilder(with_pip=False).create(home)
    variables = {"base": str(home), "platbase": str(home), "installed_base": str(home)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=variables))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"

    where = run([python, "-c", "import odt_plan.ir.graph as g; print(g.__file__)"], away)
    assert Path(where.strip()).is_relative_to(home)
    model = ROOT / "examples" / "digits_cnn.onnx"
    call: list[str | Path] = [python, "-m", "odt_plan.cli"]
    told = run([*call, model, "--device", "stm32f746g-disco", "--emit", "c,svg", "-o", "out"], away)
    assert "stm32f746g-disco" in told
    assert {"plan.json", "digits_cnn.c", "odtplan_conv.c"} <= {
        p.name for p in (away / "out").iterdir()
    }
    assert "all claims confirmed" in run([*call, "verify", "out/plan.json"], away)
    assert "nrf52840" in run([*call, "devices"], away)


def test_wheel_has_no_top_level_name_but_ours() -> None:
    sources = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["sources"]
    assert all(v == "odt_plan" or v.startswith("odt_plan/") for v in sources.values())
    assert set(sources) == {"src/odt_plan", *FOLDERS}


def test_every_module_of_the_package_is_packed() -> None:
    modules = {f"src/odt_plan/{p.name}" for p in (ROOT / "src" / "odt_plan").glob("*.py")}
    for target in ("sdist", "wheel"):
        packed = set(PROJECT["tool"]["hatch"]["build"]["targets"][target]["only-include"])
        assert modules | set(FOLDERS) <= packed


def imported(folder: Path) -> set[str]:
    """Top-level names that the sources of a folder import from elsewhere."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(a.name.split(".")[0] for a in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)


def test_every_import_is_a_declared_dependency() -> None:
    extras = PROJECT["project"]["optional-dependencies"]  # imported where they are asked for
    needed = [*PROJECT["project"]["dependencies"], *extras["dask"], *extras["data"]]
    declared = {re.split(r"[<>=\[ ]", d)[0].lower() for d in needed}
    owners = {"PIL": ["pillow"], **packages_distributions()}  # (which may be absent)
    for folder in (*(ROOT / f for f in FOLDERS), ROOT / "src" / "odt_plan"):
        for name in imported(folder):
            known = {d.lower().replace("_", "-") for d in owners.get(name, [name])}
            # pydantic-core comes with pydantic, its version pinned by it
            assert known & (declared | {"pydantic-core"}), f"{folder.name} imports {name}"


def test_folders_import_each_other_relatively() -> None:
    for folder in FOLDERS:
        bare = imported(ROOT / folder) & {*FOLDERS, "odt_plan"}
        assert not bare, f"{folder} imports {bare} by a name that only a checkout has"


def test_links_of_the_checkout_point_at_the_folders() -> None:
    for folder in FOLDERS:
        assert (ROOT / "src" / "odt_plan" / folder).resolve() == ROOT / folder


def test_public_names_are_importable_and_lazy() -> None:
    assert set(odt_plan.__all__) == {*odt_plan._HOME, "__version__"}
    for name in odt_plan.__all__:
        assert getattr(odt_plan, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = odt_plan.nonsense
    assert odt_plan.__version__ == PROJECT["project"]["version"]
    assert dir(odt_plan) == sorted(odt_plan.__all__)

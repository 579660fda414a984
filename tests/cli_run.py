"""The command line, run inside the process of the tests; see the fixture ``odt``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from odt_plan import cli


class Ran:
    """What a run of the command line left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def error(self) -> str:
        """The only line on stderr, without ``error: ``."""
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").rstrip("\n")

    @property
    def refusal(self) -> list[str]:
        """The lines that tell why there is no plan, without ``error: ``."""
        assert self.code == 3, self.err
        assert self.err.startswith("error: no plan fits: "), self.err
        return self.err.removeprefix("error: ").splitlines()

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)


class Cli:
    """Runs commands inside this process, in an empty folder."""

    def __init__(self, capfd: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self._capfd, self._patch = capfd, patch

    def __call__(self, *args: str | Path) -> Ran:
        self._patch.setattr(sys, "argv", ["odt-plan", *map(str, args)])
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as e:
            cli.main()
        code = e.value.code
        assert isinstance(code, int)
        out, err = self._capfd.readouterr()
        return Ran(code, out, err)

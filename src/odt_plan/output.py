"""An output folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from .ir.errors import OdtPlanError, UsageError

#: The file that marks a folder as one of ours, which may be written again.
PLAN_FILE = "plan.json"


class OutputFolder:
    """Collects files in a hidden folder beside their place; ``commit`` moves them all.

    Leaving the ``with`` block without ``commit`` removes everything that was written.

    Attributes:
        staging: Where to write the files.
    """

    staging: Path

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        """Check the place and make the hidden folder.

        Args:
            folder: Where the files shall stand; made if it is missing.
            force: Write over files in a folder that holds no plan.json.

        Raises:
            OdtPlanError: The folder can't be written.
        """
        self._folder = folder
        self._force = force
        ground = folder
        while not ground.exists() and ground != ground.parent:
            ground = ground.parent
        if not ground.is_dir():
            raise OdtPlanError(f"{folder}: can't write: {ground} is no folder; choose another")
        try:
            self.staging = Path(tempfile.mkdtemp(prefix=".odt-plan-", dir=ground))
        except OSError as e:
            raise unwritable(folder, e) from None

    def __enter__(self) -> Self:
        """The folder itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove what was not committed."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def write(self, name: str, text: str) -> None:
        """Write a text file, the same bytes on every system.

        Raises:
            OdtPlanError: It can't be written.
        """
        try:
            (self.staging / name).write_text(text, encoding="utf-8", newline="\n")
        except OSError as e:
            raise unwritable(self._folder / name, e) from None

    def copy(self, source: Path, name: str | None = None) -> None:
        """Copy a file into the folder.

        Args:
            source: The file.
            name: Its name there, if another.

        Raises:
            OdtPlanError: It can't be read or written.
        """
        target = self.staging / (name or source.name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        except OSError as e:
            raise unwritable(self._folder / (name or source.name), e) from None

    def commit(self) -> list[Path]:
        """Move the files to their place; plan.json comes last.

        Returns:
            The files, sorted, as paths in the folder.

        Raises:
            UsageError: A file of another origin stands in the way and ``force`` was not given.
            OdtPlanError: A file can't be written.
        """
        staged = sorted(p for p in self.staging.rglob("*") if p.is_file())
        names = [p.relative_to(self.staging) for p in staged]
        ours = self._force or (self._folder / PLAN_FILE).is_file()
        for name, source in zip(names, staged, strict=True):
            target = self._folder / name
            if target.is_dir():
                raise OdtPlanError(f"{target}: can't write: is a folder; choose another -o")
            if not ours and target.exists() and target.read_bytes() != source.read_bytes():
                raise UsageError(f"{target}: exists; choose another -o, or write over it: --force")
        try:
            # x.data comes before x, which needs it
            for name in sorted(names, key=lambda n: (str(n) != PLAN_FILE, n), reverse=True):
                target = self._folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.staging / name, target)
        except OSError as e:
            raise unwritable(self._folder, e) from None
        return [self._folder / n for n in names]


def unwritable(path: Path, error: OSError) -> OdtPlanError:
    """The error for a path that can't be written."""
    return OdtPlanError(f"{path}: can't write: {error.strerror or error}; choose another -o")

"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ...ir.errors import OdtPlanError


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text with Unix line ends to a temporary name, then rename.

    Raises:
        OdtPlanError: The folder is missing or can't be written; nothing is left behind.
    """
    temporary: str | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            encoding="utf-8",
            newline="\n",
            dir=path.parent,
            prefix=f".{path.name}.",
            delete=False,
        ) as file:
            temporary = file.name
            file.write(text)
        Path(temporary).chmod(0o666 & ~_umask())  # NamedTemporaryFile makes private files
        os.replace(temporary, path)
    except OSError as e:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = e.strerror or str(e)
        raise OdtPlanError(f"{path}: can't write: {reason}; choose another output folder") from None


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it
    os.umask(mask)
    return mask

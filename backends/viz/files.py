"""Text files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

from ...ir.errors import OdtPlanError
from ...ir.whole_file import whole_file


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text with Unix line ends, whole or not at all.

    Raises:
        OdtPlanError: The folder is missing or can't be written; nothing is left behind.
    """
    try:
        with whole_file(path) as file:
            file.write(text.encode())
    except OSError as e:
        reason = e.strerror or str(e)
        raise OdtPlanError(f"{path}: can't write: {reason}; choose another output folder") from None

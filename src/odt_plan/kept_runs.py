"""Results of trainings that are kept on disk, so that a second plan of the same takes none."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

from .backends.viz.files import write_whole
from .ir.errors import OdtPlanError

#: Folder of finished runs; ``$XDG_CACHE_HOME/odt-plan`` or ``~/.cache/odt-plan`` where unset.
CACHE_VARIABLE = "ODT_PLAN_CACHE"


class KeptRuns:
    """Finished runs of one model, data set and setting, a file each."""

    def __init__(self, kind: str, digest: str) -> None:
        """Runs of a kind, such as ``contribution``; ``digest`` is of all that they have in common.

        Nothing is read or written yet.
        """
        base = os.environ.get(CACHE_VARIABLE) or os.environ.get("XDG_CACHE_HOME")
        folder = Path(base) if base else Path.home() / ".cache"
        if not os.environ.get(CACHE_VARIABLE):
            folder /= "odt-plan"
        self._kind, self._told = kind, False
        self._folder = folder / kind / digest[:32]

    def _path(self, key: object) -> Path:
        text = json.dumps(key, sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def read(self, key: object) -> object:
        """What came of a run; None: it is not there, or the file is damaged."""
        try:
            record = json.loads(self._path(key).read_text(encoding="utf-8"))
            return record["result"] if record["run"] == json.loads(json.dumps(key)) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, key: object, result: object) -> None:
        """Keep what came of a run; that it can't be kept is told once."""
        record = {"run": key, "result": result}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(key), json.dumps(record) + "\n")
        except (OSError, OdtPlanError) as e:
            if not self._told:
                print(f"note: runs of the {self._kind} are not kept: {e}", file=sys.stderr)
            self._told = True

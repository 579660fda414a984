"""Checkpoints: everything that a training session needs to go on as if nothing had happened.

An .npz file: the states as bytes, the losses as float64, and the rest as JSON. Every member has a
checksum (ZIP's CRC-32), so a file that is cut or damaged is told. The file before the last write
stays beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...ir.array_file import array_file, write_arrays
from ...ir.errors import OdtPlanError, UsageError
from ...ir.graph import Array
from ...ir.whole_file import whole_file
from .data import DataSet
from .history import Epoch
from .metrics import Evaluation, Score
from .runtime import Runtime, Snapshot
from .standing import Judged, Standing

_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A session between two updates.

    Attributes:
        belongs: What it can go on with: digests of plan and data, and the options by their names
            on the command line.
        first: The state before training.
        good: Where it stands.
        judged: What the epochs have shown.
        losses: Of the updates that were kept.
    """

    belongs: Mapping[str, Any]
    first: Snapshot
    good: Standing
    judged: Judged
    losses: tuple[float, ...]


def previous(path: Path) -> Path:
    """Where the checkpoint before the last stands."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all; the one that had the name becomes the previous one.

    Raises:
        OdtPlanError: It can't be written; what was there stays.
    """
    good, judged = checkpoint.good, checkpoint.judged
    states = {"first": checkpoint.first, "good": good.state, "milestone": judged.milestone.state}
    if judged.best is not None:
        states["best"] = judged.best[1]
    record = {
        "format": _FORMAT,
        "belongs": dict(checkpoint.belongs),
        "good": _counts(good),
        "milestone": _counts(judged.milestone),
        "epochs": [asdict(e) for e in judged.epochs],
        "best": None if judged.best is None else judged.best[0].number,
        "updates": {name: s.updates for name, s in states.items()},
    }
    arrays: dict[str, Array] = {
        "record": np.frombuffer(json.dumps(record).encode(), np.uint8),
        "losses": np.array(checkpoint.losses, np.float64),
    }
    for name, s in states.items():
        arrays[f"{name}.state"] = np.frombuffer(s.state, np.uint8)
        arrays[f"{name}.stored"] = np.frombuffer(s.stored, np.uint8)
    try:
        with whole_file(path) as file:
            write_arrays(file, arrays)
            file.flush()
            os.fsync(file.fileno())  # a full disk shows before the old file moves
            if path.exists():
                os.replace(path, previous(path))
    except OSError as e:
        raise OdtPlanError(
            f"{path}: can't write the checkpoint: {e.strerror or e}; the last one is whole: free"
            " space, or --checkpoint elsewhere, and --resume it"
        ) from None


def resume_from(path: Path, belongs: Mapping[str, Any], tell: Callable[[str], None]) -> Checkpoint:
    """The checkpoint of a file, or the previous one where that can't be used.

    Args:
        path: The file.
        belongs: What the session to go on with is made of.
        tell: Gets a line about a checkpoint that was passed over.

    Raises:
        UsageError: Neither is whole and belongs to this session.
    """
    try:
        return _read(path, belongs)
    except UsageError as e:
        older = previous(path)
        if not older.is_file():
            raise
        try:
            found = _read(older, belongs)
        except UsageError:
            raise UsageError(f"{e}; {older.name} can't be used either") from None
        tell(f"{e}; going on from {older.name}, after update {found.good.losses}")
        return found


def _read(path: Path, belongs: Mapping[str, Any]) -> Checkpoint:
    with array_file(path) as file:
        data = np.load(file, allow_pickle=False)
        if not isinstance(data, np.lib.npyio.NpzFile) or "record" not in data:
            raise UsageError(f"{path}: is no checkpoint; give one that --checkpoint wrote")
        record = json.loads(data["record"].tobytes())
        if record["format"] != _FORMAT:
            raise UsageError(f"{path}: a checkpoint of another version; train anew")
        _check(path, record["belongs"], belongs)
        arrays = {name: data[name] for name in data.files}

    def state(name: str) -> Snapshot:
        held, stored = (arrays[f"{name}.{part}"].tobytes() for part in ("state", "stored"))
        return Snapshot(held, stored, record["updates"][name])

    epochs = tuple(_epoch(e) for e in record["epochs"])
    best = [(e, state("best")) for e in epochs if e.number == record["best"]]
    milestone = Standing(state("milestone"), **record["milestone"])
    return Checkpoint(
        belongs,
        state("first"),
        Standing(state("good"), **record["good"]),
        Judged(milestone, epochs, best[0] if best else None),
        tuple(arrays["losses"].tolist()),
    )


def _check(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) == value:
            continue
        if name.startswith("--"):
            raise UsageError(f"{path}: was trained with {name} {found.get(name)}, not {value}")
        raise UsageError(f"{path}: belongs to another {name}; give what it was trained with")


def _counts(s: Standing) -> dict[str, int]:
    return {"position": s.position, "losses": s.losses, "replayed": s.replayed, "halved": s.halved}


def _epoch(record: dict[str, Any]) -> Epoch:
    found = record.pop("validation")
    if found is not None:
        found = Evaluation(**{**found, "scores": tuple(Score(**s) for s in found["scores"])})
    return Epoch(**record, validation=found)


def belonging(
    runtime: Runtime, data: DataSet, validation: DataSet | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What a checkpoint belongs to.

    Args:
        runtime: Its plan and the parameters of its model count.
        data: The samples and targets to train on.
        validation: Those to judge by.
        options: Values that a resumed session must share, by name on the command line.
    """
    plan = runtime.plan
    return {
        "plan": plan.content_digest().hex(),
        "replay cache": None if plan.replay is None else plan.replay.model_dump(mode="json"),
        "data set": _digest(data),
        "validation set": None if validation is None else _digest(validation),
        **options,
    }


def _digest(data: DataSet) -> str:
    digest = hashlib.sha256()
    for name, a in (*data.x.items(), *data.y.items(), ("anomalous", data.anomalous)):
        if a is not None:
            digest.update(f"{name} {a.dtype} {a.shape} ".encode())
            digest.update(np.ascontiguousarray(a).tobytes())
    return digest.hexdigest()

"""What emitted libraries write: saved states (``<model>_save``) and changes (``<model>_delta``)."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

from ...ir.errors import UsageError
from ...ir.graph import Array
from ...ir.training import TrainingGraph
from ...planner.plan import Plan
from ..numpy import Runtime
from ..numpy.parameters import by_parameter

#: First bytes of a saved state.
MAGIC = b"ODTP"
_VERSION = 1
#: Magic, version, id of the plan, bytes of state, checksum of all that follows; little endian.
_HEADER = struct.Struct("<4s5I")
#: First bytes of changes; the header is the same, the floats of all changes follow.
DELTA_MAGIC = b"ODTC"
#: Updates, micro-steps and Adam's two corrections.
_PROGRESS = struct.Struct("<2I2f")


def plan_id(plan: Plan) -> tuple[int, int]:
    """64 bits that identify what a saved state belongs to: model, training, layout and steps."""
    digest = plan.content_digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def load_saved(runtime: Runtime, path: Path) -> None:
    """Continue with the weights of a device, from what the emitted library has saved there.

    Optimizer tensors in storage are left as they are.

    Args:
        runtime: Of the plan that the library was emitted for.
        path: The saved state, from its first byte on; bytes behind it are not looked at.

    Raises:
        UsageError: It can't be read, is cut or damaged, or belongs to another plan.
    """
    begin = _HEADER.size + _PROGRESS.size
    data = _read(path, begin, "saved state")
    magic, version, *plan, n_bytes, checksum = _HEADER.unpack_from(data)
    if (magic, version, *plan) != (MAGIC, _VERSION, *plan_id(runtime.plan)):
        raise UsageError(f"{path}: saved by a library of another plan; give the plan that it is of")
    content = data[_HEADER.size : begin + n_bytes]
    if len(data) < begin + n_bytes or zlib.crc32(content) != checksum:
        raise UsageError(f"{path}: a saved state that is cut or damaged; read it again")
    updates = _PROGRESS.unpack_from(data, _HEADER.size)[0]
    state = data[begin : begin + runtime.state_nbytes]
    runtime.load_state(state, updates=updates, stored=runtime.stored_bytes())


def load_delta(plan: Plan, training: TrainingGraph, path: Path) -> dict[str, Array]:
    """Changes of parameters by their names in the model, from what a device has sent.

    Args:
        plan: The plan that the library was emitted for.
        training: Its training graph.
        path: What ``<model>_delta`` wrote, from its first byte on.

    Raises:
        UsageError: It can't be read, is cut or damaged, or belongs to another plan.
    """
    data = _read(path, _HEADER.size, "changes")
    size = sum(u.value.type.size for u in training.updates) * 4
    header = _HEADER.unpack_from(data)
    if header[:-1] != (DELTA_MAGIC, _VERSION, *plan_id(plan), size):
        raise UsageError(f"{path}: changes by a library of another plan; give the plan of these")
    content = data[_HEADER.size : _HEADER.size + size]
    if len(content) < size or zlib.crc32(content) != header[-1]:
        raise UsageError(f"{path}: changes that are cut or damaged; read them again")
    changed: dict[str, Array] = {}
    rest = np.frombuffer(content, "<f4")
    for u in training.updates:
        shape = u.value.type.shape
        changed[u.value.name] = rest[: u.value.type.size].reshape(shape).astype(np.float32)
        rest = rest[u.value.type.size :]
    return by_parameter(training, changed)


def _read(path: Path, least: int, what: str) -> bytes:
    """A file of at least so many bytes."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UsageError(f"{path}: can't be read: {e.strerror or e}") from None
    if len(data) < least:
        raise UsageError(f"{path}: {len(data)} bytes are no {what}; it is cut")
    return data

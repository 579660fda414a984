"""Contribution analysis of a whole model: a run per tensor and part, in processes, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from math import inf
from pathlib import Path

from . import __version__
from .backends.numpy.contribution import HELD_OUT, RATES, UPDATES, contribution
from .backends.numpy.gradients import Gains
from .backends.numpy.micro_batches import feeds, plain
from .ir.adapters import adapters_by_param
from .ir.autodiff import build_training
from .ir.candidates import param_slots, parts
from .ir.channels import Channels, reordered
from .ir.errors import OdtPlanError, UsageError
from .ir.graph import Array, Graph
from .ir.import_options import ImportOptions
from .ir.onnx_external import external_files
from .ir.onnx_import import import_model
from .ir.training import Candidate, TrainingSpec
from .kept_runs import KeptRuns
from .local_pool import InProcess, LocalPool, cores
from .planner.progress import Watch

#: Trials that are not worth the start of processes.
_FEW = 4

Feeds = tuple[Mapping[str, Array], ...]


@dataclass(frozen=True)
class Source:
    """A model file and how it is imported."""

    model: Path
    importing: ImportOptions


@dataclass(frozen=True)
class Trial:
    """One tensor, or part of one, that is trained alone; small and picklable.

    Attributes:
        name: For messages.
        source: The model, on this machine.
        channels: Their order, see ``ir.channels``.
        spec: The loss.
        candidate: What is trained; of an adapter its last weight, and all else with it.
        learned: Micro-batches that it is trained on.
        held_out: Those that the gain is measured on.
    """

    name: str
    source: Source
    channels: Channels
    spec: TrainingSpec
    candidate: Candidate
    learned: Feeds
    held_out: Feeds

    def run(self) -> float | str:
        """The gain, or what is wrong."""
        try:
            forward = reordered(_imported(self.source), self.channels)
            adapter = adapters_by_param(forward).get(self.candidate.param)
            trained = [self.candidate] if adapter is None else list(map(Candidate, adapter.params))
            return contribution(forward, self.spec, trained, self.learned, self.held_out)
        except OdtPlanError as e:
            return str(e)

    def lost(self, reason: str) -> float | str:
        """Its worker died time and again."""
        return reason


@lru_cache(maxsize=1)
def _imported(source: Source) -> Graph:
    return import_model(source.model, source.importing)


def contributions(
    source: Source,
    forward: Graph,
    spec: TrainingSpec,
    params: Sequence[str],
    x: Mapping[str, Array],
    y: Mapping[str, Array],
    watch: Watch,
    channels: Channels,
) -> dict[str, Gains]:
    """Gains of parameters and of the parts that they can be updated by.

    A part that gains more than a larger one stands for that one as well, which could learn the
    same. Runs that were done before are read from the cache.

    Args:
        source: Model file.
        forward: The same, imported.
        spec: The loss.
        params: Parameters to score; those that learn without a gradient score 0, and so do those
            of an adapter, whose score is that of its last weight.
        x: Samples.
        y: Labels or targets.
        watch: Told what goes on.
        channels: Axes whose channels have another order than in ``forward``: parts are of the
            leading ones in this order.

    Raises:
        UsageError: The data do not fit the model or are too few, nothing gains, or a run failed.
    """
    slots = param_slots(forward)
    others = {p for a in forward.adapters for p in a.params if p != a.up}
    learn = [p for p in params if slots[p][0][1].role != "statistic" and p not in others]
    batches = feeds(build_training(forward, plain(spec), [Candidate(learn[0])]), x, y)
    if len(batches) < HELD_OUT:
        raise UsageError(
            f"contribution: {len(batches)} micro-batches are too few to hold some out; give"
            f" {HELD_OUT} or more"
        )
    held = tuple(b for i, b in enumerate(batches) if i % HELD_OUT == HELD_OUT - 1)
    learned = tuple(b for i, b in enumerate(batches) if i % HELD_OUT != HELD_OUT - 1)
    trials, keys = [], [(p, part) for p in learn for part in (*parts(forward, p), 1.0)]
    for p, part in keys:
        axis = slots[p][0][1].channel_axis(slots[p][0][0]) if part < 1 else None
        k = None if axis is None else round(part * forward.values[p].type.shape[axis])
        name, one = f"{p} {part:.1%}", Candidate(p, k)
        trials.append(Trial(name, source, channels, spec, one, learned, held))
    digest = _digest(source, channels, spec, batches)
    found = dict(zip(keys, _results(trials, digest, watch), strict=True))
    if not any(found.values()):
        raise UsageError("contribution: no tensor gains anything alone; give more samples")
    gains: dict[str, Gains] = dict.fromkeys(params, ((1.0, 0.0),))
    for p in learn:
        each = [part for q, part in keys if q == p]
        gains[p] = tuple(zip(each, accumulate((found[p, r] for r in each), max), strict=True))
    return gains


def _results(trials: Sequence[Trial], digest: str, watch: Watch) -> list[float]:
    """The gain of each trial, from the cache or of a run now."""
    kept = KeptRuns("contribution", digest)
    keys = [[t.candidate.param, t.candidate.channels] for t in trials]
    gains = {i: gain for i, k in enumerate(keys) if (gain := _gain(kept.read(k))) is not None}
    todo = [i for i in range(len(trials)) if i not in gains]

    def done(j: int, result: float | str) -> None:
        i = todo[j]
        if isinstance(result, str):
            raise UsageError(f"contribution of {trials[i].name}: {result}")
        gains[i] = result
        kept.write(keys[i], result)
        told = f"{len(gains)} of {len(trials)} runs ({trials[i].name})"
        watch.stage(f"measuring importance: contribution, {told}")

    watch.stage(f"measuring importance: contribution, {len(gains)} of {len(trials)} runs")
    few = len(todo) <= _FEW or cores() == 1
    with nullcontext(InProcess()) if few else closing(LocalPool(cores())) as pool:
        pool.run([trials[i] for i in todo], done)
    return [gains[i] for i in range(len(trials))]


def _gain(result: object) -> float | None:
    """A kept gain; None where it is none."""
    return float(result) if isinstance(result, int | float) and 0 <= result < inf else None


def _digest(
    source: Source, channels: Channels, spec: TrainingSpec, batches: Sequence[Mapping[str, Array]]
) -> str:
    """SHA-256 of all that decides a gain but the candidate."""
    found = hashlib.sha256()
    setting = [__version__, asdict(source.importing), asdict(plain(spec)), RATES, UPDATES, HELD_OUT]
    setting.append(dict(channels))
    found.update(json.dumps(setting, sort_keys=True).encode())
    for part in (Path(source.model.name), *external_files(source.model)):
        found.update(hashlib.sha256((source.model.parent / part).read_bytes()).digest())
    for batch in batches:
        for name, a in batch.items():
            found.update(f"{name} {a.dtype} {a.shape}".encode() + a.tobytes())
    return found.hexdigest()

"""The file that the host program of an emitted library trains from: options, order, samples."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from ...ir.errors import UsageError
from ...ir.graph import Array
from ...ir.training import TrainingGraph
from ...planner.plan import Plan
from ..numpy import DataSet, SessionOptions
from ..numpy.metrics import check_metric, metric_of
from ..numpy.session import sampler_of, updates_of
from .saved import plan_id
from .schedule import clips, decays
from .session import ranks_errors

#: First bytes of the file.
MAGIC = b"ODTD"
_VERSION = 4
#: Magic, version, id of the plan, bytes of all that follows, their checksum; little endian.
_HEADER = struct.Struct("<4s5I")
#: Step size; epochs, updates, online; samples to train on and to judge by; schedule, warm-up,
#: metric, patience, halvings; entries of the order; bytes of a sample and of its target; decay and
#: clipping.
_OPTIONS = struct.Struct("<d13I2d")
_SCHEDULES = ("constant", "linear", "cosine")
_METRICS = ("usual", "loss", "accuracy", "mse", "auc")
_LARGEST = 2**32


def session_file(
    plan: Plan,
    training: TrainingGraph,
    data: DataSet,
    options: SessionOptions,
    validation: DataSet | None = None,
) -> bytes:
    """What ``<model>_host`` needs to do the session that ``train_session`` does.

    The order of the samples is that of NumPy; without ``online`` each micro-batch of the run takes
    4 bytes per sample for it, or 4 bytes where a replay cache keeps micro-batches together.

    Args:
        plan: The plan that the library was emitted for.
        training: Its training graph.
        data: What to train on.
        options: How.
        validation: What to judge by.

    Raises:
        UsageError: The options contradict each other or the data, or the C session can't do them.
    """
    size, micro = plan.model.batch, plan.training.micro_batches
    total = updates_of(options, data.count, size * micro)
    metric = options.metric or metric_of(training)
    _check_options(options, plan, training, metric)
    if validation is not None:
        check_metric(training, metric, validation)
    sampler = sampler_of(options, data, plan)
    order = np.zeros(0, "<u4")
    if not options.online:
        order = np.array([i for n in range(total * micro) for i in sampler.items(n)], "<u4")
    samples, targets = _rows(data, sampler.arranged)
    rows = [np.concatenate([samples, targets], axis=1)]
    if validation is not None:
        rows.append(np.concatenate(_rows(validation, np.arange(validation.count)), axis=1))
    content = _OPTIONS.pack(
        options.lr,
        options.epochs or 0,
        options.steps or 0,
        options.online,
        data.count,
        0 if validation is None else validation.count,
        _SCHEDULES.index(options.schedule),
        options.warmup,
        _METRICS.index(metric),
        options.patience or 0,
        options.halvings,
        order.size,
        samples.shape[1],
        targets.shape[1],
        options.weight_decay,
        options.clip or 0.0,
    )
    if metric == "auc" and validation is not None and validation.anomalous is not None:
        rows.append(validation.anomalous.astype(np.uint8))
    content = b"".join([content, order.tobytes(), *(r.tobytes() for r in rows)])
    if len(content) >= _LARGEST:
        raise UsageError(f"the session takes {len(content)} B; its file must be below 4 GiB")
    head = _HEADER.pack(MAGIC, _VERSION, *plan_id(plan), len(content), zlib.crc32(content))
    return head + content


def _check_options(
    options: SessionOptions, plan: Plan, training: TrainingGraph, metric: str
) -> None:
    """Demand what the C session can do."""
    options.regularization.check(training)
    if options.clip is not None and not clips(plan, training):
        raise UsageError(
            "--clip: this plan changes weights while it makes their gradients, so the emitted C"
            " can't clip; leave it out, or plan again with --micro-batches 2 or more"
        )
    if options.weight_decay and not decays(plan, training):
        raise UsageError(
            "--weight-decay: this plan uses a weight's gradient elsewhere, too, or trains no"
            " weight, so the emitted C can't decay; leave it out"
        )
    if options.checkpoint is not None or options.resume is not None:
        raise UsageError(
            "the emitted program takes its checkpoint as an argument; leave out --checkpoint and"
            " --resume"
        )
    usual = metric_of(training)
    offered = [*({usual} - {"loss"}), *(["auc"] if ranks_errors(training) else []), "loss"]
    if metric not in offered:
        known = " or ".join(offered)
        raise UsageError(f"--metric {metric}: the emitted C judges this model by {known}")


def _rows(data: DataSet, order: Array) -> tuple[Array, Array]:
    """Bytes of samples and of targets, each [count, bytes], arrays one behind the other."""
    count = len(order)

    def joined(arrays: dict[str, Array]) -> Array:
        parts = [np.ascontiguousarray(a[order]).reshape(count, -1) for a in arrays.values()]
        little = [p.astype(p.dtype.newbyteorder("<"), copy=False) for p in parts]
        return np.concatenate([p.view(np.uint8) for p in little], axis=1)

    return joined(data.x), joined(data.y)

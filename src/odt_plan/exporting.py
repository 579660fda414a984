"""What ``odt-plan export`` does: what was learned and decided goes back into the model file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .backends.c.golden import random_samples
from .backends.c.saved import DELTA_MAGIC, MAGIC, load_delta, load_saved
from .backends.numpy import Runtime
from .backends.viz.notes import model_notes, node_notes
from .ir.adapters import adapters_by_param, without_unused
from .ir.array_file import array_file, write_arrays
from .ir.autodiff import build_training
from .ir.errors import OdtPlanError, UnsupportedModelError, UsageError
from .ir.graph import Array, Graph
from .ir.interpreter import run
from .ir.lite_residual import LiteResidual
from .ir.lora import LowRankAdapter
from .ir.lowered_layers import out_axis
from .ir.onnx_external import external_files
from .ir.onnx_import import import_model
from .ir.onnx_write import OriginalFile
from .ir.provenance import ProvenanceError, write_back
from .ir.whole_file import whole_file
from .output import OutputFolder, unwritable
from .planner.check import check
from .planner.plan import Plan, load_plan
from .planner.rebuild import (
    as_planned,
    forward_of,
    imported,
    in_precisions,
    model_of,
    rebuild,
    spec_of,
    updates_of,
)
from .planning import device_of_plan
from .report import console

#: Begins the keys of all notes.
PREFIX = "odt_plan."
#: Largest difference of predictions, relative to the largest number in them: fp32 in another order.
TOLERANCE = 1e-4
#: Random samples, or batches, that predictions are compared on.
_SAMPLES = 3


@dataclass(frozen=True)
class ExportOptions:
    """The options of ``odt-plan export``; see its ``--help``."""

    plan_file: Path
    weights: Path | None
    output: Path
    model: Path | None
    device: str | None
    as_json: bool


def run_export(options: ExportOptions) -> dict[str, object]:
    """Write the model file with what was learned and decided, checked before it appears.

    Returns:
        What ``--json`` prints.

    Raises:
        UsageError: The plan, its model, the device or the weights are wrong, or do not fit.
        OdtPlanError: The weights have no form in the file, it does not compute what was trained, or
            it can't be written.
    """
    plan = load_plan(options.plan_file)
    source = model_of(plan, options.plan_file, options.model)
    forward = forward_of(plan, options.plan_file, options.model)
    training = build_training(as_planned(plan, forward), spec_of(plan), updates_of(plan))
    check(plan, training, device_of_plan(options.plan_file, plan.device.id, options.device))
    _check_target(options, source)
    file = OriginalFile(source)
    written: _Written | None = None
    if options.weights is not None:
        runtime, lowered = Runtime(plan, training), in_precisions(plan, forward)
        before = runtime.params()
        _load(runtime, options.weights)
        learned = _learned(plan, source, forward, lowered, before, runtime)
        written = _write(file, lowered, learned, runtime, source)
    file.annotate(PREFIX, model_notes(plan), node_notes(plan, training, file.nodes))
    with OutputFolder(options.output.parent, force=True) as folder:
        staged = folder.staging / options.output.name
        try:
            file.save(staged, _data_name(options.output))
        except OSError as e:
            raise unwritable(options.output, e) from None
        difference = None if written is None else _compare(plan, staged, written)
        files = folder.commit()
    record: dict[str, Any] = {"files": [str(f) for f in files], "changed": {}}
    if written is not None:
        record |= {
            "changed": {k: [*shape] for k, shape in written.changed.items()},
            "added": written.added,
            "rounded": written.rounded,
            "difference": difference,
            "rounding_difference": written.drift,
            "tolerance": TOLERANCE,
        }
    if not options.as_json:
        _tell(record)
    return record


def run_delta(options: ExportOptions) -> dict[str, object]:
    """Write what training has changed: f32 arrays by the names of parameters, for averaging.

    Returns:
        What ``--json`` prints.

    Raises:
        UsageError: The plan, its model, the device or the weights are wrong, or do not fit.
        OdtPlanError: The file can't be written.
    """
    if options.weights is None:
        raise UsageError("--delta needs what was learned; give WEIGHTS behind the plan")
    plan = load_plan(options.plan_file)
    training = rebuild(plan, options.plan_file, options.model)
    check(plan, training, device_of_plan(options.plan_file, plan.device.id, options.device))
    _check_target(options, model_of(plan, options.plan_file, options.model))
    if _first_bytes(options.weights) == DELTA_MAGIC:
        changes = load_delta(plan, training, options.weights)
    else:
        runtime = Runtime(plan, training)
        _load(runtime, options.weights)
        changes = runtime.changes()
    try:
        with whole_file(options.output) as file:
            write_arrays(file, changes)
    except OSError as e:
        raise unwritable(options.output, e) from None
    record: dict[str, object] = {
        "files": [str(options.output)],
        "changes": {name: [*a.shape] for name, a in changes.items()},
    }
    if not options.as_json:
        text = f"changes of {len(changes)} tensors written: {options.output}"
        console().print(text, soft_wrap=True, markup=False)
    return record


@dataclass(frozen=True, eq=False)
class _Written:
    """What has been put into the file.

    Attributes:
        changed: Tensors and their shapes.
        added: Tensors of layers that the file did not have.
        rounded: Tensors that hold less than f32, with the largest difference to what was learned,
            relative to its largest number.
        drift: What that makes of predictions.
        samples: Random samples, by input.
        predictions: Of all samples, by output, by the plan's runtime with rounded parameters as
            the file holds them.
    """

    changed: dict[str, tuple[int, ...]]
    added: list[str]
    rounded: dict[str, float]
    drift: float
    samples: list[dict[str, Array]]
    predictions: dict[str, Array]


def _check_target(options: ExportOptions, source: Path) -> None:
    """The output may be no file that is read."""
    output, data = options.output, options.output.with_name(_data_name(options.output))
    read = [options.plan_file, source, *([options.weights] if options.weights else [])]
    read += [source.parent / name for name in external_files(source)]
    for target in (output, data):
        if target.is_dir():
            raise UsageError(f"{target}: is a folder; give a file name to -o")
        if target.exists() and any(r.exists() and target.samefile(r) for r in read):
            raise UsageError(f"{target}: is read and can't be written; give another -o")


def _data_name(output: Path) -> str:
    """The file beside the model for tensors that stood beside the original."""
    return f"{output.name}.data"


def _first_bytes(path: Path) -> bytes:
    """What tells the files of the emitted C."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC))
    except OSError as e:
        raise UsageError(f"{path}: can't be read: {e.strerror or e}") from None


def _load(runtime: Runtime, path: Path) -> None:
    """Learned parameters: an .npz of ``odt-plan run --save``, or a saved state of the emitted C."""
    first = _first_bytes(path)
    if first == DELTA_MAGIC:
        raise UsageError(f"{path}: holds changes, not weights; give --delta")
    if first == MAGIC:
        load_saved(runtime, path)
        return
    with array_file(path) as stream:
        data = np.load(stream, allow_pickle=False)
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise UsageError(f"{path}: is one array; give what odt-plan run --save has written")
        values = dict(data)
    wanted = {u.candidate.param for u in runtime.training.updates}
    if missing := sorted(wanted.difference(values)):
        raise UsageError(
            f"{path}: lacks {', '.join(missing)}, which the plan updates; give what odt-plan run"
            " --save has written for this plan"
        )
    try:
        runtime.set_params(values)
    except UsageError as e:
        raise UsageError(f"{path}: {e}") from None


def _learned(
    plan: Plan,
    source: Path,
    forward: Graph,
    lowered: Graph,
    before: dict[str, Array],
    runtime: Runtime,
) -> dict[str, tuple[Array, Array]]:
    """Each learned constant of the file as it was and is, and those of a fresh head.

    Adapters of low rank are merged; others are no part of it.
    """
    after = runtime.params()
    names = {u.candidate.param for u in runtime.training.updates}
    own = {n: (before[n], after[n]) for n in after if n in names}
    learned = dict(own)
    layers = {n.name: n for n in lowered.nodes}
    for a in runtime.training.graph.adapters:
        for p in a.params:
            learned.pop(p, None)
        if isinstance(a, LowRankAdapter):
            axis = out_axis(layers[a.layer])
            new = a.merged(after[a.weight], after[a.down], after[a.up], axis)
            learned[a.weight] = (before[a.weight], new)
    if bad := [n for n, (_, a) in (own | learned).items() if not np.isfinite(a).all()]:
        raise UsageError(f"{bad[0]} has learned NaN or infinite numbers; train with a smaller --lr")
    if plan.model.head is not None:
        old = import_model(source, replace(plan.model.importing, head=None))
        known = {name: now for name, (_, now) in learned.items()}
        names |= adapters_by_param(lowered).keys()
        for name in (n for n in forward.constants if n not in names):
            was, now = old.constants.get(name), known.get(name, forward.constants[name])
            if was is not None and not np.array_equal(was, now):
                learned[name] = (was, now)
    return learned


def _write(
    file: OriginalFile,
    lowered: Graph,
    learned: dict[str, tuple[Array, Array]],
    runtime: Runtime,
    source: Path,
) -> _Written:
    """Put the learned constants into the file."""
    try:
        changed, held = write_back(lowered, learned, file.tensors)
    except ProvenanceError as e:
        raise UnsupportedModelError(
            f"{source}: {e}; freeze it, or export the model with a float tensor of its own there"
        ) from None
    added = _insert(file, lowered, runtime, source)
    lossy = {n for n, a in changed.items() if a.dtype not in (np.float32, np.float64)}
    resized = [n for n, a in changed.items() if a.shape != file.tensors[n].shape]
    for name, data in changed.items():
        file.replace(name, data)
    file.resize(resized, {v.name: v.type.shape for v in lowered.outputs})
    rounded = {
        name: float(np.abs(held[name] - after).max() / max(np.abs(after).max(), 1e-30))
        for name, (_, after) in learned.items()
        if lowered.origins[name].tensors & lossy and not np.array_equal(held[name], after)
    }
    rng = np.random.default_rng(0)
    samples = [random_samples(runtime.training, rng) for _ in range(_SAMPLES)]
    predictions = trained = _predicted(runtime, samples)
    adapters = runtime.training.graph.adapters
    merged_ones = [a for a in adapters if isinstance(a, LowRankAdapter)]
    if any(a.weight in rounded for a in merged_ones):  # which the runtime has in two parts
        merged = without_unused(lowered, ())
        merged.constants |= {n: a for n, a in held.items() if n in merged.constants}
        predictions = _computed(merged, samples)
    elif rounded:
        updated = {u.candidate.param for u in runtime.training.updates}
        runtime.set_params({n: a for n, a in held.items() if n in updated})
        predictions = _predicted(runtime, samples)
    shapes = {n: a.shape for n, a in changed.items()}
    return _Written(shapes, added, rounded, _difference(trained, predictions), samples, predictions)


def _insert(file: OriginalFile, lowered: Graph, runtime: Runtime, source: Path) -> list[str]:
    """Put lite residual modules into the file; the tensors that it has got.

    Raises:
        UnsupportedModelError: It has no value that one reads or is added to.
    """
    nodes, params = {n.name: n for n in lowered.nodes}, runtime.params()
    added: list[str] = []
    for a in runtime.training.graph.adapters:
        if isinstance(a, LiteResidual):
            try:
                added += file.insert([nodes[name] for name in a.nodes], params)
            except ProvenanceError as e:
                raise UnsupportedModelError(
                    f"{source}: {a.up} can't be written: {e}; plan without --lite-residual, or"
                    " freeze it"
                ) from None
    return added


def _predicted(runtime: Runtime, samples: list[dict[str, Array]]) -> dict[str, Array]:
    """Each prediction, for all samples."""
    found = [runtime.predict(x) for x in samples]
    return {name: np.stack([each[name] for each in found]) for name in found[0]}


def _computed(graph: Graph, samples: list[dict[str, Array]]) -> dict[str, Array]:
    """Each prediction of a forward graph, for all samples."""
    inputs = [v.name for v in graph.inputs]
    results = [run(graph, dict(zip(inputs, x.values(), strict=True))) for x in samples]
    return {v.name: np.stack([values[v.name] for values in results]) for v in graph.outputs}


def _compare(plan: Plan, path: Path, written: _Written) -> float:
    """Import the written file; its predictions must be those of the plan's runtime.

    Raises:
        OdtPlanError: They are not.
    """
    try:
        found = _computed(in_precisions(plan, imported(plan, path)), written.samples)
    except OdtPlanError as e:
        raise OdtPlanError(f"the written model can't be read as it should: {e}") from None
    difference = _difference(written.predictions, found)
    if not difference <= TOLERANCE:
        raise OdtPlanError(
            f"the written model does not compute what was trained: off by {difference:.2g} of the"
            f" largest number, more than {TOLERANCE:g}; nothing was written"
        )
    return difference


def _difference(wanted: dict[str, Array], found: dict[str, Array]) -> float:
    """Largest difference of an output, relative to its largest wanted number."""
    worst = 0.0
    for name, a in wanted.items():
        if a.shape != found[name].shape:
            return float("inf")
        largest, most = float(np.abs(a).max()), float(np.abs(a - found[name]).max())
        worst = max(worst, most / largest if largest else most)
    return worst


def _tell(record: dict[str, Any]) -> None:
    lines = []
    if changed := record["changed"]:
        lines.append(f"{len(changed)} tensors changed, all others are as they were")
    if added := record.get("added"):
        lines.append(f"{len(added)} tensors added, with the layers that read them")
    if rounded := record.get("rounded"):
        worst = max(rounded, key=rounded.__getitem__)
        lines.append(
            f"{len(rounded)} are rounded to the file's types, {worst} by {rounded[worst]:.2g} of"
            " its largest number at most; that moves predictions by"
            f" {record['rounding_difference']:.2g}"
        )
    if "difference" in record:
        lines.append(
            "checked: predictions of the written file are those of the plan's runtime within"
            f" {record['difference']:.2g} of the largest number ({TOLERANCE:g} is allowed)"
        )
    lines.append(f"written: {', '.join(record['files'])}")
    for line in lines:
        console().print(line, soft_wrap=True, markup=False)

"""C text of the training session: what of it depends on the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from string import Template

from ...ir.errors import GraphError
from ...ir.graph import DTYPES
from ...ir.training import TrainingGraph
from ...planner.plan import Buffer, Plan
from ..numpy.data import reconstructs
from ..numpy.metrics import class_axis, metric_of
from .ctext import block
from .head import Head
from .parts import Parts
from .sample import Input

_TRAIN = Template("""\
    uint32_t row, sample = 0u;
    for (row = 0u; row < ${MODEL}_BATCH; row++) {
        const uint32_t place = number * ${MODEL}_BATCH + row;
        int status = odtplan_item(s->order, s->user, place, samples, &sample);
        if (status == ODTPLAN_OK) {
            status = fetch(s, ODTPLAN_TRAINING, sample, row, 1);
        }
        if (status != ODTPLAN_OK) {
            return status;
        }
    }
    return ${model}_train_step(s->net, $samples, $targets, lr, loss);
""")

_TRAIN_CACHED = Template("""\
    const uint32_t items = (samples + ${MODEL}_BATCH - 1u) / ${MODEL}_BATCH;
    uint32_t row, item = 0u, entry = 0u;
    int status = odtplan_item(s->order, s->user, number, items, &item), known;
    while (entry < s->net->captured && s->items[entry] != item) {
        entry++;
    }
    known = entry < s->net->captured;
    for (row = 0u; row < ${MODEL}_BATCH && status == ODTPLAN_OK; row++) {
        status = fetch(s, ODTPLAN_TRAINING, (item * ${MODEL}_BATCH + row) % samples, row, !known);
    }
    if (status != ODTPLAN_OK) {
        return status;
    }
    if (entry == ${MODEL}_REPLAY_ENTRIES) {
        return ${model}_train_step(s->net, $samples, $targets, lr, loss);
    }
    if (!known) {
        status = ${model}_capture(s->net, $samples, entry);
        if (status != ODTPLAN_OK) {
            return status;
        }
        s->items[entry] = item;
    }
    status = ${model}_train_cached(s->net, entry, $targets, lr, loss);
    s->replayed += known && status == ODTPLAN_OK ? 1u : 0u;
    return status;
""")

_STORED_FINITE = """\
    {{
        static const uint32_t stored[][2] = {{{pieces}}}; /* offset, bytes */
        uint32_t i, n, done;
        for (i = 0u; i < sizeof stored / sizeof stored[0]; i++) {{
            for (done = 0u; done < stored[i][1]; done += n) {{
                const uint32_t left = stored[i][1] - done;
                n = left < {room} ? left : {room};
                if (net->page_read(net->user, stored[i][0] + done, net->{arena}, n) != 0) {{
                    return ODTPLAN_ERROR_STORAGE;
                }}
                *finite = *finite && odtplan_all_finite(net->{arena}, n / 4u);
            }}
        }}
    }}
"""
_NEED_PAGES = """\
    if (s->net->page_write == NULL || s->net->page_read == NULL) {
        return ODTPLAN_ERROR_CALLBACK;
    }
"""
#: Transfers that are done when they are started, by page_write and page_read.
TRANSFERS = """
static int start_write(void *user, uint32_t transfer, uint32_t offset, const void *data,
                       uint32_t bytes) {
    (void)transfer;
    return page_write(user, offset, data, bytes);
}

static int start_read(void *user, uint32_t transfer, uint32_t offset, void *data, uint32_t bytes) {
    (void)transfer;
    return page_read(user, offset, data, bytes);
}

static int wait_for(void *user, uint32_t transfer) {
    (void)user;
    (void)transfer;
    return 0;
}
"""
TRANSFERS_SET = """\
    net.page_start_write = start_write;
    net.page_start_read = start_read;
    net.page_wait = wait_for;
"""
_LABELLED = """\
    session.anomalous =
        samples_at + ((size_t)o->samples + o->judged) * (SAMPLE_BYTES + TARGET_BYTES);
    session.errors = (double *)malloc((o->judged + (size_t)1) * sizeof(double));
    if (session.errors == NULL) {
        return ODTPLAN_ERROR_STORAGE;
    }
"""
_USUAL = {
    "accuracy": ("ODTPLAN_METRIC_ACCURACY", "accuracy"),
    "mse": ("ODTPLAN_METRIC_MSE", "squared error"),
    "loss": ("ODTPLAN_METRIC_LOSS", "loss"),
}


def ranks_errors(training: TrainingGraph) -> bool:
    """Whether the C session can judge by AUC: the model gives back its input."""
    return metric_of(training) == "mse" and reconstructs(training)


def takes_samples(plan: Plan, training: TrainingGraph) -> bool:
    """Whether a micro-batch is made of single samples, with their targets: along the first axes."""
    held = (*training.samples, *training.targets)
    return all(v.type.shape[:1] == (plan.model.batch,) for v in held)


def session_values(
    plan: Plan,
    training: TrainingGraph,
    inputs: Sequence[Input],
    heads: Sequence[Head],
    parts: Parts,
    state: Sequence[Buffer],
    values: Mapping[str, str | int],
) -> dict[str, str | int]:
    """What the templates of the session say.

    Args:
        plan: The plan.
        training: The training graph.
        inputs: The data inputs.
        heads: The outputs.
        parts: C arrays of its RAM.
        state: Tensors of the state.
        values: What the templates say of all else.
    """
    usual, words = _USUAL[metric_of(training)]
    batch = plan.model.batch
    names = {
        "samples": ", ".join(f"{i.macro('SAMPLE')}(s->net)" for i in inputs),
        "targets": ", ".join(f"s->{h.param}" for h in heads),
    }
    train = _TRAIN if plan.replay is None else _TRAIN_CACHED
    rows = [
        f"whole ? {i.macro('SAMPLE')}(s->net) + row * ({i.macro('SAMPLE_SIZE')} / {batch}u) : NULL"
        for i in inputs
    ]
    rows += [f"s->{h.param} + row * ({h.macro('TARGET_SIZE')} / {batch}u)" for h in heads]
    own = heads[0] if metric_of(training) != "loss" else None
    fields = [f"{h.element} {h.param}[{h.macro('TARGET_SIZE')}];" for h in heads]
    if own is not None:
        fields.append(f"float {own.result}[{own.macro('PREDICTION_SIZE')}];")
    ranked = ranks_errors(training)
    if ranked:
        fields += [
            "const uint8_t *anomalous; /* for AUC, set by the caller: 0 or 1 per sample judged */",
            "double *errors;           /* and room for an error of each */",
        ]
    begun = ""
    if _homes(plan, training):
        begun = _NEED_PAGES
    if plan.replay is not None:
        fields += [
            f"uint32_t items[{values['MODEL']}_REPLAY_ENTRIES]; /* in the cache */",
            "uint32_t replayed; /* micro-steps that were trained from it: to be read */",
        ]
        begun += "    s->net->captured = 0u;\n    s->replayed = 0u;\n"
    cached = " * Samples are NULL where the replay cache has them: the target alone is wanted.\n"
    return {
        **values,
        **names,
        "usual": usual,
        "usual_note": f"What ODTPLAN_METRIC_USUAL stands for here: {words}."
        f" {'Others are the loss and AUC' if ranked else 'The other is the loss'}.",
        "ranked": "s->anomalous, s->errors" if ranked else "NULL, NULL",
        "sample_elements": "\n * ".join(
            f"{i.macro('SAMPLE_SIZE')} / {batch} elements to {i.param}" for i in inputs
        ),
        "target_elements": "\n * ".join(
            f"{h.macro('TARGET_SIZE')} / {batch} elements to {h.param}" for h in heads
        ) + ".",
        "cached_note": "" if plan.replay is None else cached,
        "sample_out": ", ".join(i.declaration.removeprefix("const ") for i in inputs),
        "target_out": ", ".join(h.declaration.removeprefix("const ") for h in heads),
        "fields": "".join(f"    {f}\n" for f in fields),
        "fetched": f",\n{'':8}".join(rows),
        "train": train.substitute(values, **names),
        "predictions": ", ".join(
            f"score == NULL ? NULL : s->{h.result}" if h is own else "NULL" for h in heads
        ),
        "score": _score(training, own, batch),
        "finite": _finite(training, parts, state) + _stored_finite(plan, training, parts, values),
        "dropped": _dropped(training, parts, state),
        "begun": begun,
    }


def host_values(
    plan: Plan,
    training: TrainingGraph,
    inputs: Sequence[Input],
    heads: Sequence[Head],
    values: Mapping[str, str | int],
) -> dict[str, str | int]:
    """What the template of the host program says.

    Args:
        plan: The plan.
        training: The training graph.
        inputs: The data inputs.
        heads: The outputs.
        values: What the templates of the session say.
    """
    batch, cached = plan.model.batch, plan.replay is not None
    samples = [
        (i.param, f"{i.macro('SAMPLE_SIZE')} / {batch}u * sizeof(*{i.macro('SAMPLE')}(&net))")
        for i in inputs
    ]
    targets = [(h.param, f"{h.macro('TARGET_SIZE')} / {batch}u * 4u") for h in heads]
    copied = ""
    for name, size in (*samples, *targets):
        copied += "".join(
            f"    {line}\n"
            for line in (
                *block(f"if ({name} != NULL) {{", [f"memcpy({name}, at, {size});"]),
                f"at += {size};",
            )
        )
    overlaps = bool(values["overlap_fields"])
    return {
        **values,
        "sample_bytes": " + ".join(size for _, size in samples),
        "target_bytes": " + ".join(size for _, size in targets),
        "copied": copied,
        "labelled": _LABELLED if ranks_errors(training) else "",
        "order_items": f"((session.options.samples + {batch - 1}u) / {batch}u)"
        if cached
        else "session.options.samples",
        "transfers": TRANSFERS if overlaps else "",
        "transfers_set": TRANSFERS_SET if overlaps else "",
        "replayed": ', \\"replayed\\": %u' if cached else "",
        "replayed_value": ", (unsigned)session.replayed" if cached else "",
    }


def _score(training: TrainingGraph, own: Head | None, batch: int) -> str:
    """Scores the first rows of a micro-batch, by what ``metrics.py`` computes of a set."""
    if own is None:
        return "    (void)rows;\n    (void)score;\n"
    shape = own.value.type.shape
    arguments = f"score, s->{own.result}, s->{own.param}, "
    if own.labels:
        axis = class_axis(training, 0)
        assert axis is not None
        outer, inner = prod(shape[:axis]) // batch, prod(shape[axis + 1 :])
        ignored = -1 if own.bounds is None or own.bounds.ignored is None else own.bounds.ignored
        rows = "rows" if outer == 1 else f"rows * {outer}u"
        call = f"odtplan_score_classes({arguments}{rows}, {shape[axis]}u, {inner}u, {ignored});"
    else:
        call = f"odtplan_score_squares({arguments}rows, {own.value.type.size // batch}u);"
    lines = block("if (status == ODTPLAN_OK && score != NULL) {", [call])
    return "".join(f"    {line}\n" for line in lines)


def _finite(training: TrainingGraph, parts: Parts, state: Sequence[Buffer]) -> str:
    """All floats of the state in RAM."""
    tests = []
    for b in state:
        if b.dtype == "f32":
            tests.append(f"odtplan_all_finite(net->{parts.pointer(b)}, {b.bytes // 4}u)")
        elif "f" in DTYPES[b.dtype][0]:
            raise GraphError(f"{b.value}: the C session can't test {b.dtype} in the state")
    return "    *finite = " + (" &&\n              ".join(tests) or "1") + ";\n"


def _stored_finite(
    plan: Plan, training: TrainingGraph, parts: Parts, values: Mapping[str, str | int]
) -> str:
    """Optimizer tensors in storage, which come through the arena."""
    pieces = _homes(plan, training)
    if not pieces:
        return ""
    arena = parts.arena[0]
    return _STORED_FINITE.format(
        pieces=", ".join(f"{{{b.offset}u, {b.bytes}u}}" for b in pieces),
        room=f"{values['MODEL']}_{arena.macro}",
        arena=arena.name,
    )


def _homes(plan: Plan, training: TrainingGraph) -> list[Buffer]:
    """Optimizer tensors in storage."""
    homes = {v.name for u in training.updates for v in u.paged}
    return [b for b in plan.buffers if b.space == "storage" and b.value in homes]


def _dropped(training: TrainingGraph, parts: Parts, state: Sequence[Buffer]) -> str:
    """Accumulators are zero between two updates."""
    names = {u.accumulator.name for u in training.updates if u.accumulator is not None}
    return "".join(
        f"    memset(net->{parts.pointer(b)}, 0, {b.bytes});\n" for b in state if b.value in names
    )

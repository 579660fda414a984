"""C text of the replay cache: the frozen front, capture, and training from entries."""

from __future__ import annotations

from collections.abc import Mapping
from string import Template

from ...planner.plan import Plan
from .parts import Parts

_FRONT = Template("""
/* What stays frozen: the same for a sample at any time. */
static int front(${model}_t *net, int mode$y_taken) {
$locals
$front_body
$voids
    (void)mode;
$y_voids    return ODTPLAN_OK;
}
""")

_WHOLE = Template("""
static int run(${model}_t *net, $target_decl, float *loss, int mode$y_taken) {
    const int status = front(net, mode$y_given);
    return status == ODTPLAN_OK ? rest(net, $target_args, loss, mode$y_given) : status;
}
""")

_CAPTURED = """\
    /* Entries of the replay cache that are filled, the first ones. Set it after a reset if the
     * storage has kept them. */
    uint32_t captured;
"""

_DECLARATION = Template("""
/* Fills an entry of the replay cache with what the frozen layers make of a $each, once: entries 0,
 * 1, ... in this order, ${MODEL}_REPLAY_ENTRIES at most. Training does not change what belongs
 * there; an entry may be filled again with another one. */
int ${model}_capture(${model}_t *net, $sample_params, uint32_t entry);

/* ${model}_train_step for what a captured entry holds: the same bits, without the frozen layers. */
int ${model}_train_cached(${model}_t *net, uint32_t entry, $target_decl, float lr, float *loss);
""")

_DEFINITION = Template("""
int ${model}_capture(${model}_t *net, $sample_params, uint32_t entry) {
    int status = check(net, 0);
    if (status == ODTPLAN_OK) {
        status = check_sample($sample_args);
    }
    if (status != ODTPLAN_OK) {
        return status;
    }
    if (entry >= ${MODEL}_REPLAY_ENTRIES || entry > net->captured) {
        return ODTPLAN_ERROR_ARGUMENT;
    }
$need_write    begin(net, $sample_args);
    status = front(net, MICRO$y_none);
$write
    finish(net, status);
    if (status == ODTPLAN_OK && entry == net->captured) {
        net->captured++;
    }
    return status;
}

/* Only what the front hands on is alive at the start. */
static int begin_cached(${model}_t *net, uint32_t entry) {
$arena_locals
$all_dead
    LIVE($boundary, $entry_bytes);
$arena_voids
$read
}

int ${model}_train_cached(${model}_t *net, uint32_t entry, $target_decl, float lr, float *loss) {
    odtplan_progress_t next;
    int status = check(net, ${train_pages});
    if (status != ODTPLAN_OK) {
        return status;
    }
    if (entry >= ${MODEL}_REPLAY_ENTRIES || entry >= net->captured) {
        return ODTPLAN_ERROR_ARGUMENT;
    }
${need_read}    status = prepare(net, $target_args, lr, &next);
    if (status != ODTPLAN_OK) {
        return status;
    }
    status = begin_cached(net, entry);
    if (status == ODTPLAN_OK) {
        status = rest(net, $target_args, loss, next.micro == 0 ? UPDATE : MICRO$y_none);
    }
    finish(net, status);
    if (status == ODTPLAN_OK) {
        net->progress = next;
    }
    return status;
}
""")

_NEED = """\
    if (net->page_{0} == NULL) {{
        return ODTPLAN_ERROR_CALLBACK;
    }}
"""


def replay_sizes(plan: Plan) -> dict[str, tuple[str, str]]:
    """Macros of the cache, as name -> (value, note)."""
    r = plan.replay
    if r is None:
        return {}
    place = "RAM" if r.place == "ram" else "external storage, behind what is paged"
    return {
        "REPLAY_BYTES": (f"{r.cache_bytes}u", f"of the replay cache, in {place}"),
        "REPLAY_ENTRIES": (f"{r.entries}u", "micro-batches that it holds"),
    }


def replay_values(
    plan: Plan, parts: Parts, front: list[str], values: Mapping[str, str | int]
) -> dict[str, str]:
    """What the templates say of replay; empty texts where the plan has none.

    Args:
        plan: The plan.
        parts: C arrays of its RAM.
        front: Lines of the front.
        values: What the templates say of all else.
    """
    r = plan.replay
    if r is None:
        empty = dict.fromkeys(
            ("front", "whole", "captured", "replay_declaration", "replay_definition"), ""
        )
        return {"rest": "run", **empty}
    boundary = parts.pointer(next(b for b in plan.buffers if b.id == r.buffer))
    more = {
        **values,
        "each": "sample" if plan.model.batch == 1 else f"batch of {plan.model.batch}",
        "front_body": "\n".join(f"    {line}" for line in front),
        "boundary": boundary,
        "entry_bytes": r.entry_bytes,
    }
    if r.place == "ram":
        entry = f"net->replay + entry * {r.stride}u"
        more |= {
            "need_write": "",
            "need_read": "",
            "write": f"    memcpy({entry}, net->{boundary}, {r.entry_bytes});",
            "read": f"    memcpy(net->{boundary}, {entry}, {r.entry_bytes});\n"
            "    return ODTPLAN_OK;",
        }
    else:
        at = f"{plan.claims.storage_bytes}u + entry * {r.stride}u"
        arguments = f"(net->user, {at}, net->{boundary}, {r.entry_bytes}u)"
        more |= {
            "need_write": _NEED.format("write"),
            "need_read": _NEED.format("read"),
            "write": f"    if (net->page_write{arguments} != 0) {{\n"
            "        status = ODTPLAN_ERROR_STORAGE;\n    }",
            "read": f"    return net->page_read{arguments} == 0 ? ODTPLAN_OK"
            " : ODTPLAN_ERROR_STORAGE;",
        }
    return {
        "rest": "rest",
        "front": _FRONT.substitute(more),
        "whole": _WHOLE.substitute(more),
        "captured": _CAPTURED,
        "replay_declaration": _DECLARATION.substitute(more),
        "replay_definition": _DEFINITION.substitute(more),
    }

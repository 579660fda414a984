"""C text of the example that trains on made-up data: what of it depends on the model."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.graph import Value
from ...ir.indices import tables_of
from ...planner.plan import Plan
from .ctext import block
from .head import Head
from .sample import Input
from .session import TRANSFERS, TRANSFERS_SET

#: Classes of the made-up data where the model does not tell how many there are.
_KINDS = 2
_REAL = "(float)pattern(kind, AT) / 16.0f"
_STORAGE = """
/* Where tensors are paged to: yours is the driver of a card or a chip. Here it is more RAM. */
static uint8_t storage[{macro}_STORAGE_BYTES];

static int page_write(void *user, uint32_t offset, const void *data, uint32_t bytes) {{
    (void)user;
    memcpy(storage + offset, data, bytes);
    return 0;
}}

static int page_read(void *user, uint32_t offset, void *data, uint32_t bytes) {{
    (void)user;
    memcpy(data, storage + offset, bytes);
    return 0;
}}
"""
_STORAGE_SET = "    net.page_write = page_write;\n    net.page_read = page_read;\n"


def example_values(
    plan: Plan, inputs: Sequence[Input], heads: Sequence[Head], *, overlaps: bool
) -> dict[str, str]:
    """What the template of the example says.

    Args:
        plan: The plan.
        inputs: The data inputs.
        heads: The outputs.
        overlaps: Transfers run beside the core, by callbacks that start and wait.
    """
    counts = [h.bounds.high + 1 for h in heads if h.labels and h.bounds is not None]
    kinds = int(min(counts, default=_KINDS))
    batch = plan.model.batch
    fill = [_filled(i, i.value, "SAMPLE_SIZE", _sample(i), batch, kinds) for i in inputs]
    fill += [_filled(h, h.target, "TARGET_SIZE", _target(h), batch, kinds) for h in heads]
    storage = plan.claims.storage_bytes + plan.replay_bytes("storage") > 0
    macro = heads[0].model.upper()
    return {
        "targets": "".join(
            f"    static {h.element} {h.param}[{h.macro('TARGET_SIZE')}];\n" for h in heads
        ),
        "sample_out": ", ".join(f"{i.element} *{i.param}" for i in inputs),
        "target_out": ", ".join(f"{h.element} *{h.param}" for h in heads),
        "fill": "".join(fill),
        "samples": ", ".join(f"{i.macro('SAMPLE')}(&net)" for i in inputs),
        "target_args": ", ".join(h.param for h in heads),
        "storage_includes": "#include <string.h>\n" * storage,
        "storage": (_STORAGE.format(macro=macro) + TRANSFERS * overlaps) * storage,
        "storage_set": (_STORAGE_SET + TRANSFERS_SET * overlaps) * storage,
    }


def _filled(
    of: Input | Head, held: Value, size: str, made: str, batch: int, kinds: int
) -> str:
    """A loop that makes all elements of a parameter, those of a sample one behind the other."""
    kind, at = f"number % {kinds}u", "i"
    if batch > 1:
        each = max(1, held.type.size // batch)
        kind, at = f"(number * {batch}u + i / {each}u) % {kinds}u", f"i % {each}u"
    body = [f"const uint32_t kind = {kind};", f"{of.param}[i] = {made.replace('AT', at)};"]
    lines = block(f"for (uint32_t i = 0u; i < {of.macro(size)}; i++) {{", body)
    return "".join(f"    {line}\n" for line in lines)


def _sample(of: Input) -> str:
    """An element of a sample."""
    if of.element == "int8_t":
        return "(int8_t)((int32_t)pattern(kind, AT) * 12 - 96)"
    tables = tables_of(of.graph, of.value)
    if tables is not None:
        return f"(int32_t)(pattern(kind, AT) % {tables.entries.min()}u)"
    return _REAL


def _target(of: Head) -> str:
    """An element of a target: its class, or a value from 0 to 1."""
    return "(int32_t)kind" if of.labels else _REAL

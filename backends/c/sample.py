"""C text for samples that are no floats.

Of an i8 input the scale, and the function that makes samples of floats; of indices their check.
"""

from __future__ import annotations

import numpy as np

from ...ir.graph import TensorType
from ...ir.indices import tables_of
from ...ir.sample import quantizer
from ...ir.training import TrainingGraph
from .ctext import rows
from .emit_call import call, float_literal, kernel_of, param_struct

_NOTE = """\
/* Makes a sample of real numbers: round(x / scale) to nearest, ties to even, plus the zero point,
 * saturated to -128..127. stored may be {macro}_SAMPLE(net). */
"""

_INDEX_CHECK = """\
{table}    for (int32_t i = 0; i < {macro}_SAMPLE_SIZE; i++) {{
        const int32_t index = ((const int32_t *)x)[i];
        if (index < -{entries} || index >= {entries}) {{
            return ODTPLAN_ERROR_INDEX;
        }}
    }}
"""


def sample_sources(t: TensorType) -> tuple[str, ...]:
    """Kernel sources that the functions of ``t`` need beside those of the schedule."""
    node = quantizer(t)
    return () if node is None else (kernel_of(node).source,)


def sample_sizes(t: TensorType) -> dict[str, tuple[str, str]]:
    """Macros of the sample's meaning, as name -> (value, note)."""
    if t.quant is None:
        return {}
    return {
        "SAMPLE_SCALE": (float_literal(t.quant.scale[0]), "real = scale * (stored - zero point)"),
        "SAMPLE_ZERO_POINT": (f"{t.quant.zero_point}", "of the sample"),
    }


def index_sizes(training: TrainingGraph) -> dict[str, tuple[str, str]]:
    """The macro of the one table that a sample's indices point into, as name -> (value, note)."""
    tables = tables_of(training.graph, training.sample)
    if tables is None or len(sizes := np.unique(tables.entries)) > 1:
        return {}
    return {"ENTRIES": (f"{sizes[0]}", "indices of x are 0 .. this - 1")}


def index_check(training: TrainingGraph, macro: str) -> str:
    """Lines that refuse a sample ``x`` with an index outside of its table; empty without one."""
    tables = tables_of(training.graph, training.sample)
    if tables is None:
        return ""
    if index_sizes(training):
        return _INDEX_CHECK.format(table="", entries=f"{macro}_ENTRIES", macro=macro)
    table = f"    static const int32_t entries[{macro}_SAMPLE_SIZE] = {{\n"
    table += "".join(f"    {line}\n" for line in rows(tables.entries).splitlines()) + "    };\n"
    return _INDEX_CHECK.format(table=table, entries="entries[i]", macro=macro)


def sample_declaration(t: TensorType, model: str) -> str:
    """Prototype with its comment; empty where the model takes floats."""
    if quantizer(t) is None:
        return ""
    return f"\n{_NOTE.format(macro=model.upper())}{_head(model)};\n"


def sample_definition(t: TensorType, model: str) -> str:
    """The function; empty where the model takes floats."""
    node = quantizer(t)
    if node is None:
        return ""
    body = [*param_struct(node, "p").splitlines(), call(node, "p", ["x"], ["stored"])]
    return "\n".join([f"\n{_head(model)} {{", *(f"    {line}" for line in body), "}\n"])


def _head(model: str) -> str:
    return f"void {model}_quantize_sample(const float *x, int8_t *stored)"

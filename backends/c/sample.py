"""C text for samples of an i8 input: their scale, and the function that makes them of floats."""

from __future__ import annotations

from ...ir.graph import TensorType
from ...ir.sample import quantizer
from .emit_call import call, float_literal, kernel_of, param_struct

_NOTE = """\
/* Makes a sample of real numbers: round(x / scale) to nearest, ties to even, plus the zero point,
 * saturated to -128..127. stored may be {macro}_SAMPLE(net). */
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

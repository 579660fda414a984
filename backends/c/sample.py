"""C text for the data inputs: parameters, sizes, where they lie, checks, and how i8 ones are made.

A model of one input takes it as ``x``; each of several is a parameter ``x_<name>``, and macros and
functions about it end in its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...ir.graph import Graph, Value
from ...ir.indices import tables_of
from ...ir.sample import quantizer
from ...ir.training import TrainingGraph
from ...planner.plan import Buffer, Plan
from .ctext import c_type, identifier, rows
from .emit_call import call, float_literal, kernel_of, param_struct

_NOTE = """\
/* Makes a sample of real numbers: round(x / scale) to nearest, ties to even, plus the zero point,
 * saturated to -128..127. stored may be {macro}(net). */
"""

_INDEX_CHECK = """\
{table}    for (int32_t i = 0; i < {size}; i++) {{
        const int32_t index = {param}[i];
        if (index < -{entries} || index >= {entries}) {{
            return ODTPLAN_ERROR_INDEX;
        }}
    }}
"""
_NOTES = {"i8": "elements (stored int8)", "i32": "indices"}


@dataclass(frozen=True)
class Named:
    """One of the inputs or outputs of a model, of which there may be several.

    Attributes:
        value: The value of the training graph.
        name: Empty for the only one; an identifier else.
        model: Name of the model.
        graph: The training graph.
    """

    value: Value
    name: str
    model: str
    graph: Graph

    def called(self, word: str) -> str:
        """A name of C that begins with a word."""
        return f"{word}_{self.name}" if self.name else word

    def key(self, key: str) -> str:
        """Name of a macro, without the model's."""
        return f"{key}_{self.name.upper()}" if self.name else key

    def macro(self, key: str) -> str:
        """Name of a macro."""
        return f"{self.model.upper()}_{self.key(key)}"


@dataclass(frozen=True)
class Input(Named):
    """A data input as C sees it.

    Attributes:
        buffer: Where the caller's samples lie in the arena.
    """

    buffer: Buffer

    @property
    def param(self) -> str:
        """Name of the parameter."""
        return self.called("x")

    @property
    def element(self) -> str:
        """C type of an element."""
        return c_type(self.value.type.dtype, self.value.name)

    @property
    def declaration(self) -> str:
        """The parameter of a function."""
        return f"const {self.element} *{self.param}"

    @property
    def golden(self) -> str:
        """Array of the self-test."""
        return self.called("golden_sample")

    def sources(self) -> tuple[str, ...]:
        """Kernel sources that its functions need beside those of the schedule."""
        node = quantizer(self.value.type)
        return () if node is None else (kernel_of(node).source,)

    def sizes(self) -> dict[str, tuple[str, str]]:
        """Macros, as name -> (value, note)."""
        t = self.value.type
        note = f"{_NOTES.get(t.dtype, 'floats')} of {self.param}, whole batch"
        found = {"SAMPLE_SIZE": (f"{t.size}", note)}
        if t.quant is not None:
            scale = float_literal(t.quant.scale[0])
            found["SAMPLE_SCALE"] = (scale, "real = scale * (stored - zero point)")
            found["SAMPLE_ZERO_POINT"] = (f"{t.quant.zero_point}", "of the sample")
        if (entries := self._one_table()) is not None:
            found["ENTRIES"] = (f"{entries}", f"indices of {self.param} are 0 .. this - 1")
        return {self.key(k): v for k, v in found.items()}

    def _one_table(self) -> int | None:
        """Entries of the one table that all indices point into."""
        tables = tables_of(self.graph, self.value)
        if tables is None or len(sizes := np.unique(tables.entries)) > 1:
            return None
        return int(sizes[0])

    def check(self) -> str:
        """Lines that refuse an index outside of its table; empty without indices."""
        tables = tables_of(self.graph, self.value)
        if tables is None:
            return ""
        table, entries = "", self.macro("ENTRIES")
        if self._one_table() is None:
            array = self.key("entries").lower()
            entries = f"{array}[i]"
            name = f"static const int32_t {array}[{self.macro('SAMPLE_SIZE')}]"
            numbers = "".join(f"    {line}\n" for line in rows(tables.entries).splitlines())
            table = f"    {name} = {{\n{numbers}    }};\n"
        size = self.macro("SAMPLE_SIZE")
        return _INDEX_CHECK.format(table=table, size=size, entries=entries, param=self.param)

    def quantize_declaration(self) -> str:
        """Prototype of what makes samples, with its comment; empty where it takes floats."""
        if quantizer(self.value.type) is None:
            return ""
        return f"\n{_NOTE.format(macro=self.macro('SAMPLE'))}{self._quantize()};\n"

    def quantize_definition(self) -> str:
        """The function; empty where the model takes floats."""
        node = quantizer(self.value.type)
        if node is None:
            return ""
        body = [*param_struct(node, "p").splitlines(), call(node, "p", ["x"], ["stored"])]
        return "\n".join([f"\n{self._quantize()} {{", *(f"    {line}" for line in body), "}\n"])

    def _quantize(self) -> str:
        name = f"{self.model}_{self.key('quantize_sample').lower()}"
        return f"void {name}(const float *x, int8_t *stored)"


def inputs_of(plan: Plan, training: TrainingGraph, model: str) -> list[Input]:
    """The data inputs of a plan, in the file's order."""
    result = []
    for v, name in zip(training.samples, names_of(training.samples), strict=True):
        buffer = next(b for b in plan.buffers if b.space == "arena" and b.value == v.name)
        result.append(Input(v, name, model, training.graph, buffer))
    return result


def names_of(values: Sequence[Value]) -> list[str]:
    """Identifiers of values, with a number where one is there already; empty for the only one."""
    if len(values) == 1:
        return [""]
    result: list[str] = []
    for v in values:
        name = base = identifier(v.name)
        i = 2
        while name in result:
            name, i = f"{base}_{i}", i + 1
        result.append(name)
    return result

"""C text for the outputs: parameters of predictions and targets, sizes, checks.

A model of one output gives ``y`` and takes ``labels`` or ``target``; of several each has parameters
``y_<name>`` and ``labels_<name>`` or ``target_<name>``, and macros about it end in its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.graph import Value
from ...ir.targets import Bounds, bounds_of
from ...ir.training import TrainingGraph
from .ctext import block
from .emit_call import float_literal
from .sample import Named, names_of


@dataclass(frozen=True)
class Head(Named):
    """An output as C sees it, with its target.

    Attributes:
        target: The input of the training graph.
        loss: Its loss, in words.
    """

    target: Value
    loss: str

    @property
    def labels(self) -> bool:
        """The target holds labels."""
        return self.target.type.dtype == "i32"

    @property
    def param(self) -> str:
        """Name of the parameter for the target."""
        return self.called("labels" if self.labels else "target")

    @property
    def element(self) -> str:
        """C type of an element of the target."""
        return "int32_t" if self.labels else "float"

    @property
    def declaration(self) -> str:
        """That parameter."""
        return f"const {self.element} *{self.param}"

    @property
    def result(self) -> str:
        """Name of the parameter for the prediction."""
        return self.called("y")

    @property
    def bounds(self) -> Bounds | None:
        """What the target may hold."""
        return bounds_of(self.graph, self.target)

    def sizes(self) -> dict[str, tuple[str, str]]:
        """Macros, as name -> (value, note)."""
        of = self.result
        what = "labels" if self.labels else "floats"
        found = {
            "PREDICTION_SIZE": (f"{self.value.type.size}", f"floats of {of}, whole batch"),
            "TARGET_SIZE": (f"{self.target.type.size}", f"{what} of the target"),
        }
        return {self.key(k): v for k, v in found.items()}

    def classes(self) -> dict[str, tuple[str, str]]:
        """The macro of the number of classes, where labels are checked."""
        if self.bounds is None or not self.labels:
            return {}
        return {self.key("CLASSES"): (f"{self.bounds.high + 1}", "labels are 0 .. this - 1")}

    def note(self) -> str:
        """What the caller has to know of the target."""
        size = self.macro("TARGET_SIZE")
        checked = "" if self.bounds is None else "; checked before anything runs"
        if not self.labels:
            unit = "" if self.bounds is None else " from 0 to 1"
            kind = self.target.type
            return f"{self.param}: {size} floats{unit}, {kind} ({self.loss} loss){checked}."
        what = "numbers of classes" if self.bounds is None else "classes"
        return f"{self.param}: {size} {what} ({self.loss} loss){checked}."

    def check(self) -> list[str]:
        """Lines that refuse a target out of its bounds, NaN included."""
        if self.bounds is None:
            return []
        of = f"{self.param}[i]"
        if self.labels:
            test = f"{of} < 0 || {of} >= {self.macro('CLASSES')}"
            if self.bounds.ignored is not None:
                test = f"{of} != ({self.bounds.ignored}) && ({test})"
        else:
            low, high = float_literal(self.bounds.low), float_literal(self.bounds.high)
            test = f"!({of} >= {low} && {of} <= {high})"
        return block(
            f"for (int32_t i = 0; i < {self.macro('TARGET_SIZE')}; i++) {{",
            block(f"if ({test}) {{", ["return ODTPLAN_ERROR_LABEL;"]),
        )


def heads_of(training: TrainingGraph, model: str) -> list[Head]:
    """The outputs of a model, in the file's order."""
    spec = training.spec
    result = []
    pairs = zip(training.predictions, training.targets, names_of(training.predictions), strict=True)
    for v, target, name in pairs:
        loss = spec.loss_of(v.name)
        words = "the model's" if loss == "output" else loss.replace("_", " ")
        result.append(Head(v, name, model, training.graph, target, words))
    return result


def head_values(heads: Sequence[Head], prediction_at: str) -> dict[str, str]:
    """What the templates say of predictions and targets.

    Predictions are copied as they are made, because their bytes may be used again. Where there is
    one, an inference leaves it in the arena as well.

    Args:
        heads: The outputs.
        prediction_at: Member and offset of the last prediction.
    """
    several = len(heads) > 1
    results = [h.result for h in heads]
    model, macro = heads[0].model, heads[0].model.upper()
    where = (
        f"/* Where {model}_infer leaves the prediction, until the next call. */\n"
        f"#define {macro}_PREDICTION(net) ((float *)(void *)((net)->{prediction_at}))\n\n"
    )
    usage = [f"{h.result}: {h.macro('PREDICTION_SIZE')} of float" for h in heads]
    return {
        "y_args": ", ".join(results),
        "y_decl": ", ".join(f"float *{y}" for y in results),
        "y_usage": f"\n *{'':47}".join(usage),
        "y_note": "Predictions for a sample; any may be NULL"
        if several
        else "Prediction for a sample; y may be NULL",
        "y_taken": "".join(f", float *{y}" for y in results),
        "y_given": "".join(f", {y}" for y in results),
        "y_none": ", NULL" * len(heads),
        "y_voids": "".join(f"    (void){y};\n" for y in results),
        "prediction_macro": "" if several else where,
        "target_args": ", ".join(h.param for h in heads),
        "target_decl": ", ".join(h.declaration for h in heads),
        "target_none": ", ".join("NULL" for _ in heads),
        "target_missing": " || ".join(f"{h.param} == NULL" for h in heads),
        "target_note": "\n * ".join(h.note() for h in heads),
        "target_check": "".join(f"    {line}\n" for h in heads for line in h.check()),
    }

"""Which outputs a model can be trained by."""

from __future__ import annotations

from .errors import UnsupportedModelError
from .graph import Graph

_WAY_OUT = "leave it out with --keep-output and the names of the others"


def check_predictions(forward: Graph) -> None:
    """Demand outputs that losses have gradients of.

    Args:
        forward: A graph that is to be trained.

    Raises:
        UnsupportedModelError: It has no input or no output; an output is not f32. Of several
            outputs two are the same value, or one has not the batch first.
    """
    if not forward.inputs or not forward.outputs:
        what = "outputs" if forward.inputs else "inputs"
        raise UnsupportedModelError(f"{forward.name}: has no {what}; training needs some")
    several = len(forward.outputs) > 1
    batch = forward.inputs[0].type.shape[:1]
    for i, v in enumerate(forward.outputs):
        if v.type.dtype != "f32":
            way_out = _WAY_OUT if several else "export the model without its last operator"
            raise UnsupportedModelError(
                f"the prediction {v.name} is {v.type}, which no loss has a gradient of; {way_out}"
            )
        if v in forward.outputs[:i]:
            raise UnsupportedModelError(
                f"{forward.name}: two outputs are the same, {v.name}; {_WAY_OUT}"
            )
        if several and v.type.shape[:1] != batch:
            raise UnsupportedModelError(
                f"the prediction {v.name}, {v.type}, is not one per sample; {_WAY_OUT}"
            )

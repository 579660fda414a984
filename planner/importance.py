"""Importance of updating a parameter: measured scores, or a documented prior without any.

The prior says what the sparse-update papers found on average (TinyTL, NeurIPS'20; Tiny Training
Engine, NeurIPS'22; TinyTrain, ICML'24): later layers adapt more, larger tensors gain more but less
than in proportion, biases gain a little at almost no cost, and part of a tensor's channels gives
more than its share. It is no measurement and is labelled as a prior everywhere. Measured scores,
and those of the user, are a ``plan.ImportanceTable``.

That a gradient loses next to nothing by an input in half precision, and little by one in i8, is an
estimate in any case, and so is what an update keeps of its importance without its optimizer's
state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

from ..ir.autodiff import param_slots
from ..ir.graph import Graph, Node
from ..ir.opdef import ParamSlot
from ..ir.training import Candidate, Saved, StateForm
from .plan import ImportanceTable

PRIOR = "prior (depth x sqrt(parameters), not measured)"
#: Scores are integers in the solver; the largest whole update scores this much by the prior.
SCALE = 1_000_000
#: Part of the importance that is left where the layer's input is kept in this form.
KEPT: dict[Saved, float] = {"f32": 1.0, "f16": 0.999, "i8": 0.98}
#: Part of the importance that is left where an update is plain SGD instead of the optimizer asked
#: for. An estimate without a source, as it depends on model, data and step size; ``--state`` takes
#: another one.
SGD_WORTH = 0.9
#: The same where the state is paged. It learns as much: this is the preference for RAM where there
#: is enough, because paging takes time and wears storage out.
PAGED_WORTH = 0.995


def scores(
    forward: Graph,
    candidates: Sequence[Candidate],
    table: ImportanceTable | None = None,
    sgd_worth: float = SGD_WORTH,
) -> dict[Candidate, int]:
    """Importance of each candidate, at least 1.

    A table is scaled so that all its parameters together, whole, score what the prior gives them
    together: scores of different origin, and the noise that mixed layers avoid, have one unit.

    Args:
        forward: Forward graph.
        candidates: Candidates of its parameters.
        table: Measured or given scores; None: the prior.
        sgd_worth: From above 0 to 1.
    """
    slots = param_slots(forward)
    raw = _prior(forward, candidates, slots)
    top = max(raw.values(), default=1.0)
    if table is not None:
        params = dict.fromkeys(c.param for c in candidates)
        total = sum(gain(table, p, 1.0) for p in params)
        whole = sum(_prior(forward, [Candidate(p) for p in params], slots).values())
        unit = whole / total if total else 0.0
        raw = {
            c: unit * gain(table, c.param, ratio(forward, c, slots)) * KEPT[c.saved]
            for c in candidates
        }
    worth: dict[StateForm, float] = {"keep": 1.0, "paged": PAGED_WORTH, "sgd": sgd_worth}
    return {c: max(1, round(SCALE * s / top * worth[c.state])) for c, s in raw.items()}


def prior(
    forward: Graph, candidates: Sequence[Candidate], sgd_worth: float = SGD_WORTH
) -> dict[Candidate, int]:
    """Prior importance of each candidate, in 1 to ``SCALE``.

    score = depth * sqrt(n * r) with n the tensor's parameters, r the updated part of it (so a
    quarter of the channels keeps half of the gain) and depth rising linearly from 0.5 at the first
    trainable layer to 1 at the last; biases and scales count half of that, and ``KEPT`` of it is
    left where the input is compressed, ``PAGED_WORTH`` where the optimizer's state is paged, and
    ``sgd_worth`` where it is given up. An adapter is one tensor of all that it updates, one of low
    rank of no more parameters than the weight beside it; each has its share of the score.

    Args:
        forward: Forward graph.
        candidates: Candidates of its parameters.
        sgd_worth: From above 0 to 1.
    """
    return scores(forward, candidates, sgd_worth=sgd_worth)


def gain(table: ImportanceTable, param: str, part: float) -> float:
    """Score of updating a part, in (0, 1], of a parameter; 0 where the table has none.

    Between the parts that the table knows it is a straight line, which begins at 0 for nothing.
    """
    low, score = 0.0, 0.0
    for high, reached in table.gains.get(param, ()):
        if part <= high:
            return score + (reached - score) * (part - low) / (high - low)
        low, score = high, reached
    return score


def source_of_importance(table: ImportanceTable | None) -> str:
    """One line for plan and report that tells measured scores from the prior."""
    return PRIOR if table is None else table.source


def _prior(
    forward: Graph,
    candidates: Sequence[Candidate],
    slots: Mapping[str, Sequence[tuple[Node, ParamSlot]]],
) -> dict[Candidate, float]:
    order = {n.name: i for i, n in enumerate(forward.nodes)}
    layer = {p: uses[0][0].name for p, uses in slots.items()}
    size = {p: float(forward.values[p].type.size) for p in slots}
    for a in forward.adapters:
        layer |= dict.fromkeys(a.params, a.layer)  # beside which it stands
        every = sum(size[p] for p in a.params)
        # of all together; what stands for a weight learns no more than that
        root = sqrt(min(every, size[a.weight]) if a.choice == a.weight else every)
        size |= {p: (root * size[p] / every) ** 2 for p in a.params}
    owners = sorted(set(layer.values()), key=order.__getitem__)
    depth = {n: 0.5 + 0.5 * i / max(1, len(owners) - 1) for i, n in enumerate(owners)}
    raw: dict[Candidate, float] = {}
    for c in candidates:
        slot = slots[c.param][0][1]
        role = 1.0 if slot.role == "weight" else 0.5
        part = ratio(forward, c, slots)
        raw[c] = role * depth[layer[c.param]] * sqrt(size[c.param] * part) * KEPT[c.saved]
    return raw


def ratio(
    forward: Graph, candidate: Candidate, slots: Mapping[str, Sequence[tuple[Node, ParamSlot]]]
) -> float:
    """Updated part of the parameter, in (0, 1]; ``slots`` are those of the graph."""
    if candidate.channels is None:
        return 1.0
    node, slot = slots[candidate.param][0]
    axis = slot.channel_axis(node)
    assert axis is not None, candidate
    return candidate.channels / forward.values[candidate.param].type.shape[axis]

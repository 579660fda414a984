"""``--train``: which parameters the user wants updated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fractions import Fraction
from types import MappingProxyType

from ..ir.adapters import Adapter, adapters_by_param
from ..ir.autodiff import param_slots
from ..ir.errors import UsageError
from ..ir.graph import Graph
from ..ir.lite_residual import LiteResidual
from ..ir.lora import LowRankAdapter
from ..ir.training import Candidate

#: Items that stand for adapters: their class, what they are called, and what offers them.
_ADAPTERS: dict[str, tuple[type[Adapter], str, str]] = {
    "lora": (LowRankAdapter, "adapters", "--lora RANK"),
    "lite": (LiteResidual, "lite residual modules", "--lite-residual K"),
}


def choose(
    forward: Graph,
    train: Sequence[str],
    every: Sequence[Candidate],
    frozen: Mapping[str, str] = MappingProxyType({}),
) -> list[Candidate] | None:
    """The fixed update set, or None for ``auto``.

    Args:
        forward: Imported graph.
        train: ``auto``, ``all`` (every parameter of the model whole), or items: ``last`` (the last
            layer with a weight), ``bias`` (biases and scales), ``lora`` (adapters, but for those of
            weights that are updated themselves), ``lite`` (lite residual modules), ``PARAM`` and
            ``PARAM=RATIO``.
        every: All candidates.
        frozen: Parameters that are none because of ``--freeze-before``, each with its node.

    Raises:
        UsageError: An unknown name (the nearest ones are told), a parameter that is frozen or
            stored in several forms, a ratio outside (0, 1], or nothing of a kind to train.
    """
    items = [i.strip() for t in train for i in t.split(",") if i.strip()]
    if items in ([], ["auto"]):
        return None
    adapters = adapters_by_param(forward)
    whole = [c for c in every if c == Candidate(c.param) and c.param not in adapters]
    if items == ["all"]:
        return whole
    slots = param_slots(forward)
    kinds = [i for i in ("last", "bias", *_ADAPTERS) if i in items and i not in slots]
    found = [_candidate(forward, item) for item in items if item not in kinds]
    if "last" in kinds:
        order = {n: i for i, n in enumerate(forward.nodes)}
        weights = [c for c in whole if slots[c.param][0][1].role == "weight"]
        last = max((slots[c.param][0][0] for c in weights or whole), key=order.__getitem__)
        found += [c for c in whole if order[slots[c.param][0][0]] >= order[last]]
    if "bias" in kinds:
        biases = [c for c in whole if slots[c.param][0][1].role != "weight"]
        if not biases:
            raise UsageError(f"{forward.name} has no biases to train; use --train all or last")
        found += biases
    for kind, (sort, what, option) in _ADAPTERS.items():
        if kind not in kinds:
            continue
        offered = {p: a for p, a in adapters.items() if isinstance(a, sort)}
        if not offered:
            raise UsageError(f"--train {kind}: there are no {what}; give {option}, too")
        own = {c.param for c in found}.difference(adapters)
        known = {c.param for c in every}
        found += [Candidate(p) for p, a in offered.items() if p in known and a.choice not in own]
    if kinds:  # one parameter, of several kinds
        found = [*{c.param: c for c in reversed(found)}.values()][::-1]
    for c in found:
        if c.param in frozen:
            raise UsageError(
                f"--train: {c.param} lies before {frozen[c.param]}, where --freeze-before freezes"
                " everything; leave one of the two out"
            )
        if c.param not in {e.param for e in every}:
            raise UsageError(
                f"--train: several layers share {c.param}; pin all of them to f32 to train it"
            )
    return found


def _candidate(forward: Graph, item: str) -> Candidate:
    slots = param_slots(forward)
    name, _, text = item.rpartition("=") if "=" in item and item not in slots else (item, "", "")
    if name not in slots:
        near = get_close_matches(name, slots, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else f"; it has {', '.join(slots)}"
        raise UsageError(f"--train: {forward.name} has no trainable parameter {name}{hint}")
    if not text:
        return Candidate(name)
    try:
        wanted = Fraction(str(float(text)))  # as typed: 0.29 of 100 channels are 29
    except ValueError:
        raise UsageError(
            f"--train: {text!r} in {item} is no ratio; give a number like 0.25"
        ) from None
    if not 0 < wanted <= 1:
        raise UsageError(f"--train: ratio {text} of {name} is not in (0, 1]")
    node, slot = slots[name][0]
    axis = slot.channel_axis(node) if slot.cold_index is not None else None
    if wanted == 1:
        return Candidate(name)
    if axis is None:
        raise UsageError(f"--train: {name} can only be updated whole, not by a ratio of {text}")
    total = forward.values[name].type.shape[axis]
    k = max(1, int(total * wanted))
    return Candidate(name, k if k < total else None)

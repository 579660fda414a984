"""Where a constant of a graph comes from in the model file, and the way back.

Importing and its passes seldom take a tensor as it stands in the file: they transpose, cut, join
and widen it, scale it by a BatchNormalization, or give integers their real numbers. Every such step
is recorded as it is done. What training makes of the constant goes back through the steps in
reverse, and only what has changed is changed in the file.

A sum or product of several tensors has one home, and the others stay what they are: the learned
bias of a folded BatchNormalization goes into the normalization's own bias, the weight into the
layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from .graph import Array, Graph


class ProvenanceError(ValueError):
    """What has been learned has no form in the file; the text is the reason."""


class Step(Protocol):
    """One thing that is done to tensors."""

    def forward(self, *sources: Array) -> Array:
        """The result."""
        ...

    def backward(self, new: Array, *sources: Array) -> Sequence[Array]:
        """The sources that give another result; where it has not changed, they are as they were.

        Raises:
            ProvenanceError: There are none.
        """
        ...


@dataclass(frozen=True, eq=False)
class Origin:
    """A tensor of the file, or what a step makes of other origins.

    Attributes:
        tensor: Name of the tensor in the file, where there is no step.
        step: What is done.
        sources: What it is done to.
    """

    tensor: str = ""
    step: Step | None = None
    sources: tuple[Origin, ...] = ()

    @property
    def tensors(self) -> frozenset[str]:
        """All tensors of the file that have a part in it."""
        if self.step is None:
            return frozenset((self.tensor,))
        return frozenset().union(*(s.tensors for s in self.sources))

    @property
    def computed(self) -> bool:
        """Something has a part in it that has no way back."""
        return isinstance(self.step, Computed) or any(s.computed for s in self.sources)

    def then(self, step: Step) -> Origin:
        """What a step makes of this."""
        return Origin(step=step, sources=(self,))

    def value(self, tensors: Mapping[str, Array]) -> Array:
        """The constant, from the tensors of the file.

        Raises:
            ProvenanceError: A step is not known.
        """
        if self.step is None:
            return tensors[self.tensor]
        return self.step.forward(*(s.value(tensors) for s in self.sources))

    def restore(self, new: Array, tensors: MutableMapping[str, Array]) -> None:
        """Put what makes the constant ``new`` in the place of the tensors of the file.

        Args:
            new: The learned constant; of another shape where a head was replaced.
            tensors: Tensors of the file by name; those that change are replaced.

        Raises:
            ProvenanceError: No tensors make it.
        """
        if self.step is None:
            tensors[self.tensor] = new
            return
        old = [s.value(tensors) for s in self.sources]
        for source, was, now in zip(self.sources, old, self.step.backward(new, *old), strict=True):
            if now.shape != was.shape or not np.array_equal(now, was):
                source.restore(now, tensors)


@dataclass(frozen=True, eq=False)
class Moved:
    """Numbers that change places: each of the result is one of a source, and some may occur often.

    Attributes:
        move: Sources -> result; for arrays of any dtype.
    """

    move: Callable[..., Array]

    def forward(self, *sources: Array) -> Array:
        """The result."""
        return np.asarray(self.move(*sources))

    def backward(self, new: Array, *sources: Array) -> Sequence[Array]:
        """Every number back to its place."""
        shapes = [a.shape for a in sources]
        places = self._places(shapes)
        flat = np.concatenate([a.reshape(-1) for a in sources])
        if places.shape != new.shape:
            shapes = [self._resized(sources, new.shape)]
            places, flat = self._places(shapes), np.zeros(prod(shapes[0]), new.dtype)
        flat[places] = new
        if not np.array_equal(flat[places], new):
            raise ProvenanceError("one number of the file stands for several that differ now")
        ends = list(accumulate(prod(s) for s in shapes))
        parts = np.split(flat, ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _places(self, shapes: Sequence[tuple[int, ...]]) -> Array:
        """For each number of the result its index in all sources, one after the other."""
        ends = list(accumulate((prod(s) for s in shapes), initial=0))
        return self.forward(
            *(begin + np.arange(prod(s)).reshape(s) for begin, s in zip(ends, shapes, strict=False))
        )

    def _resized(self, sources: Sequence[Array], wanted: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the source that gives a result of another number of classes."""
        old = self.forward(*sources).shape
        changed = [(a, b) for a, b in zip(old, wanted, strict=False) if a != b]
        if len(sources) == 1 and len(old) == len(wanted) and len(changed) == 1:
            (before, after), shape = changed[0], sources[0].shape
            for axis in (i for i, n in enumerate(shape) if n == before):
                candidate = (*shape[:axis], after, *shape[axis + 1 :])
                try:
                    places = self._places([candidate])
                except Exception:  # a fixed shape, which the move gives no other tensor
                    continue
                if places.shape == wanted and np.unique(places).size == prod(candidate):
                    return candidate
        raise ProvenanceError(
            f"the file makes {[*old]} of {[*sources[0].shape]}, which does not become {[*wanted]}"
        )


@dataclass(frozen=True, eq=False)
class Affine:
    """``source * factor + offset``, in double precision, rounded once to f32.

    Attributes:
        factor: Broadcasts against the source; None: 1.
        offset: Broadcasts against the source; None: nothing is added.
    """

    factor: Array | None = None
    offset: Array | None = None

    def forward(self, *sources: Array) -> Array:
        """The result, of the source's shape."""
        y = sources[0].astype(np.float64)
        y = y if self.factor is None else y * self.factor
        return (y if self.offset is None else y + self.offset).astype(np.float32)

    def backward(self, new: Array, *sources: Array) -> Sequence[Array]:
        """Subtracted and divided."""
        (source,) = sources
        resized = new.shape != source.shape
        given = [a for a in (self.factor, self.offset) if a is not None]
        if resized and any(np.size(a) > 1 for a in given):
            raise ProvenanceError("a number per channel is multiplied or added in the file")
        moved = np.full(new.shape, True) if resized else new != self.forward(source)
        factor = np.broadcast_to(1.0 if self.factor is None else self.factor, new.shape)
        offset = 0.0 if self.offset is None else self.offset
        if (lost := moved & (factor == 0)).any():
            place = [int(i) for i in np.argwhere(lost)[0]]
            raise ProvenanceError(f"the file multiplies it by 0 (at {place}), whatever it is")
        divisor = np.where(moved, factor, 1.0)
        with np.errstate(all="ignore"):  # what overflows is found below
            old = ((new.astype(np.float64) - offset) / divisor).astype(np.float32)
        if not np.isfinite(old[moved]).all():
            raise ProvenanceError("the file multiplies it by so little that no f32 holds it")
        return [old if resized else np.where(moved, old, source)]


@dataclass(frozen=True, eq=False)
class Dequantized:
    """``(source - zeros) * scales`` of stored integers, in f32.

    Attributes:
        scales: f32, broadcasts against the source.
        zeros: i64, likewise.
    """

    scales: Array
    zeros: Array

    def forward(self, *sources: Array) -> Array:
        """Real numbers."""
        steps = (sources[0].astype(np.int64) - self.zeros).astype(np.float32)
        return np.asarray(steps * self.scales)

    def backward(self, new: Array, *sources: Array) -> Sequence[Array]:
        """The nearest integers, saturated."""
        (source,) = sources
        if new.shape != source.shape:
            raise ProvenanceError("the file stores it in integers, whose scales are of the old one")
        info = np.iinfo(source.dtype)
        wanted = np.rint(new.astype(np.float64) / self.scales) + self.zeros
        stored = np.clip(wanted, info.min, info.max).astype(source.dtype)
        return [np.where(new == self.forward(source), source, stored)]


@dataclass(frozen=True, eq=False)
class Masked:
    """Some of the numbers; 0 stands for the others, which the file says otherwise.

    Attributes:
        kept: bool, of the source's shape.
    """

    kept: Array

    def forward(self, *sources: Array) -> Array:
        """The result, of the source's shape."""
        return np.where(self.kept, sources[0], sources[0].dtype.type(0))

    def backward(self, new: Array, *sources: Array) -> Sequence[Array]:
        """Those that are kept."""
        if new.shape != self.kept.shape or new[~self.kept].any():
            raise ProvenanceError("what the file masks has learned something")
        return [np.where(self.kept, new, sources[0])]


@dataclass(frozen=True, eq=False)
class Cast:
    """f32 of another float type."""

    def forward(self, *sources: Array) -> Array:
        """In f32."""
        return sources[0].astype(np.float32)

    def backward(self, new: Array, *sources: Array) -> Sequence[Array]:
        """The nearest of the file's type."""
        (source,) = sources
        with np.errstate(all="ignore"):  # what overflows is found below
            old = new.astype(source.dtype)
        if not np.isfinite(old).all():
            raise ProvenanceError(f"the file has it in {source.dtype}, which does not hold it")
        if new.shape != source.shape:
            return [old]
        return [np.where(new == self.forward(source), source, old)]


@dataclass(frozen=True, eq=False)
class Repeated:
    """A tensor that others of the file repeat in their rows."""

    def forward(self, *sources: Array) -> Array:
        """The tensor."""
        return sources[0]

    def backward(self, new: Array, *sources: Array) -> Sequence[Array]:
        """It, and the rows."""
        _, *others = sources
        return [new, *(np.broadcast_to(new, (len(o), *new.shape)).copy() for o in others)]


@dataclass(frozen=True, eq=False)
class Computed:
    """Something that has no way back.

    Attributes:
        what: The nodes that do it.
    """

    what: str

    def forward(self, *sources: Array) -> Array:
        """Not known either."""
        raise ProvenanceError(f"{self.what} computes it")

    def backward(self, new: Array, *sources: Array) -> Sequence[Array]:
        """There is no way back."""
        raise ProvenanceError(f"{self.what} computes it")


def spread_out(count: int, data: Array) -> Array:
    """As ``[count]``: all of these numbers in a row, or one of them for all."""
    return data.reshape(-1) if data.size != 1 else np.broadcast_to(data.reshape(-1), (count,))


def write_back(
    graph: Graph, learned: Mapping[str, tuple[Array, Array]], tensors: Mapping[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The tensors of a file that make its constants what training has made of them.

    Args:
        graph: The imported graph.
        learned: Constant -> what it was before training and is now; numbers that are the same have
            the file's digits, of which an integer layer keeps fewer.
        tensors: Tensors of the file by name.

    Returns:
        The tensors that change, and the learned constants as they follow from them: integers and
        half floats of the file are rounded to.

    Raises:
        ProvenanceError: There are none, or they would change what has not learned as well.
    """
    now = dict(tensors)
    held: dict[str, Array] = {}
    for name, (before, after) in learned.items():
        try:
            origin = _origin(graph, name, tensors)
            old = origin.value(tensors)
            same = old.shape == before.shape == after.shape
            origin.restore(np.where(after == before, old, after) if same else after, now)
            held[name] = origin.value(now)
        except ProvenanceError as e:
            raise ProvenanceError(f"{_read(graph, name)} can't be written: {e}") from None
    changed = {k: a for k, a in now.items() if a is not tensors[k]}
    for name, origin in graph.origins.items():
        shared = origin.tensors.intersection(changed)
        if shared and (what := _differs(graph, name, tensors, now, held.get(name))):
            raise ProvenanceError(
                f"{', '.join(sorted(shared))} can't be written: {_read(graph, name)} is made of it"
                f" too and {what}"
            )
    return changed, held


def _differs(
    graph: Graph,
    name: str,
    tensors: Mapping[str, Array],
    now: Mapping[str, Array],
    held: Array | None,
) -> str:
    """Why a constant would not be what it should be, if it would not."""
    try:
        origin = _origin(graph, name, tensors)
        wanted, got = origin.value(tensors) if held is None else held, origin.value(now)
    except ProvenanceError as e:
        return str(e)
    if got.shape == wanted.shape and np.allclose(got, wanted, 1e-6, 0):
        return ""
    return "has not learned" if held is None else "has learned something else"


def _origin(graph: Graph, name: str, tensors: Mapping[str, Array]) -> Origin:
    """Where a constant comes from, all of it in the file."""
    origin = graph.origins.get(name)
    if origin is None:
        raise ProvenanceError("it is no tensor of the file, importing adds it")
    if missing := origin.tensors.difference(tensors):
        raise ProvenanceError(
            f"{', '.join(sorted(missing))} is no initializer or Constant of the file's main"
            " graph, nor a tensor inside a subgraph"
        )
    return origin


def _read(graph: Graph, name: str) -> str:
    """A constant and the node that reads it."""
    node = next((n for n in graph.nodes if graph.values[name] in n.inputs), None)
    return name if node is None else f"{name} of node {node.name}"

"""How a model file is imported: given once, kept in the plan, and passed on as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UsageError

#: A dimension can't be longer.
_LONGEST = 2**31 - 1


@dataclass(frozen=True)
class ImportOptions:
    """How a model file is imported.

    Attributes:
        batch: Value of the symbolic batch dimension: samples per micro-batch.
        fold_batchnorm: Merge BatchNormalization with frozen statistics into the layer before it;
            None: at batch 1.
        head: Replace the last layer by a fresh one for so many classes; None: it stays.
        dims: Open dimensions beside the batch, by name or ``INPUT:AXIS``, and their values.
        outputs: Those that are kept; empty: all.
    """

    batch: int = 1
    fold_batchnorm: bool | None = None
    head: int | None = None
    dims: tuple[tuple[str, int], ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def folds(self) -> bool:
        """BatchNormalization is merged."""
        return self.batch == 1 if self.fold_batchnorm is None else self.fold_batchnorm


#: A file as it is, with batches of one.
PLAIN = ImportOptions()


def parse_dims(texts: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """``NAME=N`` and ``INPUT:AXIS=N`` of ``--dim``.

    Raises:
        UsageError: Another form, or two values for one name.
    """
    dims: dict[str, int] = {}
    for text in texts:
        name, _, size = text.rpartition("=")
        if not name or not (size.isascii() and size.isdigit() and 1 <= int(size) <= _LONGEST):
            raise UsageError(f"--dim: {text!r} is not NAME=N or INPUT:AXIS=N with N from 1 on")
        if dims.setdefault(name, int(size)) != int(size):
            raise UsageError(f"--dim: {name} is given as {dims[name]} and as {int(size)}")
    return tuple(dims.items())

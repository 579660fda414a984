"""How a model file is imported: given once, kept in the plan, and passed on as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UsageError

#: A dimension can't be longer.
_LONGEST = 2**31 - 1
#: The largest window of a lite residual module.
_WIDEST = 31


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside the layers of a model; see ``ir.lora``.

    Attributes:
        rank: Channels between A and B.
        alpha: ``alpha / rank`` is what an adapter's result is multiplied by.
        seed: What A is drawn from.
    """

    rank: int
    alpha: float
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject impossible numbers."""
        if not 1 <= self.rank <= _LONGEST:
            raise UsageError(f"--lora: the rank must be at least 1, not {self.rank}")
        if not 0 < self.alpha <= _LONGEST:  # also rejects NaN
            raise UsageError(f"--lora: ALPHA must be above 0 and finite, not {self.alpha:g}")
        if not 0 <= self.seed <= _LONGEST:
            raise UsageError(f"--lora: the seed must be from 0 to {_LONGEST}, not {self.seed}")

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Lite:
    """Lite residual modules beside the blocks of a model; see ``ir.lite_residual``.

    Attributes:
        kernel: Height and width of the window of their first convolution.
        seed: What its weight is drawn from.
    """

    kernel: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject impossible numbers."""
        if not (1 <= self.kernel <= _WIDEST and self.kernel % 2):
            told = f"the window must be odd and from 1 to {_WIDEST}, not {self.kernel}"
            raise UsageError(f"--lite-residual: {told}")
        if not 0 <= self.seed <= _LONGEST:
            raise UsageError(
                f"--lite-residual: the seed must be from 0 to {_LONGEST}, not {self.seed}"
            )


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
        lora: Low-rank adapters beside its layers; None: none.
        lite_residual: Lite residual modules beside its blocks; None: none.
    """

    batch: int = 1
    fold_batchnorm: bool | None = None
    head: int | None = None
    dims: tuple[tuple[str, int], ...] = ()
    outputs: tuple[str, ...] = ()
    lora: Lora | None = None
    lite_residual: Lite | None = None

    def __post_init__(self) -> None:
        """Reject what does not go together."""
        if self.lora is not None and self.lite_residual is not None:
            raise UsageError("--lora and --lite-residual do not go together; give one of them")

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


def parse_lora(text: str) -> Lora:
    """``RANK[:ALPHA[:SEED]]`` of ``--lora``; ALPHA is RANK where it is not given, SEED 0.

    Raises:
        UsageError: Another form.
    """
    rank, _, rest = text.partition(":")
    alpha, _, seed = rest.partition(":")
    try:
        if text.endswith(":"):
            raise ValueError
        return Lora(int(rank), float(alpha or rank), int(seed or 0))
    except ValueError:
        raise UsageError(f"--lora: {text!r} is not RANK[:ALPHA[:SEED]], as 4 or 4:8") from None


def parse_lite(text: str) -> Lite:
    """``K[:SEED]`` of ``--lite-residual``; SEED is 0 where it is not given.

    Raises:
        UsageError: Another form.
    """
    kernel, _, seed = text.partition(":")
    try:
        if text.endswith(":"):
            raise ValueError
        return Lite(int(kernel), int(seed or 0))
    except ValueError:
        raise UsageError(f"--lite-residual: {text!r} is not K[:SEED], as 3 or 5:1") from None

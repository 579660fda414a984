"""Errors that reach the user as one line, each with its exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

LimitName = Literal["ram", "flash", "latency", "energy"]


@dataclass(frozen=True)
class Shortfall:
    """A limit that no plan keeps, in bytes, seconds or joules.

    Attributes:
        limit: Which one.
        has: What is allowed.
        needs: The least that any plan takes; for RAM live bytes, a layout may take more.
        works: Smallest value known to work; None: no layout was found.
    """

    limit: LimitName
    has: float
    needs: float
    works: float | None


class OdtPlanError(Exception):
    """Base of the errors that are told in one line: what, where and the way out."""

    exit_code: ClassVar[int] = 1


class ModelWarning(UserWarning):
    """The model is read in a way that may not be meant; one line."""


class UsageError(OdtPlanError):
    """The command line, a size, a device file or a data file is wrong."""

    exit_code: ClassVar[int] = 2


class InfeasibleError(OdtPlanError):
    """No plan keeps the limits; the message says what binds, by how much, and what would work.

    Attributes:
        shortfalls: The limits that bind, where they are known.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, shortfalls: Sequence[Shortfall] = ()) -> None:
        """Tell the message."""
        super().__init__(message)
        self.shortfalls = tuple(shortfalls)


class UnsupportedModelError(OdtPlanError):
    """The model file is broken or holds something that can't be planned; lists every obstacle."""

    exit_code: ClassVar[int] = 4


class GraphError(OdtPlanError):
    """The IR breaks one of its own rules: a defect in a pass, or a type-inconsistent model."""

    exit_code: ClassVar[int] = 4

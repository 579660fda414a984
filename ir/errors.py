"""Errors that reach the user as one line, each with its exit code."""

from __future__ import annotations

from typing import ClassVar


class OdtPlanError(Exception):
    """Base of the errors that are told in one line: what, where and the way out."""

    exit_code: ClassVar[int] = 1


class UsageError(OdtPlanError):
    """The command line, a size, a device file or a data file is wrong."""

    exit_code: ClassVar[int] = 2


class InfeasibleError(OdtPlanError):
    """No plan keeps the limits; the message says what binds, by how much, and what would work."""

    exit_code: ClassVar[int] = 3


class UnsupportedModelError(OdtPlanError):
    """The model file is broken or holds something that can't be planned; lists every obstacle."""

    exit_code: ClassVar[int] = 4


class GraphError(OdtPlanError):
    """The IR breaks one of its own rules: a defect in a pass, or a type-inconsistent model."""

    exit_code: ClassVar[int] = 4

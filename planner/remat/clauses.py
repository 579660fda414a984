"""Clauses over codes of cells, collected in matrices.

A code is 0 false, 1 true, larger: a Boolean variable; a negative code is its negation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .instance import IntArray

FALSE, TRUE = 0, 1
#: Index of the first variable.
FIRST = 2


def negated(codes: IntArray) -> IntArray:
    """The codes of the negations; of codes >= 0."""
    return np.where(codes > TRUE, -codes, 1 - codes)


@dataclass
class Clauses:
    """A growing set of clauses.

    Attributes:
        impossible: A clause without codes was added: nothing satisfies the set.
    """

    impossible: bool = False
    _matrices: list[IntArray] = field(default_factory=list)

    def add(self, *columns: IntArray) -> None:
        """One clause per row of the columns, int64[rows] or int64[rows, codes]: one code holds.

        Clauses that always hold are left out, and so are codes that are false or repeated.
        """
        codes = np.column_stack(columns)
        order = np.argsort(np.abs(codes), axis=1, kind="stable")
        codes = np.take_along_axis(codes, order, axis=1)
        before, after = codes[:, :-1], codes[:, 1:]
        certain = (codes == TRUE).any(axis=1)
        certain |= ((before == -after) & (after != FALSE)).any(axis=1)
        after[before == after] = FALSE
        codes = codes[~certain]
        if codes.size:
            self.impossible |= bool((codes == FALSE).all(axis=1).any())
            self._matrices.append(codes)

    def flat(self) -> tuple[IntArray, IntArray]:
        """Codes of the clauses one after another, and where each begins, int64[clauses + 1]."""
        counts = [(m != FALSE).sum(axis=1) for m in self._matrices]
        begin = np.concatenate([np.zeros(1, np.int64), *counts]).cumsum()
        empty = np.zeros(0, np.int64)
        return np.concatenate([empty, *(m[m != FALSE] for m in self._matrices)]), begin

    def __len__(self) -> int:
        """Number of clauses."""
        return sum(len(m) for m in self._matrices)

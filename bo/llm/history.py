"""The observations that stand in a prompt: which of them fit, and in which orders."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from probkit.bo.space import Space
from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.numerics import check_finite

__all__ = ["Evaluations", "Truncate", "kept_rows", "orders"]

Truncate = Literal["recent", "best"]
"""Which rows stay where not all fit: the last ones, or those with the best scores."""

#: All orders of more rows are too many.
_MOST_ROWS = 6
#: Codes may pass their bounds by rounding.
_SLACK = 1e-9


@dataclass(frozen=True, eq=False)
class Evaluations:
    """Configurations seen and their scores.

    Attributes:
        X: Codes [row, parameter].
        params: The configurations.
        scores: Scores [row], float64, as the metric has them.
    """

    X: Tensor
    params: list[dict[str, Any]]
    scores: Tensor

    @classmethod
    def of(cls, space: Space, X: Any, scores: Any, what: str) -> Evaluations:
        """Check observations.

        Args:
            space: The space.
            X: Codes [row, parameter].
            scores: Scores [row] or [row, 1].
            what: What needs them, for errors.

        Raises:
            ShapeError: Shapes that do not match.
            DataError: No rows, codes outside the space, or values that are not finite.
        """
        x, y = as_tensor(X, name="X").double(), as_tensor(scores, name="scores").double()
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        if x.ndim != 2 or y.ndim != 1 or len(x) != len(y) or x.shape[1] != len(space):
            raise ShapeError(
                f"{what}: expected X [row, parameter={len(space)}] and scores [row], got "
                f"{tuple(x.shape)} and {tuple(y.shape)}"
            )
        if not len(x):
            raise DataError(
                f"{what}: expected at least one observation, got an empty history; begin with "
                "LLMWarmStart or a Sobol design"
            )
        check_finite(x, "X", ("row", "parameter"))
        check_finite(y, "scores", ("row",))
        low, high = space.code_bounds
        outside = ((x < low - _SLACK) | (x > high + _SLACK)).nonzero()
        if len(outside):
            row, column = outside[0].tolist()
            raise DataError(
                f"{what}: expected codes in [0, {float(high[column]):g}] for "
                f"{space.names[column]!r}, got {float(x[row, column]):g} in row {row}; use "
                "space.codes(params)"
            )
        return cls(x, space.from_codes(x), y)

    def take(self, rows: list[int]) -> Evaluations:
        """Return some of the rows."""
        return Evaluations(self.X[rows], [self.params[k] for k in rows], self.scores[rows])

    def __len__(self) -> int:
        return len(self.params)


def kept_rows(utility: Tensor, room: int, truncate: Truncate | None, what: str) -> list[int]:
    """Return which rows stay in a prompt, in their order.

    Args:
        utility: Scores, larger is better, [row].
        room: How many fit.
        truncate: Which to keep; None refuses to drop any.
        what: What asks, for errors.

    Raises:
        DataError: Not all fit and ``truncate`` is None, or none fits.
    """
    n = len(utility)
    if room >= n:
        return list(range(n))
    if truncate is None or room < 1:
        raise DataError(
            f"{what}: the history of {n} rows does not fit into the context of the model: {room} "
            "fit; pass truncate='recent' or truncate='best' to keep as many, or shorten the card"
        )
    if truncate == "recent":
        return list(range(n - room, n))
    best = torch.argsort(utility, descending=True, stable=True)[:room]
    return sorted(best.tolist())


def orders(n: int, n_perm: int | None, rng: torch.Generator) -> list[tuple[int, ...]]:
    """Return different orders of ``n`` rows; all of them where they are not more than asked for.

    Args:
        n: Rows.
        n_perm: How many orders; None for all.
        rng: Stream.

    Raises:
        DataError: All orders of more than six rows.

    Example:
        >>> len(orders(3, 6, torch.Generator())), len(orders(3, 4, torch.Generator()))
        (6, 4)
    """
    if n_perm is None and n > _MOST_ROWS:
        raise DataError(
            f"n_perm: all orders are averaged for at most {_MOST_ROWS} rows, got {n}; pass a number"
        )
    if n_perm is None or (n <= 12 and math.factorial(n) <= n_perm):
        return list(itertools.permutations(range(n)))
    found: dict[tuple[int, ...], None] = {}
    while len(found) < n_perm:
        found[tuple(torch.randperm(n, generator=rng).tolist())] = None
    return list(found)

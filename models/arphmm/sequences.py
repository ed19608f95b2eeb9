"""Sequences of unequal length, with what is known of their states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import storable

__all__ = ["Sequences", "as_sequences"]


@storable
@dataclass(frozen=True)
class Sequences:
    """N sequences y_n [time, feature] and, if there is any, partial knowledge of their states.

    A plausibility in [0, 1] says how compatible state k is with what an expert, a label or a
    sensor says about time t: a row of ones says nothing, a one-hot row says that the state is
    known, ones on a set say that the state is in the set. Rows need not sum to one, but no row may
    be all zero. :mod:`probkit.models.arphmm.plausibility` makes them from labels, intervals and
    probabilities.

    Args:
        y: One array [time, feature] (or [time] for one feature) for each sequence; NaN marks a
            missing value.
        labels: One array of plausibilities [time, state] for each sequence, None for a sequence of
            which nothing is known; None where nothing is known of any.
        prev: What happened before, [lag, feature] for each sequence, oldest first; None where the
            first values of each sequence serve as history.

    Raises:
        DataError: There are no sequences, values are infinite, plausibilities lie outside [0, 1]
            or are all zero at a time.
        ShapeError: Shapes do not fit together.

    Example:
        >>> seqs = Sequences([[1.0, 2.0, 3.0], [4.0, 5.0]])
        >>> len(seqs), seqs.lengths, seqs.features
        (2, (3, 2), 1)
    """

    y: Sequence[Any]
    labels: Sequence[Any] | None = None
    prev: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        given: Any = self.y
        if not isinstance(given, Sequence):
            raise ShapeError(
                "Sequences: expected a list of arrays [time, feature], got one "
                f"{type(given).__name__}; write Sequences([y])"
            )
        if len(self.y) == 0:
            raise DataError("Sequences: expected at least one sequence [time, feature], got none")
        y = tuple(_series(one, f"sequence {n}") for n, one in enumerate(self.y))
        object.__setattr__(self, "y", y)
        widths = {one.shape[1] for one in y}
        if len(widths) > 1:
            n = next(n for n, one in enumerate(y) if one.shape[1] != y[0].shape[1])
            raise ShapeError(
                f"Sequences: expected {y[0].shape[1]} features in every sequence, as in the first; "
                f"sequence {n} has {y[n].shape[1]}"
            )
        if self.labels is not None:
            object.__setattr__(self, "labels", self._checked_labels(self.labels))
        if self.prev is not None:
            object.__setattr__(self, "prev", self._checked_history(self.prev))

    def _checked_labels(self, labels: Any) -> tuple[Tensor | None, ...]:
        """Bring plausibilities to tensors of the dtype of y, and check them."""
        if isinstance(labels, Tensor) or len(labels) != len(self.y):
            got = tuple(labels.shape) if isinstance(labels, Tensor) else f"{len(labels)} entries"
            raise ShapeError(
                f"labels: expected one array [time, state] (or None) for each of {len(self.y)} "
                f"sequences, got {got}"
            )
        found = tuple(
            None if one is None else _plausibilities(one, like=y, n=n)
            for n, (one, y) in enumerate(zip(labels, self.y, strict=True))
        )
        states = {one.shape[1] for one in found if one is not None}
        if len(states) > 1:
            raise ShapeError(
                f"labels: expected the same number of states everywhere, got {sorted(states)}"
            )
        return found

    def _checked_history(self, prev: Any) -> tuple[Tensor, ...]:
        """Bring histories to tensors of the dtype of y."""
        if isinstance(prev, Tensor) or len(prev) != len(self.y):
            raise ShapeError(
                f"prev: expected one array [lag, feature] for each of {len(self.y)} sequences, got "
                f"{len(prev)}"
            )
        found = tuple(_series(one, f"prev of sequence {n}") for n, one in enumerate(prev))
        for n, one in enumerate(found):
            if one.shape[1] != self.features:
                raise ShapeError(
                    f"prev: expected {self.features} features as in y, got {one.shape[1]} for "
                    f"sequence {n}"
                )
        return tuple(one.to(self.y[0]) for one in found)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.y)

    def __getitem__(self, index: int | slice) -> Sequences:
        """Select sequences; a number gives one sequence."""
        chosen = slice(index, index + 1 or None) if isinstance(index, int) else index
        return Sequences(
            self.y[chosen],
            None if self.labels is None else self.labels[chosen],
            None if self.prev is None else self.prev[chosen],
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of time steps of each sequence."""
        return tuple(len(one) for one in self.y)

    @property
    def features(self) -> int:
        """Number of features D."""
        return int(self.y[0].shape[1])

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.y[0].device

    @property
    def has_missing(self) -> bool:
        """Whether any value is NaN."""
        return any(bool(one.isnan().any()) for one in self.y)

    def without_labels(self) -> Sequences:
        """Return the same sequences with nothing known of their states."""
        return Sequences(self.y, None, self.prev)


def _series(value: Any, name: str) -> Tensor:
    """One sequence as a floating tensor [time, feature]."""
    y = as_tensor(value, name=name)
    y = y.double() if not y.is_floating_point() else y
    y = y[:, None] if y.ndim == 1 else y
    if y.ndim != 2 or y.shape[1] == 0:
        raise ShapeError(f"{name}: expected [time, feature], got {tuple(y.shape)}")
    infinite = y.isinf().nonzero()
    if len(infinite):
        t, d = infinite[0].tolist()
        raise DataError(f"{name}: expected finite values or NaN, got {y[t, d]} at [{t}, {d}]")
    return y


def _plausibilities(value: Any, *, like: Tensor, n: int) -> Tensor:
    """Plausibilities [time, state] of sequence ``n``, checked."""
    found = as_tensor(value, name=f"labels of sequence {n}").to(like)
    if found.ndim != 2 or found.shape[0] != len(like):
        raise ShapeError(
            f"labels: expected [time={len(like)}, state] for sequence {n}, got "
            f"{tuple(found.shape)}; plausibilities, not state numbers "
            "(plausibility.from_labels converts those)"
        )
    bad = ~((found >= 0) & (found <= 1))
    if bool(bad.any()):
        t, k = bad.nonzero()[0].tolist()
        raise DataError(
            f"labels: expected plausibilities in [0, 1], got {found[t, k]:.6g} for state {k} at "
            f"time {t} of sequence {n}; divide each row by its largest entry"
        )
    empty = (found.amax(1) <= 0).nonzero()
    if len(empty):
        raise DataError(
            f"labels: no state is plausible at time {int(empty[0])} of sequence {n}; write ones "
            "where nothing is known"
        )
    return found


def as_sequences(data: Any) -> Sequences:
    """Take one array, or a list of them, as sequences."""
    if isinstance(data, Sequences):
        return data
    if isinstance(data, list | tuple) and len(data) and not isinstance(data[0], int | float):
        return Sequences(tuple(data))
    if isinstance(data, list | tuple) and len(data) == 0:
        return Sequences(())
    return Sequences((as_tensor(data, name="y"),))

"""Rows of regressors and values: what switching autoregressions look at, step by step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.files import storable
from probkit.models.arphmm.sequences import Sequences

__all__ = ["Lagged", "Start", "lagged"]

Start = Literal["condition", "zeros"]
"""What precedes a sequence: its own first values are conditioned on, or zeros are put before it."""


@storable
@dataclass(frozen=True)
class Lagged:
    """N sequences as padded rows (1, y_(t-1), ..., y_(t-L), y_t).

    Attributes:
        sequences: What the rows were made of.
        design: [sequence, step, regressor + feature]: P = 1 + D L regressors, then the value y_t.
            Rows that are not usable are zero but for the leading one.
        usable: [sequence, step] whether y_t and all its lags were seen.
        lengths: [sequence] number of steps, those that only serve as history not counted.
        log_plausibility: [sequence, step, state]; None where nothing is known of any state.
        regressors: P.
        first: [sequence] position in the sequence of the first step.
    """

    sequences: Sequences
    design: Tensor
    usable: Tensor
    lengths: Tensor
    log_plausibility: Tensor | None
    regressors: int
    first: Tensor

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.design.device

    @property
    def features(self) -> int:
        """Number of features D."""
        return self.design.shape[-1] - self.regressors

    @functools.cached_property
    def complete(self) -> bool:
        """Whether every step of every sequence is usable, padding included."""
        return bool(self.usable.all())

    @functools.cached_property
    def ragged(self) -> bool:
        """Whether lengths differ."""
        return bool((self.lengths != self.usable.shape[1]).any())


def lagged(
    data: Sequences,
    *,
    order: int,
    states: int | None,
    start: Start = "condition",
    missing: bool = True,
) -> Lagged:
    """Turn sequences into rows.

    Args:
        data: The sequences.
        order: Number of lags L.
        states: Number of states that plausibilities must have; None to leave them out.
        start: With "condition" the first L values of a sequence without ``prev`` are history, and
            the states of those times are not part of the model.
        missing: Whether NaN values are allowed.

    Raises:
        DataError: A sequence is too short, or holds NaN although none are allowed.
        ShapeError: A history is too short, or plausibilities have another number of states.
    """
    pieces = [_rows_of(data, n, order, start) for n in range(len(data))]
    if not missing:
        _refuse_missing(data)
    lengths = [len(piece) for piece in pieces]
    longest = max(lengths)
    like = data.y[0]
    width = pieces[0].shape[1]
    design = like.new_zeros(len(data), longest, width)
    design[..., 0] = 1.0
    usable = torch.zeros(len(data), longest, dtype=torch.bool, device=like.device)
    for n, piece in enumerate(pieces):
        seen = ~piece.isnan().any(1)
        design[n, : len(piece), 1:] = torch.where(seen[:, None], piece, 0.0)[:, 1:]
        usable[n, : len(piece)] = seen
    first = [size - rows for size, rows in zip(data.lengths, lengths, strict=True)]
    return Lagged(
        sequences=data,
        design=design,
        usable=usable,
        lengths=torch.tensor(lengths, device=like.device),
        log_plausibility=_log_plausibility(data, first, longest, states),
        regressors=width - data.features,
        first=torch.tensor(first, device=like.device),
    )


def _rows_of(data: Sequences, n: int, order: int, start: Start) -> Tensor:
    """Rows (1, lags, value) [step, 1 + D L + D] of one sequence."""
    y = data.y[n]
    if data.prev is not None:
        before = data.prev[n]
        if len(before) < order:
            raise ShapeError(
                f"prev: expected at least {order} past values (the lag order) for sequence {n}, "
                f"got {len(before)}"
            )
        y = torch.cat([before[len(before) - order :], y])
    elif start == "zeros":
        y = torch.cat([y.new_zeros(order, y.shape[1]), y])
    steps = len(y) - order
    if steps < 1:
        raise DataError(
            f"sequence {n}: expected more than {order} time steps (the lag order), got {len(y)}; "
            "drop it, lower order, or give prev"
        )
    lags = [y[order - lag : order - lag + steps] for lag in range(1, order + 1)]
    return torch.cat([y.new_ones(steps, 1), *lags, y[order:]], dim=1)


def _log_plausibility(
    data: Sequences, first: list[int], longest: int, states: int | None
) -> Tensor | None:
    """Log plausibilities [sequence, step, state]; zero on padding and where nothing is known."""
    if states is None or data.labels is None or all(one is None for one in data.labels):
        return None
    result = data.y[0].new_zeros(len(data), longest, states)
    for n, one in enumerate(data.labels):
        if one is None:
            continue
        if one.shape[1] != states:
            raise ShapeError(
                f"labels: expected plausibilities [time, state={states}], got {tuple(one.shape)} "
                f"for sequence {n}"
            )
        rows = one[first[n] :]
        result[n, : len(rows)] = rows.log()
    return result


def _refuse_missing(data: Sequences) -> None:
    """Name the first missing value."""
    for n, y in enumerate(data.y):
        holes = y.isnan().nonzero()
        if len(holes):
            t, d = holes[0].tolist()
            raise DataError(
                f"sequence {n}: value [{t}, {d}] is NaN; fill it, or allow it by missing='skip'"
            )

"""Observations of a tensor at real-valued indexes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import storable
from probkit.models.funbat.grids import Grid, make_grid
from probkit.numerics import check_finite

__all__ = ["TensorData", "as_index"]


@storable
@dataclass(frozen=True)
class TensorData:
    """N entries of a tensor with K continuous modes: where they lie, and their values.

    Args:
        index: Coordinates [entry, mode], in any units; a frame's column names become the names of
            the modes. Scale each mode so that the length scales of the kernels fit: to [0, 1], say.
        y: Values [entry]; a series keeps its labels.
        modes: Names of the modes; by default the frame's columns, else "mode_1", "mode_2", ...
        labels: Names of the entries; by default the frame's or the series' index, else None.

    Raises:
        ShapeError: Shapes other than [N, K] and [N], or no entry.
        DataError: A value that is not finite; the message names row and mode.

    Example:
        >>> data = TensorData([[0.0, 0.5], [1.0, 0.5]], [1.0, 2.0])
        >>> len(data), data.modes, data.sizes
        (2, ('mode_1', 'mode_2'), (2, 1))
    """

    index: Tensor
    y: Tensor
    modes: Sequence[str] | None = None
    labels: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        given_index: Any = self.index
        given_y: Any = self.y
        modes, labels = self.modes, self.labels
        if isinstance(given_index, pd.DataFrame):
            plain = isinstance(given_index.columns, pd.RangeIndex)
            modes = modes if modes is not None or plain else list(map(str, given_index.columns))
            labels = _row_labels(given_index) if labels is None else labels
        if isinstance(given_y, pd.Series) and labels is None:
            labels = _row_labels(given_y)
        index = as_tensor(given_index, name="index")
        y = as_tensor(given_y, name="y")
        if y.is_complex() or index.is_complex():
            raise DataError("TensorData: expected real numbers, got complex ones")
        if index.ndim != 2 or y.ndim != 1 or len(index) != len(y) or index.numel() == 0:
            raise ShapeError(
                "TensorData: expected index [entry, mode] and y [entry] with at least one entry "
                f"and one mode, got {tuple(index.shape)} and {tuple(y.shape)}"
            )
        index, y = index.double(), y.to(index.device).double()
        modes = tuple(modes or (f"mode_{k + 1}" for k in range(index.shape[1])))
        if len(modes) != index.shape[1] or len(set(modes)) != len(modes):
            raise ShapeError(
                f"TensorData: expected {index.shape[1]} different names of modes, got {modes}"
            )
        if labels is not None and len(labels) != len(y):
            raise ShapeError(f"TensorData: expected {len(y)} labels, got {len(labels)}")
        named = {"mode": modes, **({} if labels is None else {"row": labels})}
        check_finite(index, "index", ("row", "mode"), labels=named)
        check_finite(y, "y", ("row",), labels=named)
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "y", y)
        object.__setattr__(self, "modes", modes)
        object.__setattr__(self, "labels", None if labels is None else list(labels))

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.y)

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.y.device

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modes."""
        assert self.modes is not None  # set when made
        return tuple(self.modes)

    @functools.cached_property
    def grids(self) -> tuple[Grid, ...]:
        """The distinct coordinates of each mode, sorted, and where the entries lie on them."""
        return tuple(make_grid(self.index[:, k]) for k in range(self.index.shape[1]))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of distinct coordinates of each mode."""
        return tuple(len(grid.points) for grid in self.grids)

    def take(self, rows: Tensor) -> TensorData:
        """Select entries, by number or mask."""
        chosen = torch.arange(len(self), device=self.device)[rows.to(self.device)]
        labels = None if self.labels is None else [self.labels[i] for i in chosen.tolist()]
        return TensorData(self.index[chosen], self.y[chosen], self.names, labels)

    def join(self, more: TensorData) -> TensorData:
        """Append entries of the same modes.

        Raises:
            ShapeError: Another number of modes.
            DataError: Modes of other names.
        """
        if more.index.shape[1] != self.index.shape[1]:
            raise ShapeError(
                f"expected entries with {self.index.shape[1]} modes ({', '.join(self.names)}), got "
                f"{more.index.shape[1]}"
            )
        plain = tuple(f"mode_{k + 1}" for k in range(len(self.names)))
        if more.names not in (self.names, plain):
            raise DataError(
                f"expected the modes {', '.join(self.names)}, got {', '.join(more.names)}; order "
                "and name them alike"
            )
        labels = None
        if self.labels is not None and more.labels is not None:
            labels = [*self.labels, *more.labels]
        return TensorData(
            torch.cat((self.index, more.index.to(self.index))),
            torch.cat((self.y, more.y.to(self.y))),
            self.names,
            labels,
        )


def as_index(x: Any, modes: Sequence[str]) -> Tensor:
    """Read coordinates [entry, mode] at which to predict: an array, a frame, or ``TensorData``.

    Raises:
        ShapeError: Another number of modes.
        DataError: A value that is not finite, or columns of other names.
    """
    if isinstance(x, TensorData):
        x = x.index
    columns: Any = getattr(x, "columns", None)
    if isinstance(x, pd.DataFrame) and not isinstance(columns, pd.RangeIndex):
        missing = [name for name in modes if name not in x.columns]
        if missing:
            raise DataError(
                f"index: expected the columns {', '.join(modes)}, missing {', '.join(missing)}"
            )
        x = x[list(modes)]
    index = as_tensor(x, name="index")
    if index.ndim != 2 or index.shape[1] != len(modes):
        raise ShapeError(
            f"index: expected [entry, mode={len(modes)}] ({', '.join(modes)}), got "
            f"{tuple(index.shape)}"
        )
    index = index.double()
    check_finite(index, "index", ("row", "mode"), labels={"mode": list(modes)})
    return index


def _row_labels(table: pd.DataFrame | pd.Series[Any]) -> list[Any] | None:
    return None if isinstance(table.index, pd.RangeIndex) else list(table.index)

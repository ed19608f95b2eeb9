"""Checks of regression data: inputs, targets and group labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import storable
from probkit.numerics import check_finite

__all__ = ["Groups", "columns", "group_labels", "inputs", "regression_data"]


@storable
@dataclass(frozen=True)
class Groups:
    """Which group each row belongs to.

    Attributes:
        labels: Distinct labels, in the order of their first row.
        codes: Position in ``labels`` of each row [row].
    """

    labels: tuple[Any, ...]
    codes: Tensor

    @staticmethod
    def of(labels: Sequence[Any]) -> Groups:
        """Number the labels of rows in the order in which they appear.

        Example:
            >>> Groups.of(["b", "a", "b"])
            Groups(labels=('b', 'a'), codes=tensor([0, 1, 0]))
        """
        place: dict[Any, int] = {}
        codes = [place.setdefault(label, len(place)) for label in labels]
        return Groups(tuple(place), torch.tensor(codes, dtype=torch.long))

    def of_rows(self) -> list[Any]:
        """Return the label of each row."""
        return [self.labels[code] for code in self.codes.tolist()]

    def rows(self, group: int) -> Tensor:
        """Return the row numbers [k] of one group."""
        return (self.codes == group).nonzero()[:, 0]


def regression_data(data: Any, *, grouped: bool = False) -> tuple[Any, ...]:
    """Check (X, y) or (X, y, groups) and return float64 tensors on one device.

    Args:
        data: X [row, feature], y [row] or [row, output] and, where ``grouped``, one label a row.
        grouped: Whether group labels are expected.

    Raises:
        DataError: Not such a tuple, no rows or columns, or a value that is not finite (row and
            column named).
        ShapeError: Shapes that do not fit.
    """
    form = "X [row, feature], y [row] or [row, output]" + (", groups [row]" if grouped else "")
    size = 3 if grouped else 2
    if not isinstance(data, tuple | list):
        raise DataError(f"expected data ({form}), got {type(data).__name__}")
    if len(data) != size:
        hint = "" if not len(data) == 3 else "; labels are for scale_per='group'"
        raise DataError(f"expected data ({form}), got {len(data)} parts{hint}")
    x = inputs(data[0], "X")
    y = _floating(data[1], "y")
    if x.ndim != 2 or y.ndim not in (1, 2) or x.shape[0] != y.shape[0]:
        raise ShapeError(
            f"expected X [row, feature] and y [row] or [row, output] with equally many rows, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.shape[0] == 0 or y.shape[-1] == 0:
        raise DataError(
            f"expected at least one row and one output, got X {tuple(x.shape)} and y "
            f"{tuple(y.shape)}"
        )
    check_finite(y, "y", ("row", "output")[: y.ndim])
    y = y.to(x.device)
    return (x, y, _groups(data[2], len(x))) if grouped else (x, y)


def _groups(value: Any, rows: int) -> Groups:
    found = value if isinstance(value, Groups) else Groups.of(group_labels(value, rows, "groups"))
    if len(found.codes) != rows:
        raise ShapeError(f"groups: expected one label a row, {rows}, got {len(found.codes)}")
    return found


def group_labels(value: Any, rows: int, name: str) -> list[Any]:
    """Read one label a row: integers, strings, or anything hashable.

    Raises:
        DataError: The labels are real numbers or cannot be compared.
        ShapeError: Their number is not that of the rows.
    """
    if isinstance(value, Tensor | np.ndarray) or hasattr(value, "to_numpy"):
        value = value.to_numpy() if hasattr(value, "to_numpy") else value
        value = value.tolist()
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise DataError(f"{name}: expected one label a row, got {type(value).__name__}")
    labels = list(value)
    if len(labels) != rows:
        raise ShapeError(f"{name}: expected one label a row, {rows}, got {len(labels)}")
    for row, label in enumerate(labels):
        if isinstance(label, float) or label.__hash__ is None:
            raise DataError(
                f"{name}: expected integers or strings as labels, got {label!r} at row {row}"
            )
    return labels


def inputs(value: Any, name: str, *, columns: int | None = None) -> Tensor:
    """Check inputs [*batch, row, feature] and return them in float64.

    Raises:
        ShapeError: No feature dim, or other columns than ``columns``.
        DataError: Half precision, complex or non-finite values.
    """
    x = _floating(value, name)
    if x.ndim < 2:
        raise ShapeError(
            f"{name}: expected [*batch, row, feature], got {tuple(x.shape)}; use {name}[:, None]"
        )
    if x.shape[-1] == 0:
        raise ShapeError(f"{name}: expected at least one feature column, got {tuple(x.shape)}")
    if columns is not None and x.shape[-1] != columns:
        raise ShapeError(
            f"{name}: expected {columns} feature columns as in training, got {x.shape[-1]}"
        )
    check_finite(x.reshape(-1, x.shape[-1]), name, ("row", "column"))
    return x


def columns(y: Tensor) -> Tensor:
    """Give a single output its dim: [row] -> [row, 1]."""
    return y[:, None] if y.ndim == 1 else y


def _floating(value: Any, name: str) -> Tensor:
    """Return float64 values; half precision is refused because its digits are lost already."""
    tensor = as_tensor(value, name=name)
    if tensor.dtype in (torch.float16, torch.bfloat16):
        raise DataError(f"{name}: expected float64 or float32, got {tensor.dtype}")
    if tensor.is_complex():
        raise DataError(f"{name}: expected real numbers, got {tensor.dtype}")
    return tensor.double().contiguous()

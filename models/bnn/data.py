"""Data of a network: inputs, targets, and one minibatch of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.models.standardise import Scaling, fit_scaling, no_scaling
from probkit.numerics import check_finite

__all__ = ["Rows", "as_inputs", "as_labels", "as_pair", "as_targets"]


class Rows(NamedTuple):
    """Some rows of the data, with the scaling of all of them.

    Attributes:
        x: [row, feature], as given.
        y: [row] or [row, output], as given.
        scaling: Affine maps to the network's units; None where there are none.
    """

    x: Tensor
    y: Tensor
    scaling: Scaling | None

    @classmethod
    def of(cls, data: Any, *, standardize: bool) -> Rows:
        """Read (X, y), whose own statistics are taken, or rows that carry those of all data."""
        if isinstance(data, Rows):
            return data
        x, y = data
        return cls(x, y, fit_scaling(x, y) if standardize else None)

    def inputs(self) -> Tensor:
        """Return the network's inputs [row, feature]."""
        return self.x if self.scaling is None else self.scaling.x(self.x)

    def affine(self) -> Scaling:
        """Return the scaling, the identity where there is none."""
        return no_scaling(self.x, self.y) if self.scaling is None else self.scaling


def as_pair(data: Any) -> tuple[Any, Any]:
    """Take (X, y) apart.

    Raises:
        DataError: It is no pair.
    """
    if not (isinstance(data, tuple | list) and len(data) == 2):
        raise DataError(
            f"expected data (X [row, feature], y [row] or [row, output]), got {type(data).__name__}"
        )
    return data[0], data[1]


def _floating(value: Any, name: str) -> Tensor:
    tensor = as_tensor(value, name=name)
    if tensor.is_complex() or tensor.dtype in (torch.float16, torch.bfloat16):
        raise DataError(f"{name}: expected float64 or float32, got {tensor.dtype}")
    return (tensor if tensor.is_floating_point() else tensor.double()).contiguous()


def as_inputs(value: Any, name: str, *, columns: int | None = None) -> Tensor:
    """Check inputs [*lead, row, feature]; float32 stays float32, whole numbers become float64.

    Raises:
        ShapeError: Too few dims, no columns, or another number of columns than in training.
        DataError: A value is not finite or not real.
    """
    x = _floating(value, name)
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ShapeError(
            f"{name}: expected [*lead, row, feature] with at least one feature, got "
            f"{tuple(x.shape)}; a single feature is {name}[:, None]"
        )
    if columns is not None and x.shape[-1] != columns:
        raise ShapeError(
            f"{name}: expected {columns} feature columns as in training, got {x.shape[-1]}"
        )
    check_finite(x.reshape(-1, x.shape[-1]), name, ("row", "column"))
    return x


def as_targets(value: Any, x: Tensor, outputs: int | None) -> Tensor:
    """Check real targets [row] or [row, output] and bring them to the dtype and device of ``x``.

    Raises:
        ShapeError: Other shapes, or another number of outputs than the model states.
        DataError: A value is not finite.
    """
    y = _floating(value, "y")
    _check_rows(x, y, (1, 2), "y [row] or [row, output]")
    if y.shape[-1] == 0 or (outputs is not None and tuple(y.shape[1:]) != (outputs,)):
        raise ShapeError(
            f"y: expected [row, output={outputs or 'at least one'}], got {tuple(y.shape)}"
        )
    check_finite(y, "y", ("row", "output")[: y.ndim])
    return y.to(x)


def as_labels(value: Any, x: Tensor, classes: int) -> Tensor:
    """Check labels [row] in 0, ..., classes - 1.

    Raises:
        ShapeError: Not one label a row.
        DataError: A label that is no whole number in that range; the row is named.
    """
    y = as_tensor(value, name="y")
    _check_rows(x, y, (1,), "labels y [row]")
    check_finite(y, "y", ("row",))
    wrong = (y != y.long()) | (y < 0) | (y >= classes)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise DataError(f"y: expected labels 0 to {classes - 1}, got {y[row].item()} at row {row}")
    return y.long().to(x.device)


def _check_rows(x: Tensor, y: Tensor, dims: tuple[int, ...], what: str) -> None:
    if x.ndim != 2 or y.ndim not in dims or len(x) != len(y):
        raise ShapeError(
            f"expected X [row, feature] and {what} with equally many rows, got {tuple(x.shape)} "
            f"and {tuple(y.shape)}"
        )
    if len(x) == 0:
        raise DataError(f"expected at least one row, got X {tuple(x.shape)}")

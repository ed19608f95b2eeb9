"""Data sets as a network sees them: inputs [data set, row, feature] and outputs [data set, row]."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import storable
from probkit.numerics import check_finite

__all__ = ["SetScaling", "as_sets", "one_set", "waves"]

Encode = Callable[[Any], tuple[Tensor, Tensor]]
"""Turns a model's data into x and y, with a leading dim of data sets where the data has one."""


@storable
@dataclass(frozen=True)
class SetScaling:
    """Shifts and scales that bring what a prior draws to unit size.

    Attributes:
        x_shift: [feature].
        x_scale: [feature].
        y_shift: [].
        y_scale: [].
    """

    x_shift: Tensor
    x_scale: Tensor
    y_shift: Tensor
    y_scale: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> SetScaling:
        """Take them from data sets x [data set, row, feature] and y [data set, row].

        Outputs are scaled by quantiles, for a prior may have heavy tails.
        """
        flat = x.flatten(0, -2).float()
        x_scale = flat.std(0)
        x_scale = torch.where(x_scale > 1e-12, x_scale, torch.ones_like(x_scale))
        levels = torch.tensor([0.1587, 0.5, 0.8413], dtype=torch.float64)
        values = y.flatten().double().sort().values
        low, middle, high = values[(levels * (len(values) - 1)).long()]
        y_scale = (high - low) / 2
        y_scale = torch.where(y_scale > 1e-12, y_scale, torch.ones_like(y_scale))
        return cls(flat.mean(0), x_scale, middle.float(), y_scale.float())

    def x(self, x: Tensor) -> Tensor:
        """Scale inputs [*, feature]."""
        return (x.to(self.x_shift) - self.x_shift) / self.x_scale

    def y(self, y: Tensor) -> Tensor:
        """Scale outputs."""
        return (y.to(self.y_shift) - self.y_shift) / self.y_scale


def waves(z: Tensor, octaves: int) -> Tensor:
    """Return features [*, feature (1 + 2 octaves)]: z itself, then sines and cosines of it.

    Args:
        z: [*, feature] numbers of about unit scale.
        octaves: Number of wavelengths 4, 2, 1, ..., each half of the one before. With none, a small
            network smears what differs by less than a tenth.
    """
    steps = torch.arange(octaves, dtype=z.dtype, device=z.device)
    angle = (z.unsqueeze(-1) * (0.5 * math.pi * 2.0**steps)).flatten(-2)
    return torch.cat([z, angle.sin(), angle.cos()], -1)


def as_sets(data: Any, n: int, encode: Encode | None = None) -> tuple[Tensor, Tensor]:
    """Read simulated data as x [data set, row, feature] and y [data set, row].

    Args:
        data: What ``sample_dataset(n)`` gave: a pair (x, y) with x [row], [row, feature] or
            [data set, row, feature] and y [data set, row]; or y alone, whose inputs are then the
            row numbers; or anything that ``encode`` turns into such a pair.
        n: Number of data sets.
        encode: How to read other forms, such as the mappings of Pyro programs.

    Raises:
        CapabilityError: The form is another, and no ``encode`` was given.
        ShapeError: x and y do not match.
    """
    if encode is not None:
        data = encode(data)
    if isinstance(data, Tensor):
        data = (torch.arange(data.shape[-1], dtype=torch.float32), data)
    if isinstance(data, Mapping) or not isinstance(data, list | tuple) or len(data) != 2:
        raise CapabilityError(
            "expected data (x [row, feature], y [data set, row]); pass "
            "encode=<function(data) -> (x, y)> to read another form"
        )
    x, y = as_tensor(data[0], name="x"), as_tensor(data[1], name="y")
    if y.dim() == 3 and y.shape[-1] == 1:
        y = y.squeeze(-1)
    if y.dim() != 2 or len(y) != n:
        raise ShapeError(f"expected y [data set={n}, row], got {tuple(y.shape)}")
    if x.dim() == 1 or (x.dim() == 2 and x.shape == y.shape and len(x) != y.shape[-1]):
        x = x.unsqueeze(-1)
    if x.dim() == 2:
        x = x.expand(n, *x.shape)
    if x.dim() != 3 or x.shape[:2] != y.shape:
        raise ShapeError(
            f"expected x [row, feature] or [data set, row, feature] beside y [data set={n}, "
            f"row={y.shape[-1]}], got {tuple(x.shape)}"
        )
    return x.float(), y.float()


def one_set(data: Any, features: int, encode: Encode | None = None) -> tuple[Tensor, Tensor]:
    """Read one data set as x [row, feature] and y [row], finite and of ``features`` features.

    Raises:
        ShapeError: Rows or features do not match.
        DataError: A value is NaN or infinite.
    """
    if encode is not None:
        data = encode(data)
    if isinstance(data, Tensor):
        data = (torch.arange(data.shape[-1], dtype=torch.float32), data)
    if not isinstance(data, list | tuple) or len(data) != 2:
        raise DataError("expected one data set as a pair (x [row, feature], y [row])")
    x, y = inputs(data[0], features), as_tensor(data[1], name="y")
    if y.dim() == 2 and y.shape[-1] == 1:
        y = y.squeeze(-1)
    if y.dim() != 1 or len(x) != len(y):
        raise ShapeError(
            f"expected y [row={len(x)}] beside x [row={len(x)}, feature], got {tuple(y.shape)}"
        )
    check_finite(y, "y", ("row",))
    return x, y.float()


def inputs(x: Any, features: int) -> Tensor:
    """Read inputs [*batch, row, feature].

    Raises:
        ShapeError: The number of features is another than the network's.
        DataError: A value is NaN or infinite.
    """
    x = as_tensor(x, name="x")
    if x.dim() == 1 and features == 1:
        x = x.unsqueeze(-1)
    if x.dim() < 2 or x.shape[-1] != features:
        raise ShapeError(f"expected x [row, feature={features}], got {tuple(x.shape)}")
    check_finite(x, "x", ("row", "feature"))
    return x.float()

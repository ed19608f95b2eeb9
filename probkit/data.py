"""Data as users bring it: tensors, NumPy arrays and pandas frames become tensors, once.

Row and column labels of pandas objects are kept and become coords of the posterior.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probkit.errors import DataError

__all__ = ["Converted", "Labels", "as_tensor", "convert", "device_of", "take"]

Labels = tuple[Sequence[Any] | None, ...]


@dataclass(frozen=True)
class Converted:
    """Data as tensors, and the labels that its pandas parts carried.

    Attributes:
        data: The same nesting as what came in, arrays and frames replaced by tensors.
        labels: Path of a leaf (keys and positions) -> one entry per axis, labels or None.
    """

    data: Any
    labels: Mapping[tuple[str | int, ...], Labels] = field(default_factory=dict)


def as_tensor(value: Any, *, name: str = "data") -> Tensor:
    """Turn a tensor, array, frame, series, list or number into a tensor, its precision kept.

    Args:
        value: The values; a frame becomes [row, column].
        name: What to call it in an error.

    Returns:
        A tensor; arrays are copied, so that later changes of theirs do not reach it.

    Raises:
        DataError: The values are not numbers.

    Example:
        >>> as_tensor(pd.DataFrame({"a": [1.0, 2.0]})).shape
        torch.Size([2, 1])
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, pd.DataFrame):
        for column in value.columns:
            if not pd.api.types.is_numeric_dtype(value[column].dtype):
                raise DataError(
                    f"{name}: expected numeric columns, column {column!r} has dtype "
                    f"{value[column].dtype}; encode or drop it"
                )
        value = value.to_numpy(dtype=np.result_type(*map(_numpy_dtype, value.dtypes), np.int8))
    elif isinstance(value, pd.Series | pd.Index):
        numeric = pd.api.types.is_numeric_dtype(value.dtype)
        value = value.to_numpy(dtype=_numpy_dtype(value.dtype)) if numeric else value.to_numpy()
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"{name}: expected numbers in a regular array ({error})") from None
    if array.dtype.kind not in "biufc":
        raise DataError(f"{name}: expected numbers, got dtype {array.dtype}; encode or drop them")
    if array.dtype == np.longdouble:  # torch has no extended precision
        array = array.astype(np.float64)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """The NumPy dtype of a pandas column; nullable columns become floats, so that NA is NaN."""
    if isinstance(dtype, np.dtype):
        return dtype
    return np.dtype("float64")


def convert(data: Any) -> Converted:
    """Replace every NumPy array and pandas object inside ``data`` by a tensor, keeping labels.

    Dicts, lists and tuples are walked; other objects (data containers of the families, numbers,
    strings) pass unchanged.

    Example:
        >>> frame = pd.DataFrame({"age": [1.0, 2.0]}, index=["ann", "bo"])
        >>> convert((frame, np.zeros(2))).labels
        {(0,): (['ann', 'bo'], ['age'])}
    """
    labels: dict[tuple[str | int, ...], Labels] = {}

    def walk(value: Any, path: tuple[str | int, ...]) -> Any:
        if isinstance(value, pd.DataFrame | pd.Series):
            found: Labels = (_axis_labels(value.index),)
            if isinstance(value, pd.DataFrame):
                found += (_axis_labels(value.columns),)
            if any(axis is not None for axis in found):
                labels[path] = found
            return as_tensor(value, name=_path_name(path))
        if isinstance(value, np.ndarray):
            return as_tensor(value, name=_path_name(path))
        if isinstance(value, Mapping):
            return {key: walk(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return _like(value, [walk(item, (*path, i)) for i, item in enumerate(value)])
        return value

    return Converted(walk(data, ()), labels)


def _axis_labels(index: pd.Index[Any]) -> list[Any] | None:
    """Labels of a pandas axis; None for the plain 0, 1, 2, ... that pandas makes by itself."""
    return None if isinstance(index, pd.RangeIndex) else list(index)


def _path_name(path: tuple[str | int, ...]) -> str:
    return "data" + "".join(f"[{part!r}]" for part in path)


def take(data: Any, index: Tensor, size: int) -> Any:
    """Select units of a minibatch: ``index`` along the first axis of every leaf of that length.

    Args:
        data: Nested dicts, lists and tuples of tensors.
        index: [batch] unit numbers.
        size: Number of units; tensors of another length are shared by all units and stay whole.
    """
    if isinstance(data, Tensor):
        return data[index] if data.ndim and data.shape[0] == size else data
    if isinstance(data, Mapping):
        return {key: take(value, index, size) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return _like(data, [take(value, index, size) for value in data])
    return data


def _like(sequence: Any, items: list[Any]) -> Any:
    """A list, tuple or named tuple as ``sequence`` is, of ``items``."""
    kind = type(sequence)
    return kind(*items) if hasattr(sequence, "_fields") else kind(items)


def device_of(data: Any) -> torch.device:
    """Return the device of the first tensor inside ``data`` (CPU where there is none)."""
    if isinstance(data, Tensor):
        return data.device
    if isinstance(data, Mapping):
        data = list(data.values())
    if isinstance(data, list | tuple):
        for value in data:
            found = device_of(value)
            if found.type != "cpu":
                return found
        return torch.device("cpu")
    own = getattr(data, "device", None)
    return own if isinstance(own, torch.device) else torch.device("cpu")

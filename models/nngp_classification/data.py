"""Labelled inputs, checked, with the inducing inputs that were chosen among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import storable
from probkit.numerics import check_finite

__all__ = ["LabelledData", "check_inputs", "labelled", "stratified"]


@storable
@dataclass(frozen=True, eq=False)
class LabelledData:
    """Inputs with class labels, or a batch of them.

    Attributes:
        x: Inputs [row, feature], float64.
        labels: Labels [row], whole numbers 0 to ``classes`` - 1.
        inducing: Inducing inputs [inducing, feature], the same in every batch.
        classes: Number of classes.
    """

    x: Tensor
    labels: Tensor
    inducing: Tensor
    classes: int

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the inputs."""
        return self.x.dtype

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, index: Tensor) -> LabelledData:
        """Return the rows ``index`` [unit]; the inducing inputs stay."""
        index = index.to(self.x.device)
        return LabelledData(self.x[index], self.labels[index], self.inducing, self.classes)

    def one_hot(self) -> Tensor:
        """Return the labels as rows of the unit matrix [row, class]."""
        return torch.eye(self.classes, dtype=self.x.dtype, device=self.x.device)[self.labels]


def labelled(data: Any, *, classes: int | None = None, inducing: int | Tensor = 0) -> LabelledData:
    """Check (X, labels) and choose the inducing inputs.

    Args:
        data: A pair X [row, feature] and labels [row]; ``LabelledData`` passes as it is.
        classes: Number of classes C; None for the largest label plus one.
        inducing: How many rows of X become inducing inputs, or the inputs themselves.

    Raises:
        DataError: Not a pair, no rows, values that are not finite, labels that are not whole
            numbers from 0 to C - 1, or fewer than two classes.
        ShapeError: Shapes that do not fit.
    """
    if isinstance(data, LabelledData):
        return data
    if not (isinstance(data, tuple | list) and len(data) == 2):
        raise DataError(
            f"expected data (X [row, feature], labels [row]), got {type(data).__name__}"
        )
    x = check_inputs(data[0], "X")
    given = as_tensor(data[1], name="labels")
    if x.ndim != 2 or given.ndim != 1 or len(x) != len(given):
        raise ShapeError(
            f"expected X [row, feature] and labels [row] with equally many rows, got "
            f"{tuple(x.shape)} and {tuple(given.shape)}"
        )
    if len(x) == 0:
        raise DataError("expected at least one row, got none")
    labels = _whole(given).to(x.device)
    count = int(labels.max()) + 1 if classes is None else classes
    outside = (labels < 0) | (labels >= count)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise DataError(
            f"labels: expected whole numbers from 0 to {count - 1}, got {int(labels[row])} at row "
            f"{row}; number the classes from 0, or pass classes="
        )
    if count < 2 or (classes is None and len(labels.unique()) < 2):
        raise DataError(
            f"labels: expected at least two classes, got {len(labels.unique())}; pass classes= "
            "where some have no row yet"
        )
    return LabelledData(x, labels, _inducing(x, labels, inducing), count)


def check_inputs(value: Any, name: str, *, columns: int | None = None) -> Tensor:
    """Return inputs [*batch, row, feature] in float64, checked.

    Raises:
        DataError: Values that are not real, not finite, or in half precision.
        ShapeError: Fewer than two dims, no columns, or others than in training.
    """
    tensor = as_tensor(value, name=name)
    if tensor.dtype in (torch.float16, torch.bfloat16) or tensor.is_complex():
        raise DataError(f"{name}: expected float64 or float32, got {tensor.dtype}")
    if tensor.ndim < 2:
        raise ShapeError(
            f"{name}: expected [*batch, row, feature], got {tuple(tensor.shape)}; use "
            f"{name}[:, None]"
        )
    if tensor.shape[-1] == 0:
        raise ShapeError(f"{name}: expected at least one feature column, got {tuple(tensor.shape)}")
    if columns is not None and tensor.shape[-1] != columns:
        raise ShapeError(
            f"{name}: expected {columns} feature columns as in training, got {tensor.shape[-1]}"
        )
    tensor = tensor.double().contiguous()
    check_finite(tensor.reshape(-1, tensor.shape[-1]), name, ("row", "column"))
    return tensor


def stratified(labels: Tensor, count: int) -> Tensor:
    """Choose ``count`` rows, the same number of each class as far as the classes have them.

    Within a class the rows are evenly spaced in the order of the data, so the choice is the same
    every time.

    Args:
        labels: Labels [row].
        count: Number of rows wanted, at most all.

    Returns:
        Row numbers [count], increasing.

    Example:
        >>> stratified(torch.tensor([0, 0, 0, 0, 1, 0]), 3).tolist()
        [0, 4, 5]
    """
    members = [(labels == c).nonzero().flatten() for c in labels.unique()]
    members.sort(key=len)
    chosen: list[Tensor] = []
    for position, rows in enumerate(members):
        left = count - sum(map(len, chosen))
        share = min(len(rows), -(-left // (len(members) - position)))
        place = torch.linspace(0, len(rows) - 1, share, dtype=torch.float64).round().long()
        chosen.append(rows[place.to(rows.device)])
    return torch.cat(chosen).sort().values


def _whole(labels: Tensor) -> Tensor:
    """Return labels as whole numbers, floats that are whole included."""
    if not labels.is_floating_point():
        if labels.is_complex():
            raise DataError(f"labels: expected whole numbers, got {labels.dtype}")
        return labels.long()
    check_finite(labels, "labels", ("row",))
    broken = labels != labels.round()
    if bool(broken.any()):
        row = int(broken.nonzero()[0])
        raise DataError(f"labels: expected whole numbers, got {float(labels[row]):g} at row {row}")
    return labels.long()


def _inducing(x: Tensor, labels: Tensor, wanted: int | Tensor) -> Tensor:
    if isinstance(wanted, Tensor):
        given = check_inputs(wanted, "inducing", columns=x.shape[1])
        if given.ndim != 2 or len(given) == 0:
            raise ShapeError(f"inducing: expected [inducing, feature], got {tuple(given.shape)}")
        return given.to(x.device)
    return x[stratified(labels, min(wanted, len(x)))].clone() if wanted else x[:0]

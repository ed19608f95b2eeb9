"""Kernel matrices that are computed again whenever they are needed, as LinearOperators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gpytorch.kernels import Kernel
from linear_operator import LinearOperator
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.kernels.functional import evaluate, hyperparameters
from probkit.kernels.products import BLOCK_BYTES, product

__all__ = ["PartitionedKernel", "partitioned"]


def partitioned(
    kernel: Kernel,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    params: Mapping[str, Tensor] | None = None,
    block_bytes: int = BLOCK_BYTES,
    devices: Sequence[torch.device | str] = (),
) -> PartitionedKernel:
    """Return the matrix of a kernel as an operator that stores inputs only.

    GPyTorch's conjugate gradients, Lanczos quadrature and preconditioners work on it; memory grows
    with n, not with its square. ``operator.add_diagonal(noise)`` gives what is to be solved.

    Args:
        kernel: Any GPyTorch kernel without batch dims.
        x1: Inputs [n, d].
        x2: Inputs [m, d]; None for ``x1``.
        params: Constrained hyper-parameters to use in place of the kernel's own; gradients flow to
            them. Without them they flow to nothing but the inputs.
        block_bytes: Size of the largest block of rows, for kernels without a tiled product.
        devices: Devices among which the rows of a product are divided; by default where the inputs
            live.

    Returns:
        A LinearOperator [n, m].

    Raises:
        DataError: Unknown names in ``params``.
        ShapeError: Inputs that are not matrices.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> x = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
        >>> K = partitioned(RBFKernel(), x)
        >>> bool(torch.allclose(K @ x, RBFKernel()(x).to_dense() @ x))
        True
    """
    own = {name: hyper.value.to(x1) for name, hyper in hyperparameters(kernel).items()}
    unknown = sorted(set(params or {}) - set(own))
    if unknown:
        raise DataError(
            f"unknown hyper-parameter {unknown[0]!r}: expected one of {', '.join(own) or 'none'}"
        )
    values = {**own, **(params or {})}
    inputs = (x1,) if x2 is None else (x1, x2)
    if any(x.ndim != 2 for x in inputs):
        raise ShapeError(
            f"partitioned: expected x [n, d], got {', '.join(str(list(x.shape)) for x in inputs)}"
        )
    return PartitionedKernel(
        *inputs,
        *values.values(),
        kernel=kernel,
        names=tuple(values),
        square=x2 is None,
        block_bytes=block_bytes,
        devices=tuple(str(device) for device in devices),
    )


class PartitionedKernel(LinearOperator):
    """A kernel matrix [n, m] by its inputs and hyper-parameters; made by :func:`partitioned`.

    Args:
        *tensors: Inputs ``x1`` [n, d], ``x2`` [m, d] unless ``square``, then one tensor a name.
        kernel: The kernel.
        names: Names of its hyper-parameters.
        square: Whether ``x1`` stands for both inputs.
        block_bytes: Size of the largest block of rows.
        devices: Devices among which the rows of a product are divided.
    """

    def __init__(
        self,
        *tensors: Tensor,
        kernel: Kernel,
        names: tuple[str, ...],
        square: bool,
        block_bytes: int = BLOCK_BYTES,
        devices: tuple[str, ...] = (),
    ) -> None:
        options: dict[str, Any] = {"kernel": kernel, "names": names, "square": square}
        super().__init__(*tensors, **options, block_bytes=block_bytes, devices=devices)
        self.kernel, self.names, self.square = kernel, names, square
        self.block_bytes, self.devices = block_bytes, devices
        inputs = 1 if square else 2
        self.x1, self.x2 = tensors[0], tensors[inputs - 1]
        self.params = dict(zip(names, tensors[inputs:], strict=True))

    # --------------------------------------------------------- what LinearOperators ask for

    def _size(self) -> torch.Size:
        return torch.Size([len(self.x1), len(self.x2)])

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the inputs."""
        return self.x1.dtype

    @property
    def device(self) -> torch.device:
        """Where the inputs live."""
        return self.x1.device

    def _transpose_nonbatch(self) -> PartitionedKernel:
        return self if self.square else self._with(self.x2, self.x1)

    def _matmul(self, rhs: Tensor) -> Tensor:
        vector = rhs.ndim == 1
        right = rhs[:, None] if vector else rhs
        if right.ndim > 2:  # a batch of right-hand sides: side by side
            flat = right.movedim(-2, 0).reshape(right.shape[-2], -1)
            return self._matmul(flat).reshape(-1, *right.shape[:-2], right.shape[-1]).movedim(0, -2)
        out = self._rows(right) if self.devices else self._product(self.x1, None, right)
        return out[:, 0] if vector else out

    def _product(self, rows: Tensor, device: str | None, right: Tensor) -> Tensor:
        """Product of some rows, on a device of their own."""
        whole = rows is self.x1
        params, x2 = self.params, self.x2
        if device is not None:
            rows, x2, right = rows.to(device), x2.to(device), right.to(device)
            params = {name: value.to(device) for name, value in params.items()}
        other = None if self.square and whole else x2
        return product(self.kernel, rows, other, right, params=params, block_bytes=self.block_bytes)

    def _rows(self, right: Tensor) -> Tensor:
        """Rows divided among the devices, which work at the same time; gathered in order."""
        parts = torch.tensor_split(self.x1, len(self.devices))
        pairs = zip(parts, self.devices, strict=True)
        found = [self._product(part, device, right) for part, device in pairs]
        return torch.cat([part.to(right.device) for part in found])

    def _diagonal(self) -> Tensor:
        return evaluate(self.kernel, self.x1, self.x2, params=self.params, diag=True)

    def _approx_diagonal(self) -> Tensor:
        return self._diagonal()

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(row_index.shape, col_index.shape)
        rows, columns = row_index.expand(shape), col_index.expand(shape)
        if rows.ndim > 1 and bool((rows == rows[..., :1]).all()):  # whole rows, as pivoting asks
            return self._some_rows(rows[..., 0], columns)
        a, b = self.x1[rows.reshape(-1)], self.x2[columns.reshape(-1)]
        return evaluate(self.kernel, a, b, params=self.params, diag=True).reshape(shape)

    def _some_rows(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Entries [*lead, column] of one row each."""
        flat = evaluate(self.kernel, self.x1[rows.reshape(-1)], self.x2, params=self.params)
        index = columns.reshape(len(flat), -1)
        return flat.gather(1, index).reshape(columns.shape)

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> PartitionedKernel:
        return self._with(self.x1[row_index], self.x2[col_index])

    def _with(self, x1: Tensor, x2: Tensor) -> PartitionedKernel:
        return PartitionedKernel(
            x1,
            x2,
            *self.params.values(),
            kernel=self.kernel,
            names=self.names,
            square=False,
            block_bytes=self.block_bytes,
            devices=self.devices,
        )

    def to_dense(self) -> Tensor:
        """Return the matrix [n, m] itself."""
        other = None if self.square else self.x2
        return evaluate(self.kernel, self.x1, other, params=self.params)

"""Supports of transition matrices with structural zeros and of tied covariances, with bijections.

They let gradient-based samplers work on exactly the free entries: a forbidden transition stays
zero, a diagonal covariance stays diagonal, a shared one stays the same for all states.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import (
    IndependentTransform,
    StickBreakingTransform,
    Transform,
)

from probkit.bijections import PositiveDefiniteBijection

__all__ = [
    "Covariance",
    "DiagonalCovariances",
    "FullCovariances",
    "MaskedSimplexRows",
    "SharedCovariances",
    "covariance_support",
]

Covariance = Literal["full", "diag", "shared"]
"""Shape of the emission covariances: one matrix a state, one diagonal a state, one for all."""


class MaskedSimplexRows(Constraint):
    """Matrices [*, row, entry] whose rows sum to one and vanish outside a mask.

    Args:
        mask: Entries that may be positive [row, entry]; at least one in each row.
    """

    is_discrete = False
    event_dim = 2

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask.bool().cpu()

    def check(self, value: Tensor) -> Tensor:
        """Tell which matrices [*] fit."""
        mask = self.mask.to(value.device)
        inside = ((value >= 0) & (mask | (value == 0))).all(-1)
        return (inside & ((value.sum(-1) - 1).abs() < 1e-6)).all(-1)

    def __repr__(self) -> str:
        return f"MaskedSimplexRows({self.mask.int().tolist()})"


class DiagonalCovariances(Constraint):
    """Stacks of diagonal covariance matrices [*, state, D, D]."""

    is_discrete = False
    event_dim = 3

    def check(self, value: Tensor) -> Tensor:
        """Tell which stacks [*] fit."""
        diagonal = value.diagonal(dim1=-2, dim2=-1)
        zero_elsewhere = (value == torch.diag_embed(diagonal)).flatten(-3).all(-1)
        return zero_elsewhere & (diagonal > 0).flatten(-2).all(-1)


class FullCovariances(Constraint):
    """Stacks of covariance matrices [*, state, D, D]."""

    is_discrete = False
    event_dim = 3

    def check(self, value: Tensor) -> Tensor:
        """Tell which stacks [*] fit."""
        return constraints.positive_definite.check(value).all(-1)


class SharedCovariances(Constraint):
    """Stacks [*, state, D, D] of one covariance matrix, the same for every state.

    Args:
        states: Number of states.
    """

    is_discrete = False
    event_dim = 3

    def __init__(self, states: int) -> None:
        self.states = states

    def check(self, value: Tensor) -> Tensor:
        """Tell which stacks [*] fit."""
        same = (value == value[..., :1, :, :]).flatten(-3).all(-1)
        return same & constraints.positive_definite.check(value[..., 0, :, :])


class _MaskedRows(Transform):
    """Vector of all free entries -> rows by stick breaking over each row's allowed entries."""

    domain = constraints.real_vector
    bijective = True

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask
        self.codomain = MaskedSimplexRows(mask)
        self.allowed = [row.nonzero()[:, 0] for row in mask]
        self.stick = StickBreakingTransform()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _MaskedRows) and torch.equal(self.mask, other.mask)

    __hash__ = Transform.__hash__

    def _sizes(self) -> list[int]:
        return [len(places) - 1 for places in self.allowed]

    def _call(self, x: Tensor) -> Tensor:
        rows = []
        for part, places in zip(x.split(self._sizes(), -1), self.allowed, strict=True):
            row = x.new_zeros((*x.shape[:-1], self.mask.shape[1]))
            index = places.to(x.device).expand(*x.shape[:-1], -1)
            rows.append(row.scatter(-1, index, self.stick(part)))
        return torch.stack(rows, -2)

    def _inverse(self, y: Tensor) -> Tensor:
        parts = [
            self.stick.inv(y[..., k, :].index_select(-1, places.to(y.device)))
            for k, places in enumerate(self.allowed)
        ]
        return torch.cat(parts, -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log Jacobian [*], each row's allowed entries but the last as coordinates."""
        total = x.new_zeros(x.shape[:-1])
        pieces = zip(x.split(self._sizes(), -1), self.allowed, strict=True)
        for k, (part, places) in enumerate(pieces):
            if part.shape[-1]:
                row = y[..., k, :].index_select(-1, places.to(y.device))
                total = total + self.stick.log_abs_det_jacobian(part, row)
        return total

    def forward_shape(self, shape: Any) -> torch.Size:
        """Shape of the matrix."""
        return torch.Size((*shape[:-1], *self.mask.shape))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Shape of the vector."""
        return torch.Size((*shape[:-2], sum(self._sizes())))


class _DiagonalStack(Transform):
    """Logarithms [*, state, D] -> diagonal matrices [*, state, D, D]."""

    domain = constraints.independent(constraints.real, 2)
    codomain: Constraint = DiagonalCovariances()
    bijective = True

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        return torch.diag_embed(x.exp())

    def _inverse(self, y: Tensor) -> Tensor:
        return y.diagonal(dim1=-2, dim2=-1).log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log |d diagonal entries / d logarithms| [*]."""
        return x.sum((-2, -1))

    def forward_shape(self, shape: Any) -> torch.Size:
        """Shape of the matrices."""
        return torch.Size((*shape, shape[-1]))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Shape of the logarithms."""
        return torch.Size(shape[:-1])


class _SharedStack(Transform):
    """Vector [*, D (D + 1) / 2] -> the same positive definite matrix for every state."""

    domain = constraints.real_vector
    bijective = True

    def __init__(self, states: int) -> None:
        super().__init__()
        self.states = states
        self.codomain = SharedCovariances(states)
        self.one = PositiveDefiniteBijection()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SharedStack) and self.states == other.states

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        matrix = self.one(x)
        lead, order = x.shape[:-1], matrix.shape[-1]
        return matrix.unsqueeze(-3).expand(*lead, self.states, order, order)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.one.inv(y[..., 0, :, :])

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log Jacobian of the one matrix [*]."""
        return self.one.log_abs_det_jacobian(x, y[..., 0, :, :])

    def forward_shape(self, shape: Any) -> torch.Size:
        """Shape of the matrices."""
        one = self.one.forward_shape(torch.Size(shape))
        return torch.Size((*one[:-2], self.states, *one[-2:]))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Shape of the vector."""
        return self.one.inverse_shape(torch.Size((*shape[:-3], *shape[-2:])))


@biject_to.register(MaskedSimplexRows)
def _rows(constraint: MaskedSimplexRows) -> Transform:
    return _MaskedRows(constraint.mask)


@biject_to.register(FullCovariances)
def _full(constraint: FullCovariances) -> Transform:
    return IndependentTransform(PositiveDefiniteBijection(), 1)


@biject_to.register(SharedCovariances)
def _shared(constraint: SharedCovariances) -> Transform:
    return _SharedStack(constraint.states)


@biject_to.register(DiagonalCovariances)
def _diagonal(constraint: DiagonalCovariances) -> Transform:
    return _DiagonalStack()


def covariance_support(kind: Covariance, states: int) -> Constraint:
    """Return the support of covariances [state, D, D] of ``kind``."""
    if kind == "full":
        return FullCovariances()
    return SharedCovariances(states) if kind == "shared" else DiagonalCovariances()

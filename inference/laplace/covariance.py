"""Covariances of the Gaussian, by structure: how to draw, and how to project Jacobians.

All live on one flat vector [A]: the layers of a network one after another, each as [weight; bias]
of shape [in + 1, out], or the unconstrained sites of any other model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from probkit.files import storable
from probkit.inference.laplace.layers import Factor, row_chunks

__all__ = ["Covariance", "DiagonalCovariance", "FullCovariance", "KroneckerCovariance"]


class Covariance(Protocol):
    """A covariance matrix [A, A] = R R', known by what R does."""

    @property
    def log_det_root(self) -> Tensor:
        """Log of the absolute determinant of R."""
        ...

    def colour(self, noise: Tensor) -> Tensor:
        """Return R noise [n, A] for standard normal noise [n, A]."""
        ...

    def whiten(self, vector: Tensor) -> Tensor:
        """Return R' vector [A], whose square length is vector' Sigma vector."""
        ...

    def variance(self) -> Tensor:
        """Return the diagonal [A]."""
        ...

    def to(self, dtype: torch.dtype) -> Covariance:
        """Return it in another precision."""
        ...

    def project(self, factors: Sequence[Factor]) -> Tensor:
        """Return J R [row, output, A] for the Jacobian J of a network."""
        ...

    def row_covariance(self, factors: Sequence[Factor]) -> Tensor:
        """Return J R R' J' [row, output, output], each row with itself only."""
        ...


def _from_projection(covariance: Any, factors: Sequence[Factor], size: int) -> Tensor:
    """Compute row covariances from projections, few rows at a time."""
    rows, outputs = factors[0].slopes.shape[:2]
    parts = []
    for part in row_chunks(rows, 8 * outputs * size):
        root = covariance.project([Factor(f.inputs[part], f.slopes[part]) for f in factors])
        parts.append(root @ root.mT)
    return torch.cat(parts)


@storable
@dataclass(frozen=True)
class DiagonalCovariance:
    """Independent entries.

    Attributes:
        sd: [A].
    """

    sd: Tensor

    @property
    def log_det_root(self) -> Tensor:
        """Sum of log standard deviations."""
        return self.sd.log().sum()

    def colour(self, noise: Tensor) -> Tensor:
        """Return the noise times the standard deviations."""
        return noise * self.sd

    def whiten(self, vector: Tensor) -> Tensor:
        """Return the vector times the standard deviations."""
        return vector * self.sd

    def to(self, dtype: torch.dtype) -> DiagonalCovariance:
        """Return it in another precision."""
        return DiagonalCovariance(self.sd.to(dtype))

    def variance(self) -> Tensor:
        """Return sd^2."""
        return self.sd.square()

    def _blocks(self, factors: Sequence[Factor]) -> list[Tensor]:
        shapes = [(f.inputs.shape[1], f.slopes.shape[2]) for f in factors]
        used = sum(i * o for i, o in shapes)
        parts = self.sd[:used].split([i * o for i, o in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def project(self, factors: Sequence[Factor]) -> Tensor:
        """Scale the columns of the Jacobian."""
        dense = [
            f.dense() * sd.flatten() for f, sd in zip(factors, self._blocks(factors), strict=True)
        ]
        return torch.cat(dense, -1)

    def row_covariance(self, factors: Sequence[Factor]) -> Tensor:
        """Sum inputs^2 sd^2 over inputs first: the Jacobian is never formed."""
        parts = [
            _weighted(f.inputs.square() @ sd.square(), f.slopes)
            for f, sd in zip(factors, self._blocks(factors), strict=True)
        ]
        return torch.stack(parts).sum(0)


def _weighted(weights: Tensor, slopes: Tensor) -> Tensor:
    """Return slopes diag(weights) slopes' [row, output, output] for weights [row, out]."""
    return torch.einsum("no,nko,nlo->nkl", weights, slopes, slopes)


@storable
@dataclass(frozen=True)
class FullCovariance:
    """Any covariance.

    Attributes:
        root: [A, A] with root root' the covariance.
        log_det_root: Log of the absolute determinant of the root.
        last_layer_only: Whether it is that of a network's last layer, the others held fixed.
    """

    root: Tensor
    log_det_root: Tensor
    last_layer_only: bool = False

    def colour(self, noise: Tensor) -> Tensor:
        """Multiply by the root."""
        return noise @ self.root.mT

    def whiten(self, vector: Tensor) -> Tensor:
        """Multiply by the transposed root."""
        return vector @ self.root

    def to(self, dtype: torch.dtype) -> FullCovariance:
        """Return it in another precision."""
        return FullCovariance(
            self.root.to(dtype), self.log_det_root.to(dtype), self.last_layer_only
        )

    def variance(self) -> Tensor:
        """Return the diagonal."""
        return self.root.square().sum(-1)

    def project(self, factors: Sequence[Factor]) -> Tensor:
        """Multiply the dense Jacobian by the root."""
        used = factors[-1:] if self.last_layer_only else factors
        jacobian = torch.cat([f.dense() for f in used], -1)
        return jacobian @ self.root[: jacobian.shape[-1]]

    def row_covariance(self, factors: Sequence[Factor]) -> Tensor:
        """Project few rows at a time."""
        return _from_projection(self, factors, len(self.root))


@storable
@dataclass(frozen=True)
class KroneckerCovariance:
    """One block for each layer, (left (x) right) diag(sd^2) (left (x) right)'.

    Attributes:
        left: One matrix [in + 1, in + 1] for each layer.
        right: One orthogonal matrix [out, out] for each layer.
        sd: One table [in + 1, out] for each layer.
        log_det_root: Log of the absolute determinant of the root.
    """

    left: list[Tensor]
    right: list[Tensor]
    sd: list[Tensor]
    log_det_root: Tensor

    def _layers(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return list(zip(self.left, self.right, self.sd, strict=True))

    def colour(self, noise: Tensor) -> Tensor:
        """Return left (sd * noise) right' for every layer."""
        parts = noise.split([sd.numel() for sd in self.sd], -1)
        done = [
            (left @ (part.reshape(-1, *sd.shape) * sd) @ right.mT).flatten(1)
            for part, (left, right, sd) in zip(parts, self._layers(), strict=True)
        ]
        return torch.cat(done, -1)

    def whiten(self, vector: Tensor) -> Tensor:
        """Return sd * (left' vector right) for every layer."""
        parts = vector.split([sd.numel() for sd in self.sd])
        done = [
            ((left.mT @ part.reshape(sd.shape) @ right) * sd).flatten()
            for part, (left, right, sd) in zip(parts, self._layers(), strict=True)
        ]
        return torch.cat(done)

    def to(self, dtype: torch.dtype) -> KroneckerCovariance:
        """Return it in another precision."""
        lists = ([part.to(dtype) for part in parts] for parts in (self.left, self.right, self.sd))
        left, right, sd = lists
        return KroneckerCovariance(left, right, sd, self.log_det_root.to(dtype))

    def variance(self) -> Tensor:
        """Return left^2 sd^2 right^2' for every layer."""
        parts = [
            (left.square() @ sd.square() @ right.square().mT).flatten()
            for left, right, sd in self._layers()
        ]
        return torch.cat(parts)

    def _turned(self, factors: Sequence[Factor]) -> list[tuple[Factor, Tensor]]:
        """Express the factors of the Jacobian in the eigenbases."""
        return [
            (Factor(f.inputs @ left, f.slopes @ right), sd)
            for f, (left, right, sd) in zip(factors, self._layers(), strict=True)
        ]

    def project(self, factors: Sequence[Factor]) -> Tensor:
        """Return the Jacobian in the eigenbases, scaled."""
        return torch.cat([f.dense() * sd.flatten() for f, sd in self._turned(factors)], -1)

    def row_covariance(self, factors: Sequence[Factor]) -> Tensor:
        """Sum over inputs first: the Jacobian is never formed."""
        parts = [
            _weighted(f.inputs.square() @ sd.square(), f.slopes) for f, sd in self._turned(factors)
        ]
        return torch.stack(parts).sum(0)

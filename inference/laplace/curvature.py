"""Curvature of the likelihood in the weights: generalised Gauss-Newton matrices by structure.

The weights are measured in prior standard deviations, so that the prior adds ``precision`` (one
number for each layer, 1 for the model's own prior) to the diagonal, and the likelihood's part is
divided by ``noise``, a factor on the noise variance. Neither change needs new factors.

Sources: Schraudolph (2002) for the generalised Gauss-Newton matrix; Martens and Grosse (2015),
Botev, Ritter and Barber (2017), for its Kronecker factors; Daxberger et al. (2021), "Laplace
redux", for their use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from probkit.files import storable
from probkit.inference.laplace.covariance import (
    Covariance,
    DiagonalCovariance,
    FullCovariance,
    KroneckerCovariance,
)
from probkit.inference.laplace.layers import Factor, OutputCurvature, jacobian_factors, row_chunks
from probkit.model import Values
from probkit.numerics import check_allocation, safe_cholesky

__all__ = [
    "Curvature",
    "DiagonalCurvature",
    "FullCurvature",
    "KroneckerCurvature",
    "gauss_newton",
]


class Curvature(Protocol):
    """Curvature of the likelihood, to which a prior is yet to be added."""

    def log_det(self, precision: Tensor, noise: Tensor) -> Tensor:
        """Return log det(G / noise + precision) in prior units."""
        ...

    def covariance(self, precision: Tensor, noise: Tensor) -> Covariance:
        """Return the inverse of G / noise + precision in the units of the weights."""
        ...


@storable
@dataclass(frozen=True)
class DiagonalCurvature:
    """The diagonal of the Gauss-Newton matrix.

    Attributes:
        blocks: [in + 1, out] of each layer, in prior units.
        scale: Prior standard deviations [in + 1] of each layer's rows.
    """

    blocks: list[Tensor]
    scale: list[Tensor]

    def _precisions(self, precision: Tensor, noise: Tensor) -> list[Tensor]:
        return [block / noise + precision[k] for k, block in enumerate(self.blocks)]

    def log_det(self, precision: Tensor, noise: Tensor) -> Tensor:
        """Sum of logarithms."""
        terms = [table.log().sum() for table in self._precisions(precision, noise)]
        return torch.stack(terms).sum()

    def covariance(self, precision: Tensor, noise: Tensor) -> Covariance:
        """Return the reciprocals."""
        tables = self._precisions(precision, noise)
        sd = [s[:, None] * t.rsqrt() for s, t in zip(self.scale, tables, strict=True)]
        return DiagonalCovariance(torch.cat([part.flatten() for part in sd]))


@storable
@dataclass(frozen=True)
class KroneckerCurvature:
    """One Kronecker product for each layer, kept as eigen-decompositions of its two factors.

    Attributes:
        inward: Eigenvalues [in + 1] of each layer's sum of input products, in prior units.
        inward_vectors: [in + 1, in + 1].
        outward: Eigenvalues [out] of each layer's mean of output curvatures.
        outward_vectors: [out, out].
        scale: Prior standard deviations [in + 1] of each layer's rows.
    """

    inward: list[Tensor]
    inward_vectors: list[Tensor]
    outward: list[Tensor]
    outward_vectors: list[Tensor]
    scale: list[Tensor]

    def _precisions(self, precision: Tensor, noise: Tensor) -> list[Tensor]:
        pairs = zip(self.inward, self.outward, strict=True)
        return [a[:, None] * b / noise + precision[k] for k, (a, b) in enumerate(pairs)]

    def log_det(self, precision: Tensor, noise: Tensor) -> Tensor:
        """Sum over products of eigenvalues: no factor is formed again."""
        terms = [table.log().sum() for table in self._precisions(precision, noise)]
        return torch.stack(terms).sum()

    def covariance(self, precision: Tensor, noise: Tensor) -> Covariance:
        """Return the inverse in the eigenbases."""
        sd = [table.rsqrt() for table in self._precisions(precision, noise)]
        left = [s[:, None] * u for s, u in zip(self.scale, self.inward_vectors, strict=True)]
        log_det = sum(
            (
                part.log().sum() + part.shape[1] * s.log().sum()
                for part, s in zip(sd, self.scale, strict=True)
            ),
            start=sd[0].new_zeros(()),
        )
        return KroneckerCovariance(left, list(self.outward_vectors), sd, log_det)


@storable
@dataclass(frozen=True)
class FullCurvature:
    """The Gauss-Newton matrix of all layers, or of the last one.

    Attributes:
        matrix: [A, A] in prior units.
        sizes: Entries of each layer that it spans.
        scale: Prior standard deviations [A].
        last_layer_only: Whether it spans the last layer alone.
    """

    matrix: Tensor
    sizes: tuple[int, ...]
    scale: Tensor
    last_layer_only: bool = False

    def _cholesky(self, precision: Tensor, noise: Tensor) -> Tensor:
        sizes = torch.tensor(self.sizes, device=self.matrix.device)
        diagonal = torch.repeat_interleave(precision[-len(self.sizes) :], sizes)
        return safe_cholesky(self.matrix / noise + torch.diag(diagonal))[0]

    def log_det(self, precision: Tensor, noise: Tensor) -> Tensor:
        """Return the log determinant by a Cholesky factor.

        Precisions that differ between layers move the eigenvectors, so this one needs a new factor
        at each step of a search.
        """
        return 2 * self._cholesky(precision, noise).diagonal().log().sum()

    def covariance(self, precision: Tensor, noise: Tensor) -> Covariance:
        """Return the inverse by its root, the transposed inverse of the Cholesky factor."""
        factor = self._cholesky(precision, noise)
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        log_det = self.scale.log().sum() - factor.diagonal().log().sum()
        root = (self.scale[:, None] * inverse.mT).contiguous()
        return FullCovariance(root, log_det, self.last_layer_only)


def gauss_newton(model: Any, values: Values, data: Any, structure: str) -> Curvature:
    """Compute the generalised Gauss-Newton matrix of a network's likelihood.

    Args:
        model: A :class:`~probkit.inference.laplace.layers.HasLayers`.
        values: Values of all sites, without leading dims.
        data: Its data.
        structure: "diag", "full", "kron" or "last_layer".

    Returns:
        The curvature in float64.
    """
    scale = _row_scales(model, values)
    names = model.layer_names()
    sizes = [values[weight].numel() + values[bias].numel() for weight, bias in names]
    if structure == "last_layer":
        scale, sizes = scale[-1:], sizes[-1:]
    if structure in ("full", "last_layer"):
        return _full(model, values, data, scale, sizes, structure == "last_layer")
    if structure == "kron":
        return _kronecker(model, values, data, scale)
    return _diagonal(model, values, data, scale)


def _row_scales(model: Any, values: Values) -> list[Tensor]:
    """Prior standard deviations [in + 1] of the rows of each layer: weights, then the bias."""
    sd = model.weight_sd()
    scales = []
    for weight, bias in model.layer_names():
        rows = values[weight].new_full((values[weight].shape[-2],), sd[weight])
        scales.append(torch.cat([rows, rows.new_full((1,), sd[bias])]).double())
    return scales


def _chunks(
    model: Any, values: Values, data: Any, scale: Sequence[Tensor], size: int
) -> Iterator[list[Factor]]:
    """Yield the factors of R^{1/2}' J in prior units and float64, few rows at a time."""
    x = model.network_inputs(data)
    curvature: OutputCurvature = model.output_curvature(values, data)
    for part in row_chunks(len(x), 16 * size * curvature.root.shape[1]):
        _, factors = jacobian_factors(model, values, x[part])
        root = curvature.root[part].double()
        yield [
            Factor(f.inputs.double() * s, torch.einsum("nmk,nmo->nko", root, f.slopes.double()))
            for f, s in zip(factors[-len(scale) :], scale, strict=True)
        ]


def _width(model: Any, values: Values) -> int:
    """Numbers that one row of factors takes."""
    return sum(sum(values[weight].shape[-2:]) for weight, _ in model.layer_names())


def _full(
    model: Any,
    values: Values,
    data: Any,
    scale: Sequence[Tensor],
    sizes: Sequence[int],
    last_layer_only: bool,
) -> FullCurvature:
    size = sum(sizes)
    check_full(size, scale[0].device)
    matrix = scale[0].new_zeros(size, size)
    for factors in _chunks(model, values, data, scale, size):
        jacobian = torch.cat([f.dense() for f in factors], -1).flatten(0, 1)
        matrix += jacobian.mT @ jacobian
    rows = [s.repeat_interleave(n // len(s)) for s, n in zip(scale, sizes, strict=True)]
    return FullCurvature(matrix, tuple(sizes), torch.cat(rows), last_layer_only)


def check_full(size: int, device: torch.device) -> None:
    """Refuse a full matrix that cannot fit."""
    check_allocation(
        4 * 8 * size * size,
        f"Laplace(structure='full') of {size} parameters ({4 * 8 * size * size} bytes; "
        "structure='kron' or 'diag' needs far less)",
        device=device,
    )


def _diagonal(model: Any, values: Values, data: Any, scale: Sequence[Tensor]) -> DiagonalCurvature:
    blocks: list[Tensor] = []
    for factors in _chunks(model, values, data, scale, _width(model, values)):
        parts = [f.inputs.square().mT @ f.slopes.square().sum(1) for f in factors]
        blocks = [a + b for a, b in zip(blocks, parts, strict=True)] if blocks else parts
    return DiagonalCurvature(blocks, list(scale))


def _kronecker(
    model: Any, values: Values, data: Any, scale: Sequence[Tensor]
) -> KroneckerCurvature:
    inward: list[Tensor] = []
    outward: list[Tensor] = []
    rows = 0
    for factors in _chunks(model, values, data, scale, _width(model, values)):
        a = [f.inputs.mT @ f.inputs for f in factors]
        b = [f.slopes.flatten(0, 1).mT @ f.slopes.flatten(0, 1) for f in factors]
        inward = [p + q for p, q in zip(inward, a, strict=True)] if inward else a
        outward = [p + q for p, q in zip(outward, b, strict=True)] if outward else b
        rows += len(factors[0].inputs)
    first = [torch.linalg.eigh(matrix) for matrix in inward]
    second = [torch.linalg.eigh(matrix / rows) for matrix in outward]
    return KroneckerCurvature(
        [values.clamp_min(0) for values, _ in first],
        [vectors.contiguous() for _, vectors in first],
        [values.clamp_min(0) for values, _ in second],
        [vectors.contiguous() for _, vectors in second],
        list(scale),
    )

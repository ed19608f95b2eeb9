"""The E-step under a Kronecker dictionary and a Kronecker prior, from factors alone.

With H = H_1 kron ... kron H_I and g = g_1 kron ... kron g_I the covariance of the data is
C = s2 I + (H_1 G_1 H_1^H) kron ... kron (H_I G_I H_I^H). The eigenvectors U_i of the small
factors diagonalise it, so that nothing of size N x N or M x M is ever formed.

Modes are in C order: mode 1 varies slowest. Shapes lead with [*batch]; [snapshot] comes before the
modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probkit.models.sbl.mode_products import mode_products, outer
from probkit.models.sbl.moments import Moments, abs_square, gaussian_log_evidence

__all__ = [
    "Spectrum",
    "kronecker_moments",
    "kronecker_spectrum",
]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvectors of the factors of C, and C's eigenvalues.

    Attributes:
        vectors: U_i [*batch, M_i, M_i].
        crossed: H_i^H U_i [*batch, N_i, M_i].
        values: Eigenvalues l_1 o ... o l_I + s2 of C, [*batch, M_1, ..., M_I].
        noise_var: s2 [*batch].
    """

    vectors: list[Tensor]
    crossed: list[Tensor]
    values: Tensor
    noise_var: Tensor


def kronecker_spectrum(
    factors: Sequence[Tensor], variances: Sequence[Tensor], noise_var: Tensor
) -> Spectrum:
    """Diagonalise C.

    Args:
        factors: H_i [*batch, M_i, N_i].
        variances: g_i [*batch, N_i] >= 0.
        noise_var: s2 [*batch] > 0.
    """
    vectors, crossed, levels = [], [], []
    for factor, variance in zip(factors, variances, strict=True):
        gram = (factor * variance.unsqueeze(-2)) @ factor.mH
        level, vector = torch.linalg.eigh(gram)
        vectors.append(vector)
        crossed.append(factor.mH @ vector)
        levels.append(level.clamp_min(0))
    values = outer(levels)
    s2 = noise_var.reshape(*noise_var.shape, *[1] * len(factors))
    return Spectrum(vectors, crossed, values + s2, noise_var)


def kronecker_moments(spectrum: Spectrum, variances: Sequence[Tensor], y: Tensor) -> Moments:
    """Posterior moments of the weights, and the evidence.

    Args:
        spectrum: From :func:`kronecker_spectrum`.
        variances: The same g_i [*batch, N_i].
        y: [*batch, snapshot, M_1, ..., M_I].

    Returns:
        The moments. Cost: the mode products, O(sum_i N_i) times the size of the tensor.
    """
    modes = len(variances)
    dims = tuple(range(-modes, 0))
    whitened = mode_products(y, [vector.mH.unsqueeze(-3) for vector in spectrum.vectors])
    precision = spectrum.values.reciprocal()
    solved = whitened * precision.unsqueeze(-modes - 1)
    projection = mode_products(solved, [part.unsqueeze(-3) for part in spectrum.crossed])
    leverage = mode_products(precision, [abs_square(part) for part in spectrum.crossed])
    prior = outer(variances)
    shrink = prior * leverage
    snapshots = y.shape[-modes - 1]
    size = spectrum.values.shape[spectrum.values.ndim - modes :].numel()
    quadratic = (abs_square(whitened) * precision.unsqueeze(-modes - 1)).sum((*dims, -modes - 1))
    noise_var = spectrum.noise_var
    return Moments(
        mean=projection * prior.unsqueeze(-modes - 1),
        variance=(prior * (1 - shrink)).clamp_min(0),
        projection=projection,
        leverage=leverage,
        residual=noise_var.square() * abs_square(solved).sum((*dims, -modes - 1)),
        freedom=size - noise_var * precision.sum(dims),
        log_evidence=gaussian_log_evidence(
            spectrum.values.log().sum(dims),
            quadratic,
            size,
            snapshots,
            is_complex=y.is_complex(),
        ),
    )

"""The Kalman filter and the affine backward recursions as associative scans of depth log T.

Saerkkae & Garcia-Fernandez (2021), "Temporal parallelization of Bayesian smoothers", IEEE
Transactions on Automatic Control 66(1), sections III and IV; the elements of the filter are written
for sites in either form (see `gaussian_sites`), so no precision of a site is ever inverted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probkit.inference.message_passing.gaussian import GaussianChain, symmetric, times, update
from probkit.inference.message_passing.gaussian_sites import inverse
from probkit.inference.message_passing.scan import associative_scan

__all__ = ["scan_affine", "scan_filter", "scan_smoother"]


class _FilterElement(NamedTuple):
    """A stretch of data after step i and up to j.

    p(z_j | z_i, data) = N(A z_i + b, C) and p(data | z_i) ~ exp(eta' z_i - z_i' J z_i / 2).
    """

    A: Tensor
    b: Tensor
    C: Tensor
    eta: Tensor
    J: Tensor


def _combine_filter(first: _FilterElement, second: _FilterElement) -> _FilterElement:
    """Join two neighbouring stretches; lemma 8 of the paper, with shared factors."""
    states = first.b.shape[-1]
    eye = torch.eye(states, dtype=first.b.dtype, device=first.b.device)
    D = inverse(eye + first.C @ second.J)
    inner = first.b + times(first.C, second.eta)
    D_A, D_C, D_b = (D @ torch.cat((first.A, first.C, inner.unsqueeze(-1)), -1)).split(
        (states, states, 1), -1
    )
    A, AD_C, AD_b = (second.A @ torch.cat((D_A, D_C, D_b), -1)).split((states, states, 1), -1)
    J_A, J_b = (second.J @ torch.cat((first.A, first.b.unsqueeze(-1)), -1)).split((states, 1), -1)
    residual = second.eta.unsqueeze(-1) - J_b
    J, eta = (D_A.mT @ torch.cat((J_A, residual), -1)).split((states, 1), -1)
    return _FilterElement(
        A,
        AD_b.squeeze(-1) + second.b,
        symmetric(AD_C @ second.A.mT) + second.C,
        eta.squeeze(-1) + first.eta,
        symmetric(J) + first.J,
    )


def scan_filter(chain: GaussianChain) -> tuple[Tensor, Tensor]:
    """Filtered means [*batch, T, S] and covariances [*batch, T, S, S]."""
    # Conditioning N(0, Q) instead of N(A z, Q) gives b and C; A and the likelihood follow from it.
    cov = torch.cat((chain.initial_cov.unsqueeze(-3), chain.noise), -3)
    start = chain.initial_mean.unsqueeze(-2)
    mean = torch.cat((start, torch.zeros_like(chain.transition[..., 0])), -2)
    H = chain.observation
    PH = cov @ H.mT
    weights = chain.sites.weigh(H @ PH)
    b, C = update(mean, cov, H, PH, weights)
    none = torch.zeros_like(C[..., :1, :, :])
    transition = torch.cat((none, chain.transition), -3)
    HA = H @ transition
    A = transition - PH @ weights.precision @ HA
    eta = times(HA.mT, weights.shift)
    J = symmetric(HA.mT @ weights.precision @ HA)
    # Steps first, so that matrices and vectors agree on their place.
    matrices, vectors = (x.movedim(-3, 0) for x in (A, C, J)), (x.movedim(-2, 0) for x in (b, eta))
    (A, C, J), (b, eta) = matrices, vectors
    result = associative_scan(_combine_filter, _FilterElement(A, b, C, eta, J))
    return result.b.movedim(0, -2), result.C.movedim(0, -3)


class _Affine(NamedTuple):
    """z_i = E z_j + N(g, L)."""

    E: Tensor
    g: Tensor
    L: Tensor


def _combine_smoother(first: _Affine, second: _Affine) -> _Affine:
    return _Affine(
        first.E @ second.E,
        times(first.E, second.g) + first.g,
        symmetric(first.E @ second.L @ first.E.mT) + first.L,
    )


def scan_smoother(gain: Tensor, offset: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Marginals of z_t = E_t z_(t+1) + N(g_t, L_t), backwards; see `kalman_loop.loop_smoother`."""
    elements = _Affine(_zero_last(gain).movedim(-3, 0), offset.movedim(-2, 0), rest.movedim(-3, 0))
    result = associative_scan(_combine_smoother, elements, reverse=True)
    return result.g.movedim(0, -2), result.L.movedim(0, -3)


def scan_affine(gain: Tensor, offset: Tensor) -> Tensor:
    """The recursion z_t = E_t z_(t+1) + g_t, backwards, [*batch, T, S]."""

    def combine(
        first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return first[0] @ second[0], times(first[0], second[1]) + first[1]

    elements = (_zero_last(gain).movedim(-3, 0), offset.movedim(-2, 0))
    return associative_scan(combine, elements, reverse=True)[1].movedim(0, -2)


def _zero_last(gain: Tensor) -> Tensor:
    return torch.cat((gain[..., :-1, :, :], torch.zeros_like(gain[..., -1:, :, :])), -3)

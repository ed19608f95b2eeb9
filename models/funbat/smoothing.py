"""One mode given its sites: the Kalman pass over all its components at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probkit.inference.message_passing import (
    KalmanFilter,
    MarkovPrior,
    NaturalSites,
    kalman_two_pass,
    markov_prior,
    smooth_sites,
)
from probkit.kernels.state_space import StateSpace, block_diagonal
from probkit.models.funbat.grids import Grid
from probkit.models.funbat.pairs import pack, unpack

__all__ = ["Smoothed", "make_chain", "smooth"]


class Smoothed(NamedTuple):
    """The law of a mode's components given its sites.

    Attributes:
        log_z: Log of the integral of prior times sites [copy].
        mean: E[u] [copy, point, r].
        cov: Cov[u] packed [copy, point, pair].
        state_mean: E[z] [copy, point, r s].
        state_cov: Cov[z] [copy, point, r s, r s].
        cross_cov: Cov[z_(t+1), z_t] [copy, point - 1, r s, r s].
        filtered: The forward pass, where the chain was too badly conditioned for precisions; else
            None.
    """

    log_z: Tensor
    mean: Tensor
    cov: Tensor
    state_mean: Tensor
    state_cov: Tensor
    cross_cov: Tensor
    filtered: KalmanFilter | None


def make_chain(space: StateSpace, grid: Grid, log_hyper: Tensor) -> MarkovPrior:
    """Lay out the prior of components with hyper-parameters [copy, r, part, 2] on a grid.

    The components of a mode form one Markov chain, whose state stacks theirs: number c s + j is
    entry j of component c. Every field of the result but the observation has a leading [copy] dim.
    """
    A, Q = space.dynamics(grid.gaps, log_hyper)
    P = space.stationary(log_hyper)
    components = range(log_hyper.shape[1])
    A = block_diagonal([A[:, c] for c in components])
    Q = block_diagonal([Q[:, c] for c in components])
    row = space.observation().to(log_hyper)
    H = torch.kron(torch.eye(len(components), dtype=row.dtype, device=row.device), row)
    cov = block_diagonal([P[:, c] for c in components])
    return markov_prior(cov, A[:, grid.gap_index], Q[:, grid.gap_index], H)


def smooth(chain: MarkovPrior, eta: Tensor, precision: Tensor, *, cross: bool = True) -> Smoothed:
    """Combine the prior with sites eta [copy, point, r] and packed Lam [copy, point, pair].

    ``cross=False`` leaves out ``cross_cov`` and ``filtered``, which only learning needs.
    """
    sites = NaturalSites(eta, unpack(precision, eta.shape[-1]))
    filtered = None
    if cross and chain.precision is None:
        filtered, result = kalman_two_pass(
            torch.zeros_like(chain.initial_cov[..., 0]),
            chain.initial_cov,
            chain.transition,
            chain.noise,
            sites,
            observation=chain.observation,
        )
    else:
        result = smooth_sites(chain, sites, cross=cross)
    H = chain.observation
    return Smoothed(
        result.log_evidence,
        result.mean @ H.mT,
        pack(H @ result.cov @ H.mT),
        result.mean,
        result.cov,
        result.cross_cov,
        filtered,
    )

"""The Kalman filter and the affine backward recursions step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from probkit.inference.message_passing.gaussian import GaussianChain, symmetric, times, update

__all__ = ["loop_affine", "loop_filter", "loop_smoother"]


def loop_filter(chain: GaussianChain) -> tuple[Tensor, Tensor]:
    """Filtered means [*batch, T, S] and covariances [*batch, T, S, S]."""
    kind = type(chain.sites)
    observation = chain.observation.unbind(-3)
    values, matrices = chain.sites.values.unbind(-2), chain.sites.matrices.unbind(-3)
    transition, noise = chain.transition.unbind(-3), chain.noise.unbind(-3)
    mean, cov = chain.initial_mean, chain.initial_cov
    means, covs = [], []
    for t, H in enumerate(observation):
        if t > 0:
            A = transition[t - 1]
            mean, cov = times(A, mean), A @ cov @ A.mT + noise[t - 1]
        PH = cov @ H.mT
        weights = kind(values[t], matrices[t]).weigh(H @ PH)
        mean, cov = update(mean, cov, H, PH, weights)
        means.append(mean)
        covs.append(cov)
    return torch.stack(means, -2), torch.stack(covs, -3)


def loop_smoother(gain: Tensor, offset: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Marginals of z_t = E_t z_(t+1) + N(g_t, L_t), backwards; at the last step E is not used.

    Args:
        gain: E_t [*batch, T, S, S].
        offset: g_t [*batch, T, S].
        rest: L_t [*batch, T, S, S].

    Returns:
        Means [*batch, T, S] and covariances [*batch, T, S, S].
    """
    gains, rests = gain.unbind(-3), rest.unbind(-3)
    cov = rests[-1]
    covs = [cov]
    for t in range(len(gains) - 2, -1, -1):
        cov = rests[t] + symmetric(gains[t] @ cov @ gains[t].mT)
        covs.append(cov)
    return loop_affine(gain, offset), torch.stack(covs[::-1], -3)


def loop_affine(gain: Tensor, offset: Tensor) -> Tensor:
    """The recursion z_t = E_t z_(t+1) + g_t, backwards, [*batch, T, S]."""
    gains, offsets = gain.unbind(-3), offset.unbind(-2)
    values = [offsets[-1]]
    for t in range(len(gains) - 2, -1, -1):
        values.append(times(gains[t], values[-1]) + offsets[t])
    return torch.stack(values[::-1], -2)

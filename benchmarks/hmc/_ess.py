"""Effective sample size and R-hat in NumPy alone, the same in the environment of every peer.

Rank-normalised, split chains (Vehtari, Gelman, Simpson, Carpenter and Buerkner 2021).
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np

__all__ = ["bulk_ess", "r_hat"]


def _split(draws: Any) -> Any:
    """Halve the chains: [chain, draw, *] -> [2 chain, draw // 2, *]."""
    half = draws.shape[1] // 2
    return np.concatenate([draws[:, :half], draws[:, -half:]])


def _normal_scores(draws: Any) -> Any:
    """Replace the values of each entry by normal scores of their ranks; ties share one."""
    flat = draws.reshape(-1, draws.shape[-1])
    table = np.array(
        [NormalDist().inv_cdf((k + 0.625) / (len(flat) + 0.25)) for k in range(len(flat))]
    )
    scores = np.empty_like(flat)
    for k in range(flat.shape[1]):
        values, place, counts = np.unique(flat[:, k], return_inverse=True, return_counts=True)
        ends = counts.cumsum()
        sums = np.concatenate([[0.0], table.cumsum()])
        scores[:, k] = ((sums[ends] - sums[ends - counts]) / counts)[place]
    return scores.reshape(draws.shape)


def _plain_r_hat(draws: Any) -> Any:
    length = draws.shape[1]
    within = draws.var(1, ddof=1).mean(0)
    between = draws.mean(1).var(0, ddof=1)
    return np.sqrt((length - 1) / length + between / within)


def r_hat(draws: Any) -> float:
    """Return the largest rank-normalised R-hat of draws [chain, draw, entry], bulk and folded."""
    parts = _split(draws)
    folded = np.abs(parts - np.median(parts, axis=(0, 1)))
    bulk, tails = (_plain_r_hat(_normal_scores(p)) for p in (parts, folded))
    return float(np.max(np.maximum(bulk, tails)))


def bulk_ess(draws: Any) -> float:
    """Return the smallest bulk ESS of draws [chain, draw, entry].

    Autocorrelations are summed by Geyer's initial monotone sequence.
    """
    scores = _normal_scores(_split(draws))
    chains, length, entries = scores.shape
    centred = scores - scores.mean(1, keepdims=True)
    spectrum = np.fft.rfft(centred, n=2 * length, axis=1)
    covariance = np.fft.irfft(spectrum * spectrum.conj(), axis=1)[:, :length].mean(0) / length
    within = covariance[0] * length / (length - 1)
    total = within * (length - 1) / length + scores.mean(1).var(0, ddof=1)
    found = []
    for k in range(entries):
        rho = 1.0 - (within[k] - covariance[:, k]) / total[k]
        rho[0] = 1.0
        pairs = rho[: length - length % 2].reshape(-1, 2).sum(1)
        below = np.flatnonzero(pairs <= 0.0)
        pairs = np.minimum.accumulate(pairs[: below[0] if len(below) else len(pairs)])
        tau = max(2.0 * pairs.sum() - 1.0, 1.0 / np.log10(chains * length))
        found.append(chains * length / tau)
    return float(min(found))

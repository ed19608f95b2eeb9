"""Exact tests of whether ranks are uniform on 0, ..., draws."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probkit.errors import DataError

__all__ = ["Band", "chi_square_p_value", "ecdf_band", "ecdf_p_value"]

Array = NDArray[np.float64]
Counts = NDArray[np.int64]

_MOST_POINTS = 100
_FEWEST_IN_A_BIN = 5


def chi_square_p_value(ranks: ArrayLike, draws: int, *, bins: int | None = None) -> float:
    """Return the p-value of Pearson's chi-square test that ranks are uniform.

    Args:
        ranks: [replicate] whole numbers from 0 to ``draws``.
        draws: Number of draws that each rank was taken among.
        bins: Groups of neighbouring ranks, as equal as they can be; by default as many as leave
            five replicates to each on average, 20 at most.

    Raises:
        DataError: Ranks outside of 0, ..., draws, or too few for two bins.

    Example:
        >>> chi_square_p_value(np.arange(100), 99)
        1.0
    """
    from scipy.stats import chi2

    found = _checked(ranks, draws)
    most = min(20, draws + 1, len(found) // _FEWEST_IN_A_BIN)
    count = most if bins is None else bins
    if not 2 <= count <= draws + 1:
        raise DataError(
            f"chi-square: expected 2 to {draws + 1} bins, got {count} for {len(found)} replicates; "
            f"two bins need {2 * _FEWEST_IN_A_BIN} replicates"
        )
    edges = np.linspace(0, draws + 1, count + 1).round().astype(np.int64)
    observed = np.histogram(found, edges)[0]
    expected = len(found) * np.diff(edges) / (draws + 1)
    statistic = float((np.square(observed - expected) / expected).sum())
    return float(chi2.sf(statistic, count - 1))


class Band(NamedTuple):
    """A simultaneous band for the empirical distribution function of uniform ranks.

    Attributes:
        rank: [point] ranks r at which it is evaluated.
        uniform: [point] P(rank <= r), (r + 1) / (draws + 1).
        low: [point] smallest share of ranks <= r inside the band.
        high: [point] largest such share.
    """

    rank: Counts
    uniform: Array
    low: Array
    high: Array


@functools.lru_cache(maxsize=64)
def ecdf_band(replicates: int, draws: int, level: float = 0.95) -> Band:
    """Return the band that holds the whole distribution function with probability ``level``.

    Pointwise binomial intervals of one common level, chosen so that all of them hold together with
    at least probability ``level``; that probability is computed exactly (the counts of uniform
    ranks are independent Poisson ones, given their sum), in the manner of Saeilynoja, Buerkner and
    Vehtari (2022, section 2.2).

    Args:
        replicates: Number of ranks.
        draws: Ranks run from 0 to this.
        level: Simultaneous probability.

    Raises:
        DataError: No replicates or draws, or a level outside (0, 1).

    Example:
        >>> band = ecdf_band(100, 9)
        >>> band.rank.tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8]
        >>> bool((band.low < band.uniform).all() and (band.uniform < band.high).all())
        True
    """
    _check_counts(replicates, draws)
    if not 0.0 < level < 1.0:
        raise DataError(f"ecdf_band: expected a level between 0 and 1, got {level}")
    tails = _tails(replicates, draws)
    # Intervals change only where the level passes one of the finitely many tail probabilities.
    candidates = np.unique(tails[tails <= 1.0 - level])
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        if _probability_within(replicates, draws, float(candidates[middle])) >= level:
            low = middle + 1
        else:
            high = middle
    pointwise = float(candidates[low - 1]) if low else 0.0
    first, last = _intervals(tails, pointwise)
    rank, uniform = _points(draws)
    return Band(rank, uniform, first / replicates, last / replicates)


def ecdf_p_value(ranks: ArrayLike, draws: int) -> float:
    """Return the exact p-value of the largest pointwise deviation of the distribution function.

    The statistic is the smallest two-sided binomial tail probability of the counts #{rank <= r};
    its law under uniform ranks is that of :func:`ecdf_band`.

    Args:
        ranks: [replicate] whole numbers from 0 to ``draws``.
        draws: Number of draws that each rank was taken among.

    Raises:
        DataError: Ranks outside of 0, ..., draws.

    Example:
        >>> round(ecdf_p_value(np.arange(100), 99), 3)
        1.0
        >>> ecdf_p_value(np.arange(100) // 2, 99) < 1e-6
        True
    """
    found = _checked(ranks, draws)
    tails = _tails(len(found), draws)
    rank, _ = _points(draws)
    counts = np.searchsorted(np.sort(found), rank, side="right")
    smallest = float(tails[np.arange(len(rank)), counts].min())
    return min(1.0, max(0.0, 1.0 - _probability_within(len(found), draws, smallest)))


# ------------------------------------------------------------------------------------ exact law


def _points(draws: int) -> tuple[Counts, Array]:
    """Return the ranks at which distribution functions are compared, and their probabilities."""
    count = min(draws, _MOST_POINTS)
    rank = np.unique(np.linspace(0, draws - 1, count).round().astype(np.int64))
    return rank, (rank + 1) / (draws + 1)


@functools.lru_cache(maxsize=16)
def _tails(replicates: int, draws: int) -> Array:
    """Return two-sided tail probabilities [point, count] of the counts at each point."""
    from scipy.stats import binom

    counts = np.arange(replicates + 1)
    _, uniform = _points(draws)
    below = binom.cdf(counts, replicates, uniform[:, None])
    above = binom.sf(counts - 1, replicates, uniform[:, None])
    return np.minimum(1.0, 2.0 * np.minimum(below, above))


def _intervals(tails: Array, pointwise: float) -> tuple[Counts, Counts]:
    """Return the first and last count [point] whose tail probability exceeds ``pointwise``."""
    inside = tails > pointwise
    first = inside.argmax(1)
    last = tails.shape[1] - 1 - inside[:, ::-1].argmax(1)
    return first, last


def _probability_within(replicates: int, draws: int, pointwise: float) -> float:
    """Return P(every count has a tail probability above ``pointwise``) under uniform ranks."""
    from scipy.stats import poisson

    tails = _tails(replicates, draws)
    if not bool((tails > pointwise).any(1).all()):
        return 0.0
    first, last = _intervals(tails, pointwise)
    _, uniform = _points(draws)
    rates = replicates * np.diff(np.concatenate([[0.0], uniform, [1.0]]))
    # weights[c - begin] is proportional to P(count = c, all counts so far inside).
    weights, begin = np.ones(1), 0
    for rate, low, high in zip(rates, [*first, replicates], [*last, replicates], strict=True):
        increments = poisson.pmf(np.arange(max(int(high) - begin, 0) + 1), rate)
        grown = np.convolve(weights, increments)
        counts = np.arange(int(low), int(high) + 1) - begin
        weights = np.where(counts >= 0, grown[np.clip(counts, 0, len(grown) - 1)], 0.0)
        begin = int(low)
    return float(weights.sum() / poisson.pmf(replicates, replicates))


# --------------------------------------------------------------------------------------- checks


def _check_counts(replicates: int, draws: int) -> None:
    if replicates < 1 or draws < 1:
        raise DataError(
            f"expected at least one replicate and one draw, got {replicates} and {draws}"
        )


def _checked(ranks: ArrayLike, draws: int) -> Counts:
    found = np.asarray(ranks)
    if found.ndim != 1 or not np.array_equal(found, np.round(found)):
        raise DataError(
            f"expected ranks [replicate] as whole numbers, got shape {found.shape} of {found.dtype}"
        )
    _check_counts(len(found), draws)
    if found.min() < 0 or found.max() > draws:
        raise DataError(
            f"expected ranks from 0 to draws={draws}, got {found.min()} to {found.max()}"
        )
    return found.astype(np.int64)

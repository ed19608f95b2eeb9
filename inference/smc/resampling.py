"""Resampling: turn weights into ancestors whose expected numbers are proportional to them.

Every scheme is unbiased: particle i receives n w_i offspring on average. They differ in variance:
systematic and stratified give floor or ceil of n w_i (up to one more for stratified), residual at
least floor(n w_i), multinomial is plain sampling with replacement (Douc, Cappe & Moulines 2005).

All of them work on groups at once: weights [*group, particle], one random stream a group.
Ancestors come out sorted, so that taking them is a sequential read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from probkit.errors import DataError

__all__ = [
    "RESAMPLERS",
    "Resampler",
    "Streams",
    "multinomial",
    "residual",
    "resolve",
    "stratified",
    "systematic",
]

Streams = torch.Generator | Sequence[torch.Generator]
Resampler = Callable[[Tensor, int, Streams], Tensor]


def systematic(weights: Tensor, n: int, rng: Streams) -> Tensor:
    """One uniform u places the comb (k + u) / n, k < n, on the cumulative weights.

    Args:
        weights: [*group, particle], non-negative, not all zero in any group.
        n: Number of offspring.
        rng: A stream, or one for each group.

    Returns:
        Ancestors [*group, n], sorted. Particle i appears floor(n w_i) or ceil(n w_i) times.

    Example:
        >>> w = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
        >>> systematic(w, 4, torch.Generator().manual_seed(0))
        tensor([0, 0, 2, 2])
    """
    cumulative = _cumulative(weights)
    edges = (cumulative * n - _uniforms(rng, 1, weights)).ceil_().clamp_(0, n)
    return _ancestors(_close(edges, cumulative, n), n)


def stratified(weights: Tensor, n: int, rng: Streams) -> Tensor:
    """One uniform in each of n strata: positions (k + u_k) / n on the cumulative weights.

    Arguments and result as for :func:`systematic`.

    Example:
        >>> w = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
        >>> stratified(w, 2, torch.Generator().manual_seed(0))
        tensor([0, 2])
    """
    cumulative = _cumulative(weights)
    place = cumulative * n
    stratum = place.floor().clamp_(0, n - 1)
    inside = _uniforms(rng, n, weights).gather(-1, stratum.long()) < place - stratum
    return _ancestors(_close(stratum + inside, cumulative, n), n)


def multinomial(weights: Tensor, n: int, rng: Streams) -> Tensor:
    """Independent draws with replacement.

    The n uniforms are made in sorted order, as normalised sums of exponentials, in O(n).
    Arguments and result as for :func:`systematic`.

    Example:
        >>> w = torch.tensor([0.0, 1.0], dtype=torch.float64)
        >>> multinomial(w, 3, torch.Generator().manual_seed(0))
        tensor([1, 1, 1])
    """
    sums = _exponential_sums(rng, n, weights)
    ordered = (sums[..., :n] / sums[..., n:]).clamp_(max=_BELOW_ONE)
    return torch.searchsorted(_cumulative(weights), ordered, right=True)


def residual(weights: Tensor, n: int, rng: Streams) -> Tensor:
    """Give floor(n w_i) offspring, then draw the rest from what is left of the weights.

    Arguments and result as for :func:`systematic`.

    Example:
        >>> w = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
        >>> residual(w, 4, torch.Generator().manual_seed(0))
        tensor([0, 0, 1, 2])
    """
    expected = weights / weights.sum(-1, keepdim=True) * n
    sure = (expected + 1e-12 * n).floor().clamp_max(n)  # n w_i = 2 may arrive as 1.9999999999
    left = (expected - sure).clamp_min_(0.0)
    missing = n - sure.sum(-1, keepdim=True).long()
    # The first m of the sums, divided by the next one, are m sorted uniforms.
    sums = _exponential_sums(rng, n, weights)
    ordered = (sums / sums.gather(-1, missing)).clamp_(max=_BELOW_ONE)
    unused = torch.arange(n + 1, device=weights.device) >= missing
    ordered = ordered.masked_fill_(unused, 2.0)
    # No mass is left where every expectation is whole; nothing is missing there either.
    mass = left.sum(-1, keepdim=True)
    cumulative = _cumulative(torch.where(mass > 0, left, torch.ones_like(left)))
    drawn = torch.searchsorted(ordered, cumulative)
    edges = sure.cumsum(-1).long() + torch.minimum(drawn, missing)
    return _ancestors(edges, n)


RESAMPLERS: Mapping[str, Resampler] = {
    "multinomial": multinomial,
    "residual": residual,
    "stratified": stratified,
    "systematic": systematic,
}
"""Schemes by name."""

_BELOW_ONE = 1.0 - 2.0**-53


def resolve(scheme: str | Resampler) -> Resampler:
    """Return the scheme called ``scheme``; a function passes.

    Raises:
        DataError: No scheme has that name.
    """
    if callable(scheme):
        return scheme
    if scheme not in RESAMPLERS:
        raise DataError(
            f"resampler: expected one of {', '.join(RESAMPLERS)} or a function "
            f"(weights, n, rng) -> ancestors, got {scheme!r}"
        )
    return RESAMPLERS[scheme]


def _uniforms(rng: Streams, n: int, weights: Tensor) -> Tensor:
    """Uniforms [*group, n], each group from its own stream."""
    if isinstance(rng, torch.Generator):
        drawn = torch.rand(n, generator=rng, dtype=weights.dtype, device=rng.device)
        return drawn.to(weights.device)
    rows = [_uniforms(stream, n, weights) for stream in rng]
    return torch.stack(rows).reshape(*weights.shape[:-1], n)


def _exponential_sums(rng: Streams, n: int, weights: Tensor) -> Tensor:
    """Cumulative sums [*group, n + 1] of unit exponentials (a Poisson process)."""
    return _uniforms(rng, n + 1, weights).neg_().log1p_().neg_().cumsum(-1)


def _cumulative(weights: Tensor) -> Tensor:
    """Cumulative weights that end in exactly one, also where trailing weights are zero."""
    cumulative = weights.cumsum(-1)
    return cumulative / cumulative[..., -1:]


def _close(edges: Tensor, cumulative: Tensor, n: int) -> Tensor:
    """Make the last particle with weight take all that rounding left over."""
    return torch.where(cumulative >= 1.0, n, edges).long()


def _ancestors(edges: Tensor, n: int) -> Tensor:
    """Expand cumulative offspring numbers [*group, particle] to ancestors [*group, n].

    Offspring k descends from the particle i with edges[i - 1] <= k < edges[i], so i is the number
    of edges that are at most k.
    """
    if edges.ndim == 1:
        return torch.bincount(edges[:-1], minlength=n + 1)[:n].cumsum(0)
    inner = edges[..., :-1].reshape(-1, edges.shape[-1] - 1)
    groups = len(inner)
    if groups > 1:
        inner = inner + (n + 1) * torch.arange(groups, device=edges.device).unsqueeze(-1)
    passed = torch.bincount(inner.flatten(), minlength=groups * (n + 1))
    return passed.reshape(*edges.shape[:-1], n + 1)[..., :n].cumsum(-1)

"""What a fit says of item vectors, given their groups.

The prior of an item is normal given its group, v ~ N(mu, kappa^2), and what the clicks say of it
is stood for by one normal factor N(t; v, r^2) along each coordinate. So

    q(v | mu, kappa) = N(mu + kappa q, kappa^2 a),
    w = kappa^2 / r^2,  a = 1 / (1 + w),  b = 1 - a,  q = b (t - mu) / kappa.

An item of which nothing is known (r large) has exactly its prior given the group: it moves with
every draw of the group, and its divergence from the prior is zero, so that items that nobody saw
do not make their group look better known than it is. An item with many clicks (r small) stays
where they put it. With independent normals for items and groups neither would hold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from probkit.models.slates.noise import row_noise

__all__ = [
    "SMALLEST_SPREAD",
    "UNKNOWN",
    "GroupMoments",
    "conditional_moments",
    "draw_items",
    "marginal_moments",
]

SMALLEST_SPREAD = 1e-3
"""Least standard deviation of items within a group."""

UNKNOWN = 8.0
"""log r of an item of which nothing is known."""

_BLOCK = 1 << 17  # entries that are worked on at a time, so that they stay in cache
_NODES = 10  # of quadratures over log kappa


class GroupMoments(NamedTuple):
    """Prior means and standard deviations of the items of each group, and who belongs where.

    Attributes:
        mean: mu [*draw, group, dim].
        spread: kappa [*draw, group, dim].
        group: Group of each row [row].
    """

    mean: Tensor
    spread: Tensor
    group: Tensor


def conditional_moments(
    loc: Tensor, log_scale: Tensor, mean: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of q(v | mu, kappa); all arguments broadcast.

    Args:
        loc: t.
        log_scale: log r.
        mean: mu.
        spread: kappa.

    Example:
        >>> loc, unknown, mu, kappa = torch.tensor([5.0, 8.0, 1.0, 0.5])
        >>> [round(float(x), 3) for x in conditional_moments(loc, unknown, mu, kappa)]
        [1.0, 0.5]
        >>> [round(float(x), 3) for x in conditional_moments(loc, kappa.log(), mu, kappa)]
        [3.0, 0.354]
    """
    ratio = spread.square() * (-2 * log_scale).exp()
    kept = 1 / (1 + ratio)
    return mean + ratio * kept * (loc - mean), spread * kept.sqrt()


def draw_items(
    loc: Tensor,
    log_scale: Tensor,
    groups: GroupMoments,
    weight: Tensor | None,
    seed: int,
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return drawn vectors [row, dim], and the weighted sum of KL(q(v | mu, kappa) || p).

    Values and gradients in one pass over the rows.

    Args:
        loc: t [row, dim].
        log_scale: log r [row, dim].
        groups: mu and kappa [group, dim], and the group of each row.
        weight: Weight of each row's divergence [row]; None for 1.
        seed: Seed of the noise.
        rows: Number of each row [row], what its noise belongs to.
    """
    found: tuple[Tensor, Tensor] = _Drawn.apply(loc, log_scale, *groups, weight, seed, rows)
    return found


class _Drawn(torch.autograd.Function):
    """Draw, divergence and their gradients, block of rows by block."""

    @staticmethod
    def forward(
        ctx: Any,
        loc: Tensor,
        log_scale: Tensor,
        mean: Tensor,
        spread: Tensor,
        group: Tensor,
        weight: Tensor | None,
        seed: int,
        rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        vectors, noise = torch.empty_like(loc), torch.empty_like(loc)
        kept, pull = torch.empty_like(loc), torch.empty_like(loc)
        total = loc.new_zeros(())
        for part in _blocks(loc):
            mu, kappa = mean[group[part]], spread[group[part]]
            ratio = log_scale[part].mul(-2).exp_().mul_(kappa).mul_(kappa)
            a = torch.reciprocal(ratio + 1, out=kept[part])
            b = ratio * a
            q = torch.sub(loc[part], mu, out=pull[part]).mul_(b).div_(kappa)
            e = noise[part].copy_(row_noise(seed, rows[part], loc.shape[1], dtype=loc.dtype))
            torch.sqrt(a, out=vectors[part]).mul_(e).add_(q).mul_(kappa).add_(mu)
            each = ratio.log1p_().sub_(b).addcmul_(q, q).sum(1)
            total += 0.5 * (each.sum() if weight is None else each @ weight[part])
        ctx.save_for_backward(kept, pull, noise, spread, group, weight)
        return vectors, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_vectors: Tensor, to_total: Tensor) -> tuple[Tensor | None, ...]:
        kept, pull, noise, spread, group, weight = ctx.saved_tensors
        to_loc, to_scale = torch.empty_like(kept), torch.empty_like(kept)
        wants_groups = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        to_mean, to_spread = torch.zeros_like(spread), torch.zeros_like(spread)
        for part in _blocks(kept):
            mine, kappa = group[part], spread[group[part]]
            a, q, e, slope = kept[part], pull[part], noise[part], to_vectors[part]
            c = to_total if weight is None else to_total * weight[part, None]
            b = 1 - a
            root = a.sqrt().mul_(e)  # sqrt(a) e
            aq, cq = a * q, c * q
            cqk = cq / kappa
            torch.add(slope, cqk, out=to_loc[part]).mul_(b)
            fall = torch.addcmul(-2 * aq, root, b).mul_(kappa).mul_(slope)
            square = (b * b).mul_(c)
            torch.sub(fall, square, out=to_scale[part]).addcmul_(aq, cq, value=-2)
            if wants_groups:
                to_mean.index_add_(0, mine, slope - to_loc[part])
                rise = torch.addcmul(2 * aq, root, a).mul_(slope)
                rise.addcdiv_(square, kappa)
                rise.addcmul_(2 * aq - q, cqk)
                to_spread.index_add_(0, mine, rise)
        return to_loc, to_scale, to_mean, to_spread, None, None, None, None


def _blocks(table: Tensor) -> list[slice]:
    size = max(_BLOCK // max(table.shape[1], 1), 1) if table.device.type == "cpu" else len(table)
    return [slice(first, first + size) for first in range(0, len(table), max(size, 1))]


def marginal_moments(
    loc: Tensor,
    log_scale: Tensor,
    mean: tuple[Tensor, Tensor],
    log_spread: tuple[Tensor, Tensor],
    group: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations [row, dim] of q(v), the groups integrated out.

    Exact but for the quadrature over log kappa (Gauss and Hermite's, ten nodes).

    Args:
        loc: t [row, dim].
        log_scale: log r [row, dim].
        mean: Mean and standard deviation of mu [group, dim].
        log_spread: Those of log kappa [group, dim].
        group: Group of each row [row].
    """
    nodes, weights = _hermite()
    first, second = torch.zeros_like(loc), torch.zeros_like(loc)
    centre, width = mean[0][group], mean[1][group]
    middle, reach = log_spread[0][group], log_spread[1][group]
    for node, share in zip(nodes, weights, strict=True):
        kappa = (middle + node * reach).exp().clamp_min(SMALLEST_SPREAD)
        at, sd = conditional_moments(loc, log_scale, centre, kappa)
        kept = (sd / kappa).square()  # Given kappa, v moves with mu by this share.
        at = at - centre  # Against cancellation in the variance.
        first += share * at
        second += share * (at.square() + sd.square() + (kept * width).square())
    return centre + first, (second - first.square()).clamp_min(0).sqrt()


def _hermite() -> tuple[list[float], list[float]]:
    """Nodes and weights for the standard normal law."""
    from numpy.polynomial.hermite_e import hermegauss

    nodes, weights = hermegauss(_NODES)
    return nodes.tolist(), (weights / weights.sum()).tolist()

"""The fitted surface as a differentiable random function: joint moments of f at any points.

Between two neighbouring grid points a trajectory is a Markov bridge: given the states z_l and z_r
at both ends, z(x) = W_l z_l + W_r z_r + e(x), with e independent of all else. The states at the
ends have a joint law that does not depend on x, so that means and covariances at x are closed forms
in the distances to the ends, which autograd differentiates. Outside of the grid one end is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from probkit.errors import CapabilityError
from probkit.inference.message_passing import NaturalSites, smooth_sites, smoothed_covariances
from probkit.kernels.state_space import StateSpace
from probkit.models.funbat.noise import GaussianNoise, Noise
from probkit.models.funbat.pairs import unpack
from probkit.models.funbat.smoothing import make_chain
from probkit.models.funbat.sweeps import Layout
from probkit.numerics import check_allocation, safe_cholesky
from probkit.tree import Tree

__all__ = ["joint_law", "joint_moments"]

_NEAREST = 1e-12  # distances below count as this: the derivative of the noise at zero is 0 log 0


class _Bridges(NamedTuple):
    """Where points lie between grid points, as numbers of grid points.

    Attributes:
        left: The grid point before each point [point]; the first one for points before it.
        right: The one after; the last one for points after it.
        side: -1 before the grid, 1 after it, 0 inside [point].
    """

    left: Tensor
    right: Tensor
    side: Tensor


def joint_moments(layout: Layout, state: Tree, points: Tensor) -> tuple[Tensor, Tensor]:
    """Means and covariances of f, differentiable in where.

    Args:
        layout: What the fit knows of the data.
        state: The fit, copies side by side.
        points: Scaled coordinates [*batch, q, mode].

    Returns:
        Means [copy, *batch, q] and covariances [copy, *batch, q, q]: exact under q, where f is not
        normal.
    """
    batch, (q, modes) = points.shape[:-2], points.shape[-2:]
    flat = points.reshape(-1, q, modes)
    copies = state["modes"][0]["mean"].shape[0]
    states = [mode["eta"].shape[-1] * space.size for mode, space in _pairs(layout, state)]
    widest = 4 * max(states) ** 2  # covariances of the states at both ends of both points
    check_allocation(
        8 * copies * len(flat) * q**2 * widest, f"the joint law of {q} points, {len(flat)} times"
    )
    means, seconds = [], []
    for k, mode in enumerate(state["modes"]):
        mean, second = _factor_moments(layout, mode, k, flat[..., k])
        means.append(mean)
        seconds.append(second)
    mean, second = _multilinear(means, seconds, state["core"], layout.ranks)
    cov = second - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    cov = (cov + cov.mT) / 2
    return mean.reshape(copies, *batch, q), cov.reshape(copies, *batch, q, q)


def joint_law(
    noise: Noise, noise_state: Tree, mean: Tensor, cov: Tensor, *, new: bool
) -> MultivariateNormal:
    """The normal law [copy, *batch], joint over q, with these moments of f.

    Args:
        noise: The likelihood.
        noise_state: Its state.
        mean: [copy, *batch, q].
        cov: [copy, *batch, q, q].
        new: Predict new observations, not f.

    Raises:
        CapabilityError: New observations are not normal.
    """
    if new:
        if not isinstance(noise, GaussianNoise):
            raise CapabilityError(
                f"joint predictions of a new y need GaussianNoise, got {type(noise).__name__}; "
                "take site='f', or joint=False"
            )
        variance = noise_state["rate"] / noise_state["shape"]
        variance = variance.reshape(-1, *[1] * (mean.ndim - 1)).expand(mean.shape)
        cov = cov + torch.diag_embed(variance)
    # Points may coincide: a billionth of the mean variance makes the matrix definite.
    trace = cov.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    root, _ = safe_cholesky(cov + 1e-9 * trace * torch.eye(cov.shape[-1]).to(cov))
    return MultivariateNormal(mean, scale_tril=root, validate_args=False)


def _pairs(layout: Layout, state: Tree) -> Iterator[tuple[dict[str, Any], StateSpace]]:
    return zip(state["modes"], layout.spaces, strict=True)


def _multilinear(
    means: Sequence[Tensor],
    seconds: Sequence[Tensor],
    core: Any,
    ranks: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """E[f_i] and E[f_i f_j] from factors [copy, b, q, r] and [copy, b, q, q, r, r]."""
    if core is None:
        mean, second = means[0], seconds[0]
        for m, s in zip(means[1:], seconds[1:], strict=True):
            mean, second = mean * m, second * s
        return mean.sum(-1), second.sum((-2, -1))
    copies = len(core["mean"])
    value = core["mean"].reshape(copies, 1, 1, *ranks)
    for m in means:
        value = (value * m.reshape(*m.shape, *[1] * (value.ndim - m.ndim))).sum(3)
    w = core["mean"]
    whole = core["cov"] + w.unsqueeze(-1) * w.unsqueeze(-2)
    # one pair of dims (r_k, r_k) after the other is contracted with that mode's second moments
    K = len(ranks)
    pairs = whole.reshape(copies, *ranks, *ranks)
    order = [0] + [1 + side * K + k for k in range(K) for side in (0, 1)]
    second = pairs.permute(order)[:, None, None, None]
    for s in seconds:
        second = (second * s.reshape(*s.shape, *[1] * (second.ndim - s.ndim))).sum((4, 5))
    return value, second


def _factor_moments(
    layout: Layout, mode: dict[str, Any], k: int, x: Tensor
) -> tuple[Tensor, Tensor]:
    """E[u(x_i)] [copy, b, q, r] and E[u(x_i) u(x_j)'] [copy, b, q, q, r, r] of one mode."""
    space, points, free = layout.spaces[k], layout.grids[k].points, layout.free[k]
    hyper = mode["hyper"]
    copies, r = hyper.shape[:2]
    b, q = x.shape
    where = _place(points, x.detach().flatten())
    left, right = _weights(space, points, x.flatten(), where, hyper)  # [copy, r, P, s]
    s = left.shape[-1]

    chain = make_chain(space, layout.grids[k], hyper)
    sites = NaturalSites(mode["eta"], unpack(mode["precision"], r))
    nodes, number = torch.cat((where.left, where.right)).unique(return_inverse=True)
    state_mean = smooth_sites(chain, sites, cross=False).mean[:, nodes].reshape(copies, -1, r, s)
    state_cov = smoothed_covariances(chain, sites, nodes)  # [copy, m, S, m, S]

    ends = number.reshape(2, b, q)
    weights = torch.stack((left, right), 0).reshape(2, copies, r, b, q, s)
    weights = weights.permute(1, 3, 4, 0, 2, 5)  # [copy, b, q, end, r, s]
    at_ends = state_mean[:, ends].permute(0, 2, 3, 1, 4, 5)  # likewise
    mean = (weights * at_ends).sum((3, 5))
    ends = ends.permute(1, 2, 0)  # [b, q, end]
    m = len(nodes)
    blocks = state_cov.reshape(copies, m, r, s, m, r, s).permute(0, 1, 4, 2, 3, 5, 6)
    first = ends[:, :, None, :, None].expand(b, q, q, 2, 2)
    second = ends[:, None, :, None, :].expand(b, q, q, 2, 2)
    pairs = blocks[:, first, second]  # [copy, b, q, q, end, end, r, s, r, s]
    cov = torch.einsum("cbierx,cbijefrxty,cbjfty->cbijrt", weights, pairs, weights)
    own = _bridge_covariance(space, points, x, where, hyper)  # [copy, r, b, q, q]
    cov = cov + torch.diag_embed(own.movedim(1, -1))
    return _with_constants(mean, cov, free)


def _with_constants(mean: Tensor, cov: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """First and second moments of all components, those that are constant included."""
    if not bool(free.all()):
        place = (free.long().cumsum(0) - 1).clamp_min(0)
        both = free.unsqueeze(-1) & free
        mean = torch.where(free, mean[..., place], torch.ones_like(mean[..., :1]))
        cov = torch.where(both, cov[..., place, :][..., place], torch.zeros_like(cov[..., :1, :1]))
    return mean, cov + mean[:, :, :, None, :, None] * mean[:, :, None, :, None, :]


# --------------------------------------------------------------------------- bridges


def _place(points: Tensor, x: Tensor) -> _Bridges:
    """Find the grid points around each point."""
    last = len(points) - 1
    after = torch.searchsorted(points, x.contiguous(), right=True)
    side = (after > last).long() - (after == 0).long()
    left, right = (after - 1).clamp(0, last), after.clamp(0, last)
    # outside, both ends are the same grid point
    return _Bridges(torch.where(side < 0, right, left), torch.where(side > 0, left, right), side)


def _dynamics(space: StateSpace, gaps: Tensor, hyper: Tensor) -> tuple[Tensor, Tensor]:
    """A and Q [copy, r, *gaps, s, s]."""
    A, Q = space.dynamics(gaps.flatten(), hyper)
    shape = (*A.shape[:2], *gaps.shape, *A.shape[-2:])
    return A.reshape(shape), Q.reshape(shape)


def _regular(V: Tensor, P: Tensor) -> Tensor:
    """V plus a trace of P, for states that no noise drives."""
    return V + 1e-13 * P


def _weights(
    space: StateSpace, points: Tensor, x: Tensor, where: _Bridges, hyper: Tensor
) -> tuple[Tensor, Tensor]:
    """H W_l and H W_r [copy, r, point, s]; outside of the grid only the left one counts."""
    H = space.observation().to(x)
    P = space.stationary(hyper).unsqueeze(2)
    left, right = points[where.left], points[where.right]
    A1, Q1 = _dynamics(space, (x - left).clamp_min(_NEAREST), hyper)
    A2, Q2 = _dynamics(space, (right - x).clamp_min(_NEAREST), hyper)
    V = _regular(A2 @ Q1 @ A2.mT + Q2, P)
    G = torch.linalg.solve(V, A2 @ Q1).mT
    inside = (where.side == 0)[:, None, None]
    after = (where.side > 0)[:, None, None]
    backward = torch.linalg.solve(P, A2 @ P).mT  # P A' P^-1
    W_left = torch.where(inside, A1 - G @ A2 @ A1, torch.where(after, A1, backward))
    W_right = torch.where(inside, G, torch.zeros_like(G))
    return H @ W_left, H @ W_right


def _bridge_covariance(
    space: StateSpace, points: Tensor, x: Tensor, where: _Bridges, hyper: Tensor
) -> Tensor:
    """Cov[H e(x_i), H e(x_j)] [copy, r, b, q, q]; zero between different intervals."""
    b, q = x.shape
    H = space.observation().to(x)
    P = space.stationary(hyper)[:, :, None, None, None]
    left, right = (points[end].reshape(b, q) for end in (where.left, where.right))
    side = where.side.reshape(b, q)
    low = torch.minimum(x[:, :, None], x[:, None, :])
    high = torch.maximum(x[:, :, None], x[:, None, :])
    start, end = left[:, :, None].expand_as(low), right[:, :, None].expand_as(low)
    Q1 = _dynamics(space, (low - start).clamp_min(_NEAREST), hyper)[1]
    between = _dynamics(space, high - low, hyper)[0]
    forward = Q1 @ between.mT  # Cov[z(low), z(high) | z_l]
    rest_low, rest_low_Q = _dynamics(space, (end - low).clamp_min(_NEAREST), hyper)
    rest_high = _dynamics(space, (end - high).clamp_min(_NEAREST), hyper)[0]
    V = _regular(rest_low @ Q1 @ rest_low.mT + rest_low_Q, P)
    Q_high = _dynamics(space, (high - start).clamp_min(_NEAREST), hyper)[1]
    inside = forward - (rest_low @ Q1).mT @ torch.linalg.solve(V, rest_high @ Q_high)
    # before the grid: given z_r alone, in reversed time
    before = P @ between.mT - P @ rest_low.mT @ torch.linalg.solve(P, rest_high @ P)
    kind = side[:, :, None, None, None].expand(b, q, q, 1, 1)
    value = torch.where(kind == 0, inside, torch.where(kind > 0, forward, before))
    together = (where.left.reshape(b, q, 1) == where.left.reshape(b, 1, q)) & (
        side[:, :, None] == side[:, None, :]
    )
    return torch.where(together, torch.einsum("x,...xy,y->...", H, value, H), 0.0)

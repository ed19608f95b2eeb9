"""Length scales and variances: the best ones given what is known of the trajectories.

With the law q of a mode's states fixed, the evidence bound depends on the hyper-parameters through
E_q[log p(z)] alone, which needs z_1 z_1' and, for each distinct gap between points, the sums of
z_t z_t', z_(t+1) z_(t+1)' and z_(t+1) z_t' over the steps of that gap. So a step costs nothing that
grows with the grid where the grid is regular. Maximising it raises the bound.

For one part of one component, s states, T points and unit-variance P, Q_g, A_g,

    h(l) = tr(P^-1 M_1) + sum_g tr(Q_g^-1 W_g),
    W_g = sum_(t in g) E[(z_(t+1) - A_g z_t) (z_(t+1) - A_g z_t)'],
    E_q[log p(z)] = -(log|P| + sum_g n_g log|Q_g| + s T log v + h(l) / v) / 2 + const.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.files import storable
from probkit.kernels.state_space import StateSpace, StateSpacePart
from probkit.models.funbat.grids import Grid
from probkit.models.funbat.smoothing import Smoothed

__all__ = ["HyperPrior", "Statistics", "improve_hyper", "statistics"]


@storable
@dataclass(frozen=True)
class HyperPrior:
    """Weak log-normal priors of length scales and variances, centred at the kernel's own values.

    Args:
        lengthscale_sd: Standard deviation of log l.
        variance_sd: Standard deviation of log v. Wide enough to let components die out.
    """

    lengthscale_sd: float = 1.5
    variance_sd: float = 3.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | float) or not value > 0:
                raise DataError(f"HyperPrior: expected {name} > 0, got {value!r}")

    def log_density(self, log_hyper: Tensor, centre: Tensor) -> Tensor:
        """Log density [*] of log hyper-parameters [*, part, 2] around ``centre`` [part, 2]."""
        sd = log_hyper.new_tensor([self.lengthscale_sd, self.variance_sd])
        z = (log_hyper - centre) / sd
        return -(z.square() / 2 + sd.log() + math.log(2 * math.pi) / 2).sum((-2, -1))


class Statistics(NamedTuple):
    """Second moments of the states of a mode's components, summed over steps of equal gap.

    Attributes:
        start: E[z_1 z_1'] [copy, r, s, s].
        before: Sums of E[z_t z_t'] [copy, r, gap, s, s].
        after: Sums of E[z_(t+1) z_(t+1)'].
        cross: Sums of E[z_(t+1) z_t'].
    """

    start: Tensor
    before: Tensor
    after: Tensor
    cross: Tensor


def statistics(result: Smoothed, grid: Grid, components: int) -> Statistics:
    """Collect the moments of each component from a smoothed chain."""
    second = _blocks(result.state_cov, result.state_mean, result.state_mean, components)
    cross = _blocks(
        result.cross_cov, result.state_mean[:, 1:], result.state_mean[:, :-1], components
    )
    return Statistics(
        second[:, :, 0],
        _by_gap(second[:, :, :-1], grid),
        _by_gap(second[:, :, 1:], grid),
        _by_gap(cross, grid),
    )


def improve_hyper(
    space: StateSpace,
    grid: Grid,
    log_hyper: Tensor,
    centre: Tensor,
    prior: HyperPrior,
    moments: Statistics,
) -> Tensor:
    """Move log hyper-parameters [copy, r, part, 2] to where the bound is higher, part by part."""
    counts = torch.bincount(grid.gap_index, minlength=len(grid.gaps)).to(log_hyper)
    new = log_hyper.clone()
    for p, (part, own) in enumerate(zip(space.parts, space.slices, strict=True)):
        block = Statistics(*(m[..., own, own] for m in moments))
        new[:, :, p] = _improve_part(
            part, grid.gaps, counts, log_hyper[:, :, p], centre[p], prior, block
        )
    return new


def _improve_part(
    part: StateSpacePart,
    gaps: Tensor,
    counts: Tensor,
    log_hyper: Tensor,
    centre: Tensor,
    prior: HyperPrior,
    moments: Statistics,
) -> Tensor:
    """A search over log l around the present value, with the best log v for each candidate."""
    steps = part.size * (1 + (counts.sum() if part.is_noisy else 0))

    def evaluate(log_l: Tensor) -> tuple[Tensor, Tensor]:
        """Log v and the objective [copy, r, candidate] at log l [copy, r, candidate]."""
        log_det, h = _fit(part, gaps, counts, log_l, moments)
        log_v = _best_variance(h, steps, log_hyper[..., 1:], centre[1], prior.variance_sd)
        fit = -(log_det + steps * log_v + h * (-log_v).exp()) / 2
        penalty = ((log_l - centre[0]) / prior.lengthscale_sd).square()
        penalty = penalty + ((log_v - centre[1]) / prior.variance_sd).square()
        return log_v, fit - penalty / 2

    best = log_hyper[..., :1]
    width = 0.6
    for _ in range(3):
        offsets = torch.linspace(-width, width, 5, dtype=best.dtype, device=best.device)
        candidates = best + offsets
        _, values = evaluate(candidates)
        values = torch.where(torch.isfinite(values), values, -math.inf)
        best = candidates.gather(-1, values.argmax(-1, keepdim=True))
        width = width / 4
    log_v, _ = evaluate(best)
    return torch.cat((best, log_v), -1)


def _fit(
    part: StateSpacePart, gaps: Tensor, counts: Tensor, log_l: Tensor, moments: Statistics
) -> tuple[Tensor, Tensor]:
    """log|P| + sum n log|Q|, and h, both [copy, r, candidate]."""
    P = part.stationary(log_l)
    L = torch.linalg.cholesky(P)
    log_det = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    h = torch.cholesky_solve(moments.start.unsqueeze(2), L).diagonal(dim1=-2, dim2=-1).sum(-1)
    if not part.is_noisy or len(gaps) == 0:
        return log_det, h
    A, Q = part.dynamics(gaps, log_l)
    before, after, cross = (
        m.unsqueeze(2) for m in (moments.before, moments.after, moments.cross)
    )
    AX = A @ cross.mT
    W = after - AX - AX.mT + A @ before @ A.mT
    L, _ = torch.linalg.cholesky_ex(Q)
    log_det = log_det + 2 * (L.diagonal(dim1=-2, dim2=-1).log().sum(-1) * counts).sum(-1)
    solved = torch.cholesky_solve(W, L).diagonal(dim1=-2, dim2=-1).sum(-1)
    return log_det, h + solved.clamp_min(0).sum(-1)


def _best_variance(h: Tensor, steps: Tensor, log_v: Tensor, centre: Tensor, sd: float) -> Tensor:
    """Maximise -(steps log v + h / v)/2 - ((log v - centre)/sd)^2/2, concave in log v, by Newton."""
    h = h.clamp_min(1e-300)
    # From above the optimum of the likelihood Newton's steps on this function cannot overshoot far.
    log_v = torch.minimum((h / steps).log(), centre + 30 * sd).clamp_min(float(centre) - 30 * sd)
    for _ in range(6):
        ratio = h * (-log_v).exp()
        slope = (ratio - steps) / 2 - (log_v - centre) / sd**2
        log_v = log_v + (slope / (ratio / 2 + 1 / sd**2)).clamp(-1.0, 1.0)
    return log_v


def _blocks(cov: Tensor, left: Tensor, right: Tensor, components: int) -> Tensor:
    """E[x y'] of each component [copy, r, step, s, s] from covariances and means of the stack."""
    copies, steps, states = cov.shape[:3]
    s = states // components
    blocks = cov.reshape(copies, steps, components, s, components, s)
    own = blocks.diagonal(dim1=2, dim2=4).movedim(-1, 1)
    left, right = (
        m.reshape(copies, steps, components, s).transpose(1, 2) for m in (left, right)
    )
    return own + left.unsqueeze(-1) * right.unsqueeze(-2)


def _by_gap(moments: Tensor, grid: Grid) -> Tensor:
    """Sum [copy, r, step, s, s] over the steps of each distinct gap."""
    shape = list(moments.shape)
    shape[2] = len(grid.gaps)
    return moments.new_zeros(shape).index_add_(2, grid.gap_index, moments)

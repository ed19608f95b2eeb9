"""Length scales and variances: which way the evidence bound rises, and steps along it.

With the sites of a mode fixed, the bound depends on its hyper-parameters through the evidence log Z
of the smoothed chain z_(t+1) = A_t z_t + N(0, Q_t), z_1 ~ N(0, P), and

    d log Z = tr(C dP) / 2 + sum_t [tr(B_t' dA_t) + tr(C_t dQ_t) / 2]

with sensitivities B_t, C_t and C that a smoothing pass gives (see :class:`Sensitivity`). Their sums
over the steps of each distinct gap are enough, so a gradient costs nothing that grows with the grid
where the grid is regular.

EM would maximise the expected log prior instead of climbing log Z, and creeps: the states know
their own length scale. Steps are taken in log l and log v - 2 nu log l, which unlike log l and
log v are nearly uncorrelated, with sizes that adapt to whether the sign of a slope lasts
(Riedmiller & Braun 1993).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.files import storable
from probkit.inference.message_passing import KalmanFilter, MarkovPrior
from probkit.kernels.state_space import StateSpace
from probkit.models.funbat.grids import Grid
from probkit.models.funbat.smoothing import Smoothed
from probkit.numerics import safe_cholesky

__all__ = [
    "FIRST_STEP",
    "Climb",
    "HyperPrior",
    "Sensitivity",
    "gradient",
    "propose",
    "sensitivity",
    "settle",
]


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


class Sensitivity(NamedTuple):
    """How log Z changes with the chain of each component, at its present hyper-parameters.

    Attributes:
        start: C = d log Z / dP, times two [copy, r, s, s].
        transition: B, summed over the steps of each gap [copy, r, gap, s, s].
        noise: C_t = d log Z / dQ_t, times two, summed likewise.
    """

    start: Tensor
    transition: Tensor
    noise: Tensor


def sensitivity(
    space: StateSpace, grid: Grid, log_hyper: Tensor, chain: MarkovPrior, result: Smoothed
) -> Sensitivity:
    """Read the sensitivities off a smoothed chain with hyper-parameters [copy, r, part, 2]."""
    components = log_hyper.shape[1]
    if result.filtered is not None:
        return _from_filter(chain, result, result.filtered, grid, components)
    return _from_moments(space, grid, log_hyper, result)


def _from_moments(
    space: StateSpace, grid: Grid, log_hyper: Tensor, result: Smoothed
) -> Sensitivity:
    """By Fisher's identity, from second moments of the states; needs Q_t^-1.

    B = Q^-1 (E[z' z'] - A E[z z']), C = Q^-1 (W - Q) Q^-1, W = E[(z' - A z) (z' - A z)'].
    """
    components = log_hyper.shape[1]
    mean = result.state_mean
    second = _blocks(result.state_cov, mean, mean, components)
    cross = _by_gap(_blocks(result.cross_cov, mean[:, 1:], mean[:, :-1], components), grid)
    before, after = _by_gap(second[:, :, :-1], grid), _by_gap(second[:, :, 1:], grid)
    P = space.stationary(log_hyper)
    start = _around_inverse(P, second[:, :, 0] - P)
    if len(grid.gaps) == 0:
        return Sensitivity(start, cross, cross)
    A, Q = space.dynamics(grid.gaps, log_hyper)
    counts = torch.bincount(grid.gap_index, minlength=len(grid.gaps)).to(Q)
    AX = A @ cross.mT
    W = after - AX - AX.mT + A @ before @ A.mT
    L = torch.linalg.cholesky(Q)
    transition = torch.cholesky_solve(cross - A @ before, L)
    noise = _around_inverse(Q, W - counts[:, None, None] * Q)
    return Sensitivity(start, transition, noise)


def _around_inverse(Q: Tensor, M: Tensor) -> Tensor:
    """Q^-1 M Q^-1 for symmetric M."""
    L = torch.linalg.cholesky(Q)
    return torch.cholesky_solve(torch.cholesky_solve(M, L).mT, L)


def _from_filter(
    chain: MarkovPrior, result: Smoothed, filtered: KalmanFilter, grid: Grid, components: int
) -> Sensitivity:
    """From both passes, without inverting Q_t, which may be tiny or zero.

    With the predicted law N(m, V) of a state and its smoothed law N(m_s, V_s), r = V^-1 (m_s - m)
    and N = V^-1 (V - V_s) V^-1: C_t = r r' - N, and B_t = (r r' - N) A P_f + r m_f' with the
    filtered law N(m_f, P_f) of the state before.
    """
    V = filtered.predicted_cov
    L, _ = safe_cholesky(V)
    r = torch.cholesky_solve((result.state_mean - filtered.predicted_mean).unsqueeze(-1), L)
    change = torch.cholesky_solve(torch.cholesky_solve(result.state_cov - V, L).mT, L)
    C = change + r @ r.mT
    carried = chain.transition @ filtered.filtered_cov[:, :-1]
    B = C[:, 1:] @ carried + r[:, 1:] @ filtered.filtered_mean[:, :-1].unsqueeze(-2)
    zero = torch.zeros_like(result.state_mean)
    own = _blocks(C, zero, zero, components)
    B = _blocks(B, zero[:, 1:], zero[:, 1:], components)
    return Sensitivity(own[:, :, 0], _by_gap(B, grid), _by_gap(own[:, :, 1:], grid))


class Climb(NamedTuple):
    """Where a search stands; both [copy, r, part, 2].

    Attributes:
        step: Sizes of the next steps.
        slope: The last gradient.
    """

    step: Tensor
    slope: Tensor


FIRST_STEP, LARGEST_STEP = 0.2, 0.6
_FLAT = 0.05  # slopes below this are small: a step of one changes the bound by less


def gradient(
    space: StateSpace,
    grid: Grid,
    log_hyper: Tensor,
    centre: Tensor,
    prior: HyperPrior,
    slopes: Sensitivity,
) -> Tensor:
    """Slopes of log Z plus the log prior in log l and log v, at log_hyper [copy, r, part, 2]."""
    with torch.enable_grad():
        free = log_hyper.detach().clone().requires_grad_()
        change = (slopes.start * space.stationary(free)).sum() / 2
        if len(grid.gaps):
            A, Q = space.dynamics(grid.gaps, free)
            change = change + (slopes.transition * A).sum() + (slopes.noise * Q).sum() / 2
        (slope,) = torch.autograd.grad(change, free)
    sd = log_hyper.new_tensor([prior.lengthscale_sd, prior.variance_sd])
    return slope - (log_hyper - centre) / sd.square()


def propose(
    space: StateSpace, log_hyper: Tensor, slope: Tensor, climb: Climb
) -> tuple[Tensor, Climb]:
    """Take a step uphill; see :func:`settle`."""
    power = log_hyper.new_tensor([2 * p.nu if p.kind == "matern" else 0.0 for p in space.parts])
    # Coordinates b = log l and a = log v - power log l.
    in_b = slope[..., 0] + power * slope[..., 1]
    turned = torch.stack((in_b, slope[..., 1]), -1)
    agrees = turned * climb.slope
    step = torch.where(agrees > 0, climb.step * 1.3, climb.step)
    step = torch.where(agrees < 0, climb.step * 0.5, step).clamp(1e-4, LARGEST_STEP)
    move = step * turned / (turned.abs() + _FLAT)
    moved = torch.stack(
        (log_hyper[..., 0] + move[..., 0], log_hyper[..., 1] + move[..., 1] + power * move[..., 0]),
        -1,
    )
    # Beyond these ranges a component is constant, white or absent; nothing is left to learn.
    low = log_hyper.new_tensor([-12.0, -30.0])
    high = log_hyper.new_tensor([8.0, 15.0])
    return torch.minimum(torch.maximum(moved, low), high), Climb(step, turned)


def settle(climb: Climb, accepted: Tensor) -> Climb:
    """Shorten the steps of copies [copy] whose move did not raise the bound."""
    return climb._replace(
        step=torch.where(accepted[:, None, None, None], climb.step, climb.step / 3)
    )


def _blocks(cov: Tensor, left: Tensor, right: Tensor, components: int) -> Tensor:
    """E[x y'] of each component [copy, r, step, s, s] from covariances and means of the stack."""
    copies, steps, states = cov.shape[:3]
    s = states // components
    blocks = cov.reshape(copies, steps, components, s, components, s)
    own = blocks.diagonal(dim1=2, dim2=4).movedim(-1, 1)
    left, right = (m.reshape(copies, steps, components, s).transpose(1, 2) for m in (left, right))
    return own + left.unsqueeze(-1) * right.unsqueeze(-2)


def _by_gap(moments: Tensor, grid: Grid) -> Tensor:
    """Sum [copy, r, step, s, s] over the steps of each distinct gap."""
    by_step = moments.movedim(2, 0)
    total = moments.new_zeros(len(grid.gaps), *by_step.shape[1:])
    return total.index_add_(0, grid.gap_index, by_step).movedim(0, 2)

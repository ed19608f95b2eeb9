"""One sweep of message passing: every mode, then the core, then the noise.

The state of a fit is a tree (see ``start``). For conjugate factors the messages of conditional
expectation propagation are those of structured mean-field coordinate ascent, so that without
damping each update raises the evidence bound

    E log p(y | f) - sum_k KL(q(u^k) | prior) - KL(q(core) | prior) - KL(q(noise) | prior).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.inference.message_passing import NaturalSites, kalman_sample_paths
from probkit.kernels.state_space import StateSpace
from probkit.models.funbat.contraction import (
    Core,
    core_sums,
    function_moments,
    mode_messages,
    table,
)
from probkit.models.funbat.grids import Grid
from probkit.models.funbat.hyper import (
    FIRST_STEP,
    Climb,
    HyperPrior,
    Sensitivity,
    gradient,
    propose,
    sensitivity,
    settle,
)
from probkit.models.funbat.noise import Noise
from probkit.models.funbat.pairs import outer_pairs, pairs_of, unpack
from probkit.models.funbat.smoothing import make_chain, smooth
from probkit.numerics import safe_cholesky
from probkit.rng import seed_of, stream
from probkit.tree import Tree

__all__ = ["Layout", "core_moments", "full_table", "start", "sweep"]

HOLD = 6
"""Sweeps in which the noise stays small, lest a poor start be explained as noise."""

_START_VARIANCE = 0.01


@dataclass(frozen=True)
class Layout:
    """What stays the same during a fit.

    Attributes:
        ranks: r_1, ..., r_K.
        has_core: Tucker, not CP.
        free: Of each mode, which components vary [r_k]; the others are the constant one.
        spaces: Prior of each mode's components.
        grids: Points of each mode, scaled.
        y: Values [entry] on the scale of the fit.
        noise: The likelihood.
        learn: Whether length scales and variances are learned.
        learn_from: Sweep at which learning begins.
        hyper_prior: Their prior.
    """

    ranks: tuple[int, ...]
    has_core: bool
    free: tuple[Tensor, ...]
    spaces: tuple[StateSpace, ...]
    grids: tuple[Grid, ...]
    y: Tensor
    noise: Noise
    learn: bool
    learn_from: int
    hyper_prior: HyperPrior

    @property
    def index(self) -> tuple[Tensor, ...]:
        """Position of each entry on the grid of each mode."""
        return tuple(grid.index for grid in self.grids)


def start(layout: Layout, rngs: Sequence[torch.Generator]) -> Tree:
    """Draw starting points: trajectories from the prior, small covariances, a normal core.

    Constant or uniform starts are near saddle points, where components die out or stay alike.
    """
    copies = len(rngs)
    modes = [_start_mode(layout, k, rngs) for k in range(len(layout.ranks))]
    core = None
    if layout.has_core:
        D = math.prod(layout.ranks)
        draws = [
            torch.randn(D, generator=stream(seed_of(g), "core", device=g.device), device=g.device)
            for g in rngs
        ]
        mean = torch.stack(draws).to(layout.y)
        eye = torch.eye(D, dtype=mean.dtype, device=mean.device).expand(copies, D, D)
        core = {"mean": mean, "cov": _START_VARIANCE * eye, "linear": mean * 0, "precision": eye}
    return {
        "sweep": 0,
        "modes": modes,
        "core": core,
        "noise": layout.noise.start(layout.y, copies),
    }


def _start_mode(layout: Layout, k: int, rngs: Sequence[torch.Generator]) -> dict[str, Any]:
    space, grid, free = layout.spaces[k], layout.grids[k], layout.free[k]
    r, steps, copies = int(free.sum()), len(grid.points), len(rngs)
    like = layout.y
    hyper = space.log_hyper.to(like).expand(copies, r, *space.log_hyper.shape).contiguous()
    chain = make_chain(space, grid, hyper[:1])
    nothing = NaturalSites(like.new_zeros(1, steps, r), like.new_zeros(1, steps, r, r))
    paths = []
    for g in rngs:
        drawn = kalman_sample_paths(
            chain.initial_cov.new_zeros(1, chain.initial_cov.shape[-1]),
            chain.initial_cov,
            chain.transition,
            chain.noise,
            nothing,
            1,
            rng=stream(seed_of(g), "factor", k, device=g.device),
            observation=chain.observation,
        )
        paths.append(drawn[0, 0] @ chain.observation.mT)
    pairs = pairs_of(r)
    diagonal = (pairs.first == pairs.second).to(like)
    return {
        "eta": like.new_zeros(copies, steps, r),
        "precision": like.new_zeros(copies, steps, pairs.count),
        "mean": torch.stack(paths),
        "cov": (_START_VARIANCE * diagonal).expand(copies, steps, -1).contiguous(),
        "hyper": hyper,
        "log_z": like.new_zeros(copies),
        "divergence": like.new_zeros(copies),
        "slopes": None,
        "climb": list(Climb(torch.full_like(hyper, FIRST_STEP), torch.zeros_like(hyper))),
    }


def sweep(
    layout: Layout, state: Tree, *, damping: float, order: Sequence[int] | None = None
) -> tuple[Tree, Tensor]:
    """Update every factor once; return the new state and its evidence bound [copy].

    ``order`` is that of the modes, by default 0, ..., K - 1.
    """
    number = int(state["sweep"]) + 1
    modes = list(state["modes"])
    core, noise = state["core"], state["noise"]
    keep = damping if number > 1 else 0.0
    tables = [full_table(mode, free) for mode, free in zip(modes, layout.free, strict=True)]
    moments = core_moments(core, layout.ranks)
    precision, linear = (t.T.contiguous() for t in layout.noise.quadratic(noise, layout.y))
    for k in range(len(modes)) if order is None else order:
        modes[k] = _update_mode(
            layout, modes[k], k, tables, moments, precision, linear, keep, number
        )
        tables[k] = full_table(modes[k], layout.free[k])
    if core is not None:
        core = _update_core(layout, core, tables, precision, linear, keep)
        moments = core_moments(core, layout.ranks)
    mean, second = function_moments(tables, layout.index, moments, layout.ranks)
    noise, bound = layout.noise.absorb(noise, layout.y, mean, second, hold=number <= HOLD)
    bound = bound - sum(mode["divergence"] for mode in modes)
    if core is not None:
        bound = bound - core["divergence"]
    return {**state, "sweep": number, "modes": modes, "core": core, "noise": noise}, bound


def _update_mode(
    layout: Layout,
    mode: dict[str, Any],
    k: int,
    tables: Sequence[Tensor],
    core: Core | None,
    precision: Tensor,
    linear: Tensor,
    keep: float,
    number: int,
) -> dict[str, Any]:
    """Sites from the other modes; then hyper-parameters and factor given the sites."""
    eta, lam = mode_messages(tables, layout.index, k, core, layout.ranks, precision, linear)
    eta, lam = free_part(eta, lam, layout.free[k])
    if keep:
        eta = torch.lerp(eta, mode["eta"], keep)
        lam = torch.lerp(lam, mode["precision"], keep)
    learning = layout.learn and number >= layout.learn_from
    if learning and mode["slopes"] is not None:
        fit = _learn(layout, mode, k, eta, lam)
    else:
        fit = _fit_mode(layout, k, eta, lam, mode["hyper"], learning)
        fit["climb"] = mode["climb"]
    return {"eta": eta, "precision": lam, **fit}


def _fit_mode(
    layout: Layout, k: int, eta: Tensor, lam: Tensor, hyper: Tensor, learning: bool
) -> dict[str, Any]:
    """The factor of mode k given sites and hyper-parameters, and its part of the bound."""
    space, grid = layout.spaces[k], layout.grids[k]
    chain = make_chain(space, grid, hyper)
    result = smooth(chain, eta, lam, cross=learning)
    second = result.cov + outer_pairs(result.mean)
    weight = pairs_of(eta.shape[-1]).weight.to(eta)
    fit = (eta * result.mean).sum((-2, -1)) - (lam * second @ weight).sum(-1) / 2
    divergence = fit - result.log_z
    if layout.learn:
        centre = space.log_hyper.to(hyper)
        divergence = divergence - layout.hyper_prior.log_density(hyper, centre).sum(-1)
    return {
        "mean": result.mean,
        "cov": result.cov,
        "hyper": hyper,
        "log_z": result.log_z,
        "divergence": divergence,
        "slopes": list(sensitivity(space, grid, hyper, chain, result)) if learning else None,
    }


def _learn(
    layout: Layout, mode: dict[str, Any], k: int, eta: Tensor, lam: Tensor
) -> dict[str, Any]:
    """Try a step of the hyper-parameters; each copy keeps it where log Z + log prior rises.

    With the sites fixed that is the whole change of the bound, so learning never lowers it.
    """
    space, hyper = layout.spaces[k], mode["hyper"]
    centre, prior = space.log_hyper.to(hyper), layout.hyper_prior
    slope = gradient(space, layout.grids[k], hyper, centre, prior, Sensitivity(*mode["slopes"]))
    moved, climb = propose(space, hyper, slope, Climb(*mode["climb"]))
    old = _fit_mode(layout, k, eta, lam, hyper, True)
    new = _fit_mode(layout, k, eta, lam, moved, True)

    def height(fit: dict[str, Any]) -> Tensor:
        return fit["log_z"] + prior.log_density(fit["hyper"], centre).sum(-1)

    accepted = height(new) >= height(old)
    chosen = choose_copies(accepted, new, old)
    return {**chosen, "climb": list(settle(climb, accepted))}


def choose_copies(which: Tensor, first: Tree, second: Tree) -> Tree:
    """Take each copy from the first tree where ``which`` [copy] is True, else from the second."""
    if isinstance(first, Tensor):
        return torch.where(which.reshape(-1, *[1] * (first.ndim - 1)), first, second)
    if isinstance(first, dict):
        return {key: choose_copies(which, first[key], second[key]) for key in first}
    if isinstance(first, list):
        return [choose_copies(which, a, b) for a, b in zip(first, second, strict=True)]
    return first


def free_part(eta: Tensor, lam: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Sites of the components that vary, those that are constant put in at one.

    exp(eta' u - u' Lam u / 2) with u = (u_F, 1) has the linear term eta_F - Lam_FC 1 in u_F.
    """
    if bool(free.all()):
        return eta, lam
    full = unpack(lam, len(free))
    fixed = full[..., free, :][..., ~free].sum(-1)
    inner = full[..., free, :][..., free]
    pairs = pairs_of(int(free.sum()))
    return eta[..., free] - fixed, inner[..., pairs.first, pairs.second]


def full_table(mode: dict[str, Any], free: Tensor) -> Tensor:
    """Moments of all components of a mode [point, copy, r + pair], the constant ones included."""
    mean, cov = mode["mean"], mode["cov"]
    if bool(free.all()):
        return table(mean, cov)
    r = len(free)
    pairs = pairs_of(r)
    whole = mean.new_ones(*mean.shape[:-1], r)
    whole[..., free] = mean
    both = free[pairs.first] & free[pairs.second]
    spread = mean.new_zeros(*cov.shape[:-1], pairs.count)
    spread[..., both] = cov
    return table(whole, spread)


def core_moments(core: dict[str, Tensor] | None, ranks: tuple[int, ...]) -> Core | None:
    """Moments of the core for messages; None for CP."""
    return None if core is None else Core.of(core["mean"], core["cov"], ranks)


def _update_core(
    layout: Layout,
    core: dict[str, Tensor],
    tables: Sequence[Tensor],
    precision: Tensor,
    linear: Tensor,
    keep: float,
) -> dict[str, Tensor]:
    """The normal factor of the core, w ~ N(0, I) before the data."""
    eta, lam = core_sums(tables, layout.index, layout.ranks, precision, linear)
    lam = lam + torch.eye(lam.shape[-1], dtype=lam.dtype, device=lam.device)
    if keep:
        eta = torch.lerp(eta, core["linear"], keep)
        lam = torch.lerp(lam, core["precision"], keep)
    L, _ = safe_cholesky(lam)
    cov = torch.cholesky_inverse(L)
    mean = torch.cholesky_solve(eta.unsqueeze(-1), L).squeeze(-1)
    D = lam.shape[-1]
    log_det = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)
    divergence = (trace + mean.square().sum(-1) - D + log_det) / 2
    return {"mean": mean, "cov": cov, "linear": eta, "precision": lam, "divergence": divergence}

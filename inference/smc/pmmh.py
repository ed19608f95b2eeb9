"""Particle marginal Metropolis-Hastings: parameters of state-space models, states summed out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.inference.smc.filters import (
    check_count,
    check_share,
    log_evidence_estimate,
    number_of_steps,
)
from probkit.inference.smc.resampling import Resampler, resolve
from probkit.numerics import safe_cholesky
from probkit.posterior import Posterior, make_posterior
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws
from probkit.tree import Tree
from probkit.unconstrained import Unconstrained

__all__ = ["ParticleMarginalMH"]

_TRIES = 50


@storable
@dataclass(frozen=True)
class ParticleMarginalMH(Sampler):
    """Sample parameters with the likelihood replaced by a particle filter's unbiased estimate.

    The chain targets the exact posterior of the parameters for every number of particles (Andrieu,
    Doucet & Holenstein 2010); it mixes well when the log estimate has a standard deviation of about
    one. Random-walk steps in the unconstrained space; during the warm-up their covariance follows
    the chain (Haario et al. 2001) and their length an acceptance rate of 0.234.

    Args:
        n: Particles of each filter.
        draws: Draws to keep in each chain.
        warmup: Steps to adapt and drop.
        resampler: Scheme, as in :class:`ParticleFilter`.
        ess_threshold: As in :class:`ParticleFilter`.

    Returns (through ``infer``):
        Draws of the parameters. ``sample_stats`` hold ``accepted`` and ``log_likelihood_estimate``,
        both [chain, draw].

    Example:
        >>> ParticleMarginalMH(n=100, draws=500).warmup
        500
    """

    n: int = 200
    draws: int = 1000
    warmup: int = 500
    resampler: str | Resampler = "systematic"
    ess_threshold: float = 0.5

    needs = ("sites", "at", "log_prior", "sample_prior", "steps", "start", "extend", "log_weight")

    def __post_init__(self) -> None:
        check_count("ParticleMarginalMH", n=self.n, draws=self.draws)
        check_count("ParticleMarginalMH", warmup=self.warmup, least=0)
        check_share("ParticleMarginalMH", ess_threshold=self.ess_threshold)
        resolve(self.resampler)

    def total(self) -> int:
        """Number of steps."""
        return self.warmup + self.draws

    def _log_likelihood(self, problem: Problem, values: Any, rng: torch.Generator) -> Tensor:
        return log_evidence_estimate(
            problem.model.at(values),
            problem.data,
            self.n,
            resampler=self.resampler,
            ess_threshold=self.ess_threshold,
            rng=rng,
        )

    def _evaluate(
        self, problem: Problem, free: Unconstrained, flat: Tensor, rng: torch.Generator
    ) -> dict[str, Tensor]:
        """Log prior of the flat vector and a fresh likelihood estimate."""
        values, log_det = free.constrain(flat)
        log_prior = problem.model.log_prior(values) + log_det
        log_likelihood = torch.full_like(log_prior, -math.inf)
        if bool(torch.isfinite(log_prior)):
            log_likelihood = self._log_likelihood(problem, values, rng)
        return {"flat": flat, "log_prior": log_prior, "log_likelihood": log_likelihood}

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Find a prior draw of positive likelihood."""
        model, data = problem.model, problem.data
        number_of_steps(model, data)
        sites = model.sites(data)
        if not sites:
            raise CapabilityError(
                f"ParticleMarginalMH: {type(model).__name__} has no unknown parameters; name them "
                "in prior="
            )
        free = Unconstrained(sites)
        with torch.no_grad():
            for _ in range(_TRIES):
                flat = free.flatten(model.sample_prior(1, rng=rngs[0]))[0]
                point = self._evaluate(problem, free, flat, rngs[0])
                if bool(torch.isfinite(point["log_likelihood"])):
                    break
            else:
                raise DataError(
                    f"ParticleMarginalMH: all particles died for {_TRIES} draws of the prior; use "
                    "more particles or a prior nearer the data"
                )
        return {
            "point": point,
            "taken": 0,
            "log_scale": 0.0,
            "mean": flat,
            "covariance": 0.1 * torch.eye(free.size, dtype=flat.dtype, device=flat.device),
        }

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Propose, estimate, accept or stay."""
        rng, taken, now = rngs[0], state["taken"], state["point"]
        free = Unconstrained(problem.model.sites(problem.data))
        with torch.no_grad():
            factor, _ = safe_cholesky(state["covariance"])
            noise = torch.randn(free.size, generator=rng, dtype=factor.dtype, device=factor.device)
            length = 2.38 / math.sqrt(free.size) * math.exp(state["log_scale"])
            new = self._evaluate(problem, free, now["flat"] + length * factor @ noise, rng)
            log_ratio = float(
                new["log_prior"] + new["log_likelihood"] - now["log_prior"] - now["log_likelihood"]
            )
            chance = math.exp(min(0.0, log_ratio)) if not math.isnan(log_ratio) else 0.0
            uniform = torch.rand((), generator=rng, dtype=torch.float64, device=rng.device)
            accepted = bool(uniform < chance)
        point = new if accepted else now
        taken += 1
        adapted = self._adapted(state, point["flat"], chance, taken)
        keep = None
        if taken > self.warmup:
            values = free.values(point["flat"])
            keep = {
                "values": {name: value[None, None] for name, value in values.items()},
                "accepted": torch.tensor([[accepted]]),
                "log_likelihood_estimate": point["log_likelihood"].reshape(1, 1),
            }
        state = {"point": point, "taken": taken, **adapted}
        info = {"accepted": float(accepted), "log_likelihood": float(point["log_likelihood"])}
        return Step(state, taken >= self.total(), keep, info)

    def _adapted(self, state: Tree, flat: Tensor, chance: float, taken: int) -> dict[str, Any]:
        """Follow the chain's covariance and acceptance while warming up; then hold still."""
        log_scale, mean, covariance = state["log_scale"], state["mean"], state["covariance"]
        if taken <= self.warmup:
            goal = 0.44 if len(flat) == 1 else 0.234
            log_scale = log_scale + (chance - goal) / taken**0.6
            gain = 1.0 / (taken + 10.0)
            offset = flat - mean
            mean = mean + gain * offset
            covariance = (1 - gain) * covariance + gain * torch.outer(offset, offset)
        return {"log_scale": log_scale, "mean": mean, "covariance": covariance}

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Collect the draws."""
        stats = {name: kept[name] for name in ("accepted", "log_likelihood_estimate")}
        return make_posterior(problem, Draws(kept["values"]), sample_stats=stats)

"""Tempered sequential Monte Carlo: from prior to posterior, through powers of the likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from probkit.density import check_log_joint, log_joint_of
from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.inference.smc.cloud import Cloud, move, resample, reweight, uniform
from probkit.inference.smc.filters import check_count, from_tree, to_tree, trace_dims
from probkit.inference.smc.resampling import Resampler, resolve
from probkit.model import lacks
from probkit.numerics import safe_cholesky
from probkit.posterior import Evidence, Posterior, make_posterior
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws
from probkit.tree import Tree
from probkit.unconstrained import Unconstrained

__all__ = ["SMC", "next_temperature"]


@storable
@dataclass(frozen=True)
class SMC(Sampler):
    """Move a population from the prior to the posterior through p(values) p(data | values)^beta.

    Each step raises the temperature beta as far as the effective sample size of the new weights
    stays at ``ess_threshold * n`` (bisection; del Moral, Doucet & Jasra 2012), resamples, and moves
    the particles by Metropolis-Hastings in the unconstrained space, with the population's own
    covariance. Multimodal posteriors and evidences are what it is for.

    The product of mean weights estimates the evidence. It is exactly unbiased for a fixed
    ``temperatures`` sequence and moves that do not look at the population; adapting either adds a
    bias of order 1/n.

    Args:
        n: Particles of a chain.
        ess_threshold: Share of ``n`` that the weights of one temperature step may leave.
        temperatures: Fixed increasing temperatures ending in 1; None adapts them.
        moves: Metropolis-Hastings steps at each temperature.
        kernel: "random_walk": Gaussian steps, whose length follows the acceptance rate;
            "independent": draws from the Gaussian fitted to the population;
            "differential_evolution": steps along differences of two particles in some of the
            coordinates (ter Braak 2006), every third step a random walk. It fits posteriors whose
            scale and direction change from place to place.
        last_moves: Steps at temperature 1; None takes ``moves``.
        resampler: Scheme, as in :class:`ParticleFilter`.
        max_stages: Largest number of temperatures.

    Returns (through ``infer``):
        Equally weighted draws [chain, particle, *site]. ``sample_stats`` hold ``temperature``,
        ``ess`` and ``acceptance`` of the stages, [chain, stage], the last value repeated up to the
        longest chain, and ``stages`` [chain].

    Example:
        >>> SMC(500, kernel="independent").moves
        10
    """

    n: int = 1000
    ess_threshold: float = 0.5
    temperatures: tuple[float, ...] | None = None
    moves: int = 10
    kernel: Literal["random_walk", "independent", "differential_evolution"] = "random_walk"
    resampler: str | Resampler = "systematic"
    max_stages: int = 200
    last_moves: int | None = None

    needs = ("sites", "log_joint", "sample_prior")

    def __post_init__(self) -> None:
        last = self.moves if self.last_moves is None else self.last_moves
        check_count("SMC", n=self.n, moves=self.moves, max_stages=self.max_stages, last_moves=last)
        resolve(self.resampler)
        kernels = ("random_walk", "independent", "differential_evolution")
        if not 0 < self.ess_threshold < 1 or self.kernel not in kernels:
            raise DataError(
                "SMC: expected 0 < ess_threshold < 1 and kernel 'random_walk', 'independent' or "
                f"'differential_evolution', got {self.ess_threshold!r}, {self.kernel!r}"
            )
        if self.kernel == "differential_evolution" and self.n < 8:
            raise DataError(
                "SMC: kernel 'differential_evolution' takes steps along differences of particles: "
                f"expected n >= 8, got {self.n}"
            )
        if self.temperatures is not None:
            steps = (0.0, *self.temperatures)
            rising = all(a < b for a, b in zip(steps, steps[1:], strict=False))
            if not self.temperatures or not rising or steps[-1] != 1.0:
                raise DataError(
                    "SMC: expected temperatures that rise from above 0 to exactly 1, got "
                    f"{self.temperatures}"
                )

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Draw from the prior."""
        model, data = problem.model, problem.data
        if lacks(model, ("log_likelihood",)) and lacks(model, ("log_prior",)):
            raise CapabilityError(
                "SMC tempers the likelihood, so it needs log_likelihood or log_prior beside "
                f"log_joint; {type(model).__name__} has neither"
            )
        sites = model.sites(data)
        if not sites:
            raise CapabilityError(f"SMC: {type(model).__name__} has no sites to sample")
        free = Unconstrained(sites)
        with torch.no_grad():
            values = model.sample_prior(self.n, rng=rngs[0])
            check_log_joint(model, values, data)
            flat = free.flatten(values)
            log_prior, log_likelihood = _densities(problem, free, flat)
        if not bool(torch.isfinite(log_likelihood).any()):
            raise DataError(
                f"SMC: none of {self.n} prior draws has a positive likelihood; use more particles "
                "or a prior nearer the data"
            )
        particles = {"flat": flat, "log_prior": log_prior, "log_likelihood": log_likelihood}
        return {
            "cloud": to_tree(uniform(particles, (self.n,), flat.device)),
            "temperature": 0.0,
            "stage": 0,
            "log_scale": 0.0,
            "trace": [],
        }

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Raise the temperature once: reweight, resample, move."""
        rng, stage = rngs[0], state["stage"]
        with torch.no_grad():
            cloud = from_tree(state["cloud"])
            log_likelihood = cloud.particles["log_likelihood"]
            old = state["temperature"]
            new = self._next(log_likelihood, old, stage)
            weighted = reweight(cloud, _power(log_likelihood, new - old), step=stage)
            fit = _gaussian_fit(weighted)
            moved, _ = resample(weighted, self.resampler, rng=rng)
            kernel = _Kernel(self, problem, new, fit, state["log_scale"], rng)
            moved = move(moved, kernel)
        entry = {
            "temperature": new,
            "ess": float(weighted.ess),
            "acceptance": kernel.acceptance,
        }
        state = {
            "cloud": to_tree(moved),
            "temperature": new,
            "stage": stage + 1,
            "log_scale": kernel.log_scale,
            "trace": [*state["trace"], entry],
        }
        return Step(state, new >= 1.0, info=entry)

    def _next(self, log_likelihood: Tensor, old: float, stage: int) -> float:
        if self.temperatures is not None:
            return self.temperatures[stage]
        if stage >= self.max_stages:
            raise DataError(
                f"SMC: temperature {old:.3g} after max_stages={self.max_stages}; lower "
                "ess_threshold, or check that prior and likelihood overlap"
            )
        return next_temperature(log_likelihood, old, self.ess_threshold)

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """Before temperature 1 the particles are not draws from the posterior."""
        return bool(state["temperature"] >= 1.0)

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Return the particles at temperature 1."""
        cloud = from_tree(state["cloud"])
        free = Unconstrained(problem.model.sites(problem.data))
        values = free.values(cloud.particles["flat"])
        longest = self.max_stages if self.temperatures is None else len(self.temperatures)
        traces = _traces(state["trace"], longest)
        return make_posterior(
            problem,
            Draws({name: value.unsqueeze(0) for name, value in values.items()}),
            log_evidence=Evidence(cloud.log_evidence.reshape(1), "estimate"),
            sample_stats=traces,
            stat_dims=trace_dims(traces, "stage"),
        )

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Cut the traces to the longest chain."""
        from dataclasses import replace

        stats = dict(posterior.sample_stats)
        longest = int(stats["stages"].max())
        for name in ("temperature", "ess", "acceptance"):
            stats[name] = stats[name][:, :longest]
        return replace(posterior, sample_stats=stats)


def _traces(trace: list[Mapping[str, float]], longest: int) -> dict[str, Tensor]:
    """Stage statistics [chain=1, longest], the last value repeated, and their number."""
    padded = [*trace, *([trace[-1]] * (longest - len(trace)))]
    stats = {name: torch.tensor([[entry[name] for entry in padded]]) for name in trace[0]}
    return {**stats, "stages": torch.tensor([len(trace)])}


def next_temperature(log_likelihood: Tensor, old: float, share: float) -> float:
    """Return the largest temperature at which the weights keep ``share`` of the particles.

    Bisection on ESS((beta - old) * log_likelihood) = share * (particles with positive likelihood);
    1 where even that keeps them.

    Args:
        log_likelihood: [particle], of equally weighted particles.
        old: The current temperature.
        share: Between 0 and 1.

    Example:
        >>> next_temperature(torch.zeros(10, dtype=torch.float64), 0.0, 0.5)
        1.0
    """
    target = share * float(torch.isfinite(log_likelihood).sum())

    def ess(step: float) -> float:
        weights = (step * (log_likelihood - log_likelihood.max())).exp()
        weights = weights.nan_to_num(0.0)
        return float(weights.sum().square() / weights.square().sum())

    low, high = 0.0, 1.0 - old
    if ess(high) >= target:
        return 1.0
    while high - low > 1e-6 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if ess(middle) >= target else (low, middle)
    return old + high


def _power(log_likelihood: Tensor, step: float) -> Tensor:
    """Return step * log_likelihood; a zero likelihood stays zero for every step > 0."""
    return step * log_likelihood.double()


def _densities(problem: Problem, free: Unconstrained, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return log prior of the flat vectors (Jacobian included) and log likelihood, each [n].

    A point outside the prior's support has prior zero; its likelihood is not used.
    """
    model, data = problem.model, problem.data
    values, log_det = free.constrain(flat)
    log_joint = log_joint_of(model, values, data)
    if callable(getattr(model, "log_likelihood", None)):
        log_likelihood = model.log_likelihood(values, data)
        log_prior = log_joint - log_likelihood
        # -inf - (-inf): a zero likelihood says nothing of the prior, and the point is dead anyway.
        log_prior = torch.where(torch.isneginf(log_likelihood), log_joint, log_prior)
    else:
        log_prior = model.log_prior(values)
        log_likelihood = torch.where(torch.isneginf(log_prior), log_joint, log_joint - log_prior)
    return (log_prior + log_det).double(), log_likelihood.double()


def _gaussian_fit(cloud: Cloud) -> tuple[Tensor, Tensor]:
    """Weighted mean [size] and Cholesky factor [size, size] of the covariance of the particles."""
    flat, weights = cloud.particles["flat"], cloud.weights
    mean = weights @ flat.double()
    centred = (flat.double() - mean) * weights.sqrt().unsqueeze(-1)
    covariance = centred.mT @ centred
    # A direction in which few particles differ still needs steps of some length.
    floor = 1e-10 + 1e-8 * covariance.diagonal()
    factor, _ = safe_cholesky(covariance + torch.diag(floor))
    return mean, factor


class _Kernel:
    """Metropolis-Hastings steps that leave prior * likelihood^beta invariant.

    Called on the particles of a cloud. The length of random-walk steps starts at 2.38 / sqrt(size)
    (Roberts & Rosenthal 2001) and follows the acceptance rate from stage to stage.
    """

    def __init__(
        self,
        options: SMC,
        problem: Problem,
        temperature: float,
        fit: tuple[Tensor, Tensor],
        log_scale: float,
        rng: torch.Generator,
    ) -> None:
        self.options, self.problem, self.temperature = options, problem, temperature
        self.mean, self.factor = fit
        self.log_scale, self.rng = log_scale, rng
        self.acceptance = 0.0

    def __call__(self, particles: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Take all steps of this temperature; sets ``acceptance`` and ``log_scale``."""
        free = Unconstrained(self.problem.model.sites(self.problem.data))
        count = self.options.moves
        if self.temperature >= 1.0 and self.options.last_moves is not None:
            count = self.options.last_moves
        rates, walks = [], []
        for k in range(count):
            if self.options.kernel == "differential_evolution" and k % 3 < 2:
                particles, rate = self._evolve(free, particles)
            else:
                particles, rate = self._step(free, particles)
                walks.append(rate)
            rates.append(rate)
        self.acceptance = sum(rates) / len(rates)
        if self.options.kernel != "independent" and walks:
            # An acceptance of 0.234 is best for long vectors, 0.44 for one dimension.
            goal = 0.44 if free.size == 1 else 0.234
            rate = sum(walks) / len(walks)
            self.log_scale += max(-1.0, min(1.0, 2.0 * (rate - goal)))
        return particles

    def _step(
        self, free: Unconstrained, now: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], float]:
        """Step with the covariance of the population, or jump to a draw from its Gaussian fit."""
        flat = now["flat"]
        noise = torch.randn(flat.shape, generator=self.rng, dtype=torch.float64, device=flat.device)
        step = noise @ self.factor.mT
        if self.options.kernel == "independent":
            proposed = (self.mean + step).to(flat.dtype)
            correction = self._half_square(proposed) - self._half_square(flat)
        else:
            length = 2.38 / math.sqrt(free.size) * math.exp(self.log_scale)
            proposed = (flat + length * step).to(flat.dtype)
            correction = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
        return self._accept(free, now, proposed, correction)

    def _evolve(
        self, free: Unconstrained, now: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], float]:
        """Move each half of the population along differences within the other half.

        The other half stands still, so that the step is symmetric: the target stays invariant.
        """
        order = self._draw(torch.randperm, len(now["flat"]))
        halves = order.tensor_split(2)
        rates = []
        for moving, still in (halves, halves[::-1]):
            part: Mapping[str, Tensor] = {name: value[moving] for name, value in now.items()}
            proposed = part["flat"] + self._difference(now["flat"][still], part["flat"].shape)
            correction = torch.zeros(len(moving), dtype=torch.float64, device=moving.device)
            part, rate = self._accept(free, part, proposed, correction)
            now = {name: value.index_copy(0, moving, part[name]) for name, value in now.items()}
            rates.append(rate * len(moving))
        return now, sum(rates) / len(order)

    def _difference(self, pool: Tensor, shape: torch.Size) -> Tensor:
        """Scaled differences [particle, size] of two particles of ``pool`` in some coordinates."""
        n, size = shape
        first = self._draw(torch.randint, len(pool), (n,))
        other = (first + self._draw(torch.randint, 1, len(pool), (n,))) % len(pool)
        # a share of the coordinates, at least one; one step in ten keeps its full length
        share = self._draw(torch.rand, n, 1)
        chosen = self._draw(torch.rand, n, size) < share
        always = self._draw(torch.randint, size, (n, 1))
        chosen = chosen.scatter(1, always, True)
        length = 2.38 / (2.0 * chosen.sum(1, keepdim=True)).sqrt()
        length = torch.where(self._draw(torch.rand, n, 1) < 0.1, 1.0, length)
        step = chosen * length.to(pool) * (pool[first] - pool[other])
        jitter = 1e-4 * pool.std(0) * self._draw(torch.randn, n, size).to(pool)
        return step + chosen * jitter

    def _draw(self, law: Callable[..., Tensor], *size: Any) -> Tensor:
        return law(*size, generator=self.rng, device=self.rng.device).to(self.mean.device)

    def _accept(
        self,
        free: Unconstrained,
        now: Mapping[str, Tensor],
        proposed: Tensor,
        correction: Tensor,
    ) -> tuple[Mapping[str, Tensor], float]:
        """Metropolis-Hastings: move each particle to its proposal, or let it stay."""
        flat = now["flat"]
        log_prior, log_likelihood = _densities(self.problem, free, proposed)
        new = {"flat": proposed, "log_prior": log_prior, "log_likelihood": log_likelihood}
        log_ratio = self._log_target(new) - self._log_target(now) + correction
        uniform_draw = torch.rand(
            len(flat), generator=self.rng, dtype=torch.float64, device=flat.device
        )
        accept = uniform_draw.log() < log_ratio  # False where the ratio is NaN
        mixed = {
            name: torch.where(accept.reshape(-1, *[1] * (value.ndim - 1)), new[name], value)
            for name, value in now.items()
        }
        return mixed, float(accept.double().mean())

    def _log_target(self, point: Mapping[str, Tensor]) -> Tensor:
        return point["log_prior"] + _power(point["log_likelihood"], self.temperature)

    def _half_square(self, flat: Tensor) -> Tensor:
        """Half the squared distance from the fitted Gaussian's mean, [n]."""
        whitened = torch.linalg.solve_triangular(
            self.factor, (flat.double() - self.mean).mT, upper=False
        )
        return 0.5 * whitened.square().sum(0)

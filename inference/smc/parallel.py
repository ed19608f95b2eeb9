"""Parallel tempering of particle Gibbs: hot chains wander, swaps hand what they find to the cold.

Rung k samples p(path) prod_t G_t^(1/T_k) by conditional sequential Monte Carlo. After every sweep
neighbours may exchange their paths x_k, x_{k+1}, with probability (Puri et al. 2025, algorithm 3)

    min(1, pi_k(x_{k+1}) pi_{k+1}(x_k) / (pi_k(x_k) pi_{k+1}(x_{k+1})))
        = min(1, exp((1/T_k - 1/T_{k+1}) (S(x_{k+1}) - S(x_k)))),    S(x) = sum_t log G_t,

so that the product of all rungs' targets stays invariant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.files import storable
from probkit.inference.smc import hooks
from probkit.inference.smc.filters import cost_stats, find_proposal, number_of_steps
from probkit.inference.smc.gibbs import (
    ParticleGibbs,
    Sweep,
    SweepEnded,
    conditional_sweep,
    no_stats,
    stop_of,
)
from probkit.inference.smc.particles import Particles, take
from probkit.posterior import Posterior
from probkit.sampler import Problem, Sampler, Step
from probkit.tree import Tree

__all__ = ["ParallelTempering", "log_potential_of", "swap"]


class _Tempered:
    """A ``Sequential`` model with the log weights of its steps multiplied by ``power``."""

    def __init__(self, model: Any, power: float) -> None:
        self._model, self._power = model, power

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def log_weight(self, t: int, old: Particles, new: Particles, data: Any) -> Tensor:
        """Return the tempered log weights [n]."""
        return self._power * self._model.log_weight(t, old, new, data)


def tempered(model: Any, power: float) -> Any:
    """Return ``model`` with its potentials to a power, in the model's own way where it has one."""
    if power == 1.0:
        return model
    own = getattr(model, "tempered", None)
    return own(power) if callable(own) else _Tempered(model, power)


def log_potential_of(model: Any, path: Particles, data: Any) -> float:
    """Return S(x), the sum of the log potentials along a path of T + 1 particles.

    Models whose ``log_weight`` holds the correction of a proposal tell their potentials by
    ``log_potential``; for all others the weights are the potentials.
    """
    of_step = getattr(model, "log_potential", None) or model.log_weight
    total = 0.0
    for t in range(number_of_steps(model, data)):
        old, new = take(path, torch.tensor([t])), take(path, torch.tensor([t + 1]))
        total += float(of_step(t, old, new, data))
    return total


def swap(
    paths: Sequence[Any], sums: Sequence[float], powers: Sequence[float], *, rng: torch.Generator
) -> tuple[list[Any], list[float], list[bool]]:
    """Offer every pair of neighbours, coldest first, to exchange their paths.

    Args:
        paths: One path for each rung.
        sums: S of each path.
        powers: 1/T of each rung.
        rng: Stream.

    Returns:
        The paths and their sums after the swaps, and which of the pairs were exchanged.

    Example:
        >>> swap(["cold", "hot"], [0.0, 5.0], [1.0, 0.5], rng=torch.Generator().manual_seed(0))
        (['hot', 'cold'], [5.0, 0.0], [True])
    """
    paths, sums, accepted = list(paths), list(sums), []
    uniform = torch.rand(len(paths) - 1, generator=rng, dtype=torch.float64, device=rng.device)
    for k, u in enumerate(uniform.tolist()):
        log_ratio = (powers[k] - powers[k + 1]) * (sums[k + 1] - sums[k])
        yes = u < math.exp(min(0.0, log_ratio))
        if yes:
            paths[k], paths[k + 1] = paths[k + 1], paths[k]
            sums[k], sums[k + 1] = sums[k + 1], sums[k]
        accepted.append(yes)
    return paths, sums, accepted


@storable
@dataclass(frozen=True)
class ParallelTempering(Sampler):
    """Particle Gibbs on several temperatures, with exact swaps.

    The draws are those of the coldest rung, whose temperature is 1: its target is the posterior
    itself, for any number of particles and any ladder. Each chain of ``infer`` is a whole ladder.

    Args:
        inner: Particles, draws, warm-up and moves of every rung.
        temperatures: Rising from exactly 1; potentials count with the power 1/T.

    Raises:
        DataError: A ladder of fewer than two rungs, not rising, or not beginning with 1.

    Returns (through ``infer``):
        As :class:`ParticleGibbs`; ``sample_stats`` also hold ``swapped`` [chain, draw, pair],
        whether neighbours exchanged their paths, and ``log_potential`` [chain, draw, rung], the S
        of the paths after the swaps.

    Example:
        >>> from probkit import infer
        >>> from probkit.models.state_space import StochasticVolatility
        >>> y = torch.tensor([0.3, -1.2, 0.5], dtype=torch.float64)
        >>> ladder = ParallelTempering(ParticleGibbs(5, draws=20, warmup=0), (1.0, 2.0, 4.0))
        >>> post = infer(StochasticVolatility(), y, ladder, rng=0)
        >>> post.sample_stats["swapped"].shape
        torch.Size([1, 20, 2])
    """

    inner: ParticleGibbs = ParticleGibbs()
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)

    needs = ParticleGibbs.needs
    accepts_guide = True

    def __post_init__(self) -> None:
        if not isinstance(self.inner, ParticleGibbs):
            raise DataError(
                f"ParallelTempering: expected ParticleGibbs(...) to temper, got {self.inner!r}"
            )
        ladder = tuple(self.temperatures)
        rising = all(a < b for a, b in zip(ladder, ladder[1:], strict=False))
        if len(ladder) < 2 or ladder[0] != 1.0 or not rising or not ladder[-1] < math.inf:
            raise DataError(
                "ParallelTempering: expected at least two finite temperatures that rise from "
                f"exactly 1, got {ladder}"
            )

    @property
    def powers(self) -> tuple[float, ...]:
        """The potentials' powers 1/T."""
        return tuple(1.0 / temperature for temperature in self.temperatures)

    def total(self) -> int:
        """Number of rounds, each a sweep of every rung."""
        return self.inner.total()

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Check what the options need."""
        state = self.inner.init(problem, rngs=rngs)
        return {**state, "references": [None] * len(self.temperatures)}

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Sweep every rung, then offer swaps."""
        model = problem.model
        if limit := hooks.exhausted(model, state["spent"]):  # only before the first round
            return self.inner.without_draws(problem, state, f"budget: {limit}", rngs[0])
        before = hooks.metered(model)
        stop = stop_of(model, state["spent"], before)
        try:
            with torch.no_grad():
                sweeps = [
                    self._sweep(problem, power, reference, stop, rngs[0])
                    for power, reference in zip(self.powers, state["references"], strict=True)
                ]
                sums = [log_potential_of(model, sweep.path, problem.data) for sweep in sweeps]
        except SweepEnded as end:
            spent = hooks.spent_since(model, before)
            return self.inner.ended(state, end, spent)
        paths, sums, swapped = swap(
            [sweep.path for sweep in sweeps], sums, self.powers, rng=rngs[0]
        )
        cold = sweeps[0]._replace(path=paths[0])
        cost = hooks.spent_since(model, before)
        stats = {
            "swapped": torch.tensor([[swapped]]),
            "log_potential": torch.tensor([[sums]], dtype=torch.float64),
            **cost_stats(cost),
        }
        step = self.inner.after(problem, state, cold, stats, cost)
        return Step({**step.state, "references": paths}, step.done, step.keep, step.info)

    def _sweep(
        self, problem: Problem, power: float, reference: Any, stop: Any, rng: torch.Generator
    ) -> Sweep:
        return conditional_sweep(
            tempered(problem.model, power),
            problem.data,
            self.inner.n,
            reference,
            ancestor_sampling=self.inner.ancestor_sampling,
            proposal=find_proposal(problem, self.inner.guided, "ParallelTempering"),
            stop=stop,
            rng=rng,
        )

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Collect the paths of the coldest rung."""
        if kept is None:
            rungs = len(self.temperatures)
            kept = no_stats(state, number_of_steps(problem.model, problem.data))
            kept["swapped"] = torch.zeros(1, 0, rungs - 1, dtype=torch.bool)
            kept["log_potential"] = torch.zeros(1, 0, rungs, dtype=torch.float64)
        return self.inner.finish(problem, state, kept, rngs=rngs)

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Cut chains of objects to the longest one."""
        return self.inner.conclude(problem, posterior)

"""Gibbs sampling for models that can draw their parameters given everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from probkit.errors import DataError
from probkit.files import storable
from probkit.model import lacks
from probkit.posterior import Posterior, make_posterior
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws
from probkit.tree import Tree

__all__ = ["Gibbs"]


@storable
@dataclass(frozen=True)
class Gibbs(Sampler):
    """Run the model's own Gibbs sweep, warm it up, keep every ``thin``-th state.

    The model offers ``gibbs_init(data, rng=)``, values to start from, and
    ``gibbs_step(values, data, rng=)``, one sweep that leaves its posterior invariant. Nothing is
    tuned, so the warm-up only forgets the start.

    Args:
        draws: Draws to keep in each chain.
        warmup: Sweeps before the first draw.
        thin: Sweeps between draws.

    Returns (through ``infer``):
        Draws [chain, draw]; ``sample_stats["lp"]`` holds the log joint where the model has it.

    Raises:
        DataError: An option is out of range, or a sweep gives a value that is not finite.

    Example:
        >>> Gibbs(draws=500, thin=2).total()
        2000
    """

    draws: int = 1000
    warmup: int = 1000
    thin: int = 1

    needs = ("sites", "gibbs_init", "gibbs_step")

    def __post_init__(self) -> None:
        counts = (self.draws, self.warmup, self.thin)
        whole = all(isinstance(count, int) for count in counts)
        if not whole or min(self.draws, self.thin) < 1 or self.warmup < 0:
            raise DataError(
                "Gibbs: expected whole draws >= 1, warmup >= 0 and thin >= 1, got "
                f"{self.draws}, {self.warmup}, {self.thin}"
            )

    def total(self) -> int:
        """Return the number of sweeps."""
        return self.warmup + self.draws * self.thin

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Ask the model for values to start from."""
        with torch.no_grad():
            values = problem.model.gibbs_init(problem.data, rng=rngs[0])
        return {"values": dict(values), "taken": 0}

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take one sweep."""
        model, data = problem.model, problem.data
        with torch.no_grad():
            values = dict(model.gibbs_step(state["values"], data, rng=rngs[0]))
        taken = state["taken"] + 1
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise DataError(
                    f"Gibbs on {type(model).__name__}: sweep {taken} drew a value of site "
                    f"{name!r} that is not finite; check the data's scale against the prior"
                )
        keep = None
        past = taken - self.warmup
        if past > 0 and past % self.thin == 0:
            keep = {"values": {name: value[None, None] for name, value in values.items()}}
            if not lacks(model, ("log_joint",)):
                with torch.no_grad():
                    keep["lp"] = model.log_joint(values, data).reshape(1, 1)
        return Step({"values": values, "taken": taken}, taken >= self.total(), keep)

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Return the draws."""
        stats = {name: value for name, value in kept.items() if name != "values"}
        return make_posterior(problem, Draws(kept["values"]), sample_stats=stats)

"""The score of a state-space model by Fisher's identity, and maximum likelihood by it.

grad log p(y; theta) = E[ sum_t grad log m_theta(x_(t-1), x_t) + grad log g_theta(y_t | x_t) | y ]
(Cappe, Moulines & Ryden 2005, section 10.1.3): a smoothed additive functional.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probkit.density import initial_values
from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.inference.smc.filters import check_count, check_share, number_of_steps
from probkit.inference.smc.paris import Functional, require_bounded, smooth
from probkit.inference.smc.resampling import Resampler, resolve
from probkit.model import Values
from probkit.posterior import Posterior, make_posterior
from probkit.rng import Rng, stream
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws
from probkit.tree import Tree, map_tensors
from probkit.unconstrained import Unconstrained

__all__ = ["Score", "ScoreAscent", "score", "score_functional"]


class Score(NamedTuple):
    """An estimated score.

    Attributes:
        gradient: Parameter name -> gradient of the log likelihood, in the parameter's shape.
        log_likelihood: Log of the unbiased likelihood estimate, a scalar.
    """

    gradient: dict[str, Tensor]
    log_likelihood: Tensor


def score(
    model: Any,
    values: Values,
    data: Any,
    *,
    n: int = 1000,
    draws: int = 2,
    resampler: str | Resampler = "systematic",
    ess_threshold: float = 0.5,
    rng: Rng,
) -> Score:
    """Estimate the gradient of log p(data | values) by PaRIS.

    Args:
        model: A ``Sequential`` model with ``log_transition`` and ``at(values)``, the model with
            parameter values put in.
        values: Parameter name -> value; the gradient is with respect to these.
        data: The data.
        n: Particles.
        draws: Backward draws of each particle.
        resampler: Scheme.
        ess_threshold: Threshold of resampling.
        rng: Seed or generator.

    Returns:
        The gradient and the log likelihood estimate.

    Raises:
        CapabilityError: The model lacks ``at`` or ``log_transition``.

    Example:
        >>> from probkit.models.state_space import StochasticVolatility
        >>> model = StochasticVolatility()
        >>> y = torch.tensor([0.3, -1.2, 0.5], dtype=torch.float64)
        >>> values = {"scale": torch.tensor(1.0, dtype=torch.float64)}
        >>> score(model, values, y, n=200, rng=0).gradient["scale"].shape
        torch.Size([])
    """
    if not callable(getattr(model, "at", None)):
        raise CapabilityError(
            f"score needs at(values), the model with parameters put in; {type(model).__name__} "
            "lacks it"
        )
    prepared = model.prepare(data) if callable(getattr(model, "prepare", None)) else data
    with torch.no_grad():
        result = smooth(
            model.at(values),
            prepared,
            score_functional(model, values),
            n,
            draws=draws,
            resampler=resampler,
            ess_threshold=ess_threshold,
            rng=stream(rng, "score"),
        )
    return Score(_unflatten(result.value, values), result.log_evidence)


def score_functional(model: Any, values: Values) -> Functional:
    """Return h(t, old, new, data) [n, parameter], the gradient of log m + log g of each pair.

    One gradient for each pair would take n backward passes. With weights v on the pairs, the
    gradient of the weighted sum is linear in v, and its derivatives by v are the gradients wanted:
    one backward pass for each entry of the parameters.
    """
    flat = torch.cat([value.detach().reshape(-1) for value in values.values()])
    theta = flat.clone().requires_grad_()
    with torch.enable_grad():
        at = model.at(_unflatten(theta, values))

    def functional(t: int, old: Any, new: Any, data: Any) -> Tensor:
        with torch.enable_grad():
            terms = at.log_transition(t, old, new, data) + at.log_weight(t, old, new, data)
            if not terms.requires_grad:
                return torch.zeros(len(terms), len(flat), dtype=flat.dtype, device=flat.device)
            v = torch.zeros_like(terms, requires_grad=True)
            total = torch.autograd.grad(terms, theta, v, create_graph=True)[0]
            columns = [
                torch.autograd.grad(entry, v, retain_graph=True, allow_unused=True)[0]
                for entry in total
            ]
        empty = torch.zeros_like(terms)
        return torch.stack([empty if c is None else c for c in columns], dim=1).detach()

    return functional


def _unflatten(flat: Tensor, values: Values) -> dict[str, Tensor]:
    """Cut a vector [parameter] into tensors shaped as ``values``."""
    parts = flat.split([value.numel() for value in values.values()], dim=-1)
    return {
        name: part.reshape(value.shape)
        for (name, value), part in zip(values.items(), parts, strict=True)
    }


@storable
@dataclass(frozen=True)
class ScoreAscent(Sampler):
    """Maximum likelihood for state-space models: climb along estimated scores.

    Adam works on the unconstrained parameters (the model's sites), from a draw of the prior or the
    model's ``initial_values``. The step length falls like 1 / sqrt(step), and the estimate is the
    mean of the unconstrained parameters over the second half of the steps, which averages the
    noise of the scores out.

    Args:
        n: Particles for each score.
        steps: Gradient steps.
        lr: First step length.
        draws: Backward draws of each particle.
        prior: Add the gradient of the log prior: a posterior mode in place of a likelihood one
            (in the constrained space).
        resampler: Scheme, as in :class:`ParticleFilter`.
        ess_threshold: As in :class:`ParticleFilter`.

    Returns (through ``infer``):
        Draws of shape [chain, 1] marked ``attrs["point_estimate"]``; ``sample_stats`` hold
        ``log_likelihood_trace`` [chain, step] and ``gradient_norm`` [chain, step].

    Example:
        >>> ScoreAscent(n=200, steps=50).lr
        0.1
    """

    n: int = 500
    steps: int = 200
    lr: float = 0.1
    draws: int = 2
    prior: bool = False
    resampler: str | Resampler = "systematic"
    ess_threshold: float = 0.5

    needs = ("sites", "at", "steps", "start", "extend", "log_weight", "log_transition")

    def __post_init__(self) -> None:
        check_count("ScoreAscent", n=self.n, steps=self.steps, draws=self.draws)
        check_share("ScoreAscent", ess_threshold=self.ess_threshold)
        resolve(self.resampler)
        if not 0 < self.lr < math.inf:
            raise DataError(f"ScoreAscent: expected 0 < lr < inf, got {self.lr!r}")

    def total(self) -> int:
        """Number of gradient steps."""
        return self.steps

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Choose the starting point."""
        model, data = problem.model, problem.data
        number_of_steps(model, data)
        sites = model.sites(data)
        if not sites:
            raise CapabilityError(
                f"ScoreAscent: {type(model).__name__} has no unknown parameters; name them in "
                "prior="
            )
        free = Unconstrained(sites)
        if callable(getattr(model, "sample_prior", None)):
            start = model.sample_prior(1, rng=rngs[0])
        else:
            start = initial_values(model, data, sites, 1, rng=rngs[0])
        flat = free.flatten(start)[0].detach()
        return {"flat": flat, "average": torch.zeros_like(flat), "taken": 0, "adam": None}

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take one gradient step."""
        free = Unconstrained(problem.model.sites(problem.data))
        flat, taken = state["flat"].clone().requires_grad_(), state["taken"]
        with torch.enable_grad():
            values = free.values(flat)
            detached = {name: value.detach() for name, value in values.items()}
            found = score(
                problem.model,
                detached,
                problem.data,
                n=self.n,
                draws=self.draws,
                resampler=self.resampler,
                ess_threshold=self.ess_threshold,
                rng=rngs[0],
            )
            # The chain rule from values to the flat vector.
            linear = torch.stack([(values[k] * g).sum() for k, g in found.gradient.items()]).sum()
            if self.prior:
                linear = linear + problem.model.log_prior(values)
            gradient = torch.autograd.grad(linear, flat)[0]
        require_bounded(gradient, f"ScoreAscent: the score at step {taken}")
        new, adam = _adam(state["flat"], gradient, state["adam"], self.lr / math.sqrt(taken + 1))
        taken += 1
        average, burn = state["average"], self.steps // 2
        if taken > burn:
            average = average + (new - average) / (taken - burn)
        keep = {
            "log_likelihood_trace": found.log_likelihood.reshape(1, 1),
            "gradient_norm": gradient.norm().reshape(1, 1),
        }
        state = {"flat": new, "average": average, "taken": taken, "adam": adam}
        info = {"log_likelihood": float(found.log_likelihood)}
        return Step(state, taken >= self.steps, keep, info)

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Return the averaged estimate."""
        free = Unconstrained(problem.model.sites(problem.data))
        enough = state["taken"] > self.steps // 2
        values = free.values(state["average"] if enough else state["flat"])
        return make_posterior(
            problem,
            Draws(map_tensors(lambda value: value[None, None], values)),
            sample_stats=dict(kept),
            attrs={"point_estimate": True},
        )


def _adam(
    flat: Tensor, gradient: Tensor, state: Mapping[str, Any] | None, lr: float
) -> tuple[Tensor, dict[str, Any]]:
    """One ascent step of Adam (Kingma & Ba 2015, algorithm 1)."""
    if state is None:
        state = {"mean": torch.zeros_like(flat), "square": torch.zeros_like(flat), "count": 0}
    count = state["count"] + 1
    mean = 0.9 * state["mean"] + 0.1 * gradient
    square = 0.99 * state["square"] + 0.01 * gradient.square()
    direction = (mean / (1 - 0.9**count)) / ((square / (1 - 0.99**count)).sqrt() + 1e-8)
    return flat + lr * direction, {"mean": mean, "square": square, "count": count}

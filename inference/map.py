"""Maximum a posteriori estimates by L-BFGS in the unconstrained space."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probkit.density import check_log_joint, initial_values, log_joint_of
from probkit.errors import CapabilityError, ConvergenceWarning, DataError
from probkit.files import storable
from probkit.posterior import Posterior, make_posterior
from probkit.rng import scope
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws
from probkit.tree import Tree, map_tensors
from probkit.unconstrained import Unconstrained

__all__ = ["MAP"]


@storable
@dataclass(frozen=True)
class MAP(Sampler):
    """Maximise the log joint over all sites.

    L-BFGS with a strong Wolfe line search runs on the unconstrained vector from several starting
    points and keeps the best. The density is that of the constrained values, without the Jacobian
    (the convention of Stan's optimiser); ``jacobian=True`` maximises the density of the
    unconstrained vector instead.

    Args:
        restarts: Starting points within one chain.
        max_iter: L-BFGS iterations for each.
        tolerance: Stop when the largest gradient entry, divided by max(1, |log joint|), is
            below it.
        jacobian: Include the log Jacobian of the map to the constrained values.
        chunk: L-BFGS iterations between reports.

    Returns (through ``infer``):
        Draws of shape [chain, 1] marked ``attrs["point_estimate"]``.

    Example:
        >>> from probkit import infer
        >>> from probkit.kernels import NNGPKernel
        >>> from probkit.marginal import Marginal
        >>> from probkit.models import ScaleMixtureNNGP
        >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
        >>> model = Marginal(ScaleMixtureNNGP(NNGPKernel()))
        >>> post = infer(model, (x, x[:, 0].sin()), MAP(), rng=0)
        >>> post.draws["noise_var"].shape
        torch.Size([1, 1])
    """

    restarts: int = 3
    max_iter: int = 200
    tolerance: float = 1e-6
    jacobian: bool = False
    chunk: int = 10

    needs = ("sites", "log_joint")

    def __post_init__(self) -> None:
        if min(self.restarts, self.max_iter, self.chunk) < 1 or self.tolerance <= 0:
            raise DataError(
                "MAP: expected restarts, max_iter and chunk >= 1 and tolerance > 0, got "
                f"{self.restarts}, {self.max_iter}, {self.chunk}, {self.tolerance}"
            )

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Choose the starting points."""
        sites = problem.model.sites(problem.data)
        if not sites:
            raise CapabilityError(f"MAP: {type(problem.model).__name__} has no sites to optimise")
        free = Unconstrained(sites)
        start = initial_values(problem.model, problem.data, sites, self.restarts, rng=rngs[0])
        check_log_joint(problem.model, start, problem.data)
        return {
            "starts": free.flatten(start),
            "restart": 0,
            "flat": free.flatten(start)[0],
            "optimizer": None,
            "iterations": 0,
            "best": free.flatten(start)[0],
            "best_value": float("inf"),
            "converged": False,
        }

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take ``chunk`` iterations from the current starting point."""
        objective = self._objective(problem)
        take = min(self.chunk, self.max_iter - state["iterations"])
        flat, optimizer, value, gradient = _lbfgs(
            objective, state["flat"], state["optimizer"], take, self.tolerance
        )
        iterations = state["iterations"] + take
        converged = gradient <= self.tolerance * max(1.0, abs(value))
        stalled = bool((flat == state["flat"]).all())
        new = {**state, "flat": flat, "optimizer": optimizer, "iterations": iterations}
        # A last chunk that stays where it is may be the one that sees the small gradient.
        if value < state["best_value"] or (value == state["best_value"] and converged):
            new.update(best=flat, best_value=value, converged=converged)
        done = False
        if converged or stalled or iterations >= self.max_iter:
            restart = state["restart"] + 1
            done = restart >= self.restarts
            if not done:
                new.update(
                    restart=restart, flat=state["starts"][restart], optimizer=None, iterations=0
                )
        return Step(new, done, info={"log_joint": -new["best_value"], "restart": new["restart"]})

    def _objective(self, problem: Problem) -> Callable[[Tensor], Tensor]:
        """Minus the log density as a function of the flat vector [size]."""
        free = Unconstrained(problem.model.sites(problem.data))

        def objective(flat: Tensor) -> Tensor:
            values, log_det = free.constrain(flat[None])
            value = log_joint_of(problem.model, values, problem.data)
            return -(value + log_det if self.jacobian else value)[0]

        return objective

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """Any optimum so far can be returned."""
        return bool(state["best_value"] < float("inf"))

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Return the best optimum."""
        if state["best_value"] == float("inf"):
            raise DataError(
                "MAP: the log joint was not finite at any starting point; check the data and the "
                "starting values"
            )
        free = Unconstrained(problem.model.sites(problem.data))
        values = {name: value[None, None] for name, value in free.values(state["best"]).items()}
        log_joint = state["best"].new_tensor([[-state["best_value"]]])
        return make_posterior(
            problem,
            Draws(values),
            sample_stats={"lp": log_joint, "converged": torch.tensor([[state["converged"]]])},
            attrs={"point_estimate": True},
        )

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Warn where a chain has not converged."""
        converged = bool(posterior.sample_stats["converged"].all())
        if not converged:
            warnings.warn(
                f"MAP ended before its gradient fell below tolerance={self.tolerance:g} (at most "
                f"max_iter={self.max_iter} iterations from each start); raise max_iter",
                ConvergenceWarning,
                stacklevel=4,
            )
        return replace(posterior, attrs={**posterior.attrs, "converged": converged})


def _lbfgs(
    objective: Callable[[Tensor], Tensor],
    flat: Tensor,
    memory: Any,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Any, float, float]:
    """Run L-BFGS for some iterations.

    Returns:
        (position, optimizer state, objective, largest gradient entry) at the best finite point.
    """
    position = flat.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [position],
        max_iter=iterations,
        max_eval=25 * iterations,  # What one line search may take; the default cuts iterations.
        line_search_fn="strong_wolfe",
        tolerance_grad=tolerance,
        tolerance_change=0.0,
    )
    if memory is not None:
        # The optimizer works in place; the old state must stay as it is.
        optimizer.load_state_dict(map_tensors(Tensor.clone, memory))
    seen: list[tuple[float, Tensor, float]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        try:
            # Warnings at trial points are of no interest; those at the optimum come again.
            with torch.enable_grad(), scope(quiet=True):
                loss = objective(position)
                loss.backward()
        except DataError:
            loss = position.new_tensor(math.inf)
        gradient = position.grad
        value = float(loss.detach())
        if math.isfinite(value) and gradient is not None and bool(gradient.isfinite().all()):
            seen.append((value, position.detach().clone(), float(gradient.abs().max())))
            return loss.detach()
        # A trial step to where the model overflows. The line search interpolates, so the value must
        # be finite; a flat peak above all that was seen sends it back.
        position.grad = torch.zeros_like(position)
        return position.new_tensor(1e6 * (1.0 + max((abs(v) for v, _, _ in seen), default=0.0)))

    optimizer.step(closure)
    if not seen:
        return flat, None, float("inf"), float("inf")
    value, best, gradient = min(seen, key=lambda entry: entry[0])
    return best, optimizer.state_dict(), value, gradient

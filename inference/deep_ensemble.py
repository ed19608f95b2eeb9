"""Deep ensembles: many maximum a posteriori fits by Adam, all in one tensor program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from probkit.density import check_log_joint, initial_values, log_joint_of
from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.model import Values, lacks
from probkit.posterior import Posterior, make_posterior
from probkit.rng import scope, seed_of, stream
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws
from probkit.tree import Tree, map_tensors
from probkit.unconstrained import Unconstrained

__all__ = ["DeepEnsemble"]

_ATTEMPTS = 20


@storable
@dataclass(frozen=True)
class DeepEnsemble(Sampler):
    """Fit several networks (or any model) to the maximum of the posterior, each from its own start.

    Lakshminarayanan, Pritzel and Blundell (2017), "Simple and scalable predictive uncertainty
    estimation using deep ensembles". Members differ in their starting values and in the random
    part of the data they see; they run together, with a leading member dim, and do not see each
    other. The density is that of the constrained values, without the Jacobian, as in
    :class:`~probkit.inference.MAP`. The prior of the model takes the place of weight decay.

    Members are modes, not draws: their spread is an approximation whose quality no diagnostic
    tells, and R-hat or effective sample sizes of them mean nothing.

    Args:
        members: Networks in the ensemble.
        steps: Adam steps.
        lr: Learning rate at the start.
        schedule: "cosine" lets the rate fall to zero, "constant" keeps it.
        fraction: Share of the units that each member sees, drawn without replacement; the
            likelihood is scaled up to all units, so the prior keeps its weight. Models that cannot
            be cut into minibatches, or have sites local to the units, show everything to each.
        jacobian: Include the log Jacobian of the map to the constrained values.
        chunk: Adam steps between reports.

    Returns (through ``infer``):
        Draws [chain, member, *site], equally weighted; ``sample_stats["lp"]`` [chain, member] is
        the log joint given all data, ``attrs["fraction"]`` the share that was used.

    Example:
        >>> import probkit as pk
        >>> from probkit.models import BNN
        >>> x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
        >>> model = BNN(hidden=(8,), noise_var=0.01)
        >>> post = pk.infer(model, (x, x[:, 0].sin()), DeepEnsemble(members=4, steps=100), rng=0)
        >>> post.draws["weight_0"].shape, post.predict(x, site="f").mean.shape
        (torch.Size([1, 4, 1, 8]), torch.Size([20]))
    """

    members: int = 10
    steps: int = 1000
    lr: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    fraction: float = 0.8
    jacobian: bool = False
    chunk: int = 50

    needs = ("sites", "log_joint")

    def __post_init__(self) -> None:
        counts = (self.members, self.steps, self.chunk)
        if not all(isinstance(count, int) and count >= 1 for count in counts):
            raise DataError(
                f"DeepEnsemble: expected whole members, steps and chunk >= 1, got {self.members}, "
                f"{self.steps}, {self.chunk}"
            )
        if not 0 < self.lr < math.inf or not 0 < self.fraction <= 1:
            raise DataError(
                "DeepEnsemble: expected 0 < lr < inf and 0 < fraction <= 1, got "
                f"{self.lr}, {self.fraction}"
            )
        if self.schedule not in ("cosine", "constant"):
            raise DataError(
                f"DeepEnsemble: expected schedule 'cosine' or 'constant', got {self.schedule!r}"
            )

    def total(self) -> int:
        """Number of chunks."""
        return -(-self.steps // self.chunk)

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Draw the starting point and the part of the data of each member, from its own stream."""
        sites = problem.model.sites(problem.data)
        if not sites:
            raise CapabilityError(
                f"DeepEnsemble: {type(problem.model).__name__} has no sites to optimise"
            )
        free = Unconstrained(sites)
        device = rngs[0].device
        seed = seed_of(rngs[0])
        streams = [stream(seed, "member", k, device=device) for k in range(self.members)]
        index = self._subsets(problem, streams)
        starts = []
        for k, rng in enumerate(streams):
            chosen = None if index is None else index[k : k + 1]
            starts.append(_finite_start(problem, free, chosen, rng, k))
        return {"flat": torch.cat(starts), "index": index, "optimizer": None, "taken": 0}

    def _subsets(self, problem: Problem, streams: list[torch.Generator]) -> Tensor | None:
        """Choose units [member, unit] of each member; None where all see everything."""
        model, data = problem.model, problem.data
        local = any(site.plate is not None for site in model.sites(data).values())
        if self.fraction == 1 or local or lacks(model, ("plate_size", "minibatch")):
            return None
        units = model.plate_size(data)
        size = max(1, round(self.fraction * units))
        orders = [torch.randperm(units, generator=rng, device=rng.device) for rng in streams]
        return torch.stack([order[:size] for order in orders])

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take ``chunk`` Adam steps with every member."""
        free = Unconstrained(problem.model.sites(problem.data))
        flat = state["flat"].detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([flat], lr=self.lr)
        if state["optimizer"] is not None:
            # Adam works in place; the old state must stay as it is.
            optimizer.load_state_dict(map_tensors(Tensor.clone, state["optimizer"]))
        taken = state["taken"]
        for _ in range(min(self.chunk, self.steps - taken)):
            optimizer.param_groups[0]["lr"] = self._rate(taken)
            optimizer.zero_grad()
            with torch.enable_grad(), scope(quiet=True):
                density = _density(problem, free, flat, state["index"], self.jacobian)
                (-density.sum()).backward()
            optimizer.step()
            taken += 1
        density, flat = density.detach(), flat.detach()
        bad = ~(torch.isfinite(density) & torch.isfinite(flat).all(-1))
        if bool(bad.any()):
            raise DataError(
                f"DeepEnsemble: the log joint of member {int(bad.nonzero()[0])} is no longer "
                f"finite at step {taken}; lower lr={self.lr:g}"
            )
        new = {**state, "flat": flat, "optimizer": optimizer.state_dict(), "taken": taken}
        return Step(new, taken >= self.steps, info={"log_joint": float(density.mean())})

    def _rate(self, taken: int) -> float:
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * taken / self.steps))

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """Any state is an ensemble."""
        return True

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Return the members as equally weighted draws."""
        free = Unconstrained(problem.model.sites(problem.data))
        values = free.values(state["flat"])
        with torch.no_grad():
            log_joint = log_joint_of(problem.model, values, problem.data)
        index = state["index"]
        share = 1.0
        if index is not None:
            share = index.shape[1] / problem.model.plate_size(problem.data)
        attrs: dict[str, Any] = {"ensemble": True, "fraction": share}
        if self.members == 1:
            attrs["point_estimate"] = True
        return make_posterior(
            problem,
            Draws({name: value[None] for name, value in values.items()}),
            sample_stats={"lp": log_joint[None]},
            attrs=attrs,
        )


def _density(
    problem: Problem, free: Unconstrained, flat: Tensor, index: Tensor | None, jacobian: bool
) -> Tensor:
    """Log joint [member] at ``flat`` [member, D], each given its own units ``index``."""
    values, log_det = free.constrain(flat)
    if index is None:
        density = log_joint_of(problem.model, values, problem.data)
    else:
        density = _on_subsets(problem.model, values, problem.data, index)
    return density + log_det if jacobian else density


def _on_subsets(model: Any, values: Values, data: Any, index: Tensor) -> Tensor:
    """Log joint [member] at values [member, *site], each on its own minibatch ``index``."""

    def one(point: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        batch = model.minibatch(data, chosen)
        density: Tensor = model.log_joint(point, batch.data, scale=batch.scale)
        return density

    with scope(validate=False):
        return torch.func.vmap(one)(dict(values), index)


def _finite_start(
    problem: Problem, free: Unconstrained, index: Tensor | None, rng: torch.Generator, member: int
) -> Tensor:
    """Draw starting points [1, D] until the log joint is finite there.

    Raises:
        DataError: It never is.
    """
    model, data = problem.model, problem.data
    for attempt in range(_ATTEMPTS):
        values = initial_values(model, data, free.sites, 1, rng=rng)
        if member == 0 and attempt == 0:
            check_log_joint(model, values, data)
        flat = free.flatten(values)
        with torch.no_grad(), scope(quiet=True):
            density = _density(problem, free, flat, index, jacobian=False)
        if bool(torch.isfinite(density)):
            return flat
    raise DataError(
        f"DeepEnsemble: the log joint of {type(model).__name__} is {float(density):g} at all "
        f"{_ATTEMPTS} starting points of member {member}; check the data and the priors, or give "
        "the model initial_values"
    )

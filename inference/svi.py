"""Stochastic variational inference: fit a guide by maximising the evidence lower bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probkit.density import check_log_joint, log_joint_of
from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.guide import Guide, HasBound
from probkit.loader import Loader, Sized
from probkit.model import Batch, lacks
from probkit.posterior import Evidence, Posterior, make_posterior
from probkit.rng import seed_of
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws, Fitted
from probkit.tree import Tree, leaves, map_tensors

__all__ = ["SVI", "elbo"]


@storable
@dataclass(frozen=True)
class SVI(Sampler):
    """Maximise the evidence lower bound over a guide's parameters by Adam.

    The bound is E_q[log p(values, data) - log q(values)], estimated with reparameterised draws;
    on a minibatch, local terms of both densities are scaled by units / batch size.

    Args:
        steps: Gradient steps.
        lr: Learning rate at the start; it falls exponentially to ``lr * decay``.
        decay: Share of the learning rate that is left at the end.
        particles: Draws per gradient step.
        batch_size: Units per step; None uses all data. Needs ``plate_size`` and ``minibatch``.
            A :class:`~probkit.loader.Loader` as data brings its own batches.
        chunk: Gradient steps between reports.
        evidence_draws: Draws for the final estimate of the bound (full data only).

    Example:
        >>> SVI(steps=500, batch_size=64).steps
        500
    """

    steps: int = 2000
    lr: float = 0.02
    decay: float = 0.1
    particles: int = 8
    batch_size: int | None = None
    chunk: int = 50
    evidence_draws: int = 1000

    needs = ("sites", "log_joint")
    accepts_guide = True
    accepts_loader = True

    def __post_init__(self) -> None:
        batch = 1 if self.batch_size is None else self.batch_size
        counts = (self.steps, self.particles, self.chunk, self.evidence_draws, batch)
        whole = all(isinstance(count, int) and count >= 1 for count in counts)
        if not whole or not 0 < self.lr < math.inf or not 0 < self.decay <= 1:
            raise DataError(
                "SVI: expected whole steps, particles, chunk, evidence_draws, batch_size >= 1, "
                f"0 < lr < inf and 0 < decay <= 1, got {self}"
            )

    def total(self) -> int:
        """Number of chunks."""
        return -(-self.steps // self.chunk)

    def _guide(self, problem: Problem) -> Guide:
        if problem.guide is not None:
            return problem.guide
        own = getattr(problem.model, "guide", None)
        chosen = own() if callable(own) else None
        if chosen is not None:
            return chosen
        from probkit.inference.guides import MeanField

        return MeanField()

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Make the guide's parameters."""
        data, loader = problem.data, None
        if isinstance(data, Loader):
            if self.batch_size is not None:
                raise DataError("SVI: a Loader makes its own batches; leave out batch_size=")
            data, loader = data.example, data
        elif self.batch_size is not None:
            missing = lacks(problem.model, ("plate_size", "minibatch"))
            if missing:
                raise CapabilityError(
                    f"SVI(batch_size=) needs plate_size and minibatch; "
                    f"{type(problem.model).__name__} lacks {', '.join(missing)}. Leave it out"
                )
        guide = self._guide(problem)
        local = any(site.plate is not None for site in problem.model.sites(data).values())
        model = Sized(problem.model, loader.units) if loader and local else problem.model
        params = guide.init(model, data, rng=rngs[0])
        params = map_tensors(lambda t: t.detach().clone(), params)
        if not leaves(params):
            raise CapabilityError(f"SVI: {type(guide).__name__} has no parameters to fit")
        seed = 0 if loader is None else seed_of(rngs[0])
        batch = loader.next(problem.model, seed, 0, 0)[0] if loader else Batch(data)
        values, _ = guide.sample(params, problem.model, batch, 2, rng=rngs[0])
        values = map_tensors(Tensor.detach, values)
        check_log_joint(problem.model, values, batch.data, scale=batch.scale)
        return {
            "params": params,
            "optimizer": None,
            "taken": 0,
            "feed": {"seed": seed, "epoch": 0, "position": 0, "order": None},
        }

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take ``chunk`` gradient steps."""
        guide = self._guide(problem)
        params = map_tensors(lambda t: t.detach().clone().requires_grad_(), state["params"])
        optimizer = torch.optim.Adam(
            [t for t in leaves(params) if isinstance(t, Tensor)], lr=self.lr
        )
        if state["optimizer"] is not None:
            # Adam works in place; the old state must stay as it is.
            optimizer.load_state_dict(map_tensors(Tensor.clone, state["optimizer"]))
        feed, taken = state["feed"], state["taken"]
        bounds = []
        for _ in range(min(self.chunk, self.steps - taken)):
            batch, feed = self._next_batch(problem, feed, rngs[0])
            for group in optimizer.param_groups:
                group["lr"] = self.lr * self.decay ** (taken / self.steps)
            optimizer.zero_grad()
            with torch.enable_grad():
                bound = elbo(problem.model, guide, params, batch, self.particles, rngs[0]).mean()
                (-bound).backward()
            optimizer.step()
            taken += 1
            bounds.append(float(bound.detach()))
        average = sum(bounds) / len(bounds)
        if not math.isfinite(average):
            raise DataError(
                f"SVI: the bound became {average} at step {taken}; lower lr={self.lr:g}, or check "
                "the log joint near the guide's draws"
            )
        new = {
            "params": map_tensors(Tensor.detach, params),
            "optimizer": optimizer.state_dict(),
            "taken": taken,
            "feed": feed,
        }
        return Step(new, taken >= self.steps, info={"elbo": average})

    def _next_batch(
        self, problem: Problem, feed: Mapping[str, Any], rng: torch.Generator
    ) -> tuple[Batch, Mapping[str, Any]]:
        """Take the next batch; ``feed`` tells where the pass over the data is.

        Without a loader units are taken in a random order, drawn anew for each pass.
        """
        if isinstance(problem.data, Loader):
            batch, epoch, position = problem.data.next(
                problem.model, feed["seed"], feed["epoch"], feed["position"]
            )
            return batch, {**feed, "epoch": epoch, "position": position + 1}
        if self.batch_size is None:
            return Batch(problem.data), feed
        size = problem.model.plate_size(problem.data)
        order, position = feed["order"], feed["position"]
        if order is None or position >= size:
            order, position = torch.randperm(size, generator=rng, device=rng.device), 0
        index = order[position : position + self.batch_size]
        batch = problem.model.minibatch(problem.data, index)
        return batch, {**feed, "order": order, "position": position + len(index)}

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """Any state is a fit."""
        return True

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Return the fitted guide and, on full data, its bound.

        A guide that always draws the same values (AutoDelta) is a point estimate, not a posterior:
        it becomes one draw, marked so. Where some sites are points, there is no bound.
        """
        guide = self._guide(problem)
        params = map_tensors(Tensor.detach, state["params"])
        source = Fitted(guide, [params])
        evidence = None
        from_loader = isinstance(problem.data, Loader)
        if from_loader:
            problem = replace(problem, data=problem.data.example)
        elif self.batch_size is None:
            with torch.no_grad():
                bound = elbo(
                    problem.model, guide, params, Batch(problem.data), self.evidence_draws, rngs[0]
                )
            evidence = Evidence(bound.mean(0, keepdim=True), "bound")
        if not from_loader:
            twice = source.sample(2, model=problem.model, data=problem.data, rng=rngs[0])
            points = [name for name, value in twice.items() if torch.equal(value[0], value[1])]
            if len(points) == len(twice):
                values = {name: value[:1][None] for name, value in twice.items()}
                return make_posterior(problem, Draws(values), attrs={"point_estimate": True})
            if points:
                evidence = None  # The density of a point is no density of a continuous site.
        return make_posterior(
            problem,
            source,
            marginals=source.marginals(problem.model, problem.data),
            log_evidence=evidence,
        )


def elbo(
    model: Any, guide: Guide, params: Any, batch: Batch, n: int, rng: torch.Generator
) -> Tensor:
    """Return ``n`` single-draw estimates [n] of the evidence lower bound on ``batch``.

    log p(values, batch; scale) - log q_global - scale * log q_local, values drawn from q. Its mean
    over random batches and draws is the bound on all data (Hoffman et al. 2013, section 2.4). A
    guide that has part of it in closed form gives its own, see
    :class:`~probkit.guide.HasBound`.
    """
    if isinstance(guide, HasBound):
        return guide.elbo(params, model, batch, n, rng=rng)
    values, log_q = guide.sample(params, model, batch, n, rng=rng)
    log_p = log_joint_of(model, values, batch.data, scale=batch.scale)
    return log_p - log_q.total(batch.scale)

"""Growing answers step by step, and weighing the grown ones: what all searches share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probkit.errors import NumericsWarning
from probkit.inference.smc import hooks
from probkit.posterior import Posterior, make_posterior
from probkit.sampler import Problem
from probkit.sources import Population

__all__ = ["NEEDS", "Rollout", "complete", "concluded", "grow", "ready", "select", "weighted"]

NEEDS = ("sites", "steps", "start", "extend", "finished", "reward")

Rollout = Mapping[str, Any]
"""``t``, ``particles``, ``tokens`` (generated so far), ``spent`` (by the model's meter) and
``stopped`` (why, in words): a tree, so that samplers can carry it in their state."""


def ready(model: Any, n: int, data: Any, rng: torch.Generator) -> dict[str, Any]:
    """Return ``n`` answers before their first step."""
    particles = list(model.start(n, data, rng=rng))
    return {"t": 0, "particles": particles, "tokens": 0, "spent": {}, "stopped": ""}


def grow(model: Any, rollout: Rollout, data: Any, rng: torch.Generator) -> dict[str, Any]:
    """Take one step with every answer that goes on, unless a budget of the model is used up."""
    stopped = hooks.exhausted(model, rollout["spent"])
    if stopped is not None:
        return {**rollout, "stopped": stopped}
    before = hooks.metered(model)
    with torch.no_grad():
        new = list(model.extend(rollout["t"], rollout["particles"], data, rng=rng))
    cost = hooks.spent_since(model, before)
    spent = {name: rollout["spent"].get(name, 0) + value for name, value in cost.items()}
    drawn = _tokens(model, new) - _tokens(model, rollout["particles"])
    return {
        **rollout,
        "t": rollout["t"] + 1,
        "particles": new,
        "tokens": rollout["tokens"] + drawn,
        "spent": spent,
        "stopped": hooks.exhausted(model, spent) or "",
    }


def complete(model: Any, rollout: Rollout, data: Any) -> bool:
    """Tell whether no answer goes on."""
    used_up = bool(rollout["stopped"]) or rollout["t"] >= model.steps(data)
    return used_up or hooks.all_finished(model, rollout["particles"])


def _tokens(model: Any, particles: Sequence[Any]) -> int:
    """Generated tokens of all answers, where the model describes them."""
    describe = getattr(model, "describe", None)
    return int(sum(describe(particles).get("n_tokens", ()))) if callable(describe) else 0


def select(log_rewards: Tensor, finished: Tensor, *, weighted: bool) -> Tensor:
    """Return normalised log weights of answers, [n].

    Only finished answers can be chosen, unless none of positive reward is finished.

    Args:
        log_rewards: [n].
        finished: [n].
        weighted: Weights proportional to the reward; else all weight on the best, the first of
            equals. Equal weights where every reward is zero.

    Example:
        >>> rewards = torch.tensor([0.2, 0.6, 0.9]).log()
        >>> done = torch.tensor([True, True, False])
        >>> select(rewards, done, weighted=True).exp()
        tensor([0.2500, 0.7500, 0.0000])
        >>> select(rewards, done, weighted=False).exp()
        tensor([0., 1., 0.])
    """
    open_to = torch.isfinite(log_rewards) & finished
    if not bool(open_to.any()):
        open_to = torch.isfinite(log_rewards)
    if not bool(open_to.any()):
        return torch.full_like(log_rewards, 1.0 / len(log_rewards)).log()
    among = log_rewards.masked_fill(~open_to, -torch.inf)
    if weighted:
        return torch.log_softmax(among, -1)
    best = torch.full_like(among, -torch.inf)
    best[int(among.argmax())] = 0.0
    return best


def weighted(
    problem: Problem, rollout: Rollout, log_weights: Tensor, size: int, **stats: Tensor
) -> Posterior:
    """Make the posterior of one chain.

    ``attrs["stopped"]`` says how it ended (empty where there is nothing to say) and
    ``attrs["usage"]`` what it has cost, with an entry for each chain.

    Args:
        problem: The problem.
        rollout: The grown answers.
        log_weights: Of the answers, [answer], normalised.
        size: Number of particles of every chain; missing ones repeat the first answer, with weight
            zero.
        stats: Further statistics, [chain=1, *].
    """
    particles, model = list(rollout["particles"]), problem.model
    missing = size - len(particles)
    padded = particles + particles[:1] * missing
    log_weights = torch.cat([log_weights, log_weights.new_full((missing,), -torch.inf)])
    finished = torch.tensor(list(model.finished(padded)), dtype=torch.bool)
    return make_posterior(
        problem,
        Population([padded], log_weights.unsqueeze(0)),
        sample_stats={
            "log_reward": model.reward(padded).double().unsqueeze(0),
            "finished": finished.unsqueeze(0),
            "completion_tokens": torch.tensor([rollout["tokens"]]),
            **stats,
        },
        stat_dims={"log_reward": ("particle",), "finished": ("particle",)},
        attrs={
            "stopped": (rollout["stopped"] or hooks.state_of(model, rollout["particles"]),),
            **({"usage": (dict(rollout["spent"]),)} if rollout["spent"] else {}),
        },
    )


def concluded(posterior: Posterior) -> Posterior:
    """Warn where no answer deserved to be chosen."""
    barren = torch.isneginf(posterior.sample_stats["log_reward"]).all(-1)
    if bool(barren.any()):
        warnings.warn(
            f"in {int(barren.sum())} of {posterior.chains} chains no answer has a reward above "
            "zero, so that the choice says nothing: use a particle filter, a softer potential, or "
            "more answers",
            NumericsWarning,
            stacklevel=4,
        )
    return posterior

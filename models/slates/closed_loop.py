"""Closed loop: a policy chooses the slates, and its own clicks train the next round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.models.slates.guide import SlateMeanField
from probkit.models.slates.log import SlateLog
from probkit.models.slates.metrics import distinct_groups
from probkit.models.slates.model import SlateGRU
from probkit.models.slates.policies import SlatePolicy, recommend
from probkit.models.slates.simulator import MarketPlace
from probkit.rng import Rng, seed_of, stream
from probkit.sources import Fitted

if TYPE_CHECKING:
    from probkit.inference import SVI
    from probkit.posterior import Posterior

__all__ = ["LoopResult", "Refit", "closed_loop"]

Learner = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class LoopResult:
    """What happened in a closed loop.

    Attributes:
        clicks: Clicks in each round [round].
        click_rate: Expected click rate of the slates shown, from the true states [round].
        best_rate: Expected click rate of the best slates at the same states [round].
        groups: Mean number of groups in a slate [round].
        log: Everything that was shown and clicked.
        posterior: The last posterior.
    """

    clicks: Tensor
    click_rate: Tensor
    best_rate: Tensor
    groups: Tensor
    log: SlateLog
    posterior: Posterior

    @property
    def regret(self) -> Tensor:
        """Clicks per user that were expected to be missed, in total after each round [round]."""
        return (self.best_rate - self.click_rate).cumsum(0)


@dataclass(frozen=True, eq=False)
class Refit:
    """Fit the model to the whole log, starting where the last fit ended.

    Args:
        model: The model.
        first: Sampler of the first fit.
        then: Sampler of later fits, which need fewer steps.
        guide: The guide.
    """

    model: SlateGRU
    first: SVI
    then: SVI
    guide: SlateMeanField = SlateMeanField(users="table")

    def __call__(self, log: SlateLog, last: Posterior | None, *, rng: Rng) -> Posterior:
        """Return the posterior given ``log``; ``last`` is the one of the round before."""
        from probkit.driver import infer

        if last is None or not isinstance(last.source, Fitted):
            return infer(self.model, log, self.first, guide=self.guide, rng=rng)
        warm = replace(self.guide, start=last.source.params[0])
        return infer(self.model, log, self.then, guide=warm, rng=rng)


def closed_loop(
    place: MarketPlace,
    policy: SlatePolicy | Sequence[SlatePolicy],
    learn: Learner,
    *,
    rounds: int,
    size: int,
    start: SlateLog,
    candidates: Any = None,
    rng: Rng,
    report: Callable[[int, float], None] | None = None,
) -> LoopResult:
    """Show every user one slate a round, and learn from the clicks before the next round.

    Args:
        place: The market place; its users answer.
        policy: The policy, or one for each round (the last stays).
        learn: ``learn(log, last, rng=)`` returns the posterior given the log so far; ``last`` is
            the posterior of the round before, None at first. See :class:`Refit`.
        rounds: Rounds.
        size: Items in a slate.
        start: The log before the first round, of the same users.
        candidates: Items that may be shown, see :func:`recommend`.
        rng: Source of randomness; the users' answers have a stream of their own.
        report: Called with the round and its click rate.

    Raises:
        DataError: The log is not of the market place's users, or holds fewer than one step.
    """
    if start.users != place.users or start.slots != size + 1:
        raise DataError(
            f"closed_loop: expected a first log of {place.users} users and slates of {size} items, "
            f"got {start.users} users and {start.slots - 1} items"
        )
    if rounds < 1:
        raise DataError(f"closed_loop: expected rounds >= 1, got {rounds}")
    seed = seed_of(rng)
    answers = stream(seed, "answers")
    policies = [policy] if not isinstance(policy, Sequence) else list(policy)
    slates, slots = start.slate[..., 1:].long(), start.click_idx.long()
    state = place.states(start.click.long())[:, -1]
    post, log = None, start
    rows: list[tuple[float, float, float, float]] = []
    for number in range(rounds):
        post = learn(log, post, rng=stream(seed, "learn", number))
        now = policies[min(number, len(policies) - 1)]
        shown = recommend(
            post,
            log,
            size,
            now,
            candidates=candidates,
            users=torch.arange(place.users),
            propensity_draws=0,
            rng=stream(seed, "choose", number),
        ).ids
        slot = place.respond(state, shown, rng=answers)
        rate = float(place.click_probability(state, shown).mean())
        best = float(place.click_probability(state, place.best(state, size)).mean())
        diversity = float(distinct_groups(shown, place.groups).double().mean())
        rows.append((float((slot > 0).sum()), rate, best, diversity))
        state = place.moved(state, shown, slot)
        slates = torch.cat([slates, shown[:, None]], 1)
        slots = torch.cat([slots, slot[:, None]], 1)
        log = place.as_log(slates, slots)
        if report is not None:
            report(number, rate)
    assert post is not None  # rounds >= 1
    clicks, rates, bests, groups = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return LoopResult(clicks, rates, bests, groups, log, post)

"""Closed loop: a policy chooses the slates, and its own clicks train the next round."""

from __future__ import annotations

from collections.abc import Callable
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

__all__ = ["LoopResult", "Refit", "closed_loop", "newcomer_loop"]

Learner = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class LoopResult:
    """What happened in a closed loop.

    Attributes:
        clicks: Clicks in each round [round].
        click_rate: Expected click rate of the slates shown, from the true states [round].
        best_rate: Expected click rate of the best slates on offer at the same states [round].
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
    policy: SlatePolicy,
    learn: Learner,
    *,
    rounds: int,
    size: int,
    start: SlateLog,
    candidates: Any = None,
    rng: Rng,
    report: Callable[[int, float], None] | None = None,
) -> LoopResult:
    """Show the same users one slate a round, and learn from all clicks before the next round.

    Args:
        place: The market place; its users answer.
        policy: The policy.
        learn: ``learn(log, last, rng=)`` returns the posterior given the log so far; ``last`` is
            the posterior of the round before, None at first. See :class:`Refit`.
        rounds: Rounds.
        size: Items in a slate.
        start: The log before the first round, of the same users.
        candidates: Items that may be shown, see :func:`recommend`; a function of the round where
            items come and go, such as :meth:`MarketPlace.arrivals` makes.
        rng: Source of randomness; the users' answers have a stream of their own.
        report: Called with the round and its click rate.

    Raises:
        DataError: The log is not of the market place's users.
    """
    _check(rounds, size, start)
    if start.users != place.users:
        raise DataError(
            f"closed_loop: expected a first log of the {place.users} users of the market place, "
            f"got {start.users}"
        )
    seed = seed_of(rng)
    answers = stream(seed, "answers")
    visit = _Visit(place, policy, size, candidates, answers)
    state = place.states(start.click.long())[:, -1]
    post, log, rows = None, start, []
    for number in range(rounds):
        post = learn(log, post, rng=stream(seed, "learn", number))
        users = torch.arange(place.users)
        rng_round = stream(seed, "choose", number)
        shown, slot, row = visit(post, log, users, state, number, rng_round)
        state = place.moved(state, shown, slot)
        slates = torch.cat([log.slate[..., 1:].long(), shown[:, None]], 1)
        log = place.as_log(slates, torch.cat([log.click_idx.long(), slot[:, None]], 1))
        rows.append(row)
        if report is not None:
            report(number, row[1])
    return _result(rows, log, post)


def newcomer_loop(
    place: MarketPlace,
    policy: SlatePolicy,
    learn: Learner,
    *,
    rounds: int,
    size: int,
    start: SlateLog,
    candidates: Any = None,
    rng: Rng,
    report: Callable[[int, float], None] | None = None,
) -> LoopResult:
    """Serve new users in every round, and learn from all clicks before the next ones come.

    A round's users come once, without a history, and see as many slates as there are steps in the
    first log. What a policy learns of items, it learns from what it dares to show to strangers.

    Args:
        place: The market place: users of the first log, then equal shares for the rounds.
        policy: The policy.
        learn: As for :func:`closed_loop`; the guide must serve users it has not seen.
        rounds: Rounds.
        size: Items in a slate.
        start: The log before the first round, of the first users.
        candidates: Items that may be shown, see :func:`recommend`; a function of the round where
            items come and go, such as :meth:`MarketPlace.arrivals` makes.
        rng: Source of randomness; the users' answers have a stream of their own.
        report: Called with the round and its click rate.

    Raises:
        DataError: The users that are left cannot be shared among the rounds.
    """
    _check(rounds, size, start)
    cohort, rest = divmod(place.users - start.users, rounds)
    if cohort < 1 or rest:
        raise DataError(
            f"newcomer_loop: expected the users after the first {start.users} to be a multiple of "
            f"rounds={rounds}, got {place.users - start.users}"
        )
    seed = seed_of(rng)
    visit = _Visit(place, policy, size, candidates, stream(seed, "answers"))
    post, log, rows = None, start, []
    for number in range(rounds):
        post = learn(log, post, rng=stream(seed, "learn", number))
        first = start.users + number * cohort
        state = place.start[first : first + cohort]
        slates, slots = [], []
        history = _strangers(cohort, size, log)
        for step in range(start.steps):
            rng_step = stream(seed, "choose", number, step)
            shown, slot, row = visit(post, history, None, state, number, rng_step)
            state = place.moved(state, shown, slot)
            slates.append(shown)
            slots.append(slot)
            history = place.as_log(torch.stack(slates, 1), torch.stack(slots, 1))
            rows.append(row)
        log = log.joined(history)
        if report is not None:
            report(number, sum(row[1] for row in rows[-start.steps :]) / start.steps)
    per_round = [
        _joined(rows[first : first + start.steps]) for first in range(0, len(rows), start.steps)
    ]
    return _result(per_round, log, post)


# ---------------------------------------------------------------- one visit

_Row = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class _Visit:
    """Show one slate to each user and draw the answers."""

    place: MarketPlace
    policy: SlatePolicy
    size: int
    candidates: Any
    answers: torch.Generator

    def __call__(
        self,
        post: Posterior,
        history: SlateLog,
        users: Tensor | None,
        state: Tensor,
        number: int,
        rng: torch.Generator,
    ) -> tuple[Tensor, Tensor, _Row]:
        """Return slates [user, slot], slots clicked [user] and the figures of the visit."""
        place, size = self.place, self.size
        offered = self.candidates(number) if callable(self.candidates) else self.candidates
        shown = recommend(
            post,
            history,
            size,
            self.policy,
            candidates=offered,
            users=users,
            propensity_draws=0,
            rng=rng,
        ).ids
        slot = place.respond(state, shown, rng=self.answers)
        row = (
            float((slot > 0).sum()),
            float(place.click_probability(state, shown).mean()),
            float(place.click_probability(state, place.best(state, size, offered)).mean()),
            float(distinct_groups(shown, place.groups).double().mean()),
        )
        return shown, slot, row


def _strangers(users: int, size: int, like: SlateLog) -> SlateLog:
    """Users without a history."""
    return SlateLog(
        torch.zeros(users, 1, size + 1).long(),
        torch.zeros(users, 1).long(),
        groups=like.groups,
        n_items=like.n_items,
        check=False,
    )


def _joined(rows: list[_Row]) -> _Row:
    """One row from those of a round: clicks add up, the rest is averaged."""
    clicks, *others = zip(*rows, strict=True)
    rate, best, groups = (sum(values) / len(rows) for values in others)
    return sum(clicks), rate, best, groups


def _check(rounds: int, size: int, start: SlateLog) -> None:
    if rounds < 1 or start.slots != size + 1:
        raise DataError(
            f"closed loop: expected rounds >= 1 and a first log with slates of {size} items, got "
            f"rounds={rounds} and {start.slots - 1} items"
        )


def _result(rows: list[_Row], log: SlateLog, post: Posterior | None) -> LoopResult:
    assert post is not None  # rounds >= 1
    clicks, rates, bests, groups = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return LoopResult(clicks, rates, bests, groups, log, post)

"""Closed loops: the bookkeeping is that of a market place, and what is learned helps."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from probkit.errors import DataError
from probkit.inference import SVI
from probkit.models.slates import (
    Greedy,
    InSlateThompson,
    Random,
    Refit,
    SlateGRU,
    SlateMeanField,
    SlatePrior,
    closed_loop,
    draw_market_place,
    newcomer_loop,
)
from probkit.models.slates.item_law import UNKNOWN

pytestmark = pytest.mark.usefixtures("unchanged_global_state")


def refit(log, steps, *, users="table"):
    prior = SlatePrior(
        group_mean=3.0, log_group_scale=(-1.0, 1.0), user=2.5, no_click=3.0, logit_gamma=(0.0, 2.0)
    )
    model = SlateGRU(
        log.n_items, groups=log.groups, transition="linear", dim=2, prior=prior, length_bias=False
    )
    first, then = (SVI(steps=n, lr=0.05, particles=1, evidence_draws=1) for n in (4 * steps, steps))
    return Refit(model, first, then, SlateMeanField(users=users))


def test_every_round_adds_one_step_of_every_user():
    place = draw_market_place(users=12, items=20, groups=4, rng=0)
    start = place.log(2, 3, optimal=0.0, rng=0)
    seen = []
    learner = refit(start, 3)

    def learn(log, last, *, rng):
        seen.append((log.steps, last is None))
        return learner(log, last, rng=rng)

    found = closed_loop(place, InSlateThompson(), learn, rounds=3, size=3, start=start, rng=1)
    assert seen == [(2, True), (3, False), (4, False)]
    assert found.log.slate.shape == (12, 5, 4)
    assert torch.equal(found.log.slate[:, :2], start.slate)
    assert torch.equal(found.clicks, (found.log.click[:, 2:] > 2).sum(0).double())
    states = place.states(found.log.click)
    for k in range(3):
        shown = found.log.slate[:, 2 + k, 1:]
        rate = place.click_probability(states[:, 2 + k], shown).mean()
        assert float(found.click_rate[k]) == pytest.approx(float(rate), abs=1e-6)
    assert (found.best_rate >= found.click_rate).all()
    assert (found.regret.diff() >= 0).all()
    again = closed_loop(place, InSlateThompson(), learner, rounds=3, size=3, start=start, rng=1)
    assert torch.equal(found.log.click, again.log.click)


def test_items_arrive():
    """Only what is on offer is shown, and regret counts what is on offer."""
    place = draw_market_place(users=12, items=20, groups=4, rng=0)
    offered = place.arrivals(6, 4, rng=0)
    pools = [set(offered(k).tolist()) for k in range(4)]
    assert [len(pool) for pool in pools] == [6, 11, 15, 20]
    assert all(early < late for early, late in itertools.pairwise(pools))
    assert torch.equal(offered(9), place.real_items)
    grown = place.arrivals(5, 4, by_group=True, rng=0)(1)
    shares = [(place.groups[grown] == g).sum() / (place.groups == g).sum() for g in range(3, 7)]
    assert sum(0 < float(share) < 1 for share in shares) <= 1  # Group after group.
    start = place.log(2, 3, optimal=0.0, rng=0)
    found = closed_loop(
        place,
        InSlateThompson(),
        refit(start, 3),
        rounds=4,
        size=3,
        start=start,
        candidates=offered,
        rng=1,
    )
    states = place.states(found.log.click)
    for k, pool in enumerate(pools):
        assert set(found.log.slate[:, 2 + k, 1:].flatten().tolist()) <= pool
        best = place.best(states[:, 2 + k], 3, offered(k))
        rate = place.click_probability(states[:, 2 + k], best).mean()
        assert float(found.best_rate[k]) == pytest.approx(float(rate), abs=1e-6)
    with pytest.raises(DataError, match="expected 1 <= first <= 20 items"):
        place.arrivals(21, 4, rng=0)


def test_items_that_join_a_fit_begin_near_their_group():
    """A warm start: items that nobody had seen begin at the group, the others where they were."""
    place = draw_market_place(users=12, items=20, groups=4, rng=0)
    few, all_of_them = place.log(1, 2, optimal=0.0, rng=0), place.log(9, 5, optimal=0.0, rng=1)
    learner = refit(few, 3)
    first = learner(few, None, rng=0).source.params[0]["items"]
    unknown = (first["log_scale"] == UNKNOWN).all(1)
    assert torch.equal(unknown[3:], few.exposure()[3:] == 0)
    guide = dataclasses.replace(learner.guide, start={"items": first})
    second = guide.init(learner.model, all_of_them, rng=0)["items"]
    joined = unknown & (all_of_them.exposure() > 0) & (torch.arange(23) >= 3)
    assert bool(joined.any())
    assert (second["log_scale"][joined] < 3).all()
    assert torch.equal(second["loc"][~unknown], first["loc"][~unknown])


def test_newcomers_are_served_once():
    place = draw_market_place(users=18, items=20, groups=4, rng=0)
    first = dataclasses.replace(place, start=place.start[:6])
    start = first.log(2, 3, optimal=0.0, rng=0)
    learner = refit(start, 3, users="amortised")
    found = newcomer_loop(place, Greedy(), learner, rounds=3, size=3, start=start, rng=1)
    assert found.log.slate.shape == (18, 2, 4)
    assert torch.equal(found.log.slate[:6], start.slate)
    clicks = (found.log.click[6:] > 2).sum(1).reshape(3, 4).sum(1)
    assert torch.equal(found.clicks, clicks.double())
    # Nobody has a history at first, so that greed shows all users of a round the same slate.
    for cohort in found.log.slate[6:, 0].split(4):
        assert (cohort == cohort[:1]).all()


@pytest.mark.slow
def test_learning_from_clicks_beats_chance():
    place = draw_market_place(users=60, items=60, groups=8, rng=0)
    start = place.log(2, 5, optimal=0.0, rng=0)
    learner = refit(start, 150)
    greedy = closed_loop(place, Greedy(), learner, rounds=16, size=5, start=start, rng=1)
    random = closed_loop(place, Random(), refit(start, 1), rounds=16, size=5, start=start, rng=1)
    # Click rates of 60 users: a standard error below 0.065 a round, 0.03 over the last four.
    assert greedy.click_rate[-4:].mean() > random.click_rate[-4:].mean() + 4 * 0.03


def test_bad_input():
    place = draw_market_place(users=7, items=20, groups=4, rng=0)
    start = dataclasses.replace(place, start=place.start[:3]).log(2, 3, rng=0)
    learner = refit(start, 3)
    for call, text in (
        (
            lambda: closed_loop(place, Greedy(), learner, rounds=2, size=3, start=start, rng=0),
            "7 users",
        ),
        (
            lambda: closed_loop(place, Greedy(), learner, rounds=0, size=3, start=start, rng=0),
            "rounds >= 1",
        ),
        (
            lambda: newcomer_loop(place, Greedy(), learner, rounds=2, size=2, start=start, rng=0),
            "slates of 2 items",
        ),
        (
            lambda: newcomer_loop(place, Greedy(), learner, rounds=3, size=3, start=start, rng=0),
            "multiple of rounds=3, got 4",
        ),
    ):
        with pytest.raises(DataError, match=text):
            call()

"""Policies: the laws of bandits that can be computed, propensities, candidates, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.slate_fits import bandit, walk

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.models.slates import SlateLog, draw_parameters, plug_in_parameters
from probkit.models.slates.policies import (
    EpsilonGreedy,
    Greedy,
    InSlateThompson,
    Popularity,
    Random,
    Thompson,
    recommend,
    slate_propensities,
    slot_marginals,
)
from probkit.posterior import Context, Evidence, Posterior
from probkit.sources import Draws, Fitted

pytestmark = pytest.mark.usefixtures("unchanged_global_state")

MEANS, SDS = [1.0, 0.5, 0.0], [0.1, 0.5, 1.0]
FIRST = torch.tensor([0.7040, 0.1448, 0.1511])
PAIRS = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
IN_SLATE = torch.tensor([0.4736, 0.2305, 0.1217, 0.0232, 0.1264, 0.0247])
THOMPSON = torch.tensor([0.5284, 0.1762, 0.1359, 0.0087, 0.1325, 0.0185])


@pytest.mark.parametrize("draws", [30_000, pytest.param(200_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("policy", "law"),
    [
        (InSlateThompson(), IN_SLATE),
        (InSlateThompson("rank_major"), IN_SLATE),
        (Thompson(), THOMPSON),
    ],
)
def test_the_law_of_a_small_bandit(policy, law, draws):
    """Ordered pairs from three items with independent normal scores."""
    post = bandit(MEANS, SDS, draws)
    tolerance = 4 * (0.2 / draws) ** 0.5  # four standard errors; 0.004 at 200,000 draws
    ids = recommend(
        post,
        torch.zeros(draws, 1).long(),
        2,
        policy,
        users=torch.arange(draws),
        propensity_draws=0,
        rng=0,
    ).ids
    counts = torch.bincount((ids[:, 0] - 3) * 3 + ids[:, 1] - 3, minlength=9) / draws
    found = torch.stack([counts[3 * a + b] for a, b in PAIRS])
    assert (found - law).abs().max() < tolerance
    assert (torch.bincount(ids[:, 0] - 3) / draws - FIRST).abs().max() < tolerance


def test_the_two_variants_differ_in_the_third_slot():
    """The law of rank-major slates of three, from the same scores drawn by hand."""
    users = 20_000
    post = bandit([1.0, 0.9, 0.5, 0.0], [0.1, 0.6, 0.5, 1.0], users)
    g = torch.Generator().manual_seed(5)
    drawn = torch.randn(users, 3, 4, generator=g) * torch.tensor([0.1, 0.6, 0.5, 1.0])
    order = (drawn + torch.tensor([1.0, 0.9, 0.5, 0.0])).argsort(dim=2, descending=True)
    by_hand = {"independent": [], "rank_major": []}
    for lists in order.tolist():
        chosen = []
        for one in lists:
            chosen.append(next(i for i in one if i not in chosen))
        by_hand["independent"].append(chosen[2])
        merged = [one[rank] for rank in range(4) for one in lists]
        by_hand["rank_major"].append(list(dict.fromkeys(merged))[2])
    history = torch.zeros(users, 1).long()
    laws = {}
    for variant, expected in by_hand.items():
        ids = recommend(
            post,
            history,
            3,
            InSlateThompson(variant),
            users=torch.arange(users),
            propensity_draws=0,
            rng=1,
        ).ids
        laws[variant] = torch.bincount(ids[:, 2] - 3, minlength=4) / users
        hand = torch.bincount(torch.tensor(expected), minlength=4) / len(expected)
        error = (0.25 / users + 0.25 / len(expected)) ** 0.5
        assert (laws[variant] - hand).abs().max() < 4 * error
    assert (laws["independent"] - laws["rank_major"]).abs().max() > 0.02


@pytest.mark.parametrize(("policy", "law"), [(InSlateThompson(), IN_SLATE), (Thompson(), THOMPSON)])
def test_propensities_are_conditional_probabilities(policy, law):
    """Of all six slates; their products sum to one."""
    post = bandit(MEANS, SDS, 6)
    slates = torch.tensor(PAIRS) + 3
    found = slate_propensities(
        post, torch.zeros(6, 1).long(), slates, policy, users=torch.arange(6), draws=20_000, rng=0
    )
    error = 4 * (0.25 / 20_000) ** 0.5
    head = FIRST[slates[:, 0] - 3].double()
    assert (found[:, 0] - head).abs().max() < error
    # The second share is of the draws with the first: 0.14 of 20,000 for the rarest.
    assert (found[:, 1] - law.double() / head).abs().max() < error / 0.14**0.5
    assert found.prod(1).sum() == pytest.approx(1, abs=0.02)


def test_a_slate_counts_as_one_draw_of_its_own_propensity():
    """So that a logged propensity is never zero."""
    post = bandit([0.0] * 30, [1.0] * 30, 200)
    history, users = torch.zeros(200, 1).long(), torch.arange(200)
    for policy in (Thompson(), InSlateThompson(), InSlateThompson("rank_major")):
        found = recommend(post, history, 3, policy, users=users, propensity_draws=10, rng=0)
        assert found.propensity.min() >= 1 / 11 - 1e-9
        assert found.propensity.max() <= 1


def test_closed_form_propensities():
    post = bandit([2.0, 1.0, 0.0], [0.1] * 3, 4)
    history, users = torch.zeros(4, 1).long(), torch.arange(4)
    slates = torch.tensor([[3, 4], [3, 5], [4, 3], [5, 4]])

    def of(policy):
        return slate_propensities(post, history, slates, policy, users=users, draws=1, rng=0)

    assert of(Greedy()).tolist() == [[1, 1], [1, 0], [0, 0], [0, 1]]
    assert torch.allclose(of(Random()), torch.tensor([1 / 3, 1 / 2]).double().expand(4, 2))
    e = 0.3
    # The best item left: 3 at first, then the best of the other two.
    best = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]], dtype=torch.float64)
    expected = (1 - e) * best + e * torch.tensor([1 / 3, 1 / 2], dtype=torch.float64)
    assert torch.allclose(of(EpsilonGreedy(e)), expected)


@pytest.mark.parametrize("policy", [EpsilonGreedy(0.4), Random()])
def test_closed_form_propensities_are_those_of_the_choices(policy):
    users = 4000
    post = bandit([2.0, 1.0, 0.0], [0.1] * 3, users)
    history = torch.zeros(users, 1).long()
    found = recommend(post, history, 2, policy, users=torch.arange(users), rng=3)
    for a, b in itertools.permutations(range(3), 2):
        mine = (found.ids == torch.tensor([a + 3, b + 3])).all(1)
        stated = float(found.propensity[mine].prod(1).mean())
        assert float(mine.double().mean()) == pytest.approx(stated, abs=4 * (0.25 / users) ** 0.5)


@pytest.mark.parametrize(
    "policy", [Greedy(), Thompson(), InSlateThompson(), EpsilonGreedy(), Random()]
)
@pytest.mark.parametrize("transition", ["linear", "gru", "markov"])
def test_users_do_not_depend_on_each_other(policy, transition):
    """The same user at the same place gets the same slate, whoever else is served."""
    post, log = walk(transition=transition)
    full = recommend(post, log, 4, policy, rng=7)
    again = recommend(post, log, 4, policy, rng=7)
    assert torch.equal(full.ids, again.ids)
    assert torch.equal(full.propensity, again.propensity)
    some = recommend(post, log[:2], 4, policy, rng=7)
    assert torch.equal(some.ids, full.ids[:2])
    assert torch.allclose(some.propensity, full.propensity[:2])
    assert (full.ids.sort(1).values.diff(dim=1) > 0).all()  # No item twice.
    assert (full.ids >= 3).all()


def test_thompson_draws_are_the_posterior():
    """Shares of first items agree with draws of all sites by the guide itself."""
    post, log = walk(users="amortised", sd=1.0)
    model, n = post.model, 2000
    values = post.sample(n, rng=0)
    state = model.states(values, log).read[:, :, -1]
    score = -(state[:, :, None] - values["items"][:, None]).square().sum(-1).sqrt()
    score[..., :3] = -torch.inf
    expected = torch.stack(
        [torch.bincount(score[:, u].argmax(-1), minlength=model.n_items) for u in range(len(log))]
    )
    found = slot_marginals(post, log, 1, Thompson(), draws=n, rng=1)[:, 0] * n
    z = (found - expected) / (found + expected).clamp_min(1).sqrt()
    assert z.abs().max() < 4.5  # 240 shares


def test_a_clicked_item_has_one_vector_in_a_draw():
    """Under the Markov transition the state is the clicked item's own vector, its score 0."""
    post, log = walk(transition="markov", score="l2", sd=2.0)
    rows = [[int(i)] for i in log.click[:, 0].clamp_min(3)]
    found = recommend(post, rows, 1, Thompson(), propensity_draws=0, rng=0)
    assert found.ids[:, 0].tolist() == [row[0] for row in rows]
    assert found.scores.abs().max() <= 1e-4
    other = recommend(post, rows, 1, Thompson(), exclude="clicked", propensity_draws=0, rng=0)
    assert not any(row[0] == int(i) for row, i in zip(rows, other.ids[:, 0], strict=True))


def test_candidates_and_exclusions():
    post, log = walk()
    pool = torch.tensor([9, 4, 30, 17, 17])
    out = torch.tensor([9, 0])
    for policy in (
        Greedy(),
        Thompson(),
        InSlateThompson(),
        EpsilonGreedy(),
        Random(),
        Popularity(),
    ):
        found = recommend(post, log, 3, policy, candidates=pool, exclude=out, rng=0)
        assert {4, 30, 17} == set(found.ids.flatten().tolist())
        mask = torch.zeros(43, dtype=torch.bool).index_fill_(0, pool, True)
        same = recommend(post, log, 3, policy, candidates=mask, exclude=out, rng=0)
        assert torch.equal(same.ids, found.ids)
    each = torch.arange(3, 9)[:, None]
    found = recommend(post, log, 40 - 1, Random(), exclude=each, rng=0)
    assert not (found.ids == each).any()


def test_popularity_counts_training_clicks():
    post, log = walk()
    best = log.clicks()[3:].argsort(descending=True, stable=True)[:3] + 3
    found = recommend(post, log, 3, Popularity(), rng=0)
    assert (found.ids == best).all()
    assert torch.equal(found.scores[0], log.clicks()[best].double())


def test_temperature_scales_the_spread():
    post, log = walk(sd=1.0)
    cold = recommend(post, log, 5, Thompson(temperature=1e-8), propensity_draws=0, rng=0)
    assert torch.equal(cold.ids, recommend(post, log, 5, Greedy(), rng=0).ids)


def test_draws_of_any_sampler_will_do():
    """A posterior of stored draws, without a guide: shares agree with the draws themselves."""
    post, log = walk(sd=1.0)
    values = post.sample(64, rng=0)
    drawn = Posterior(
        Draws({name: value[None] for name, value in values.items()}), post.model, Context(log)
    )
    found = recommend(drawn, log, 3, InSlateThompson(), rng=0)
    assert found.ids.shape == (6, 3)
    greedy = recommend(drawn, log, 3, Greedy(), rng=0)
    mean = {name: value.mean(0, keepdim=True) for name, value in drawn.sample(256, rng=0).items()}
    state = post.model.states(mean, log).read[0, :, -1]
    score = -(state[:, None] - mean["items"]).square().sum(-1).sqrt()
    score[:, :3] = -torch.inf
    assert torch.equal(greedy.ids, score.topk(3).indices)
    with pytest.raises(CapabilityError, match="cannot be tempered"):
        recommend(drawn, log, 3, Thompson(temperature=2.0), rng=0)


def test_draws_come_from_all_fits():
    """Two fits that disagree: half of the users are served from each, greed takes the better."""
    one, two = bandit([3.0, 0.0], [0.1] * 2, 400), bandit([0.0, 3.0], [0.1] * 2, 400)
    both = Fitted(one.source.guide, [one.source.params[0], two.source.params[0]])
    bound = Evidence(torch.tensor([-2.0, -1.0]), "bound")
    post = Posterior(both, one.model, one.context, log_evidence=bound)
    history, users = torch.zeros(400, 1).long(), torch.arange(400)
    for policy in (Thompson(), InSlateThompson()):
        found = recommend(post, history, 1, policy, users=users, propensity_draws=0, rng=0).ids
        assert abs(float((found == 3).double().mean()) - 0.5) < 4 * 0.5 / 20
    best = recommend(post, history, 1, Greedy(), users=users, rng=0).ids
    assert (best == 4).all()
    drawn = draw_parameters(post, 400, rng=0)
    first = drawn.items(torch.tensor([3, 4]))[..., 0]
    high = first > 1.5
    assert (high[:, 0] != high[:, 1]).all()
    assert abs(float(high[:, 0].double().mean()) - 0.5) < 4 * 0.5 / 20
    assert float(plug_in_parameters(post).items(torch.tensor([4]))) == pytest.approx(3.0, abs=1e-3)


def test_a_history_may_be_clicked_ids():
    post, _ = walk()
    lists = recommend(post, [[5, 1, 9], []], 3, Greedy(), rng=0)
    clicks = torch.tensor([[5, 1, 9], [0, 0, 0]])
    assert torch.equal(lists.ids, recommend(post, clicks, 3, Greedy(), rng=0).ids)
    log = SlateLog(
        [[[1, 5], [1, 7], [1, 9]], [[0, 0]] * 3], [[5, 1, 9], [0, 0, 0]], n_items=43, check=False
    )
    assert torch.equal(lists.ids, recommend(post, log, 3, Greedy(), rng=0).ids)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda p, h: recommend(p, h, 41, rng=0), DataError, "size=41 and 40 candidates"),
        (
            lambda p, h: recommend(p, h, 40, exclude="clicked", rng=0),
            DataError,
            "candidates after exclusions",
        ),
        (lambda p, h: recommend(p, h, 0, rng=0), DataError, "whole number size >= 1"),
        (lambda p, h: recommend(p, h, 2, candidates=[2], rng=0), DataError, "3..42, got 2"),
        (
            lambda p, h: recommend(p, h, 2, candidates=[], rng=0),
            DataError,
            "at least one candidate",
        ),
        (
            lambda p, h: recommend(p, h, 2, candidates=torch.ones(5).bool(), rng=0),
            ShapeError,
            r"mask candidates \[item=43\]",
        ),
        (lambda p, h: recommend(p, h, 2, exclude="all", rng=0), DataError, "exclude 'clicked'"),
        (
            lambda p, h: recommend(p, h, 2, exclude=[[3]], rng=0),
            ShapeError,
            r"\[user=6, excluded\]",
        ),
        (lambda p, h: recommend(p, h, 2, exclude=[99], rng=0), DataError, r"in \[0, n_items=43\)"),
        (
            lambda p, h: recommend(p, h, 2, propensity_draws=-1, rng=0),
            DataError,
            "propensity_draws",
        ),
        (lambda p, h: recommend(p, [[99]], 2, rng=0), DataError, "got 99 for user 0 at step 0"),
        (lambda p, h: recommend(p, "ann", 2, rng=0), DataError, "ids clicked by each user"),
        (lambda p, h: recommend(p, h, 2, rng=-1), DataError, "rng must be"),
        (
            lambda p, h: slate_propensities(p, h, [[3, 4]], Greedy(), rng=0),
            ShapeError,
            r"slates \[user=6, slot\]",
        ),
        (lambda p, h: slate_propensities(p, h, [3], Greedy(), rng=0), ShapeError, "slates"),
    ],
)
def test_bad_requests(call, error, text):
    post, log = walk()
    with pytest.raises(error, match=text):
        call(post, log)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Thompson(temperature=0.0), "temperature > 0"),
        (lambda: InSlateThompson(temperature=-1.0), "temperature > 0"),
        (lambda: InSlateThompson("both"), "'independent' or 'rank_major'"),
        (lambda: EpsilonGreedy(1.5), r"epsilon in \[0, 1\]"),
    ],
)
def test_bad_policies(make, text):
    with pytest.raises(DataError, match=text):
        make()


def test_users_that_a_table_does_not_know():
    post, log = walk(users="table")
    assert recommend(post, log, 2, rng=0).ids.shape == (6, 2)
    with pytest.raises(DataError, match=r"user 6 was not in the fit"):
        recommend(post, [[3]], 2, users=[6], rng=0)
    with pytest.raises(DataError, match="who its users are"):
        recommend(post, [[3]], 2, rng=0)


def test_a_posterior_of_another_model():
    other = Posterior(Draws({"x": torch.zeros(1, 1)}), object())
    with pytest.raises(CapabilityError, match="SlateGRU"):
        recommend(other, [[3]], 2, rng=0)

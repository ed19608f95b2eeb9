"""The simulated market place: its geometry, its answers, and the level of extreme slates."""

from __future__ import annotations

import pytest
import torch

from probkit.errors import DataError
from probkit.models.slates.metrics import click_rate
from probkit.models.slates.simulator import draw_market_place

pytestmark = pytest.mark.usefixtures("unchanged_global_state")


def test_groups_lie_where_they_should():
    place = draw_market_place(items=6000, groups=30, rng=0)
    real = place.items[3:]
    centres = torch.stack([real[place.groups[3:] == g].mean(0) for g in range(3, 33)])
    radius = centres.norm(dim=1)
    assert radius.min() > 0.5 - 0.1  # extent 5 times 0.1, less the error of a mean
    assert radius.max() < 4.0 + 0.1
    spread = (real - centres[place.groups[3:] - 3]).std()
    assert float(spread) == pytest.approx(0.5, abs=4 * 0.5 / (2 * 12_000) ** 0.5)
    assert torch.equal(place.groups[:3], torch.arange(3))
    start = place.start[:, None] - centres
    assert start.norm(dim=2).amin(1).max() < 0.2  # Users begin at a centre.


def test_answers_follow_the_softmax():
    place = draw_market_place(users=1, items=10, groups=4, rng=1)
    state = place.start.expand(40_000, -1)
    slate = torch.tensor([[3, 7, 12]]).expand(40_000, -1)
    g = torch.Generator().manual_seed(0)
    slots = place.respond(state, slate, rng=g)
    logits = torch.cat([torch.ones(1), -(place.items[slate[0]] - place.start[0]).norm(dim=1)])
    probs = torch.softmax(logits, 0)
    share = torch.bincount(slots, minlength=4) / 40_000
    assert (share - probs).abs().max() < 4 * (0.25 / 40_000) ** 0.5
    assert torch.allclose(place.choice_probs(state[:1], slate[:1])[0], probs, atol=1e-6)
    assert float(place.click_probability(state[:1], slate[:1])) == pytest.approx(
        1 - float(probs[0])
    )


def test_states_follow_the_clicks():
    place = draw_market_place(users=50, items=40, groups=5, gamma=0.7, rng=2)
    log = place.log(6, 4, rng=3)
    states = place.states(log.click)
    assert torch.equal(states[:, 0], place.start)
    for t in range(6):
        moved = place.moved(states[:, t], log.slate[:, t, 1:], log.click_idx[:, t])
        assert torch.allclose(moved, states[:, t + 1])
    clicked = log.click[:, 0] > 2
    target = 0.7 * place.start + 0.3 * place.items[log.click[:, 0]]
    assert torch.allclose(states[clicked, 1], target[clicked])
    assert torch.equal(states[~clicked, 1], place.start[~clicked])


def test_random_and_best_slates():
    """The published levels of config A: random .18-.22, best .59-.61, means over four places."""
    random, best = [], []
    for seed in range(4):
        place = draw_market_place(rng=seed)
        state = place.states(place.log(20, 5, rng=seed).click)[240:, 5:20].flatten(0, 1)
        g = torch.Generator().manual_seed(seed)
        random.append(place.click_probability(state, place.random(900, 5, rng=g)).mean())
        best.append(place.click_probability(state, place.best(state, 5)).mean())
    assert 0.16 < float(torch.stack(random).mean()) < 0.22
    assert 0.58 < float(torch.stack(best).mean()) < 0.61


def test_the_logging_policy_mixes():
    place = draw_market_place(rng=0)
    rates = [click_rate(place.log(5, 5, optimal=p, rng=1)) for p in (0.0, 1.0)]
    assert rates[0] < 0.25 < 0.5 < rates[1]
    log = place.log(4, 5, optimal=1.0, rng=1)
    first = place.best(place.start, 5)
    assert torch.equal(log.slate[:, 0, 1:], first)
    same = place.log(4, 5, rng=1)
    assert torch.equal(same.click, place.log(4, 5, rng=1).click)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: draw_market_place(users=0, rng=0), "users, items, groups >= 1"),
        (lambda: draw_market_place(gamma=1.5, rng=0), r"gamma in \[0, 1\]"),
        (lambda: draw_market_place(items=4, rng=0).log(3, 5, rng=0), "1 <= size <= 4"),
        (lambda: draw_market_place(rng=0).log(3, 5, optimal=2.0, rng=0), r"optimal in \[0, 1\]"),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(DataError, match=text):
        call()

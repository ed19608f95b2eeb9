"""The slate model against hand-computed numbers, and its parts against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from support.slates import random_log

from probkit.models.slates import SlateGRU, SlateLog, SlatePrior
from probkit.models.slates.amortise import amortised_moments, click_weights
from probkit.models.slates.choices import by_type, sampled_choices, slate_choices
from probkit.models.slates.noise import row_noise
from probkit.models.slates.scoring import catalogue_log_prob, choice_log_prob, scores
from probkit.models.slates.transitions import unroll, weight_shapes
from probkit.rng import scope

F64 = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=F64)


@pytest.mark.parametrize(
    ("score", "expected", "total"),
    [
        ("l2", (-1.694304, -0.265358, -1.596194), -3.555856),
        ("dot", (-1.185620, -0.643513, -0.861995), -2.691128),
    ],
)
def test_log_probabilities_of_a_small_log(score, expected, total):
    log = SlateLog([[[1, 3, 4, 5], [1, 5, 6, 0], [1, 3, 2, 6]]], [[4, 1, 3]])
    items = torch.zeros(7, 2, dtype=F64)
    items[3:] = tensor([1, 0], [0, 1], [-1, 0], [0, -1])
    model = SlateGRU(7, transition="linear", dim=2, score=score, dtype=F64)
    values = {
        "items": items,
        "gamma": torch.tensor(0.8, dtype=F64),
        "no_click": tensor(9, 9, 9, 0.3, 0.4),
        "user_init": tensor([0.5, 0.5]),
    }
    each = model.pointwise_log_likelihood(values, log)["click"][0]
    torch.testing.assert_close(each, tensor(*expected), rtol=0, atol=1e-6)
    assert float(model.log_likelihood(values, log)) == pytest.approx(total, abs=1e-6)
    torch.testing.assert_close(model.states(values, log).last[0], tensor(0.52, 0.48))


GRU = {
    "W_ir": tensor([0.1, 0.2], [-0.3, 0.4]),
    "W_hr": tensor([0.5, -0.1], [0.2, 0.3]),
    "W_id": tensor([-0.2, 0.1], [0.3, 0.6]),
    "W_hd": tensor([0.4, 0.2], [-0.5, 0.1]),
    "W_in": tensor([0.7, -0.6], [0.2, 0.9]),
    "W_hn": tensor([0.3, 0.8], [-0.4, 0.5]),
    "W_z": tensor([1.0, 0.5], [-0.5, 2.0]),
}


def test_one_step_of_the_gru():
    moves = torch.tensor([[True]])
    states = unroll("gru", GRU, tensor([[0.0, 1.0]]), moves, tensor([0.5, 0.5]))
    torch.testing.assert_close(states.last[0], tensor(0.193278, 0.593072), rtol=0, atol=1e-6)
    expected = tensor([0.75, 0.75], [0.489815, 1.089506])
    torch.testing.assert_close(states.read[0], expected, rtol=0, atol=1e-6)


def test_the_gru_is_that_of_torch():
    """torch's h' = (1 - z) n + z h, gates in the order r, z, n, without biases."""
    generator = torch.Generator().manual_seed(0)
    values = {k: torch.randn(s, generator=generator) for k, s in weight_shapes("gru", 3, 4).items()}
    values["W_z"] = torch.eye(3, 4)
    with scope(rng=0):
        cell = torch.nn.GRU(3, 4, bias=False, batch_first=True)
    with torch.no_grad():
        cell.weight_ih_l0.copy_(torch.cat([values[f"W_i{g}"] for g in "rdn"]))
        cell.weight_hh_l0.copy_(torch.cat([values[f"W_h{g}"] for g in "rdn"]))
        clicked = torch.randn(5, 6, 3, generator=generator)
        start = torch.randn(5, 4, generator=generator)
        path, _ = cell(clicked, start[None])
    states = unroll("gru", values, clicked, torch.ones(5, 6, dtype=torch.bool), start)
    torch.testing.assert_close(states.read[:, 1:], path[..., :3])


def test_the_lstm_is_that_of_torch():
    generator = torch.Generator().manual_seed(1)
    shapes = weight_shapes("lstm", 3, 4)
    values = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
    with scope(rng=0):
        cell = torch.nn.LSTM(3, 4, bias=False, batch_first=True)
    with torch.no_grad():
        cell.weight_ih_l0.copy_(torch.cat([values[f"W_i{g}"] for g in "ifgo"]))
        cell.weight_hh_l0.copy_(torch.cat([values[f"W_h{g}"] for g in "ifgo"]))
        clicked = torch.randn(5, 6, 3, generator=generator)
        start = torch.randn(5, 4, generator=generator)
        path, _ = cell(clicked, (start[None], start[None]))
    states = unroll("lstm", values, clicked, torch.ones(5, 6, dtype=torch.bool), start)
    torch.testing.assert_close(states.read[:, 1:], path @ values["W_z"].T)


@pytest.mark.parametrize("kind", ["linear", "markov", "gru", "lstm", "lingru"])
def test_states_stay_where_no_real_item_is_clicked(kind):
    generator = torch.Generator().manual_seed(2)
    shapes = weight_shapes(kind, 2, 2)
    values = {k: torch.randn(s, generator=generator, dtype=F64) for k, s in shapes.items()}
    values["gamma"] = torch.tensor(0.7, dtype=F64)
    clicked = torch.randn(1, 4, 2, generator=generator, dtype=F64)
    start = torch.randn(1, 2, generator=generator, dtype=F64)
    moves = torch.tensor([[True, False, False, True]])
    states = unroll(kind, values, clicked, moves, start)
    read = states.read[0]
    assert torch.equal(read[1], read[2]) and torch.equal(read[2], read[3])
    assert not torch.equal(read[3], read[4])
    short = unroll(kind, values, clicked[:, [0, 3]], moves[:, [0, 3]], start)
    torch.testing.assert_close(short.read[0], read[[0, 1, 4]])


@pytest.mark.parametrize("kind", ["linear", "markov", "gru", "lstm", "lingru"])
def test_leading_dims_of_states_are_a_loop(kind):
    generator = torch.Generator().manual_seed(3)
    shapes = weight_shapes(kind, 2, 2)
    values = {k: torch.randn(3, *s, generator=generator) for k, s in shapes.items()}
    values["gamma"] = torch.rand(3, generator=generator)
    clicked = torch.randn(3, 4, 5, 2, generator=generator)
    start = torch.randn(3, 4, 2, generator=generator)
    moves = torch.rand(4, 5, generator=generator) < 0.5
    together = unroll(kind, values, clicked, moves, start)
    for k in range(3):
        own = {name: value[k] for name, value in values.items()}
        alone = unroll(kind, own, clicked[k], moves, start[k])
        torch.testing.assert_close(together.read[k], alone.read)
        torch.testing.assert_close(together.last[k], alone.last)


def test_weights_of_clicks_in_first_states():
    moves = torch.tensor([[1, 4, 5, 0, 5]]) >= 3
    expected = tensor([0, 0.930357, 0.058148, 0, 0.011486])
    torch.testing.assert_close(click_weights(moves), expected, rtol=0, atol=1e-6)
    assert not click_weights(torch.zeros(1, 3, dtype=torch.bool)).any()


def test_first_states_as_published_without_pseudo_clicks():
    """Mean and root of phi^2 (variance + 1e-6) over the clicked vectors; the prior without any."""
    clicked = tensor([[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]], [[0.0, 0.0]] * 3)
    moves = torch.tensor([[True, True, False], [False] * 3])
    mean, scale = amortised_moments(clicked, moves, torch.tensor(0.2, dtype=F64), 0.5, 0.0)
    raw = torch.tensor([1 / (1 + 1e-5), 1 / (16 + 1e-5)], dtype=F64)
    first, second = (raw / (raw.sum() + 1e-5)).tolist()
    torch.testing.assert_close(mean, tensor([first, 2 * second], [0, 0]))
    spread = [0.2 * math.sqrt(0.25 + 1e-6), 0.2 * math.sqrt(1.0 + 1e-6)]
    torch.testing.assert_close(scale, tensor(spread, [0.5, 0.5]))


# ---------------------------------------------------------------- the fast likelihood


def plain_choice(kind, state, items, slots, offset, no_click, chosen, multiplier):
    found = scores(kind, state[:, None], items[slots], multiplier) + offset
    logits = torch.cat([no_click[:, None], found], 1)
    return torch.log_softmax(logits, 1).gather(1, chosen[:, None])[:, 0]


def choice_problem(multiplier):
    generator = torch.Generator().manual_seed(4)
    state = torch.randn(40, 3, generator=generator, dtype=F64)
    items = torch.randn(11, 3, generator=generator, dtype=F64)
    state[0] = items[2]  # a distance of zero
    slots = torch.randint(11, (40, 5), generator=generator)
    slots[0, 0] = 2
    offset = torch.randn(40, 5, generator=generator, dtype=F64)
    offset[:, 3:].masked_fill_(torch.rand(40, 2, generator=generator) < 0.5, -math.inf)
    chosen = torch.randint(4, (40,), generator=generator)
    no_click = torch.randn(40, generator=generator, dtype=F64)
    factor = torch.tensor(-1.3, dtype=F64) if multiplier else None
    leaves = [t for t in (state, items, no_click, factor) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    return (state, items, slots, offset, no_click, chosen, factor), leaves


@pytest.mark.parametrize("kind", ["l2", "dot"])
@pytest.mark.parametrize("multiplier", [False, True])
def test_fast_likelihood_and_gradients_are_the_plain_ones(kind, multiplier, monkeypatch):
    monkeypatch.setitem(
        __import__("probkit.models.slates.scoring", fromlist=["x"])._BLOCK_ENTRIES, "cpu", 100
    )  # several blocks
    arguments, leaves = choice_problem(multiplier)
    fast, plain = choice_log_prob(kind, *arguments), plain_choice(kind, *arguments)
    torch.testing.assert_close(fast, plain)
    weight = torch.linspace(-1, 2, 40, dtype=F64)
    ours = torch.autograd.grad((weight * fast).sum(), leaves)
    theirs = torch.autograd.grad((weight * plain).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["l2", "dot"])
def test_catalogue_likelihood_is_the_plain_one(kind):
    arguments, _ = choice_problem(False)
    state, items, _, _, no_click, _, _ = arguments
    slots = torch.arange(11).expand(40, 11)
    chosen = torch.arange(40) % 12
    offset = torch.zeros(40, 11, dtype=F64)
    plain = plain_choice(kind, state, items, slots, offset, no_click, chosen, None)
    torch.testing.assert_close(catalogue_log_prob(kind, state, items, no_click, chosen), plain)


def test_unknown_items_and_padding_get_no_probability_however_large_the_scores():
    log = SlateLog([[[1, 3, 2, 0]]], [[3]], n_items=4)
    model = SlateGRU(4, transition="linear", dim=1, score="dot", dtype=F64)
    values = {
        "items": tensor([1e6], [1e6], [1e6], [-300.0]),
        "gamma": torch.tensor(0.5, dtype=F64),
        "no_click": torch.zeros(5, dtype=F64),
        "user_init": tensor([1.0]),
    }
    assert float(model.log_likelihood(values, log)) == pytest.approx(-300.0)


# ---------------------------------------------------------------- sampled choices


def test_corrected_samples_estimate_the_normaliser_without_bias():
    """E exp(logits) over draws is the normaliser over all items: z-test with 4 standard errors."""
    log = random_log(users=1, steps=2, slots=4, items=40, seed=5)
    log = SlateLog(log.slate, torch.stack([log.slate[:, 0, 0], log.slate[:, 1, 2]], 1), n_items=43)
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(43, generator=generator, dtype=F64)
    counted = log.mask("train")
    parts = []
    for _ in range(1000):
        c = sampled_choices(log, counted, 5, True, F64, generator)
        assert bool((c.ids[c.chosen == 1, 1:] != c.ids[c.chosen == 1, :1]).all())
        parts.append((score[c.ids] + c.offset).exp().sum(1))
    found = torch.stack(parts)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - score[3:].exp().sum()).abs() < 4 * error).all())


def test_samples_without_correction_have_no_offset():
    log = random_log(users=3, steps=2, slots=4, items=40, seed=6)
    generator = torch.Generator().manual_seed(0)
    c = sampled_choices(log, log.mask("train"), 5, False, F64, generator)
    assert bool((c.offset[:, 1:] == 0).all()) and int(c.ids.min()) >= 3 and int(c.ids.max()) < 43


def test_choices_leave_out_padding_and_unknown_clicks():
    log = SlateLog([[[1, 3, 2], [1, 2, 4], [1, 4, 0], [0, 0, 0]]], [[3, 2, 1, 0]])
    c = slate_choices(log, log.mask("train"), F64)
    assert c.step.tolist() == [0, 2] and c.chosen.tolist() == [1, 0] and c.length.tolist() == [3, 2]
    assert c.offset.tolist() == [[0, -math.inf], [0, -math.inf]]


def test_types_name_their_likelihood():
    assert by_type("full") == ("full", "full", "full")
    assert by_type({1: "sampled", "recommendation": "full"}) == ("slate", "sampled", "full")


# ---------------------------------------------------------------- noise


def test_noise_of_a_row_is_its_own():
    whole = row_noise(3, torch.arange(1000), 5, dtype=F64)
    rows = torch.tensor([999, 0, 17])
    assert torch.equal(row_noise(3, rows, 5, dtype=F64), whole[rows])
    assert not torch.equal(row_noise(4, rows, 5, dtype=F64), whole[rows])


def test_noise_is_standard_normal_and_independent():
    """Moments to 5 standard errors; correlations between columns, rows and neighbouring seeds."""
    n, width = 40_000, 5
    x, y = (row_noise(seed, torch.arange(n), width, dtype=F64) for seed in (7, 8))
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        gap = (x**power).mean(0) - expected
        assert float(gap.abs().max()) < 5 * math.sqrt(variance / n), power
    bound = 5 / math.sqrt(n)
    corr = (x.T @ x / n).fill_diagonal_(0)
    assert float(corr.abs().max()) < bound
    assert float((x.T @ y / n).abs().max()) < bound
    assert float((x[:-1] * x[1:]).mean(0).abs().max()) < bound


# ---------------------------------------------------------------- simulation


def test_simulated_clicks_follow_the_model():
    """Shares of clicks in 3,000 draws against the model's probabilities, along two steps."""
    log = random_log(users=1, steps=2, slots=3, items=6, seed=7)
    model = SlateGRU(9, transition="gru", dim=2, dtype=F64, prior=SlatePrior(weight=2.0))
    generator = torch.Generator().manual_seed(0)
    one = {k: v[0] for k, v in model.initial_values(log, 1, rng=generator).items()}
    one["items"] = torch.randn(9, 2, generator=generator, dtype=F64)
    n = 3000
    values = {k: v.expand(n, *v.shape) for k, v in one.items()}
    clicks = model.simulate(values, log, rng=1)
    slots = clicks["click_idx"][:, 0]
    for first in range(4):
        same = slots[slots[:, 0] == first, 1]
        click = torch.tensor([[int(log.slate[0, 0, first]), int(log.slate[0, 1, 0])]])
        expected = []
        for second in range(4):
            click[0, 1] = log.slate[0, 1, second]
            each = model.pointwise_log_likelihood(one, SlateLog(log.slate, click, n_items=9))
            expected.append(each["click"].exp()[0])
        expected = torch.stack(expected)
        share = len(same) / n
        p = float(expected[0, 0])
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / n)
        counts = torch.bincount(same, minlength=4) / max(len(same), 1)
        p = expected[:, 1]
        assert bool(((counts - p).abs() < 4.5 * (p * (1 - p) / len(same)).sqrt()).all())

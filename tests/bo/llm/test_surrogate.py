"""The surrogate: predictions against a Gaussian process, orders, faults, and BoTorch around it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
from botorch.optim import optimize_acqf, optimize_acqf_discrete

from probkit.bo import Categorical, Float, LLMSurrogate, Space, make_surrogate
from probkit.bo.llm import DiscretePosterior, GPScript, ProblemCard
from probkit.bo.llm.digits import DigitDensity, DigitTree
from probkit.bo.llm.history import orders
from probkit.bo.surrogates.data import training_data
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.models.language.oracle import FiniteLM, OracleLM
from probkit.models.language.protocol import Budget
from probkit.rng import scope, stream

from .conftest import bowl, observations


def gaussian_process(space, X, y, points, lengthscale=0.3, noise=1e-4):
    """Mean and standard deviation of a new observation, from the normal equations."""

    def kernel(a, b):
        gaps = space.features(a)[:, None] - space.features(b)[None]
        return torch.exp(-0.5 * gaps.square().sum(-1) / lengthscale**2)

    scale = y.std(correction=0)
    inverse = torch.linalg.inv(kernel(X, X) + noise * torch.eye(len(X)))
    cross = kernel(points, X)
    mean = y.mean() + cross @ inverse @ (y - y.mean())
    variance = scale**2 * (1 + noise - (cross @ inverse * cross).sum(-1))
    return mean, variance.sqrt()


def as_printed(model, X, y):
    """What a prompt shows of observations: codes of printed points, printed scores."""
    serialiser = model._serialiser
    rounded = [serialiser.rounded(p) for p in model.spec.space.from_codes(X)]
    return model.spec.space.codes(rounded), torch.round(y, decimals=model.decimals)


@pytest.mark.parametrize("direction", ["min", "max"])
def test_sampled_predictions_are_those_of_the_process_behind_them(plane, direction):
    X, y = observations(plane, 6)
    card = ProblemCard(direction=direction)
    # a long lengthscale, else draws of points far from data differ in nothing but their noise
    script = GPScript(plane, lengthscale=0.6)
    spec = LLMSurrogate(OracleLM(script), plane, card, n_perm=4, k=500)
    model = spec.condition(X, card.sign * y, rng=0)
    points = plane.random_codes(2, rng=torch.Generator().manual_seed(9))
    X_shown, y_shown = as_printed(model, X, y)
    points_shown, _ = as_printed(model, points, y)
    mean, sd = gaussian_process(plane, X_shown, y_shown, points_shown, lengthscale=0.6)
    found = model.posterior(points[:, None])
    n = 2000
    gap = (card.sign * found.mean[:, 0, 0] - mean).abs() / (sd / math.sqrt(n))
    spread = (found.variance[:, 0, 0].sqrt() - sd).abs() / (sd / math.sqrt(2 * n))
    assert bool((gap < 3).all()) and bool((spread < 3).all())
    assert model.report.asked == 2 * n and model.report.accepted == 2 * n


def test_the_digit_tree_gives_the_process_without_sampling(plane):
    X, y = observations(plane, 6)
    script = GPScript(plane)
    spec = LLMSurrogate(
        FiniteLM(script.law, tokens=("12", "0.", " 0.", ".3", " ##")),
        plane, mode="logprob", n_perm=2, prune=0.0, decimals=3, outcome="score",
    )  # fmt: skip
    model = spec.condition(X, y, rng=0)
    points = plane.random_codes(2, rng=torch.Generator().manual_seed(9))
    X_shown, y_shown = as_printed(model, X, y)
    mean, sd = gaussian_process(plane, X_shown, y_shown, as_printed(model, points, y)[0])
    found = model.posterior(points[:, None])
    assert isinstance(found, DiscretePosterior)
    # rounding to a grid of step h moves the mean by less than 1e-6 here and adds h^2 / 12
    torch.testing.assert_close(found.mean[:, 0, 0], mean, rtol=0, atol=1e-5)
    spread = (sd**2 + 1e-6 / 12).sqrt()
    torch.testing.assert_close(found.variance[:, 0, 0].sqrt(), spread, rtol=1e-3, atol=1e-6)
    assert abs(model.density(plane.from_codes(points)[0]).tail) < 1e-9


class OrderLM(FiniteLM):
    """A model whose answer depends on the order of the examples, by the last one of them."""

    def __init__(self):
        def law(prompt):
            shown = prompt.split("Performance: ## ")[1:]
            first, last = float(shown[0].split()[0]), float(shown[-1].split()[0])
            a, b = f" {(first + 2 * last) / 3:.2f} ##", f" {first:.2f} ##"
            return {a: 0.7, b: 0.3} if a != b else {a: 1.0}

        super().__init__(law)


@pytest.mark.parametrize("n_perm", [6, 24, None])
def test_all_orders_of_three_rows_are_averaged_exactly(plane, n_perm):
    X, _ = observations(plane, 3)
    y = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    spec = LLMSurrogate(
        OrderLM(), plane, mode="logprob", n_perm=n_perm, prune=0.0, decimals=2, outcome="score"
    )
    model = spec.condition(X, y, rng=0)
    params = plane.from_codes(X[:1])[0]
    parts = []
    for order in itertools.permutations(range(3)):
        first, last = float(y[order[0]]), float(y[order[-1]])
        parts += [(round((first + 2 * last) / 3, 2), 0.7 / 6), (round(first, 2), 0.3 / 6)]
    density = model.density(params)
    for value in {v for v, _ in parts}:
        expected = math.fsum(p for v, p in parts if v == value)
        assert float(density.mass[density.values == value]) == pytest.approx(expected, abs=1e-12)
    assert len(model.prompts(params)) == 6


def test_orders_differ_and_are_all_where_they_are_few():
    generator = torch.Generator().manual_seed(0)
    some = orders(8, 5, generator)
    assert len(set(some)) == 5 and all(sorted(o) == list(range(8)) for o in some)
    assert set(orders(3, 6, generator)) == set(itertools.permutations(range(3)))
    with pytest.raises(DataError, match="all orders are averaged for at most 6 rows, got 7"):
        orders(7, None, generator)


def test_sampling_converges_to_the_tree(plane):
    X, y = observations(plane, 4)
    lm = FiniteLM(GPScript(plane).law)
    spec = LLMSurrogate(
        lm, plane, n_perm=1, k=1000, temperature=1.0, decimals=2, outcome="score", prune=0.0
    )
    point = plane.random_codes(1, rng=torch.Generator().manual_seed(3))
    sampled = spec.condition(X, y, rng=1).posterior(point)
    exact = replace(spec, mode="logprob").condition(X, y, rng=0).posterior(point)
    se = math.sqrt(float(exact.variance) / 1000)
    assert abs(float(sampled.mean) - float(exact.mean)) < 3 * se


def test_different_orders_widen_the_spread(plane):
    """The law of total variance: one order leaves out what lies between orders."""
    X, y = observations(plane, 4)
    spec = LLMSurrogate(OrderLM(), plane, mode="logprob", prune=0.0, decimals=2, outcome="score")
    wide = replace(spec, n_perm=24).condition(X, y, rng=0).posterior(X[:1])
    narrow = replace(spec, n_perm=1).condition(X, y, rng=0).posterior(X[:1])
    assert float(wide.variance) > 2 * float(narrow.variance)


@pytest.mark.parametrize("exact", [True, False])
def test_labels_say_what_is_among_the_best(plane, exact):
    X, y = observations(plane, 16)
    script = GPScript(plane, truth=bowl, sd=0.05)
    lm = FiniteLM(script.law) if exact else OracleLM(script)
    spec = LLMSurrogate(lm, plane, mode="classify", outcome="score", n_perm=3, k=20)
    model = spec.condition(X, y, rng=0)
    good, bad = plane.codes([{"a": 0.3, "b": 0.7}, {"a": 0.9, "b": 0.1}])
    chance = model.posterior(torch.stack([good, bad])[:, None]).mean[:, 0, 0]
    assert float(chance[0]) > 0.7 and float(chance[1]) < 0.1
    best, _ = optimize_acqf_discrete(model.acquisition(), 1, torch.stack([bad, good]))
    assert torch.equal(best[0], good)
    # a quarter of 16 rows has label 1
    assert sum("Classification: ## 1" in p for p in model.prompts({"a": 0.5, "b": 0.5})) == 3
    assert model.prompts({"a": 0.5, "b": 0.5})[0].count("Classification: ## 1 ##") == 4
    if exact:  # the law's probability itself, whatever the order
        assert float(chance[0]) == pytest.approx(script.chance(model.prompts(
            plane.from_codes(good[None])[0])[0]), abs=1e-9)  # fmt: skip


# ---------------------------------------------------------------------- inside BoTorch


def test_botorch_chooses_among_given_points(plane):
    X, y = observations(plane, 8)
    model = LLMSurrogate(OracleLM(GPScript(plane)), plane).condition(X, -y, rng=0)
    choices = plane.random_codes(12, rng=torch.Generator().manual_seed(5))
    best, value = optimize_acqf_discrete(LogExpectedImprovement(model, best_f=-y.min()), 1, choices)
    asked = model.report.asked
    assert asked == 12 * 5 * 10
    again, same = optimize_acqf_discrete(model.acquisition(), 1, choices)
    assert torch.equal(best, again) and torch.equal(value, same)
    assert model.report.asked == asked  # nothing is asked twice
    with scope(rng=0):
        pair, _ = optimize_acqf_discrete(
            qLogExpectedImprovement(model, best_f=-y.min()), 2, choices
        )
    assert pair.shape == (2, 2)


def test_gradients_are_refused_before_anything_is_asked(plane):
    X, y = observations(plane, 4)
    model = LLMSurrogate(OracleLM(GPScript(plane)), plane).condition(X, -y, rng=0)
    with pytest.raises(CapabilityError, match="no gradients: choose among given points"):
        model.posterior(X.clone().requires_grad_())
    bounds = plane.code_bounds
    with scope(rng=0), pytest.raises(CapabilityError, match="optimize_acqf_discrete"):
        optimize_acqf(model.acquisition(), bounds, 1, num_restarts=2, raw_samples=512)
    assert model.report.asked == 0


def test_make_surrogate_takes_it(plane):
    X, y = observations(plane, 4)
    spec = LLMSurrogate(OracleLM(GPScript(plane)), plane)
    model = make_surrogate(spec, X, -y, bounds=plane.domain, options={"k": 3}, rng=0)
    assert model.posterior(X[:1]).mean.shape == (1, 1) and model.spec.k == 3
    more = model.condition_on_observations(X[:1] * 0.5, -y[:1, None])
    assert len(more.history) == 5 and more.num_outputs == 1
    assert more.subset_output([0]) is more


def test_equal_seeds_give_equal_answers(plane):
    X, y = observations(plane, 4)
    spec = LLMSurrogate(OracleLM(GPScript(plane)), plane)
    first, second, other = (
        spec.condition(X, -y, rng=seed).posterior(X[:2]).mean for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


# ---------------------------------------------------------------------- prompts and faults


def test_one_call_asks_all_orders_and_candidates(plane):
    X, y = observations(plane, 8)
    lm = OracleLM(GPScript(plane))
    model = LLMSurrogate(lm, plane, n_perm=4, k=7).condition(X, -y, rng=0)
    sizes = []
    generate = lm.generate
    lm.generate = lambda prefixes, **kw: sizes.append(len(prefixes)) or generate(prefixes, **kw)
    model.posterior(X[:3, None])
    assert sizes == [3 * 4 * 7]
    # questions about one order share all but their last lines
    a, b = (model.prompts(p)[0] for p in plane.from_codes(X[:2]))
    assert a[: a.rindex("Configuration")] == b[: b.rindex("Configuration")]


def test_a_metric_to_be_minimised_is_shown_with_its_own_sign(plane, card):
    X = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    utility = LLMSurrogate(OracleLM(GPScript(plane)), plane, card)
    metric = replace(utility, outcome="score")
    for model in (utility.condition(X, [-0.25], rng=0), metric.condition(X, [0.25], rng=0)):
        prompt = model.prompts({"a": 0.1, "b": 0.2})[0]
        assert "Performance: ## 0.250000 ##" in prompt
        assert "lower is better" in prompt
        assert prompt.endswith("Configuration: a is 0.100, b is 0.200\nPerformance: ##")


def test_hidden_names_and_context_leave_the_prompt(card):
    space = Space(secret=Float(0, 1), act=Categorical(["u", "v"]))
    spec = LLMSurrogate(
        OracleLM(lambda prompt, rng: "1 ##"), space, ProblemCard("forest", "gini", notes="hush"),
        context="none", anonymous=True,
    )  # fmt: skip
    prompt = spec.condition([[0.5, 0.0]], [1.0], rng=0).prompts({"secret": 0.1, "act": "u"})[0]
    assert not any(word in prompt for word in ("secret", "forest", "gini", "hush"))
    assert "X1 is 0.100, X2 is u" in prompt


def test_a_chat_gets_messages_and_may_open_its_answer(plane):
    lm = OracleLM(lambda prompt, rng: "## 0.25 ## I hope that helps")
    spec = LLMSurrogate(lm, plane, chat=True, outcome="score", n_perm=1, k=2)
    X, y = observations(plane, 2)
    model = spec.condition(X, y, rng=0)
    assert [m["role"] for m in model.prompts({"a": 0.1, "b": 0.2})[0]] == ["system", "user"]
    assert float(model.posterior(X[:1]).mean) == 0.25


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.6])
def test_faults_are_counted_and_predictions_stay_near(plane, rate):
    X, y = observations(plane, 8)
    each = rate / 4
    lm = OracleLM(GPScript(plane), malformed=each, refusals=each, timeouts=each, out_of_range=each)
    spec = LLMSurrogate(lm, plane, outcome="score", n_perm=5, k=40)
    model = spec.condition(X, y, rng=0)
    points = plane.random_codes(4, rng=torch.Generator().manual_seed(1))
    found = model.predictions(plane.from_codes(points))
    report = model.report
    assert report.asked == 800 and report.accepted + sum(report.reasons.values()) == 800
    # each fault is binomial
    for reason in ("failed", "out of range"):
        count = report.reasons.get(reason, 0)
        # malformed answers hold no number but for one in ten, which adds to "out of range" nothing
        assert abs(count - 800 * each) < 4 * math.sqrt(800 * each)
    X_shown, y_shown = as_printed(model, X, y)
    mean, sd = gaussian_process(plane, X_shown, y_shown, as_printed(model, points, y)[0])
    se = sd / (found.valid * 200).sqrt()
    assert bool(((found.mean - mean).abs() < 4 * se).all())


@pytest.mark.parametrize("mode", ["mc", "logprob", "classify"])
def test_without_any_valid_answer_the_history_stands_in(plane, mode):
    X, y = observations(plane, 6)
    lm = FiniteLM(lambda prompt: {" no idea": 1.0})
    model = LLMSurrogate(lm, plane, mode=mode, outcome="score").condition(X, y, rng=0)
    found = model.predictions(plane.from_codes(X[:2]))
    assert bool((found.valid == 0).all()) and bool((found.sd > 0).all())
    expected = 0.25 if mode == "classify" else float(y.mean())
    assert bool(((found.mean - expected).abs() < 1e-3).all())
    assert model.report.accepted == 0
    assert bool(torch.isfinite(model.acquisition()(X[:2, None])).all())


def test_a_candidate_without_answers_gets_the_mean_of_the_others(plane):
    def script(prompt, rng):
        return "" if prompt.endswith("a is 0.500, b is 0.500\nPerformance: ##") else " 0.3 ##"

    X, y = observations(plane, 4)
    spec = LLMSurrogate(OracleLM(script), plane, outcome="score")
    found = spec.condition(X, y, rng=0).predictions(
        [{"a": 0.5, "b": 0.5}, {"a": 0.1, "b": 0.1}, {"a": 0.2, "b": 0.1}]
    )
    torch.testing.assert_close(found.mean, torch.full((3,), 0.3).double())
    assert found.valid.tolist() == [0.0, 1.0, 1.0]
    # answers that never differ still have the floor of a thousandth of the range
    floor = 1e-3 * float(y.max() - y.min())
    assert found.sd.tolist() == pytest.approx([floor] * 3)


def test_a_spent_budget_ends_the_questions_and_nothing_else(plane):
    X, y = observations(plane, 4)
    lm = OracleLM(GPScript(plane), budget=Budget(calls=60))
    model = LLMSurrogate(lm, plane, n_perm=5, k=10).condition(X, -y, rng=0)
    best, _ = optimize_acqf_discrete(model.acquisition(), 1, X)
    assert best.shape == (1, 2)
    assert model.report.reasons["budget"] == 140 and lm.usage.calls == 60


def test_rows_that_do_not_fit_are_counted_or_dropped(plane):
    X, y = observations(plane, 12)
    script = GPScript(plane)
    one = len(LLMSurrogate(OracleLM(script), plane).condition(X[:1], -y[:1], rng=0).prompts(
        {"a": 0.5, "b": 0.5})[0])  # fmt: skip
    row = len("Configuration: a is 0.123, b is 0.123\nPerformance: ## 0.123456 ##\n\n")
    lm = OracleLM(script, context=one + 5 * row)
    spec = LLMSurrogate(lm, plane, outcome="score")
    with pytest.raises(DataError, match=r"history of 12 rows does not fit .* 5 fit; pass truncate"):
        spec.condition(X, y, rng=0)
    recent = replace(spec, truncate="recent").condition(X, y, rng=0)
    assert recent.rows == [7, 8, 9, 10, 11]
    best = replace(spec, truncate="best").condition(X, y, rng=0)
    assert best.rows == sorted(y.argsort()[:5].tolist())
    assert recent.posterior(X[:1]).mean.shape == (1, 1)
    with pytest.raises(DataError, match="holds no prompt at all"):
        replace(spec, lm=OracleLM(script, context=100)).condition(X, y, rng=0)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "guess"}, DataError, "mode: expected 'mc', 'logprob' or 'classify'"),
        ({"mode": "logprob"}, CapabilityError, "logprob.* needs a language model with logits"),
        ({"context": "some"}, DataError, "context: expected 'none', 'partial' or 'full'"),
        ({"outcome": "loss"}, DataError, "outcome: expected 'utility' or 'score'"),
        ({"truncate": "old"}, DataError, "truncate: expected None, 'recent' or 'best'"),
        ({"n_perm": 0}, DataError, "expected a whole n_perm >= 1, got 0"),
        ({"k": 1.5}, DataError, "expected a whole k >= 1, got 1.5"),
        ({"gamma": 1.0}, DataError, r"gamma: expected a number in \(0, 1\), got 1.0"),
        ({"temperature": -1.0}, DataError, "finite temperature >= 0"),
        ({"top_p": 0.0}, DataError, "0 < top_p <= 1"),
        ({"decimals": -2}, DataError, "whole decimals >= 0"),
        ({"prune": 2.0}, DataError, "0 <= prune < 1"),
        ({"lm": "gpt"}, CapabilityError, "expected a language model .* got str"),
        ({"space": {"a": 1}}, DataError, "expected a Space"),
        ({"card": "a card"}, DataError, "expected a ProblemCard"),
        ({"space": Space({"a##": Float(0, 1)})}, DataError, "delimits answers"),
    ],
)
def test_options_are_refused_before_any_work(plane, change, error, message):
    options = {"lm": OracleLM(lambda prompt, rng: "1"), "space": plane, **change}
    with pytest.raises(error, match=message):
        LLMSurrogate(**options)


@pytest.mark.parametrize(
    ("X", "y", "error", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0), DataError, "at least one observation, got an empty"),
        (torch.zeros(2, 2), [0.0, math.nan], DataError, "scores.*row 1"),
        (torch.zeros(2, 2), [0.0, math.inf], DataError, "scores.*row 1"),
        (torch.zeros(2, 3), [0.0, 1.0], ShapeError, r"\[row, parameter=2\]"),
        ([[0.5, 2.0]], [0.0], DataError, r"codes in \[0, 1\] for 'b', got 2 in row 0"),
        (torch.zeros(2, 2), [0.0], ShapeError, "scores"),
    ],
)
def test_other_histories_are_refused(plane, X, y, error, message):
    spec = LLMSurrogate(OracleLM(lambda prompt, rng: "1"), plane)
    with pytest.raises(error, match=message):
        spec.condition(X, y, rng=0)


def test_one_output_only(plane):
    X, y = observations(plane, 3)
    spec = LLMSurrogate(OracleLM(lambda prompt, rng: "1"), plane)
    with pytest.raises(DataError, match="expected one output, got 2"):
        spec.fit(training_data(X, torch.stack([y, -y], 1)), rng=0)


def test_other_points_are_refused(plane):
    X, y = observations(plane, 3)
    model = LLMSurrogate(OracleLM(lambda prompt, rng: "1"), plane).condition(X, -y, rng=0)
    with pytest.raises(ShapeError, match="parameter=2"):
        model.posterior(torch.zeros(1, 3))
    with pytest.raises(CapabilityError, match="got 300 points and most=256"):
        model.posterior(plane.random_codes(300, rng=torch.Generator().manual_seed(0)))
    with pytest.raises(CapabilityError, match="expected mode='logprob', got 'mc'"):
        model.density({"a": 0.5, "b": 0.5})
    with pytest.raises(DataError, match="the only output"):
        model.subset_output([1])
    with pytest.raises(CapabilityError, match="condition_on_observations: expected X"):
        model.condition_on_observations(X[None], y[None, :, None])


def test_a_wrong_average_over_orders_would_be_seen(plane):
    """The mutant: densities of fewer orders than asked for."""
    X, _ = observations(plane, 3)
    y = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    spec = LLMSurrogate(OrderLM(), plane, mode="logprob", prune=0.0, decimals=2, outcome="score")
    model = replace(spec, n_perm=6).condition(X, y, rng=0)
    params = plane.from_codes(X[:1])[0]
    starts = [spec.lm.start(p) for p in model.prompts(params)[:5]]
    wrong = DigitDensity.mixture(DigitTree(2, 0.0).walk(spec.lm, starts))
    assert abs(wrong.mean - model.density(params).mean) > 1e-3


def test_streams_depend_on_the_question(plane):
    a, b = (stream(0, "answers", key) for key in ("x", "y"))
    assert float(torch.rand((), generator=a)) != float(torch.rand((), generator=b))

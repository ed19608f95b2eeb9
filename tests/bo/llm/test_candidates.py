"""Candidates: targets, what is accepted, what is asked again, and what fills the rest."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from probkit.bo import Categorical, Float, Int, LLMCandidates, Space
from probkit.bo.llm import GPScript, ProblemCard, Proposal, target_score
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.models.language.oracle import FiniteLM, OracleLM
from probkit.models.language.protocol import Budget

from .conftest import bowl, observations


@pytest.mark.parametrize(
    ("scores", "direction", "alpha", "expected"),
    [
        ([0.2, 0.5], "min", -0.1, 0.23),
        ([0.2, 0.5], "max", -0.1, 0.47),
        ([0.2, 0.5], "min", 0.1, 0.17),
        ([0.2, 0.5], "max", 0.1, 0.53),
        ([-5.0, -1.0, -3.0], "min", -0.25, -4.0),
        ([-5.0, -1.0, -3.0], "max", -0.25, -2.0),
        ([0.0, 0.0], "min", -0.1, 0.0),
        ([-2.0], "max", 0.1, -2.0),
        ([0.999, 0.5], "max", -1.0, 0.5),
    ],
)
def test_targets(scores, direction, alpha, expected):
    assert target_score(scores, direction, alpha) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], "min"), "at least one score"),
        (([math.nan], "min"), "scores"),
        (([1.0], "up"), "direction: expected 'min' or 'max'"),
        (([1.0], "min", -1.5), "alpha: expected a finite number >= -1, got -1.5"),
        (([1.0], "min", math.inf), "alpha: expected a finite number"),
    ],
)
def test_other_targets_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        target_score(*arguments)


def test_candidates_reach_the_target(plane, card):
    X, y = observations(plane, 12)
    lm = OracleLM(GPScript(plane, truth=bowl))
    found = LLMCandidates(lm, plane, card).propose((X, y), 8, target=0.05, rng=0)
    assert set(found.origins) == {"llm"} and found.target == 0.05
    # the nearest of 64 random points: some 3 % of the square lies within 0.01 of the target
    assert all(abs(bowl(p) - 0.05) < 0.02 for p in found.params)
    assert found.report.asked >= 8 and found.report.accepted == 8


def test_the_prompt_asks_for_the_target_in_the_metrics_own_sign(plane):
    prompts = []

    def script(prompt, rng):
        prompts.append(prompt)
        return " a: 0.111, b: 0.222 ##"

    X, _ = observations(plane, 2)
    sampler = LLMCandidates(OracleLM(script), plane, ProblemCard(direction="max"), fill="none")
    found = sampler.propose((X, [0.2, 0.5]), 1, rng=0)
    assert found.params == [{"a": 0.111, "b": 0.222}]
    assert prompts[0].endswith("Performance: 0.470000\nHyperparameter configuration: ##")
    assert "higher is better" in prompts[0] and "- a: number from 0 to 1, 3 decimals" in prompts[0]
    assert "Performance: 0.500000\nHyperparameter configuration: ## a: " in prompts[0]


def test_points_are_new_in_print_not_in_the_last_digits(plane):
    answers = iter(["a: 0.5, b: 0.5 ##", "a: 0.50000001, b: 0.5 ##", "a: 0.25, b: 0.5 ##"] * 3)
    lm = OracleLM(lambda prompt, rng: next(answers))
    history = (torch.tensor([[0.25, 0.5]], dtype=torch.float64), [1.0])
    found = LLMCandidates(lm, plane, rounds=1, fill="none").propose(history, 3, rng=0)
    assert found.params == [{"a": 0.5, "b": 0.5}]
    report = found.report
    assert (report.asked, report.parsed, report.in_range, report.duplicates) == (3, 3, 3, 2)


def test_what_is_missing_is_asked_again_at_most_thrice(plane):
    counts = []

    def script(prompt, rng):
        counts.append(1)
        return "no" if len(counts) <= 5 else f"a: 0.{len(counts):03d}, b: 0.5 ##"

    X, y = observations(plane, 3)
    sampler = LLMCandidates(OracleLM(script), plane)
    found = sampler.propose((X, y), 4, rng=0)
    assert found.origins == ["llm"] * 4 and found.report.asked == 4 + 4 + 1
    assert found.report.reasons == {"no delimiter": 5}
    silent = replace(sampler, lm=OracleLM(lambda prompt, rng: ""))
    assert silent.propose((X, y), 4, rng=0).report.asked == 12


@pytest.mark.parametrize("fault", ["malformed", "refusals", "out_of_range", "timeouts"])
def test_no_fault_raises_and_points_are_filled(plane, fault):
    X, y = observations(plane, 8)
    sampler = LLMCandidates(OracleLM(GPScript(plane), **{fault: 1.0}), plane)
    found = sampler.propose((X, y), 10, rng=0)
    assert found.X.shape == (10, 2) and set(found.origins) == {"sobol", "local"}
    assert found.report.asked == 30 and found.report.accepted == 0
    assert bool(((found.X >= 0) & (found.X <= 1)).all())
    best = X[y.argsort()[:2]]
    near = found.X[[o == "local" for o in found.origins]]
    # neighbours: a normal step of a tenth in each of two coordinates
    assert bool((torch.cdist(near, best).min(-1).values < 0.5).all())


def test_a_spent_budget_stops_the_asking(plane):
    X, y = observations(plane, 4)
    lm = OracleLM(GPScript(plane), budget=Budget(calls=0))
    found = LLMCandidates(lm, plane).propose((X, y), 5, rng=0)
    assert len(found) == 5 and found.report.reasons == {"budget": 5} and lm.usage.calls == 0


def test_a_finite_space_runs_out():
    space = Space(k=Int(1, 3), act=Categorical(["u", "v"]))
    X = space.codes([{"k": 1, "act": "u"}, {"k": 2, "act": "v"}])
    lm = OracleLM(GPScript(space))
    found = LLMCandidates(lm, space).propose((X, [1.0, 2.0]), 10, rng=0)
    assert len(found) == 4
    rows = {tuple(p.items()) for p in found.params}
    assert len(rows) == 4 and not rows & {tuple(p.items()) for p in space.from_codes(X)}


def test_conditional_spaces_get_valid_points():
    space = Space(act=Categorical(["u", "v"]), slope=Float(0, 1, when={"act": "v"}), k=Int(1, 9))
    X = space.random_codes(5, rng=torch.Generator().manual_seed(0))
    X = space.canonical(X)
    lm = OracleLM(GPScript(space), malformed=0.5)
    found = LLMCandidates(lm, space).propose((X, torch.arange(5.0)), 12, rng=0)
    assert [space.check(p) for p in found.params] == found.params
    assert torch.equal(space.codes(found.params), found.X)


def test_log_probabilities_weigh_the_pool(plane):
    law = {" a: 0.1, b: 0.1 ##": 0.8, " a: 0.2, b: 0.2 ##": 0.15, " a: 0.3, b: 0.3 ##": 0.05}
    X, y = observations(plane, 2)
    sampler = LLMCandidates(
        FiniteLM(lambda prompt: law), plane, temperature=1.0, top_p=1.0, rounds=20
    )
    found = sampler.propose((X, y), 4, rng=0)
    assert found.origins[:3] == ["llm"] * 3 and found.origins[3] != "llm"
    texts = [f" a: {q['a']}, b: {q['b']} ##" for q in found.params[:3]]
    p = torch.tensor([law[text] for text in texts], dtype=torch.float64)
    torch.testing.assert_close(found.log_q[:3], p.log(), rtol=0, atol=1e-9)
    weights = found.log_weights().exp()
    torch.testing.assert_close(weights[:3], (1 / p) / (1 / p).sum())
    assert float(weights[3]) == 0.0
    tilted = found.log_weights(torch.tensor([0.0, -torch.inf, 0.0, 0.0])).exp()
    assert float(tilted[1]) == 0.0 and float(tilted.sum()) == pytest.approx(1.0)
    with pytest.raises(ShapeError, match=r"log_target: expected \[point=4\]"):
        found.log_weights(torch.zeros(2))


def test_without_log_probabilities_there_are_no_weights(plane):
    X, y = observations(plane, 2)
    found = LLMCandidates(OracleLM(GPScript(plane)), plane).propose((X, y), 2, rng=0)
    assert bool(found.log_q.isnan().all())
    with pytest.raises(DataError, match="no point has a known log_q"):
        found.log_weights()


def test_equal_seeds_give_equal_points_and_generators_move_on(plane):
    X, y = observations(plane, 4)
    sampler = LLMCandidates(OracleLM(GPScript(plane)), plane)

    def points(rng) -> Proposal:
        return sampler.propose((X, y), 3, rng=rng)

    assert torch.equal(points(3).X, points(3).X)
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(points(generator).X, points(generator).X)


def test_long_histories_are_refused_or_cut(plane):
    X, y = observations(plane, 30)
    lm = OracleLM(GPScript(plane), context=2500)
    with pytest.raises(DataError, match=r"LLMCandidates.propose: the history of 30 rows .* fit"):
        LLMCandidates(lm, plane).propose((X, y), 3, rng=0)
    assert len(LLMCandidates(lm, plane, truncate="best").propose((X, y), 3, rng=0)) == 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_perm": 0}, DataError, "whole n_perm >= 1, got 0"),
        ({"rounds": 1.5}, DataError, "whole rounds >= 1, got 1.5"),
        ({"fill": "grid"}, DataError, "fill: expected 'mixed'"),
        ({"truncate": "worst"}, DataError, "truncate: expected None"),
        ({"context": "much"}, DataError, "context: expected"),
        ({"temperature": math.inf}, DataError, "finite temperature"),
        ({"lm": None}, CapabilityError, "expected a language model"),
        ({"space": Space({"a,b": Float(0, 1)})}, DataError, "delimits answers"),
    ],
)
def test_other_options_are_refused(plane, change, error, message):
    with pytest.raises(error, match=message):
        LLMCandidates(**{"lm": OracleLM(lambda prompt, rng: ""), "space": plane, **change})


@pytest.mark.parametrize(
    ("history", "m", "options", "error", "message"),
    [
        ((torch.zeros(0, 2), []), 2, {}, DataError, "empty history"),
        ((torch.zeros(1, 2), [math.nan]), 2, {}, DataError, "scores"),
        ((torch.zeros(1, 3), [1.0]), 2, {}, ShapeError, "parameter=2"),
        ((torch.zeros(1, 2), [1.0]), 0, {}, DataError, "m >= 1, got 0"),
        (torch.zeros(3, 2), 1, {}, DataError, r"a pair \(codes, scores\), got Tensor"),
        ((torch.zeros(1, 2), [1.0]), 2, {"target": math.nan}, DataError, "finite score, got nan"),
        ((torch.zeros(1, 2), [1.0]), 2, {"alpha": -2.0}, DataError, "alpha"),
    ],
)
def test_other_requests_are_refused(plane, history, m, options, error, message):
    sampler = LLMCandidates(OracleLM(lambda prompt, rng: ""), plane)
    with pytest.raises(error, match=message):
        sampler.propose(history, m, rng=0, **options)

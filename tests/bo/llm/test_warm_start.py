"""First configurations: lists that are read strictly, asked for again, and filled."""

from __future__ import annotations

import pytest
import torch

from probkit.bo import Categorical, Float, Int, LLMWarmStart, Space
from probkit.bo.llm import GPScript, ProblemCard
from probkit.errors import CapabilityError, DataError
from probkit.models.language.oracle import OracleLM
from probkit.models.language.protocol import Budget

from .conftest import SPACES, bowl


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("warp", [False, True])
def test_configurations_are_different_and_inside_every_space(name, warp):
    space = SPACES[name]
    lm = OracleLM(GPScript(space, warp=warp))
    found = LLMWarmStart(lm, space, warp=warp).propose(5, rng=0)
    assert found.origins == ["llm"] * 5 and found.X.shape == (5, len(space))
    assert [space.check(p) for p in found.params] == found.params
    assert len({str(p) for p in found.params}) == 5


def test_what_is_known_helps(plane):
    good = LLMWarmStart(OracleLM(GPScript(plane, truth=bowl)), plane).propose(5, rng=0)
    wrong = LLMWarmStart(OracleLM(GPScript(plane, truth=bowl, adversarial=True)), plane).propose(
        5, rng=0
    )
    assert max(map(bowl, good.params)) < min(map(bowl, wrong.params))


def test_the_prompt_tells_the_card_and_the_space():
    prompts = []

    def script(prompt, rng):
        prompts.append(prompt)
        return '[{"k": 2, "act": "u"}]'

    space = Space(k=Int(1, 8), act=Categorical(["u", "v"]))
    card = ProblemCard("forest", "accuracy", "max", n_samples=12)
    LLMWarmStart(OracleLM(script), space, card, "partial").propose(1, rng=0)
    assert "- k: whole number from 1 to 8\n- act: one of u | v" in prompts[0]
    assert '"accuracy", higher is better' in prompts[0] and "12 samples" in prompts[0]
    assert prompts[0].endswith("JSON list:")


def test_partial_lists_are_kept_and_the_rest_asked_for():
    space = Space(k=Int(1, 8))
    answers = iter(
        ['Here: [{"k": 2}, {"k": 2}, {"k": 99}, {"k"', '[{"k": 3}, {"k": 4}, {"k": 5}, {}]']
    )
    lm = OracleLM(lambda prompt, rng: next(answers))
    found = LLMWarmStart(lm, space).propose(4, rng=0)
    assert [p["k"] for p in found.params] == [2, 3, 4, 5] and found.origins == ["llm"] * 4
    report = found.report
    assert (report.asked, report.accepted) == (7, 4)
    assert report.reasons == {"duplicate": 1, "out of range": 1, "not json": 1}


@pytest.mark.parametrize("fault", ["malformed", "refusals", "out_of_range", "timeouts"])
def test_no_fault_raises_and_points_are_filled(plane, fault):
    lm = OracleLM(GPScript(plane), **{fault: 1.0})
    found = LLMWarmStart(lm, plane).propose(6, rng=0)
    assert found.origins == ["sobol"] * 6 and found.report.accepted == 0
    assert found.report.asked == 18
    again = LLMWarmStart(lm, plane).propose(6, rng=0)
    assert torch.equal(found.X, again.X)


def test_a_spent_budget_stops_the_asking(plane):
    lm = OracleLM(GPScript(plane), budget=Budget(calls=0))
    found = LLMWarmStart(lm, plane).propose(3, rng=0)
    assert len(found) == 3 and found.report.reasons == {"budget": 3}


def test_choices_with_brackets_do_not_end_the_list():
    space = Space(c=Categorical(["a]", "b"]), k=Int(1, 9))
    found = LLMWarmStart(OracleLM(GPScript(space)), space).propose(6, rng=0)
    assert found.origins == ["llm"] * 6 and {p["c"] for p in found.params} == {"a]", "b"}


def test_a_small_space_gives_what_it_has():
    space = Space(k=Int(1, 3))
    found = LLMWarmStart(OracleLM(GPScript(space)), space).propose(5, rng=0)
    assert sorted(p["k"] for p in found.params) == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rounds": 0}, DataError, "whole rounds >= 1, got 0"),
        ({"context": "much"}, DataError, "context: expected"),
        ({"lm": 3}, CapabilityError, "expected a language model"),
        ({"space": Space({"a:b": Float(0, 1)})}, DataError, "delimits answers"),
    ],
)
def test_other_options_are_refused(plane, change, error, message):
    with pytest.raises(error, match=message):
        LLMWarmStart(**{"lm": OracleLM(lambda prompt, rng: ""), "space": plane, **change})


def test_other_requests_are_refused(plane):
    warm = LLMWarmStart(OracleLM(lambda prompt, rng: ""), plane)
    with pytest.raises(DataError, match="n >= 1, got 0"):
        warm.propose(0, rng=0)
    short = LLMWarmStart(OracleLM(lambda prompt, rng: "", context=10), plane)
    with pytest.raises(DataError, match="the context holds 10"):
        short.propose(2, rng=0)


def test_conditions_are_explained_only_where_there_are_some(plane):
    prompts = []

    def script(prompt, rng):
        prompts.append(prompt)
        return ""

    for space in (plane, SPACES["mixed"]):
        LLMWarmStart(OracleLM(script), space, rounds=1).propose(1, rng=0)
    assert "condition" not in prompts[0]
    assert "leave out parameters whose condition does not hold" in prompts[1]

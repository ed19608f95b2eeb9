"""Expressions and grammars: prefixes live exactly as long as they can be completed."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch

import probkit as pk
from probkit.errors import DataError
from probkit.inference import ParticleFilter
from probkit.models.language import GuidedGeneration, Law, MarkovLM, Steps
from probkit.models.language.potentials import GrammarPotential, RegexPotential, tokens_where
from probkit.models.language.protocol import Prefix

pytest.importorskip("regex")
pytest.importorskip("llguidance")

LETTERS, LONGEST = "ab-", 5
PATTERNS = ["a+-b", "(ab|b-)*", "[ab]{2}(-a)?", "a?b?-?", "(a|ab)(-|b-)b"]
WORDS = ["".join(w) for n in range(9) for w in itertools.product(LETTERS, repeat=n)]


def alive(potential, texts, ends):
    logs = potential.log_value([Prefix("?", text=t) for t in texts], [ends] * len(texts))
    assert set(logs.tolist()) <= {0.0, -math.inf}
    return [value == 0.0 for value in logs.tolist()]


def brute_force(is_sentence):
    """Which short texts are sentences, and which begin one of at most three symbols more."""
    sentences = [w for w in WORDS if is_sentence(w)]
    beginnings = {w[:k] for w in sentences for k in range(len(w) + 1)}
    short = [w for w in WORDS if len(w) <= LONGEST]
    return short, [w in beginnings for w in short], [is_sentence(w) for w in short]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("build", [RegexPotential, lambda p: GrammarPotential(p, "regex")])
def test_expressions_against_brute_force(pattern, build):
    short, begins, is_whole = brute_force(lambda w: re.fullmatch(pattern, w) is not None)
    assert alive(build(pattern), short, ends=False) == begins
    assert alive(build(pattern), short, ends=True) == is_whole


def nested(text):
    """Whether a text is a (recursively) nested pair: P -> "-" | "a" P "b"."""
    while text.startswith("a") and text.endswith("b"):
        text = text[1:-1]
    return text == "-"


def test_a_grammar_that_no_expression_can_say():
    potential = GrammarPotential('start: "-" | "a" start "b"')
    short = [w for w in WORDS if len(w) <= LONGEST]
    depth = {w[:k] for n in range(6) for w in ["a" * n + "-" + "b" * n] for k in range(len(w) + 1)}
    assert alive(potential, short, ends=False) == [w in depth for w in short]
    assert alive(potential, short, ends=True) == [nested(w) for w in short]


def test_a_json_schema():
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    potential = GrammarPotential(schema, "json")
    assert alive(potential, ['{"n": 1', '{"m', "[", '{"n": "1"'], ends=False) == [
        True,
        False,
        False,
        False,
    ]
    assert alive(potential, ['{"n": 12}', '{"n": 1', "{}"], ends=True) == [True, False, False]


def test_the_stop_string_may_be_left_out():
    for potential in (RegexPotential("a+", ignore="-"), GrammarPotential("a+", "regex", "-")):
        assert alive(potential, ["aa-", "aa", "-"], ends=True) == [True, True, False]
        assert alive(potential, ["aa-"], ends=False) == [False]


VOCABULARY = ["a", "b", "-", "ab", "b-b", "", "é", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("build", [RegexPotential, lambda p: GrammarPotential(p, "regex")])
def test_masks_are_what_the_weights_allow(pattern, build):
    potential = build(pattern)
    allowed = potential.allowed(VOCABULARY)
    for text in WORDS[:40]:
        if not alive(potential, [text], ends=False)[0]:
            continue
        mask = allowed(Prefix("?", text=text)).tolist()
        readable = VOCABULARY[:5]
        assert mask[:5] == alive(potential, [text + token for token in readable], ends=False)
        assert mask[5] == alive(potential, [text], ends=True)[0]
        assert mask[6:] == [False, False]


def test_masks_of_dead_ends_are_empty():
    for potential in (RegexPotential("a"), GrammarPotential("a", "regex")):
        allowed = potential.allowed(["a", "b", ""])
        assert allowed(Prefix("?", text="b")).tolist() == [False] * 3
        assert allowed(Prefix("?", text="a")).tolist() == [False, False, True]


LM = MarkovLM(
    [0.6, 0.3, 0.1],
    [[0.6, 0.3, 0.1], [0.2, 0.6, 0.2], [0.4, 0.4, 0.2]],
    end=[0.05, 0.2, 0.1],
    symbols=list(LETTERS),
)
STEPS = Steps(stop=(), max_tokens=1, max_steps=5)
PATTERN = "a{1,3}-b(-b)?"


def exact_evidence():
    potential = RegexPotential(PATTERN)
    return sum(
        math.exp(outcome.log_p)
        for outcome in LM.outcomes(5)
        if alive(potential, [outcome.text], ends=outcome.reason == "end")[0]
    )


@pytest.mark.parametrize("masked", [False, True])
def test_the_evidence_of_a_constraint_is_that_of_the_enumeration(masked):
    """Bootstrap and masked proposal estimate the same probability; the mask with less noise."""
    potential = RegexPotential(PATTERN)
    proposal = Law(allowed=potential.allowed(LM.vocabulary)) if masked else None
    model = GuidedGeneration(LM, potential, steps=STEPS, proposal=proposal)
    post = pk.infer(model, "go", ParticleFilter(200), rng=0, chains=30)
    ratio = (post.log_evidence.value - math.log(exact_evidence())).exp()
    error = float(ratio.std()) / 30**0.5
    assert error < (0.03 if masked else 0.1)
    assert abs(float(ratio.mean()) - 1) < 4 * error
    weights = post.log_weights.exp()
    texts = [p.text for chain in post.particles.particles for p in chain]
    kept = [t for t, w in zip(texts, weights.flatten().tolist(), strict=True) if w > 0]
    assert all(alive(potential, kept, ends=False))


def test_a_mask_without_its_correction_is_another_target():
    """The masked law as the base law: every text allowed, the evidence 1 and not the true one."""
    potential = RegexPotential(PATTERN)
    law = Law(allowed=potential.allowed(LM.vocabulary))
    model = GuidedGeneration(LM, potential, steps=STEPS, law=law)
    post = pk.infer(model, "go", ParticleFilter(20), rng=0)
    assert float(post.log_evidence.value.exp()) == pytest.approx(1.0)
    assert exact_evidence() < 0.2


def test_tokens_by_a_predicate():
    allowed = tokens_where(lambda text: "b" not in text, VOCABULARY, end=False)
    assert allowed(Prefix("?", text="b")).tolist() == [True, False, True, False] + [False] * 2 + [
        True,
        True,
    ]
    with pytest.raises(DataError, match="none of 2 does"):
        tokens_where(lambda text: False, ["a", ""], end=False)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RegexPotential("(a"), r"expected a regular expression, got '\(a': missing \)"),
        (lambda: RegexPotential(3), "expected a regular expression, got 3"),
        (lambda: GrammarPotential("start: x"), "cannot read the grammar: .*unknown name"),
        (lambda: GrammarPotential("(a", "regex"), "cannot read the grammar"),
        (lambda: GrammarPotential("{", "json"), "cannot read the grammar"),
        (lambda: GrammarPotential({"type": "x"}, "json"), "cannot read the grammar: Invalid type"),
        (lambda: GrammarPotential(3), "cannot read the grammar"),
        (lambda: GrammarPotential("a", "bnf"), "expected notation 'lark', 'json' or 'regex'"),
    ],
)
def test_bad_constraints(build, message):
    with pytest.raises(DataError, match=message):
        build()


def test_a_pattern_that_backtracks_without_end_is_stopped():
    slow = RegexPotential(r"(a+a+)+[yz]z", timeout=1e-4)
    with pytest.raises(DataError, match="took more than 0.0001 s on 'aaaa.*nested repeats"):
        slow.log_value([Prefix("?", text="a" * 200 + "bz")], [False])


def test_masks_are_remembered():
    calls = []

    class Counting(RegexPotential):
        def matches(self, text, *, partial):
            calls.append(text)
            return super().matches(text, partial=partial)

    allowed = Counting("a*").allowed(["a", "b", ""])
    first = allowed(Prefix("?", text="a"))
    n = len(calls)
    assert torch.equal(allowed(Prefix("other", text="a")), first) and len(calls) == n

"""Scripted language models: rates of faults, and laws over answers that are exact."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.errors import CapabilityError, DataError
from probkit.models.language import FiniteLM, OracleLM
from probkit.models.language.oracle import MALFORMED, REFUSAL
from probkit.models.language.protocol import Budget, Law, extended
from probkit.testing import LanguageModelConformance

LAW = {"aab\nz": 0.2, "aac": 0.2, "abab\n": 0.15, "b\n": 0.1, "bcab": 0.15, "ccc\nab": 0.2}


def letters(prompt: str, rng: torch.Generator) -> str:
    """A random row of letters and line breaks."""
    return "".join("ab\n"[k] for k in torch.randint(3, (8,), generator=rng).tolist())


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestOracleLM(LanguageModelConformance):
    def model(self):
        return OracleLM(letters)


class TestFiniteLM(LanguageModelConformance):
    def model(self):
        return FiniteLM(lambda prompt: LAW)


class TestFiniteLMWithMergedTokens(LanguageModelConformance):
    max_tokens = 5

    def model(self):
        return FiniteLM(lambda prompt: LAW, tokens=["ab", "aa", "b\n", "ccc"])


# ---------------------------------------------------------------------- faults


def test_faults_come_at_their_rates():
    rates = {"malformed": 0.3, "refusals": 0.1, "out_of_range": 0.2, "timeouts": 0.15}
    lm = OracleLM(lambda prompt, rng: " 0.5 ##", **rates)
    n = 2000
    steps = lm.generate([lm.start("p")] * n, max_tokens=80, rng=rng())
    texts = [step.text for step in steps]
    counts = {
        "malformed": sum(t in MALFORMED for t in texts)
        - sum(s.reason == "failed" for s in steps),  # the empty answer is among the malformed
        "refusals": texts.count(REFUSAL),
        "out_of_range": texts.count(" 1507 ##"),
        "timeouts": sum(s.reason == "failed" for s in steps),
    }
    for name, rate in rates.items():
        assert abs(counts[name] - n * rate) < 4 * math.sqrt(n * rate * (1 - rate)), name
    assert texts.count(" 0.5 ##") == n - sum(counts.values())
    assert lm.usage.failures == counts["timeouts"] and lm.usage.calls == n


def test_a_shared_prompt_is_read_once():
    lm = OracleLM(lambda prompt, rng: "x")
    lm.generate([lm.start("four")] * 5 + [lm.start("seven!!")], max_tokens=4, rng=rng())
    assert lm.usage.prompt_tokens == 4 + 7


def test_the_budget_holds_to_the_character():
    lm = OracleLM(lambda prompt, rng: "x" * 10, budget=Budget(tokens=50))
    steps = lm.generate([lm.start("p" * 8)] * 9, max_tokens=10, rng=rng())
    assert [s.reason for s in steps] == ["length"] * 5 + ["budget"] * 4
    assert lm.usage.tokens == 58  # no more than one answer beyond


def test_the_context_is_limited():
    lm = OracleLM(lambda prompt, rng: "x", context=5)
    lm.start("12345")
    with pytest.raises(DataError, match="the prompt has 6 characters, the context holds 5"):
        lm.start("123456")


def test_scripts_see_chats_as_paragraphs_and_partial_answers():
    seen = []
    lm = OracleLM(lambda prompt, rng: seen.append(prompt) or "abc")
    start = lm.start([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    step = lm.generate([start], max_tokens=2, rng=rng())[0]
    lm.generate([extended(start, step)], max_tokens=2, rng=rng())
    assert seen == ["S\n\nU", "S\n\nUab"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"malformed": 1.5}, r"expected malformed in \[0, 1\], got 1.5"),
        ({"timeouts": -0.1}, r"expected timeouts in \[0, 1\]"),
        ({"malformed": 0.6, "refusals": 0.6}, "rates that sum to at most 1"),
    ],
)
def test_other_rates_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        OracleLM(letters, **options)


def test_what_an_oracle_cannot_do_is_refused():
    lm = OracleLM(letters)
    with pytest.raises(CapabilityError, match="expected a script with answer"):
        OracleLM("hello")
    for call in (lambda: lm.next_log_probs([]), lambda: lm.score([], [])):
        with pytest.raises(CapabilityError, match="no log probabilities; use FiniteLM"):
            call()
    with pytest.raises(CapabilityError, match=r"no logits, which Law\.allowed needs"):
        law = Law(allowed=lambda prefix: torch.ones(1).bool())
        lm.generate([lm.start("p")], max_tokens=1, law=law, rng=rng())
    assert lm.vocabulary == ()


# ---------------------------------------------------------------------- laws


@pytest.mark.parametrize("tokens", [(), ("ab", "aa", "b\n", "ccc")])
def test_the_law_of_whole_answers_is_the_one_given(tokens):
    lm = FiniteLM(lambda prompt: LAW, tokens=tokens)
    n = 3000
    steps = lm.generate([lm.start("p")] * n, max_tokens=10, rng=rng())
    assert {s.reason for s in steps} == {"end"}
    for text, p in LAW.items():
        found = [s for s in steps if s.text == text]
        assert abs(len(found) - n * p) < 4 * math.sqrt(n * p * (1 - p))
        assert found[0].log_q == pytest.approx(math.log(p), abs=1e-12)


def test_next_tokens_follow_by_conditioning():
    lm = FiniteLM(lambda prompt: LAW)
    start = lm.start("p")
    index = {text: k for k, text in enumerate(lm.vocabulary)}
    first = lm.next_log_probs([start])[0].exp()
    assert [float(first[index[c]]) for c in "abc"] == pytest.approx([0.55, 0.25, 0.2])
    second = lm.next_log_probs([start._replace(tokens=(index["a"],), text="a")])[0].exp()
    assert float(second[index["a"]]) == pytest.approx(0.4 / 0.55)
    longer = tuple(index[c] for c in "aac")
    last = lm.next_log_probs([start._replace(tokens=longer, text="aac")])[0].exp()
    assert float(last[-1]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("law", "message"),
    [
        ({}, "sums to 1, got 0 answers"),
        ({"a": 0.5}, "sums to 1, got 1 answers with the sum 0.5"),
        ({"a": 1.5, "b": -0.5}, "sums to 1"),
        ({"\u00e9": 1.0}, "is no token; pass it in tokens="),
    ],
)
def test_other_laws_are_refused(law, message):
    lm = FiniteLM(lambda prompt: law)
    with pytest.raises(DataError, match=message):
        lm.next_log_probs([lm.start("p")])


def test_empty_tokens_are_refused():
    with pytest.raises(DataError, match="expected tokens that are not empty"):
        FiniteLM(lambda prompt: LAW, tokens=[""])

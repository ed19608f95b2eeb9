"""The exact Markov language model: the conformance suite, enumeration, orders, bad input."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from probkit.errors import DataError, ShapeError
from probkit.files import pack, unpack
from probkit.models.language import Continuation, Law, MarkovLM, Prefix
from probkit.models.language.protocol import extended
from probkit.testing import LanguageModelConformance, z_bound

INITIAL = [0.5, 0.3, 0.2]
TRANSITION = [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]


def chain(**options):
    return MarkovLM(INITIAL, TRANSITION, **{"end": [0.1, 0.0, 0.3], "symbols": "ab\n", **options})


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


class TestMarkovLM(LanguageModelConformance):
    tolerance = 1e-12

    def model(self):
        return chain()


class TestMarkovLMOfOrder2(LanguageModelConformance):
    tolerance = 1e-12

    def model(self):
        table = torch.rand(3, 3, 3, generator=stream(5), dtype=torch.float64) + 0.1
        table /= table.sum(-1, keepdim=True)
        return MarkovLM([INITIAL, TRANSITION], table, end=0.05, symbols="ab\n")


def by_hand(tokens, ended):
    """Probability of a sequence, written out."""
    end = [0.1, 0.0, 0.3]
    p = INITIAL[tokens[0]]
    for a, b in zip(tokens, tokens[1:], strict=False):
        p *= (1 - end[a]) * TRANSITION[a][b]
    return p * end[tokens[-1]] if ended else p


def test_every_outcome_has_its_probability():
    outcomes = chain().outcomes(3)
    assert math.isclose(sum(math.exp(s.log_p) for s in outcomes), 1.0, rel_tol=1e-12)
    assert len({(s.tokens, s.reason) for s in outcomes}) == len(outcomes)
    for step in outcomes:
        expected = by_hand(step.tokens, step.reason == "end")
        assert math.isclose(math.exp(step.log_p), expected, rel_tol=1e-12)
        assert step.log_q == step.log_p


@pytest.mark.parametrize("law", [Law(), Law(temperature=0.5, top_p=0.9)])
@pytest.mark.parametrize("stop", [(), ("ab",), ("\n", "bb")])
def test_draws_follow_the_enumeration(law, stop):
    lm, n = chain(), 6000
    outcomes = {(s.tokens, s.reason): s for s in lm.outcomes(4, stop=stop, law=law)}
    steps = lm.generate(
        [lm.start("x")] * n, max_tokens=4, stop=stop, law=law, base=Law(), rng=stream()
    )
    counts = Counter((s.tokens, s.reason) for s in steps)
    assert set(counts) <= set(outcomes)
    common = [key for key, s in outcomes.items() if n * math.exp(s.log_q) >= 10]
    for key in common:
        p = math.exp(outcomes[key].log_q)
        z = (counts[key] / n - p) / math.sqrt(p * (1 - p) / n)
        assert abs(z) <= z_bound(len(common)), key
    for step in steps[:200]:
        same = outcomes[step.tokens, step.reason]
        assert math.isclose(step.log_q, same.log_q, rel_tol=1e-12)
        assert math.isclose(step.log_p, same.log_p, rel_tol=1e-12)
        assert step.text == same.text


def test_a_wrong_chain_is_caught():
    """The comparison above fails for a chain that is a little different."""
    lm, n = chain(), 6000
    wrong = MarkovLM([0.4, 0.4, 0.2], TRANSITION, end=[0.1, 0.0, 0.3], symbols="ab\n")
    outcomes = {(s.tokens, s.reason): s for s in lm.outcomes(2)}
    counts = Counter(
        (s.tokens, s.reason)
        for s in wrong.generate([lm.start("x")] * n, max_tokens=2, rng=stream())
    )
    worst = max(
        abs(counts[key] / n - p) / math.sqrt(p * (1 - p) / n)
        for key, p in ((key, math.exp(s.log_q)) for key, s in outcomes.items())
    )
    assert worst > z_bound(len(outcomes))


def test_steps_continue_where_the_prefix_ends():
    lm = chain()
    prefix = extended(lm.start("x"), Continuation((1,), "b", 0.0, 0.0, "length", 1))
    outcomes = lm.outcomes(2, prefix=prefix)
    assert math.isclose(sum(math.exp(s.log_p) for s in outcomes), 1.0, rel_tol=1e-12)
    first = {s.tokens[0] for s in outcomes}
    row = lm.next_log_probs([prefix])[0].exp()
    torch.testing.assert_close(row, torch.tensor([0.2, 0.5, 0.3, 0.0]).double())
    assert first == {0, 1, 2}
    text = Prefix("x", (), 0, "b")  # Without tokens, the text decides.
    torch.testing.assert_close(lm.next_log_probs([text])[0].exp(), row)


def test_a_stop_string_may_spread_over_symbols():
    lm = MarkovLM([1.0, 0.0], [[0.0, 1.0], [1.0, 0.0]], symbols=["one|", "|two"])
    (step,) = lm.generate([lm.start("x")], max_tokens=9, stop=["e||t"], rng=stream())
    assert (step.text, step.reason, step.tokens) == ("one||two", "stop", (0, 1))


def test_masks_follow_what_was_drawn_so_far():
    def no_repeats(prefix):
        mask = torch.ones(4, dtype=torch.bool)
        if prefix.text:
            mask["ab\n".index(prefix.text[-1])] = False
        return mask

    lm, law = chain(), Law(allowed=no_repeats)
    steps = lm.generate([lm.start("x")] * 50, max_tokens=6, law=law, base=Law(), rng=stream())
    for step in steps:
        assert all(a != b for a, b in zip(step.tokens, step.tokens[1:], strict=False))
    outcomes = {(s.tokens, s.reason): s for s in lm.outcomes(6, law=law)}
    assert math.isclose(sum(math.exp(s.log_q) for s in outcomes.values()), 1.0, rel_tol=1e-12)
    for step in steps:
        assert math.isclose(step.log_q, outcomes[step.tokens, step.reason].log_q, rel_tol=1e-12)
        assert math.isclose(step.log_p, outcomes[step.tokens, step.reason].log_p, rel_tol=1e-12)


def test_a_dead_end_fails_without_stopping_the_others():
    def dead_after_b(prefix):
        return torch.full((4,), not prefix.text.endswith("b"))

    lm = chain()
    steps = lm.generate(
        [lm.start("x")] * 40, max_tokens=2, law=Law(allowed=dead_after_b), rng=stream()
    )
    reasons = Counter(step.reason for step in steps)
    assert set(reasons) == {"failed", "length", "end"}
    for step in steps:
        if step.reason == "failed":
            assert (step.text, step.tokens, step.n_tokens, step.log_q) == ("", (), 0, -math.inf)


def test_a_higher_order_remembers():
    lm = TestMarkovLMOfOrder2().model()
    outcomes = lm.outcomes(4)
    assert math.isclose(sum(math.exp(s.log_p) for s in outcomes), 1.0, rel_tol=1e-12)
    step = next(s for s in outcomes if s.tokens == (0, 1, 2, 0))
    table, stay = lm.transition, 0.95
    expected = INITIAL[0] * stay * TRANSITION[0][1] * stay * table[0, 1, 2] * stay * table[1, 2, 0]
    assert math.isclose(math.exp(step.log_p), float(expected), rel_tol=1e-12)


def test_files_hold_the_whole_chain():
    lm = TestMarkovLMOfOrder2().model()
    back = unpack(*pack(lm))
    assert back.outcomes(3) == lm.outcomes(3)
    assert repr(back) == "MarkovLM(symbols=['a', 'b', '\\n'], order=2)"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (([0.5, 0.5], [[0.5, 0.5]]), {}, ShapeError, r"expected transition \[symbol, symbol\]"),
        (([0.5], [[0.5, 0.5]] * 2), {}, ShapeError, r"expected initial \[symbol\] with 2 symbols"),
        ((0.5, [[0.5, 0.5]] * 2), {}, ShapeError, r"expected initial \[symbol\] with 2 symbols"),
        (([0.5, 0.6], [[0.5, 0.5]] * 2), {}, DataError, "rows of initial that sum to 1"),
        (([0.5, 0.5], [[1.5, -0.5]] * 2), {}, DataError, ">= 0 in transition"),
        (([0.5, 0.5], [[0.5, 0.5]] * 2), {"end": 1.2}, DataError, r"in \[0, 1\] for end"),
        (([0.5, 0.5], [[0.5, 0.5]] * 2), {"end": [0.1]}, ShapeError, "one for each of 2 symbols"),
        (([0.5, 0.5], [[0.5, 0.5]] * 2), {"symbols": ["a"]}, DataError, "2 non-empty texts"),
        (([0.5, 0.5], [[0.5, 0.5]] * 2), {"symbols": ["a", "ab"]}, DataError, "begins the symbol"),
        (([1 / 30] * 30, [[1 / 30] * 30] * 30), {}, DataError, "name the 30 symbols"),
    ],
)
def test_bad_tables(arguments, options, error, text):
    with pytest.raises(error, match=text):
        MarkovLM(*arguments, **options)


def test_unknown_symbols():
    lm = chain()
    prefix = lm.start("x")
    with pytest.raises(DataError, match="no symbol of .* stands at character 1 of 'axb'"):
        lm.score([prefix], [Continuation((), "axb", 0.0, 0.0, "length", 3)])
    with pytest.raises(DataError, match="unknown token 7; expected ids of symbols, 0 to 2"):
        lm.score([prefix], [Continuation((0, 7), "a", 0.0, 0.0, "length", 2)])
    with pytest.raises(ShapeError, match=r"expected a mask \[token\] of 4 booleans"):
        lm.generate([prefix], max_tokens=1, law=Law(allowed=lambda p: torch.ones(3)), rng=stream())

"""Searches on a Markov language model, where every law can be enumerated."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.special import betainc
from scipy.stats import chisquare

import probkit as pk
from probkit.errors import CapabilityError, DataError, NumericsWarning
from probkit.inference import DVTS, BeamSearch, BestOfN, Greedy, SelfConsistency
from probkit.inference.search import leader_probability
from probkit.inference.search.rollout import select
from probkit.models.language import Budget, GuidedGeneration, MarkovLM, Steps
from probkit.models.language.answers import answer_posterior
from probkit.models.language.potentials import VerifierPotential
from probkit.testing import SamplerConformance

LM = MarkovLM([0.6, 0.4], [[0.7, 0.3], [0.4, 0.6]], end=[0.1, 0.2])
STEPS = Steps(stop=(), max_tokens=1, max_steps=3)


def score(text):
    level = (4 + 3 * text.count("b") - text.count("a")) / 20
    return min(1.0, max(0.01, level)) if text else 0.05


class Timeless(GuidedGeneration):
    """Counts everything but seconds, so that two equal runs leave equal states."""

    def meter(self):
        return {name: used for name, used in super().meter().items() if name != "seconds"}


MODEL = Timeless(LM, VerifierPotential(score, kind="value"), steps=STEPS)


def texts_law():
    """p(text) of all answers."""
    law: Counter[tuple[str, bool]] = Counter()
    for outcome in LM.outcomes(3):
        law[outcome.text, outcome.reason == "end"] += math.exp(outcome.log_p)
    return law


class TestBestOfN(SamplerConformance):
    def problem(self):
        return BestOfN(3), MODEL, "go"


class TestSelfConsistency(SamplerConformance):
    def problem(self):
        return SelfConsistency(6, stop="beta", threshold=0.8, batch=2), MODEL, "go"


class TestBeamSearch(SamplerConformance):
    def problem(self):
        return BeamSearch(4, 2), MODEL, "go"


class TestDVTS(SamplerConformance):
    def problem(self):
        return DVTS(4, 2, weighted=True), MODEL, "go"


class TestGreedy(SamplerConformance):
    def problem(self):
        return Greedy(), MODEL, "go"

    def is_random(self):
        return False

    def test_options_are_frozen_and_storable(self):
        from probkit.files import pack, unpack

        assert unpack(*pack(Greedy())) == Greedy()  # it has no options


# ------------------------------------------------------------------------------ best of N


def best_law(n):
    """p(selected text): the first of the largest among n, finished ones before others."""
    law = texts_law()
    levels = sorted({(ended, score(text)) for text, ended in law})
    below, chosen = 0.0, {}
    for level in levels:
        here = {key: p for key, p in law.items() if (key[1], score(key[0])) == level}
        share = sum(here.values())
        best = (below + share) ** n - below**n
        for (text, _), p in here.items():
            chosen[text] = chosen.get(text, 0.0) + best * p / share
        below += share
    return chosen


def p_value(found, law):
    names = [name for name in law if law[name] * len(found) >= 5]
    counts = Counter(found)
    observed = np.array([counts[name] for name in names] + [0.0])
    observed[-1] = len(found) - observed.sum()
    expected = np.array([law[name] for name in names] + [0.0])
    expected[-1] = 1 - expected.sum()
    keep = expected > 1e-12
    assert observed[~keep].sum() == 0
    return chisquare(observed[keep], expected[keep] * len(found)).pvalue


def test_the_law_of_the_best_of_four():
    post = pk.infer(MODEL, "go", BestOfN(4), rng=0, chains=500)
    best = [
        chain[int(row.argmax())].text
        for chain, row in zip(post.particles.particles, post.log_weights, strict=True)
    ]
    assert sum(best_law(4).values()) == pytest.approx(1.0)
    assert p_value(best, best_law(4)) > 1e-4
    assert p_value(best, best_law(3)) < 1e-4, "the check cannot tell four from three"
    assert bool((post.log_weights.exp().sum(1) == 1).all()) and post.log_evidence is None


def test_weighted_best_of_n_is_importance_sampling():
    """The weighted vote estimates p_LM(x) reward(x), normalised, here where all can finish."""
    lm = MarkovLM([0.6, 0.4], [[0.7, 0.3], [0.4, 0.6]], end=1.0)
    model = GuidedGeneration(lm, MODEL.potential, steps=STEPS)
    post = pk.infer(model, "go", BestOfN(4000, weighted=True), rng=0)
    exact = torch.tensor([0.6 * score("a"), 0.4 * score("b")]).double()
    found = answer_posterior(post, str)
    a = float(exact[0] / exact.sum())
    assert abs(found.prob("a") - a) < 4 * (a * (1 - a) / found.ess) ** 0.5
    rewards = post.sample_stats["log_reward"]
    torch.testing.assert_close(post.log_weights, torch.log_softmax(rewards, -1))


def test_unfinished_answers_are_a_last_resort():
    rewards = torch.tensor([-1.0, -0.5, -2.0, -math.inf])
    done = torch.tensor([True, False, False, True])
    assert select(rewards, done, weighted=False).exp().tolist() == [1, 0, 0, 0]
    none_done = select(rewards, torch.tensor([False, False, False, True]), weighted=False)
    assert none_done.exp().tolist() == [0, 1, 0, 0]
    ties = select(torch.zeros(3), torch.tensor([True] * 3), weighted=False)
    assert ties.exp().tolist() == [1, 0, 0]
    barren = select(torch.full((4,), -math.inf), done, weighted=True)
    torch.testing.assert_close(barren.exp(), torch.full((4,), 0.25))


def test_a_choice_among_zeros_warns():
    dead = GuidedGeneration(LM, VerifierPotential(lambda text: False), steps=STEPS)
    for sampler in (BestOfN(3), BeamSearch(4, 2), DVTS(4, 2)):
        with pytest.warns(NumericsWarning, match="in 2 of 2 chains no answer has a reward above"):
            pk.infer(dead, "go", sampler, rng=0, chains=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.infer(dead, "go", Greedy(), rng=0)
        pk.infer(dead, "go", SelfConsistency(3), rng=0)


# ------------------------------------------------------------------------------ greedy


def test_greedy_takes_the_most_probable_token():
    lm = MarkovLM([0.4, 0.6], [[0.9, 0.1], [0.8, 0.2]], end=[0.05, 0.6])
    model = GuidedGeneration(lm, MODEL.potential, steps=STEPS)
    post = pk.infer(model, "go", Greedy(), rng=0)
    assert post.particles.best().text == "b" and post.particles.best().finished
    longer = MarkovLM([0.4, 0.6], [[0.9, 0.1], [0.8, 0.2]])
    post = pk.infer(GuidedGeneration(longer, MODEL.potential, steps=STEPS), "go", Greedy(), rng=0)
    assert post.particles.best().text == "baa"
    assert post.attrs["stopped"][0].startswith("max_steps")


# ------------------------------------------------------------------------------ self-consistency


def test_votes_of_self_consistency_follow_the_law_of_the_model():
    post = pk.infer(MODEL, "go", SelfConsistency(2000), rng=0)
    finished = {key[0]: p for key, p in texts_law().items() if key[1]}
    total = sum(finished.values())
    votes = answer_posterior(post, str)
    n = int(post.sample_stats["finished"].sum())
    assert votes.ess == pytest.approx(n) and int(post.sample_stats["drawn"]) == 2000
    assert abs(n / 2000 - total) < 4 * (total * (1 - total) / 2000) ** 0.5
    for text, p in finished.items():
        share = p / total
        assert abs(votes.prob(text) - share) < 4 * (share * (1 - share) / n) ** 0.5


def test_the_leader_against_scipy():
    for first, second in itertools.product(range(25), range(25)):
        exact = 1 - betainc(first + 1, second + 1, 0.5)
        assert leader_probability(first, second) == pytest.approx(exact, abs=1e-12)
    assert leader_probability(0, 0) == 0.5
    assert leader_probability(3, 0) < 0.95 < leader_probability(4, 0)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_early_stop_comes_at_the_first_look_that_is_sure(batch):
    """Replay: recount the votes in the order drawn, and apply the rule with scipy."""
    lm = MarkovLM([0.55, 0.45], [[0.5, 0.5]] * 2, end=1.0)
    model = GuidedGeneration(lm, MODEL.potential, steps=STEPS)
    sampler = SelfConsistency(30, stop="beta", batch=batch)
    post = pk.infer(model, "go", sampler, rng=1, chains=40)
    drawn = post.sample_stats["drawn"].tolist()
    for chain, row, n in zip(post.particles.particles, post.log_weights, drawn, strict=True):
        texts = [p.text for p in chain[:n]]
        looks = [k for k in range(1, 31) if k % batch == 0 or k == 30]
        sure = []
        for k in looks:
            (_, first), *rest = [*Counter(texts[:k]).most_common(2), ("", 0)]
            sure.append(1 - betainc(first + 1, rest[0][1] + 1, 0.5) > 0.95)
            if sure[-1] or k == 30:
                break
        assert n == looks[len(sure) - 1]
        assert row.exp().tolist() == pytest.approx([1 / n] * n + [0.0] * (30 - n))
    assert min(drawn) < 30 and len(set(drawn)) > 3


def test_votes_are_of_what_is_parsed():
    lm = MarkovLM([0.5, 0.5], [[0.5, 0.5]] * 2, end=1.0)
    model = GuidedGeneration(lm, MODEL.potential, steps=STEPS)
    same = pk.infer(model, "go", SelfConsistency(30, lambda text: 7, stop="beta"), rng=0)
    assert int(same.sample_stats["drawn"]) == 4
    none = pk.infer(model, "go", SelfConsistency(12, lambda text: None, stop="beta"), rng=0)
    assert int(none.sample_stats["drawn"]) == 12


# ------------------------------------------------------------------------------ beam and DVTS


class Tree:
    """Text of three symbols; the k-th copy of a text continues with symbol k modulo 3."""

    depth = 4

    def sites(self, data):
        return {}

    def steps(self, data):
        return self.depth

    def start(self, n, data, *, rng):
        return [""] * n

    def extend(self, t, particles, data, *, rng):
        seen = Counter()
        new = []
        for text in particles:
            new.append(text + "abc"[seen[text] % 3] if len(text) < self.depth else text)
            seen[text] += 1
        return new

    def log_weight(self, t, old, new, data):
        return torch.zeros(len(new))

    def finished(self, particles):
        return [len(text) == self.depth for text in particles]

    def reward(self, particles):
        table = torch.rand(3**5, generator=torch.Generator().manual_seed(4)).double()
        return torch.stack([table[int("1" + t.translate(DIGITS), 3)].log() for t in particles])


DIGITS = str.maketrans("abc", "012")


def beam_by_hand(keep):
    """Deterministic beam search, by sorting."""
    tree, beams = Tree(), [""]
    for _ in range(tree.depth):
        children = [beam + s for beam in beams for s in "abc"]
        rewards = tree.reward(children).tolist()
        beams = [c for _, c in sorted(zip(rewards, children, strict=True), reverse=True)][:keep]
    return beams[0]


def test_a_beam_of_full_width_is_exhaustive_search():
    leaves = ["".join(word) for word in itertools.product("abc", repeat=4)]
    best = leaves[int(Tree().reward(leaves).argmax())]
    post = pk.infer(Tree(), "", BeamSearch(81, 3, distinct=True), rng=0)
    assert post.particles.best() == best
    assert beam_by_hand(1) != best, "the tree is too easy to tell a narrow beam from a full one"


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_a_narrow_beam_is_beam_search(keep):
    post = pk.infer(Tree(), "", BeamSearch(3 * keep, 3, distinct=True), rng=0)
    assert post.particles.best() == beam_by_hand(keep)


def test_equal_candidates_fill_a_beam_unless_told_otherwise():
    """Every root child stands 27 times; the 27 places go to the best one, or to all three."""
    wide = [pk.infer(Tree(), "", BeamSearch(81, 3, distinct=d), rng=0) for d in (False, True)]
    starts = [{text[0] for text in post.particles.particles[0]} for post in wide]
    assert len(starts[0]) == 1 and len(starts[1]) == 3


def test_a_wide_beam_finds_the_best_text_of_a_markov_model():
    """Nothing is pruned: 32 places for at most 7 distinct texts of two symbols."""
    finished = [text for text, ended in texts_law() if ended]
    best = max(finished, key=score)
    post = pk.infer(MODEL, "go", BeamSearch(256, 8, distinct=True), rng=0)
    assert score(post.particles.best().text) == score(best)


def test_subtrees_of_dvts_do_not_compete():
    """One subtree a beam: each follows its own best, whatever the others find."""
    n, width = 12, 3
    post = pk.infer(MODEL, "go", DVTS(n, width, weighted=True), rng=5)
    chain, weights = post.particles.particles[0], post.log_weights[0].exp()
    assert int((weights > 0).sum()) <= n // width
    beam = pk.infer(MODEL, "go", BeamSearch(n, width, weighted=True), rng=5)
    assert len({p.text for p in chain}) >= 1 and beam.log_weights.shape == (1, n)


def test_dvts_of_width_one_is_best_of_n():
    one = pk.infer(MODEL, "go", DVTS(8, 1), rng=3, chains=3)
    other = pk.infer(MODEL, "go", BestOfN(8), rng=3, chains=3)
    for mine, theirs in zip(one.particles.particles, other.particles.particles, strict=True):
        assert Counter(p.text for p in mine) == Counter(p.text for p in theirs)
    for k in range(3):
        best = [
            post.particles.particles[k][int(post.log_weights[k].argmax())].log_potential
            for post in (one, other)
        ]
        assert best[0] == best[1]


def test_a_finished_beam_is_not_drawn_again():
    lm = MarkovLM([0.5, 0.5], [[0.5, 0.5]] * 2, end=1.0)
    model = GuidedGeneration(lm, MODEL.potential, steps=STEPS)
    post = pk.infer(model, "go", BeamSearch(8, 2), rng=0)
    drawn = int(post.sample_stats["completion_tokens"])
    assert drawn <= 2 * 8  # a symbol and an end for each candidate at most
    chains = (post.particles.particles[0], post.log_weights[0].tolist())
    texts = [p.text for p, w in zip(*chains, strict=True) if w == 0]
    assert texts == ["b"]


# ------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize("sampler", [BestOfN(8), SelfConsistency(8), BeamSearch(8, 2), DVTS(8, 2)])
def test_a_budget_is_passed_by_one_step_at_most(sampler):
    from dataclasses import replace

    lm = MarkovLM([0.6, 0.4], [[0.7, 0.3], [0.4, 0.6]])
    model = replace(MODEL, lm=lm, steps=Steps(stop=(), max_tokens=1, max_steps=20))
    limited = replace(model, budget=Budget(completion_tokens=30))
    post = pk.infer(limited, "go", sampler, rng=0)
    spent = int(post.sample_stats["completion_tokens"])
    assert 30 <= spent < 30 + 8
    assert post.attrs["stopped"][0].startswith("completion_tokens: ")
    assert post.attrs["usage"][0]["completion_tokens"] == spent
    assert float(post.log_weights.exp().sum()) == pytest.approx(1.0)
    whole = pk.infer(model, "go", sampler, rng=0)
    assert int(whole.sample_stats["completion_tokens"]) == 160


# ------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BestOfN(0), "BestOfN: expected a whole n >= 1, got 0"),
        (lambda: SelfConsistency(2.5), "SelfConsistency: expected a whole n >= 1, got 2.5"),
        (lambda: SelfConsistency(stop="half"), "expected stop None or 'beta', got 'half'"),
        (lambda: SelfConsistency(threshold=0.3), "expected 0.5 <= threshold < 1, got 0.3"),
        (lambda: SelfConsistency(batch=0), "expected a whole batch >= 1, got 0"),
        (lambda: BeamSearch(5, 2), "BeamSearch: expected n to be a multiple of width, got n=5"),
        (lambda: DVTS(4, 8), "DVTS: expected n to be a multiple of width, got n=4, width=8"),
        (lambda: BeamSearch(4, 0), "expected a whole width >= 1, got 0"),
    ],
)
def test_bad_options(build, message):
    with pytest.raises(DataError, match=message):
        build()


def test_a_model_that_knows_no_rewards_is_refused():
    from probkit.models.state_space import StochasticVolatility

    with pytest.raises(CapabilityError, match="BestOfN needs .* lacks finished, reward"):
        pk.infer(StochasticVolatility(), torch.zeros(3).double(), BestOfN(2), rng=0)

"""The tree of digits against enumeration, over tokens of every kind."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.bo.llm.digits import DigitDensity, DigitTree, label_probability, read_label
from probkit.bo.llm.scores import print_score, read_score, score_decimals
from probkit.errors import CapabilityError, DataError
from probkit.models.language.markov import MarkovLM
from probkit.models.language.oracle import FiniteLM, OracleLM
from probkit.models.language.protocol import Law

TOKENS = {
    "characters": (),
    "several digits": ("12", "123", "00", "99", "-1", "0.", ".5", "1.2"),
    "merged with what is around": (" 1", " 12", " ##", "5 ##", "3\n", ".2 ", "7#", " -0", "## 1"),
}


def random_law(seed: int, n: int = 60) -> dict[str, float]:
    """Answers, most of them numbers of three decimals, some of them not."""
    generator = torch.Generator().manual_seed(seed)
    values = 20 * torch.randn(n, generator=generator, dtype=torch.float64)
    texts = [f" {v:.3f} ##" for v in values.tolist()]
    texts += [f" {v:.1f}\n" for v in values[:10].tolist()] + [
        f"{v:.0f}" for v in values[:5].tolist()
    ]
    texts += [" nan ##", " 0.5.1 ##", " 1e5 ##", " about 3", "", "##", "-", " 12a", "## 1.234 ##"]
    weights = torch.rand(len(texts), generator=generator, dtype=torch.float64)
    law: dict[str, float] = {}
    for text, w in zip(texts, (weights / weights.sum()).tolist(), strict=True):
        law[text] = law.get(text, 0.0) + w
    return law


def enumerated(law: dict[str, float], decimals: int) -> dict[float, float]:
    """The law of the numbers that the answers hold, as answers are read."""
    found: dict[float, float] = {}
    for text, p in law.items():
        value = read_score(text, decimals).value
        if not math.isnan(value):
            found[value] = found.get(value, 0.0) + p
    return found


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_tree_without_pruning_is_enumeration(tokens, seed):
    law = random_law(seed)
    lm = FiniteLM(lambda prompt: law, tokens=tokens)
    density = DigitTree(decimals=3, prune=0.0).walk(lm, [lm.start("a number: ##")])[0]
    expected = enumerated(law, 3)
    # "0.5.1" has not ended where its third decimal is missing; what follows that is not looked at
    assert density.values.tolist() == sorted(expected)
    values = torch.tensor(sorted(expected), dtype=torch.float64)
    mass = torch.tensor([expected[v] for v in sorted(expected)], dtype=torch.float64)
    torch.testing.assert_close(density.mass, mass, rtol=0, atol=1e-10)
    assert density.pruned == 0.0 and density.coarse == 0.0
    assert density.total + density.tail == pytest.approx(1.0, abs=1e-12)
    probs = mass / mass.sum()
    mean = float(probs @ values)
    assert density.mean == pytest.approx(mean, abs=1e-10)
    assert density.variance == pytest.approx(float(probs @ (values - mean) ** 2), rel=1e-10)
    inside = (values >= -5) & (values <= 5)
    assert density.probability(-5, 5) == pytest.approx(float(probs[inside].sum()), abs=1e-10)
    for direction, gain in (("min", 1.5 - values), ("max", values - 1.5)):
        expected_gain = float(probs @ gain.clamp_min(0))
        assert density.expected_improvement(1.5, direction) == pytest.approx(
            expected_gain, abs=1e-10
        )


def test_the_tree_of_a_markov_chain_is_the_sum_over_its_outcomes():
    """The chain forgets all but the last sign: another law, another model."""
    signs = ["1", "2", "."]
    lm = MarkovLM(
        [0.5, 0.4, 0.1], [[0.1, 0.2, 0.7], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], end=0.6, symbols=signs
    )
    density = DigitTree(decimals=1, prune=1e-3).walk(lm, [lm.start("p")])[0]
    found = dict(zip(density.values.tolist(), density.mass.tolist(), strict=True))
    assert density.total + density.tail == pytest.approx(1.0, abs=1e-12)
    # whole numbers end with the sequence; decimals count with their first digit
    start, step, stay = {"1": 0.5, "2": 0.4}, {"11": 0.1, "12": 0.2, "21": 0.2, "22": 0.3}, 0.4
    assert found[1.0] == pytest.approx(start["1"] * 0.6, abs=1e-12)
    assert found[12.0] == pytest.approx(start["1"] * stay * step["12"] * 0.6, abs=1e-12)
    assert found[1.1] == pytest.approx(start["1"] * stay * 0.7 * stay * 0.6, abs=1e-12)
    assert found[22.2] == pytest.approx(
        start["2"] * stay * step["22"] * stay * 0.5 * stay * 0.3, abs=1e-12
    )


@pytest.mark.parametrize("prune", [1e-1, 1e-2, 1e-3])
def test_pruning_errs_by_no_more_than_it_says(prune):
    law = {f" {k / 1000:.3f} ##": p for k, p in enumerate(_bell(1000, 380, 90))}
    lm = FiniteLM(lambda prompt: law)
    start = [lm.start("a number: ##")]
    exact = DigitTree(decimals=3, prune=0.0).walk(lm, start)[0]
    rough = DigitTree(decimals=3, prune=prune).walk(lm, start)[0]
    assert rough.total + rough.tail == pytest.approx(1.0, abs=1e-12)
    assert rough.coarse > 0 and len(rough.values) < len(exact.values)
    # coarse mass stands in the middle of branches of width 0.1 at most (below the first decimal)
    assert abs(rough.mean - exact.mean) <= 0.05 * rough.coarse + rough.tail
    gap = abs(rough.probability(0.35, 0.45) - exact.probability(0.35, 0.45))
    assert gap <= rough.tail + rough.coarse


def _bell(n: int, mean: float, sd: float) -> list[float]:
    grid = torch.arange(n, dtype=torch.float64)
    p = torch.exp(-0.5 * ((grid - mean) / sd) ** 2)
    return (p / p.sum()).tolist()


def test_branches_cut_before_their_point_stay_in_the_tail():
    lm = FiniteLM(lambda prompt: {" 123.0 ##": 0.05, " 7.0 ##": 0.95})
    density = DigitTree(decimals=1, prune=0.1).walk(lm, [lm.start("p")])[0]
    assert density.values.tolist() == [7.0]
    assert density.pruned == pytest.approx(0.05) and density.coarse == 0.0


def test_width_keeps_the_most_probable_digits():
    law = {f" {d}.0 ##": p for d, p in zip(range(4), (0.1, 0.2, 0.3, 0.4), strict=True)}
    lm = FiniteLM(lambda prompt: law)
    density = DigitTree(decimals=1, width=2, prune=0.0).walk(lm, [lm.start("p")])[0]
    assert density.values.tolist() == [2.0, 3.0]
    assert density.pruned == pytest.approx(0.3)


def test_numbers_out_of_bounds_are_invalid():
    lm = FiniteLM(lambda prompt: {" 0.5 ##": 0.75, " 99.5 ##": 0.25})
    density = DigitTree(decimals=1, between=(0, 1)).walk(lm, [lm.start("p")])[0]
    assert density.values.tolist() == [0.5] and density.invalid == pytest.approx(0.25)


def test_several_prefixes_are_walked_as_one_by_one():
    laws = {f"p{k}": random_law(k, 20) for k in range(3)}
    lm = FiniteLM(laws.__getitem__)
    starts = [lm.start(p) for p in laws]
    tree = DigitTree(decimals=3, prune=1e-3, batch=7)
    for start, together in zip(starts, tree.walk(lm, starts), strict=True):
        alone = tree.walk(lm, [start])[0]
        assert torch.equal(alone.values, together.values)
        torch.testing.assert_close(alone.mass, together.mass, rtol=1e-14, atol=0)


def test_a_temperature_is_followed_exactly():
    """Sampled answers under the same law have the tree's distribution: no symbol is special."""
    law = {" 0.1 ##": 0.6, " 0.2 ##": 0.3, " 0.9 ##": 0.1}
    lm = FiniteLM(lambda prompt: law)
    density = DigitTree(decimals=1, prune=0.0).walk(lm, [lm.start("p")], Law(0.5))[0]
    squares = torch.tensor([0.36, 0.09, 0.01], dtype=torch.float64)
    torch.testing.assert_close(density.mass, squares / squares.sum())
    nucleus = DigitTree(decimals=1, prune=0.0).walk(lm, [lm.start("p")], Law(1.0, 0.8))[0]
    assert nucleus.values.tolist() == [0.1, 0.2]


def test_a_mixture_averages_masses():
    a = DigitDensity(torch.tensor([0.0, 1.0]).double(), torch.tensor([0.5, 0.25]).double(), 0.25)
    b = DigitDensity(torch.tensor([1.0]).double(), torch.tensor([0.5]).double(), 0.1, 0.4)
    mixed = DigitDensity.mixture([a, b])
    assert mixed.values.tolist() == [0.0, 1.0]
    assert mixed.mass.tolist() == [0.25, 0.375]
    assert (mixed.pruned, mixed.invalid) == (0.175, 0.2)
    assert mixed.total + mixed.tail == pytest.approx(1.0)


def test_a_model_that_writes_no_number_has_no_law():
    lm = FiniteLM(lambda prompt: {" I do not know": 1.0})
    density = DigitTree().walk(lm, [lm.start("p")])[0]
    assert (density.total, density.tail) == (0.0, pytest.approx(1.0))
    with pytest.raises(DataError, match="writes no number here"):
        density.mean  # noqa: B018


def test_the_tree_needs_next_token_distributions():
    lm = OracleLM(lambda prompt, rng: "1")
    with pytest.raises(CapabilityError, match=r"digit tree needs a language model with logits.*mc"):
        DigitTree().walk(lm, [lm.start("p")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decimals": -1}, "expected a whole decimals >= 0, got -1"),
        ({"width": 0}, "expected a whole width >= 1, got 0"),
        ({"prune": 1.0}, "expected 0 <= prune < 1, got 1.0"),
        ({"batch": 1.5}, "expected a whole batch >= 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        DigitTree(**options)


# ---------------------------------------------------------------------- reading scores


@pytest.mark.parametrize(
    ("text", "value", "reason"),
    [
        (" 0.912088 ##", 0.912088, ""),
        ("## 0.5 ##", 0.5, ""),
        ("-3.25", -3.25, ""),
        ("7\nnext", 7.0, ""),
        ("007.5 ", 7.5, ""),
        ("0.12345678 ##", 0.123456, ""),
        ("nan ##", None, "not a number"),
        ("inf", None, "not a number"),
        ("1e309", None, "not a number"),
        ("0.5.1 ##", None, "not a number"),
        ("0.5%", None, "not a number"),
        ("+0.5", None, "not a number"),
        ("\u0663.5", None, "not a number"),
        ("about 1", None, "not a number"),
        ("", None, "not a number"),
        ("1" * 16, None, "not a number"),
        ("99.0 ##", None, "out of range"),
    ],
)
def test_a_score_is_read_by_one_grammar(text, value, reason):
    found = read_score(text, 6, between=(-10, 10))
    assert found.reason == reason
    assert math.isnan(found.value) if value is None else found.value == value


def test_a_number_that_was_cut_off_lacks_digits():
    assert read_score(" 0.91", 3, cut=True).reason == "cut off"
    assert read_score(" 0.912", 3, cut=True).value == 0.912
    assert read_score(" 0.91 #", 3, cut=True).value == 0.91


def test_decimals_grow_with_small_ranges():
    assert score_decimals(torch.tensor([1.0, 1.0])) == 6
    assert score_decimals(torch.tensor([0.0, 0.0])) == 6
    assert score_decimals(torch.tensor([1e-9, 3e-9])) == 13
    assert score_decimals(torch.tensor([10.0, 310.0]), least=0, steps=1000) == 1
    assert print_score(-0.0, 1) == "0.0"


# ---------------------------------------------------------------------- labels


def test_labels_count_in_every_token_that_holds_them():
    law = {" 1 ##": 0.2, "1": 0.1, " 0 ##": 0.25, "## 0": 0.05, "10": 0.2, "one": 0.1, " 0.5": 0.1}
    for tokens in ((), (" 1", " 0 ##", "10"), ("## 0", "##", " 0")):
        lm = FiniteLM(lambda prompt: law, tokens=tokens)
        found = float(label_probability(lm, [lm.start("p")])[0])
        # A label of one character counts at once where its token holds nothing more.
        seen = {"1": 0.0, "0": 0.0}
        for text, p in law.items():
            first = text.replace("#", "").strip()[:1]
            whole = text == "10" and "10" in tokens
            if first in seen and not whole:
                seen[first] += p
        assert found == pytest.approx(seen["1"] / (seen["0"] + seen["1"]), abs=1e-10)


def test_without_labels_there_is_no_probability():
    lm = FiniteLM(lambda prompt: {"yes": 1.0})
    assert label_probability(lm, [lm.start("p")]).isnan().all()
    assert [read_label(t) for t in ("1", " 0 ##", "## 1", "2", "1.5", "10")] == [
        1,
        0,
        1,
        None,
        None,
        None,
    ]

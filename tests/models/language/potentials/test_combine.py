"""Powers, products, and values taken step by step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import probkit as pk
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.inference import ParticleFilter
from probkit.models.language import GuidedGeneration, MarkovLM, Steps
from probkit.models.language.potentials import All, AsSteps, Power, VerifierPotential, kind_of
from probkit.models.language.protocol import Continuation, Prefix


def step(text, reason="length"):
    return Continuation((), text, -1.0, -1.0, reason, len(text))


SHORT = VerifierPotential(lambda text: len(text) < 3, low=0.1)
CALM = VerifierPotential(lambda text: "!" not in text, low=0.5)
EVEN = VerifierPotential(lambda text: len(text) % 2 == 0, kind="value", low=0.25)
NEVER = VerifierPotential(lambda text: "x" not in text, kind="value")


def test_a_power_scales_the_log():
    steps = [step("ab"), step("abc")]
    logs = SHORT.log_step([Prefix("?")] * 2, steps)
    torch.testing.assert_close(Power(SHORT, 0.5).log_step([Prefix("?")] * 2, steps), 0.5 * logs)
    prefix = Prefix("?", text="abc")
    assert Power(EVEN, 2.0).log_value([prefix], [False]).exp().item() == pytest.approx(0.0625)
    assert kind_of(Power(EVEN, 2.0)) == "value" and kind_of(Power(SHORT, 2.0)) == "per_step"


def test_all_multiplies_and_asks_only_about_what_is_alive():
    asked = []

    def count(text):
        asked.append(text)
        return 0.5

    both = All([NEVER, VerifierPotential(count, kind="value")])
    prefixes = [Prefix("?", text=text) for text in ("a", "x", "b")]
    assert both.log_value(prefixes, [False] * 3).exp().tolist() == [0.5, 0.0, 0.5]
    assert asked == ["a", "b"]
    product = All([SHORT, CALM]).log_step([Prefix("?")], [step("ab!")])
    assert product.exp().item() == pytest.approx(0.05)


def test_steps_of_a_value_multiply_to_it():
    """For every way of cutting a text into steps, with the value of the empty text 1."""
    value = VerifierPotential(lambda text: 1 / (2 + text.count("b")), kind="value")
    text = "abbab"
    wanted = value.log_value([Prefix("?", text=text)], [True]).item()
    for cuts in itertools.product([0, 1], repeat=len(text) - 1):
        ends = [k + 1 for k, cut in enumerate(cuts) if cut] + [len(text)]
        starts = [0, *ends[:-1]]
        logs = AsSteps(value).log_step(
            [Prefix("?", text=text[:a]) for a in starts],
            [step(text[a:b]) for a, b in zip(starts, ends, strict=True)],
        )
        assert logs.sum().item() == pytest.approx(wanted, abs=1e-12)


def test_a_dead_value_stays_dead():
    logs = AsSteps(NEVER).log_step([Prefix("?", text="x")], [step("a")])
    assert logs.tolist() == [-math.inf]


def test_as_steps_knows_the_end():
    ends = VerifierPotential(lambda text: 1.0, kind="value", final=lambda text: 0.5)
    steps = [step("a"), step("a", "end"), step("a.")]
    plain = AsSteps(ends).log_step([Prefix("?", text="b")] * 3, steps)
    assert plain.exp().tolist() == [1.0, 0.5, 1.0]
    final = AsSteps(ends, final=".").log_step([Prefix("?", text="b")] * 3, steps)
    assert final.exp().tolist() == [1.0, 0.5, 0.5]


LM = MarkovLM([0.5, 0.5], [[0.7, 0.3], [0.4, 0.6]], end=[0.1, 0.3])
STEPS = Steps(stop=(), max_tokens=1, max_steps=4)


def test_a_value_and_its_steps_have_one_target():
    """Same seed, same draws, same weights: the two forms are one Feynman-Kac model."""
    value = VerifierPotential(lambda text: 0.2 + 0.15 * text.count("b"), kind="value")
    posts = [
        pk.infer(GuidedGeneration(LM, potential, steps=STEPS), "go", ParticleFilter(50), rng=3)
        for potential in (value, AsSteps(value))
    ]
    torch.testing.assert_close(posts[0].log_evidence.value, posts[1].log_evidence.value)
    torch.testing.assert_close(posts[0].log_weights, posts[1].log_weights)


def test_the_evidence_of_a_power_is_that_of_the_enumeration():
    """Z = E[G^beta], summed over all texts of at most four symbols."""
    potential = VerifierPotential(lambda text: 0.3 if text.endswith("b") else 0.9)

    def exact(beta):
        total = 0.0
        for outcome in LM.outcomes(4):
            log_g = sum(
                potential.log_step([Prefix("?", text=outcome.text[:k])], [step(s)]).item()
                for k, s in enumerate(outcome.text)
            )
            total += math.exp(outcome.log_p + beta * log_g)
        return total

    for beta in (0.5, 2.0):
        model = GuidedGeneration(LM, Power(potential, beta), steps=STEPS)
        post = pk.infer(model, "go", ParticleFilter(100), rng=1, chains=40)
        ratio = (post.log_evidence.value - math.log(exact(beta))).exp()
        error = ratio.std() / 40**0.5
        assert abs(ratio.mean() - 1) < 4 * error < 0.1
    wrong = (post.log_evidence.value - math.log(exact(1.0))).exp()
    assert abs(wrong.mean() - 1) > 4 * wrong.std() / 40**0.5


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Power(SHORT, 0.0), DataError, "expected a finite beta > 0, got 0.0"),
        (lambda: Power(SHORT, math.inf), DataError, "expected a finite beta > 0, got inf"),
        (lambda: Power(object(), 1.0), CapabilityError, "object has neither"),
        (lambda: All([]), DataError, "expected at least one potential"),
        (
            lambda: All([SHORT, EVEN]),
            CapabilityError,
            "got both: VerifierPotential is per_step, VerifierPotential is value.*AsSteps",
        ),
        (lambda: AsSteps(SHORT), CapabilityError, "rates steps already; use it as it is"),
    ],
)
def test_bad_combinations(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_part_that_returns_too_few():
    class Short:
        def log_value(self, prefixes, finished):
            return torch.zeros(1)

    with pytest.raises(ShapeError, match=r"Short: expected one log score for each of 2 texts"):
        All([Short()]).log_value([Prefix("?")] * 2, [False] * 2)

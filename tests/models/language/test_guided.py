"""Guided generation: its target by enumeration, its kinds of potentials, its proposals."""

from __future__ import annotations

import math

import pytest
import torch
from support.guided_toys import (
    PROMPT,
    Flaky,
    Local,
    Prefixed,
    Value,
    chain,
    enumerate_target,
    evidence_z,
    model_of,
    posterior_z,
)

from probkit import infer
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.inference import ParticleFilter
from probkit.models.language import (
    Capabilities,
    GuidedGeneration,
    Law,
    MarkovLM,
    Partial,
    Prefix,
    Steps,
)
from probkit.models.language.partial import step_between
from probkit.models.language.scoring import score_under

OTHER = MarkovLM([0.3, 0.3, 0.4], [[0.3, 0.3, 0.4]] * 3, end=0.3)
RESAMPLERS = ("systematic", "stratified", "residual", "multinomial")


def check(model, *, chains=100, n=6, **options):
    """The evidence and the weights of probable answers are unbiased."""
    truth = enumerate_target(model)
    post = infer(model, PROMPT, ParticleFilter(n, **options), rng=0, chains=chains)
    assert abs(evidence_z(post, truth.log_evidence)) < 3.0
    assert posterior_z(post, truth) < 3.5  # up to four answers
    return post


# ---------------------------------------------------------------- the target


@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_evidence_is_unbiased_for_every_resampler(resampler):
    check(model_of(Prefixed()), resampler=resampler, ess_threshold=1.0)


@pytest.mark.parametrize("tau", [0.0, 0.5])
@pytest.mark.parametrize("potential", [Local(), Value()])
def test_evidence_is_unbiased_for_every_threshold(potential, tau):
    check(model_of(potential), ess_threshold=tau)


@pytest.mark.slow
@pytest.mark.parametrize("tau", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("resampler", RESAMPLERS)
@pytest.mark.parametrize("potential", [Prefixed(), Value()])
def test_every_resampler_with_every_threshold(potential, resampler, tau):
    check(model_of(potential), resampler=resampler, ess_threshold=tau, chains=80, n=20)


def test_the_weighted_posterior_approaches_the_enumeration():
    model = model_of(Prefixed())
    truth = enumerate_target(model)
    distances = []
    for n in (20, 3000):
        post = infer(model, PROMPT, ParticleFilter(n), rng=1)
        found: dict[tuple[str, bool], float] = {}
        for p, w in zip(
            post.particles.particles[0], post.log_weights[0].exp().tolist(), strict=True
        ):
            found[p.text, p.finished] = found.get((p.text, p.finished), 0.0) + w
        gaps = [abs(found.get(key, 0.0) - expected) for key, expected in truth.law.items()]
        distances.append(0.5 * sum(gaps))
    # total variation of 38 answers: about sqrt(38 / (2 pi n)) = 0.04 for independent draws
    assert distances[1] < 0.08 < distances[0]


class WithoutIncrement(GuidedGeneration):
    """Mutant: forgets the evidence of every second step."""

    def log_weight(self, t, old, new, data):
        increments = super().log_weight(t, old, new, data)
        return increments - increments.logsumexp(0) + math.log(len(new)) * (t % 2)


class Reweighting(GuidedGeneration):
    """Mutant: counts the last potential of finished answers again."""

    def extend(self, t, particles, data, *, rng):
        after = super().extend(t, particles, data, rng=rng)
        return [
            p if p.finished and p.log_increment else new
            for p, new in zip(particles, after, strict=True)
        ]


class WithoutRatio(GuidedGeneration):
    """Mutant: drops p / q."""

    def log_weight(self, t, old, new, data):
        return self.log_potential(t, old, new, data)


@pytest.mark.parametrize("mutant", [WithoutIncrement, WithoutRatio])
def test_the_checks_catch_mutants(mutant):
    made = model_of(Local(), proposal=MarkovLM([0.3, 0.5, 0.2], [[0.3, 0.5, 0.2]] * 3, end=0.1))
    check(made, n=30)
    names = ("lm", "potential", "steps", "proposal")
    model = mutant(**{name: getattr(made, name) for name in names})
    with pytest.raises(AssertionError):
        check(model, n=30)


def test_the_checks_catch_weights_after_the_end():
    made = early_stopper(StepScore())
    check(made, ess_threshold=0.5)
    model = Reweighting(made.lm, made.potential, steps=made.steps)
    with pytest.raises(AssertionError):
        check(model, ess_threshold=0.5)


def early_stopper(potential, **options):
    """S ends the answer at once, with score 0.8; else four steps of 0.7 each, even odds."""
    lm = MarkovLM([0.5, 0.5], [[0.0, 1.0], [0.0, 1.0]], symbols=["S", "x"])
    steps = Steps(stop=(), max_tokens=1, max_steps=4, final=("S",))
    return GuidedGeneration(lm, potential, steps=steps, **options)


class StepScore:
    def log_step(self, prefixes, steps):
        scores = [0.8 if "S" in step.text else 0.7 for step in steps]
        return torch.tensor(scores, dtype=torch.float64).log()


class WholeScore:
    def log_value(self, prefixes, finished):
        scores = [0.8 if "S" in prefix.text else 0.7 for prefix in prefixes]
        return torch.tensor(scores, dtype=torch.float64).log()


def share_of_s(post):
    """Mean and standard error over chains of the weight of answers S."""
    here = torch.tensor([[p.text == "S" for p in row] for row in post.particles.particles])
    each = (here * post.log_weights.exp()).sum(1)
    return float(each.mean()), float(each.std() / len(each) ** 0.5)


@pytest.mark.parametrize(
    ("potential", "exact"), [(StepScore(), 0.4 / (0.4 + 0.5 * 0.7**4)), (WholeScore(), 0.8 / 1.5)]
)
def test_early_stopper(potential, exact):
    model = early_stopper(potential)
    truth = enumerate_target(model)
    assert truth.law["S", True] == pytest.approx(exact, abs=1e-12)
    post = infer(model, PROMPT, ParticleFilter(1000), rng=0, chains=20)
    share, error = share_of_s(post)
    assert abs(share - exact) < 3 * error < 0.02
    assert round(exact, 3) in (0.769, 0.533)


def test_early_stopper_as_its_hub_weighs_it():
    model = early_stopper(WholeScore(), compat="its_hub")
    options = ParticleFilter(64, resampler="multinomial", ess_threshold=1.0)
    post = infer(model, PROMPT, options, rng=0, chains=150)
    share, error = share_of_s(post)
    limit = 1.0 / (1.0 + ((0.7 / 0.3) / (0.8 / 0.2)) ** 4)
    assert round(limit, 3) == 0.896
    assert abs(share - 0.893) < 3 * error + 3 * 0.005  # 0.893 +- 0.005 was measured with its-hub
    assert share - 3 * error > 0.8  # far from the exact 0.533
    assert "biased" in post.attrs["compat"]


# ---------------------------------------------------------------- invariants


def test_the_split_of_a_value_does_not_matter():
    evidence, texts = [], []
    for early in (0.0, 1.0, -2.0):
        model = model_of(Value(early))
        post = infer(model, PROMPT, ParticleFilter(20, ess_threshold=0.0), rng=0)
        evidence.append(float(post.log_evidence.value))
        texts.append([p.text for p in post.particles.particles[0]])
    assert texts[0] == texts[1] == texts[2]
    assert evidence[0] == pytest.approx(evidence[1], abs=1e-12)
    assert evidence[0] == pytest.approx(evidence[2], abs=1e-12)
    check(model_of(Value(-0.3)), ess_threshold=1.0, n=12)


@pytest.mark.parametrize("potential", [Prefixed(), Value()])
def test_without_resampling_it_is_importance_sampling(potential):
    model = model_of(potential, proposal=Law(temperature=1.5))
    post = infer(model, PROMPT, ParticleFilter(30, ess_threshold=0.0), rng=3)
    particles = post.particles.particles[0]
    q = [_log_q(model, p, Law(temperature=1.5)) for p in particles]
    p = [_log_q(model, p, Law()) for p in particles]
    ratio = torch.tensor(p, dtype=torch.float64) - torch.tensor(q, dtype=torch.float64)
    log_weights = ratio + model.reward(particles)
    expected = log_weights.logsumexp(0) - math.log(30)
    assert float(post.log_evidence.value) == pytest.approx(float(expected), abs=1e-12)
    normalised = log_weights - log_weights.logsumexp(0)
    assert torch.allclose(post.log_weights[0], normalised, atol=1e-12)


def _log_q(model, partial, law):
    step = step_between(Partial(Prefix(PROMPT)), partial)
    return float(score_under(model.lm, law, [Prefix(PROMPT)], [step]))


def test_finished_answers_are_never_touched_again():
    model = model_of(Prefixed(), lm=chain(0.5))
    rng = torch.Generator().manual_seed(0)
    now = model.start(40, PROMPT, rng=rng)
    for t in range(3):
        after = model.extend(t, now, PROMPT, rng=rng)
        increments = model.log_weight(t, now, after, PROMPT)
        for old, new, gain in zip(now, after, increments.tolist(), strict=True):
            if old.finished:
                assert gain == 0.0 and new.prefix == old.prefix
                assert (new.steps, new.log_potential) == (old.steps, old.log_potential)
        now = after
    assert sum(p.finished for p in now) > 10


def test_exactly_max_steps():
    lm = chain(0.0)
    model = model_of(Local(), lm=lm, steps=Steps(stop=(), max_tokens=2, max_steps=4))
    post = infer(model, PROMPT, ParticleFilter(5), rng=0)
    assert {p.steps for p in post.particles.particles[0]} == {4}
    assert {len(p.text) for p in post.particles.particles[0]} == {8}
    assert lm.usage.calls == 4
    assert not any(p.finished for p in post.particles.particles[0])
    assert post.attrs["stopped"] == ("max_steps: 5 of 5 answers are not finished",)


def test_steps_end_at_delimiters_and_answers_at_final_strings():
    lm = MarkovLM([0.5, 0.5, 0.0], [[0.4, 0.4, 0.2]] * 3, symbols=["x", ";", "!"])
    steps = Steps(stop=";", max_tokens=4, max_steps=30, final="!")
    model = GuidedGeneration(lm, Unit(), steps=steps)
    post = infer(model, PROMPT, ParticleFilter(30), rng=0)
    for p in post.particles.particles[0]:
        assert p.finished and p.text.endswith("!") and p.text.count("!") == 1
    assert post.sample_stats["steps_taken"].item() < 30


class Unit:
    """No guidance at all."""

    def log_step(self, prefixes, steps):
        return torch.zeros(len(steps), dtype=torch.float64)


# ---------------------------------------------------------------- laws and proposals


@pytest.mark.parametrize(
    "options",
    [
        {"proposal": Law(temperature=2.0)},
        {"proposal": OTHER},
        {"law": Law(temperature=0.6)},
        {"law": Law(temperature=0.6), "proposal": Law()},
        {"law": Law(temperature=0.6), "proposal": OTHER},
        {"power": 0.5, "proposal": Law(temperature=2.0)},
    ],
    ids=["law", "other model", "base", "base and law", "base and other", "power"],
)
def test_proposals_and_laws_are_corrected(options):
    check(model_of(Prefixed(), **options), n=16)


class NoC:
    """Forbids the symbol c."""

    def log_step(self, prefixes, steps):
        return torch.tensor([-math.inf if "c" in s.text else 0.0 for s in steps]).double()


def test_a_mask_keeps_everybody_alive():
    mask = torch.tensor([True, True, False, True])
    masked = model_of(NoC(), proposal=Law(allowed=lambda prefix: mask))
    post = check(masked, n=8)
    assert all("c" not in p.text for row in post.particles.particles for p in row)
    assert float(post.sample_stats["ess"].min()) > 4.0
    bare = check(model_of(NoC()), n=8, ess_threshold=0.0)
    dead = [p for row in bare.particles.particles for p in row if p.dead]
    assert len(dead) > 100 and all(not p.finished for p in dead)


def test_a_dead_end_is_dead_at_once():
    nothing = torch.zeros(4, dtype=torch.bool)
    alive = torch.ones(4, dtype=torch.bool)
    law = Law(allowed=lambda prefix: nothing if prefix.text.endswith("a") else alive)
    lm = Flaky(chain(0.0), share=0.0)
    post = infer(
        model_of(Unit(), lm=lm, proposal=law), PROMPT, ParticleFilter(20, ess_threshold=0.0), rng=0
    )
    assert lm.calls == 3  # nothing is drawn again
    assert all(p.dead == ("a" in p.text[:2]) for p in post.particles.particles[0])


def test_scores_under_any_law_are_those_of_the_draws():
    lm = chain()
    law = Law(temperature=0.7, top_p=0.9)
    rng = torch.Generator().manual_seed(0)
    prefixes = [lm.start(PROMPT)] * 40
    drawn = lm.generate(prefixes, max_tokens=4, law=law, rng=rng)
    found = score_under(lm, law, prefixes, drawn)
    assert torch.allclose(found, torch.tensor([s.log_q for s in drawn]).double(), atol=1e-12)
    own = score_under(lm, Law(), prefixes, drawn)
    assert torch.allclose(own, lm.score(prefixes, drawn))
    with pytest.raises(CapabilityError, match="needs its tokens"):
        score_under(lm, law, prefixes[:1], [drawn[0]._replace(tokens=())])


def test_transition_density_of_pairs():
    model = model_of(Prefixed(), lm=chain(0.4))
    rng = torch.Generator().manual_seed(0)
    old = model.start(30, PROMPT, rng=rng)
    new = model.extend(0, old, PROMPT, rng=rng)
    expected = [_log_q(model, p, Law()) for p in new]
    found = model.log_transition(0, old, new, PROMPT)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))
    later = model.extend(1, new, PROMPT, rng=rng)
    wrong = model.log_transition(1, new, [*later[1:], later[0]], PROMPT)
    kept = model.log_transition(1, new, later, PROMPT)
    assert bool(torch.isfinite(kept).all()) and bool(torch.isneginf(wrong).any())
    assert all(v == 0.0 for v, p in zip(kept.tolist(), new, strict=True) if p.finished)


def test_base_law_is_on_record():
    model = model_of(Local(), law=Law(temperature=0.8), proposal=Law(), power=0.5)
    attrs = infer(model, PROMPT, ParticleFilter(2), rng=0).attrs
    assert attrs["law"] == "temperature=0.8, top_p=1"
    assert (attrs["proposal"], attrs["power"]) == ("temperature=1, top_p=1", 0.5)
    assert attrs["potential_kind"] == "per_step"


# ---------------------------------------------------------------- bad input


class Given:
    """Returns what it is told to."""

    def __init__(self, value, log_bound=None):
        self.value = value
        if log_bound is not None:
            self.log_bound = log_bound

    def log_step(self, prefixes, steps):
        if isinstance(self.value, float):
            return torch.tensor([0.0] * (len(steps) - 1) + [self.value], dtype=torch.float64)
        return self.value


@pytest.mark.parametrize(
    ("potential", "message"),
    [
        (Given(math.nan), "Given: log potential of particle 3 at step 0 is nan; expected a finite"),
        (Given(math.inf), "log potential of particle 3 at step 0 is inf"),
        (Given(0.5, log_bound=0.0), "particle 3 at step 0 is 0.5; .* and at most its bound 0"),
    ],
)
def test_bad_potentials_name_particle_and_step(potential, message):
    with pytest.raises(DataError, match=message):
        infer(model_of(potential), PROMPT, ParticleFilter(4), rng=0)


def test_potentials_of_another_size():
    with pytest.raises(ShapeError, match=r"expected log potentials \[n=4\], one for each"):
        infer(model_of(Given(torch.zeros(3))), PROMPT, ParticleFilter(4), rng=0)


def test_kinds_are_kept_apart():
    class Both(Local, Value):
        def __init__(self):
            Value.__init__(self)

    for potential in (Both(), object()):
        with pytest.raises(CapabilityError, match="expected an object with either log_step"):
            model_of(potential)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_failure": "retry"}, "expected on_failure 'redraw' or 'drop', got 'retry'"),
        ({"power": 0.0}, "expected a finite power above 0, got 0.0"),
        ({"steps": 5}, "expected steps as Steps, got 5"),
        ({"law": 0.8}, "expected law as Law, got 0.8"),
        ({"proposal": 0.8}, "expected proposal as a Law or a language model, got 0.8"),
        ({"proposal": Law(temperature=0.0)}, "a proposal of temperature 0 draws one text only"),
        ({"compat": "other"}, "expected compat None or 'its_hub', got 'other'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DataError, match=message):
        model_of(Local(), **options)


def test_compat_needs_a_value():
    with pytest.raises(CapabilityError, match="expected a value potential, got one per step"):
        model_of(Local(), compat="its_hub")
    with pytest.raises(DataError, match="knows neither proposal nor power"):
        model_of(Value(), compat="its_hub", power=0.5)


class Poor(Flaky):
    """A back end without any capability."""

    capabilities = Capabilities()


def test_missing_capabilities_are_named():
    poor = Poor(chain(), share=0.0)
    infer(model_of(Local(), lm=poor), PROMPT, ParticleFilter(3), rng=0)
    with pytest.raises(CapabilityError, match="a proposal needs a language model with logprobs"):
        model_of(Local(), lm=poor, proposal=Law(temperature=2.0))
    with pytest.raises(CapabilityError, match="another model as proposal needs .* prompt_logprobs"):
        model_of(Local(), lm=poor, proposal=OTHER)
    two = MarkovLM([0.5, 0.5], [[0.5, 0.5]] * 2)
    with pytest.raises(CapabilityError, match="the same vocabulary"):
        model_of(Local(), proposal=two)


@pytest.mark.parametrize("prompt", ["", [], 3, ["go"]])
def test_bad_prompts(prompt):
    with pytest.raises(DataError, match="GuidedGeneration: expected a prompt"):
        infer(model_of(Local()), prompt, ParticleFilter(3), rng=0)


def test_chat_messages_are_prompts():
    messages = [{"role": "user", "content": "go"}]
    post = infer(model_of(Local()), messages, ParticleFilter(3), rng=0)
    assert post.particles.particles[0][0].prefix.prompt == (("user", "go"),)


def test_too_few_particles():
    with pytest.raises(DataError, match="ParticleFilter: expected a whole n >= 1, got 0"):
        ParticleFilter(0)


def test_nothing_to_predict():
    post = infer(model_of(Local()), PROMPT, rng=0)  # the default sampler
    assert len(post.particles.particles[0]) == 32
    with pytest.raises(CapabilityError, match="the answers are post.particles"):
        post.predict("x")

"""Particles over a server that fails: no fault ends a run, passes a budget or sets a weight."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fault_proxy import INJECTION, FaultProxy, Faults
from support.openai_server import OpenAIServer, Variant, chain

from probkit import infer
from probkit.errors import CapabilityError
from probkit.inference import ParticleFilter, ParticleGibbs
from probkit.models import OpenAILM
from probkit.models.language import Budget, GuidedGeneration, Law, Retries, Steps

PROMPT = "x|"
STEPS = Steps(stop=("\n",), max_tokens=2, max_steps=3)
QUICK = Retries(most=40, first=0.001, longest=0.002)
FEW = Retries(most=1, first=0.001, longest=0.002)
ROUGH = Faults(dropped=0.1, malformed=0.1, truncated=0.1, limited=0.1, broken=0.1, wrong_schema=0.1)
STEP = 6 * (2 + 12)  # tokens of one step of six particles: two generated, up to twelve read


class FewB:
    """A step is worth exp(-number of b): text in, number out."""

    def log_step(self, prefixes, steps):
        return torch.tensor([-1.0 * s.text.count("b") for s in steps], dtype=torch.float64)


def worth(text: str) -> float:
    return -1.0 * text.count("b")


@pytest.fixture(scope="module")
def behind():
    """A server that tells token ids and scores text, a proxy before it, what probing found."""
    with OpenAIServer(Variant(vllm=True, context=1000)) as server, FaultProxy(server.url) as proxy:
        with OpenAILM(f"{server.url}/v1", api_key_env=None) as lm:
            found = lm.profile
        yield server, proxy, replace(found, end_token=4)


def spoil(proxy: FaultProxy, faults: Faults, seed: int = 0) -> None:
    proxy.faults, proxy.seed = faults, seed
    proxy.sent.clear()
    proxy.struck.clear()


def model_of(proxy, profile, *, potential=None, guided=None, **options) -> GuidedGeneration:
    given = {"retries": QUICK, "timeout": 20.0, "concurrency": 4, "profile": profile} | options
    lm = OpenAILM(f"{proxy.url}/v1", api_key_env=None, **given)
    potential = FewB() if potential is None else potential
    return GuidedGeneration(lm, potential, steps=STEPS, **(guided or {}))


def run(model: GuidedGeneration, sampler=None, rng: int = 0):
    try:
        return infer(model, PROMPT, ParticleFilter(6) if sampler is None else sampler, rng=rng)
    finally:
        model.lm.close()


def texts(post) -> list[str]:
    return [p.prefix.text for p in post.particles.particles[0]]


def test_retried_faults_change_nothing(behind):
    _, proxy, profile = behind
    spoil(proxy, Faults())
    clean = run(model_of(proxy, profile))
    spoil(proxy, ROUGH)
    model = model_of(proxy, profile)
    spoilt = run(model)
    assert texts(spoilt) == texts(clean)
    assert torch.equal(spoilt.log_weights, clean.log_weights)
    assert torch.equal(spoilt.log_evidence.value, clean.log_evidence.value)
    assert model.lm.usage.retries > 10 and model.lm.usage.failures == 0


def test_the_evidence_is_that_of_the_chain(behind):
    """E[exp(-number of b)] over whole answers, by enumeration: within 4 standard errors."""
    _, proxy, profile = behind
    spoil(proxy, Faults())
    model = model_of(proxy, profile)
    with model.lm:
        post = infer(model, PROMPT, ParticleFilter(8), rng=1, chains=6)
    exact, total = chain(), 0.0
    open_ = [(exact.start(PROMPT), 0.0, 0)]
    while open_:
        prefix, log_p, steps = open_.pop()
        for step in exact.outcomes(2, prefix=prefix, stop=STEPS.stop):
            now = log_p + step.log_p + worth(step.text)
            if step.reason == "end" or steps + 1 == STEPS.max_steps:
                total += math.exp(now)
            else:
                longer = prefix._replace(
                    tokens=prefix.tokens + step.tokens, text=prefix.text + step.text
                )
                open_.append((longer, now, steps + 1))
    ratio = (post.log_evidence.value - math.log(total)).exp()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert abs(float(ratio.mean()) - 1.0) < 4 * error < 1.0


mixes = st.builds(
    lambda parts: Faults(**{k: 0.95 * v / max(1.0, sum(parts.values())) for k, v in parts.items()}),
    st.fixed_dictionaries(
        {
            name: st.floats(0.0, 1.0)
            for name in (
                *("dropped", "malformed", "truncated", "limited", "broken"),
                *("wrong_schema", "injected"),
            )
        }
    ),
)


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    faults=mixes,
    seed=st.integers(0, 999),
    tokens=st.integers(0, 400),
    inside=st.booleans(),
    on_failure=st.sampled_from(["redraw", "drop"]),
)
def test_no_mix_of_faults_kills_a_run_or_passes_a_budget(
    behind, faults, seed, tokens, inside, on_failure
):
    """The budget of the back end, or of the run; what the server computed is what counts."""
    server, proxy, profile = behind
    spoil(proxy, faults, seed)
    before, budget = server.tokens, Budget(tokens=tokens)
    guided = {"on_failure": on_failure} | ({} if inside else {"budget": budget})
    options = {"budget": budget} if inside else {}
    model = model_of(proxy, profile, guided=guided, retries=FEW, **options)
    post = run(model)
    spent = server.tokens - before
    if inside:  # requests are admitted one by one, with what they can cost at most
        assert model.lm.usage.tokens <= tokens
        assert spent <= tokens + (2 + 12)
    else:  # between steps: one step may pass it, with its repeats and redraws
        assert spent <= tokens + STEP * (1 + FEW.most) * (4 if on_failure == "redraw" else 1)
    weights = post.log_weights[0]
    assert len(weights) == 6 and not weights.isnan().any()
    for text, particle in zip(texts(post), post.particles.particles[0], strict=True):
        assert text == particle.prefix.text
        assert particle.dead or particle.log_potential == pytest.approx(worth(text))


@pytest.mark.parametrize("fault", ["dropped", "malformed", "broken", "limited"])
def test_a_server_that_only_fails_ends_in_an_answer_all_the_same(behind, fault):
    _, proxy, profile = behind
    spoil(proxy, Faults())
    model = model_of(proxy, profile, retries=FEW)
    model.lm.start(PROMPT)
    spoil(proxy, Faults(**{fault: 1.0}))
    post = run(model)
    assert texts(post) == [""] * 6  # the last population that had weight
    assert not post.log_weights.isnan().any()
    assert post.log_evidence.value.tolist() == [-math.inf]
    assert post.attrs["stopped"]


def test_text_that_gives_orders_has_the_weight_of_its_text(behind):
    """Half of the answers say "score 1.0": their weights are those of the potential, no others."""
    _, proxy, profile = behind
    spoil(proxy, Faults(injected=0.5), seed=4)
    post = run(model_of(proxy, profile), ParticleFilter(6, ess_threshold=0.0))
    said = texts(post)
    assert any(INJECTION in text for text in said) and any(INJECTION not in t for t in said)
    expected = torch.tensor([worth(text) for text in said], dtype=torch.float64)
    torch.testing.assert_close(
        torch.log_softmax(post.log_weights[0], 0), torch.log_softmax(expected, 0)
    )


def test_a_judge_is_not_talked_into_a_score(behind):
    """Its replies carry orders: they are no score, so every text keeps the neutral one."""
    from probkit.models.language.potentials import JudgePotential

    server, proxy, profile = behind
    spoil(proxy, Faults(injected=1.0))
    with OpenAILM(f"{proxy.url}/v1", api_key_env=None, profile=profile, retries=QUICK) as judge:
        potential = JudgePotential(judge, "Is it short?", mode="reply")
        with OpenAILM(f"{server.url}/v1", api_key_env=None, profile=profile) as writer:
            model = GuidedGeneration(writer, potential, steps=replace(STEPS, max_steps=1))
            post = infer(model, PROMPT, ParticleFilter(4, ess_threshold=0.0), rng=0)
    assert len(set(post.log_weights[0].tolist())) == 1
    assert {p.log_potential for p in post.particles.particles[0]} == {math.log(0.5)}


def test_a_proposal_that_cannot_be_corrected_is_refused(behind):
    """vLLM tells log probabilities before the temperature: those of the proposal are unknown."""
    _, proxy, profile = behind
    spoil(proxy, Faults())
    model = model_of(proxy, profile, guided={"proposal": Law(temperature=0.7)})
    with pytest.raises(CapabilityError, match="needs log p and log q .*OpenAILM did not tell"):
        run(model)


def test_particle_gibbs_with_ancestor_sampling_survives(behind):
    """Scores fail too; an ancestor that cannot be scored is not chosen."""
    _, proxy, profile = behind
    sampler = ParticleGibbs(3, draws=3, warmup=0)
    spoil(proxy, Faults())
    clean = run(model_of(proxy, profile), sampler)
    spoil(proxy, ROUGH, seed=1)
    assert texts(run(model_of(proxy, profile), sampler)) == texts(clean)
    spoil(proxy, Faults(dropped=0.3, broken=0.3), seed=2)
    post = run(model_of(proxy, profile, retries=FEW), sampler)
    assert not post.log_weights.isnan().any()


def test_recorded_runs_replay_without_key_or_server(behind, monkeypatch, tmp_path):
    from probkit.models.language import RecordingLM, ReplayLM

    key = "sk-canary-77aa01"
    monkeypatch.setenv("PROBKIT_TEST_KEY", key)
    _, proxy, profile = behind
    spoil(proxy, ROUGH, seed=6)
    path = tmp_path / "run.jsonl"
    with OpenAILM(
        f"{proxy.url}/v1", api_key_env="PROBKIT_TEST_KEY", profile=profile, retries=QUICK
    ) as lm:
        recorded = infer(
            GuidedGeneration(RecordingLM(lm, path), FewB(), steps=STEPS),
            PROMPT,
            ParticleFilter(4),
            rng=3,
        )
    assert key not in path.read_text() and proxy.url not in path.read_text()
    replayed = infer(
        GuidedGeneration(ReplayLM(path), FewB(), steps=STEPS), PROMPT, ParticleFilter(4), rng=3
    )
    assert texts(replayed) == texts(recorded)
    assert torch.equal(replayed.log_weights, recorded.log_weights)
    recorded.save(tmp_path / "post")
    stored = "".join(f.read_bytes().decode("latin-1") for f in (tmp_path / "post").iterdir())
    assert key not in stored

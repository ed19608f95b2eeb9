"""OpenAILM through a proxy that spoils answers: runs go on, budgets hold, results stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fault_proxy import INJECTION, FaultProxy, Faults
from support.openai_server import OpenAIServer, Variant

from probkit.models import OpenAILM
from probkit.models.language import Budget, Retries

QUICK = Retries(most=30, first=0.001, longest=0.002)
FEW = Retries(most=2, first=0.001, longest=0.002)
ROUGH = Faults(dropped=0.1, malformed=0.1, truncated=0.1, limited=0.1, broken=0.1, wrong_schema=0.1)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["completions", "vllm", "repeat"])
def behind(request):
    """A server, a proxy before it, and what probing found without faults."""
    variant = {
        "completions": Variant(),
        "vllm": Variant(vllm=True),
        "repeat": Variant(completions=False, chat="repeat"),
    }[request.param]
    with OpenAIServer(variant) as server, FaultProxy(server.url) as proxy:
        with OpenAILM(f"{server.url}/v1", api_key_env=None) as lm:
            yield server, proxy, lm.profile


def model_of(proxy: FaultProxy, profile, **options) -> OpenAILM:
    defaults = {"retries": QUICK, "timeout": 20.0, "concurrency": 4, "profile": profile}
    return OpenAILM(f"{proxy.url}/v1", api_key_env=None, **(defaults | options))


def spoil(proxy: FaultProxy, faults: Faults, seed: int = 0, delay: float = 1.0) -> None:
    proxy.faults, proxy.seed, proxy.delay = faults, seed, delay
    proxy.sent.clear()
    proxy.struck.clear()


def rounds(lm: OpenAILM, n: int = 4, times: int = 2, max_tokens: int = 4):
    """Steps of a small run: every prefix is continued until it ends or is refused."""
    from probkit.models.language.protocol import extended

    rng = stream(7)
    found, prefixes = [], [lm.start("x|")] * n
    for _ in range(times):
        steps = lm.generate(prefixes, stop=["\n"], max_tokens=max_tokens, rng=rng)
        found.append([(s.text, s.reason, s.tokens, str(s.log_q)) for s in steps])
        prefixes = [extended(p, s) for p, s in zip(prefixes, steps, strict=True)]
    return found


def test_results_with_faults_are_those_without(behind):
    _, proxy, profile = behind
    spoil(proxy, Faults())
    with model_of(proxy, profile) as lm:
        clean = rounds(lm)
    spoil(proxy, ROUGH)
    with model_of(proxy, profile) as lm:
        assert rounds(lm) == clean
        assert lm.usage.retries > 3 and lm.usage.failures == 0
    assert sum(proxy.struck[f] > 0 for f in vars(ROUGH)) >= 4


def test_probing_survives_faults(behind):
    _, proxy, profile = behind
    spoil(proxy, ROUGH, seed=3)
    with OpenAILM(f"{proxy.url}/v1", api_key_env=None, retries=QUICK) as lm:
        assert lm.profile == profile
        assert lm.usage.retries > 0


@pytest.mark.parametrize("fault", ["dropped", "malformed", "truncated", "limited", "broken"])
def test_nothing_but_faults_is_a_failed_step(behind, fault):
    _, proxy, profile = behind
    spoil(proxy, Faults())
    with model_of(proxy, profile, retries=FEW) as lm:
        prefix = lm.start("x|")
        spoil(proxy, Faults(**{fault: 1.0}))
        assert lm.start("another|").tokens == ()
        steps = lm.generate([prefix] * 2, max_tokens=3, rng=stream())
        assert [s.reason for s in steps] == ["failed"] * 2
        assert (lm.usage.calls, lm.usage.retries, lm.usage.failures) == (2, 4, 2)


def test_orders_in_a_text_are_text(behind):
    """An answer that gives orders is a string like any other; nothing else of the step changes."""
    _, proxy, profile = behind
    if profile.raw is None:
        pytest.skip("here the injection follows the repeated partial answer; see the next test")
    spoil(proxy, Faults(injected=1.0))
    with model_of(proxy, profile) as lm:
        steps = lm.generate([lm.start("x|")] * 4, max_tokens=3, rng=stream(2))
    spoil(proxy, Faults())
    with model_of(proxy, profile) as lm:
        clean = lm.generate([lm.start("x|")] * 4, max_tokens=3, rng=stream(2))
    assert {s.text for s in steps} == {INJECTION}
    for spoilt, plain in zip(steps, clean, strict=True):
        assert spoilt.reason == plain.reason
        assert str(spoilt.log_q) in (str(plain.log_q), "nan")


mixes = st.builds(
    lambda parts: Faults(**{k: 0.9 * v / max(1.0, sum(parts.values())) for k, v in parts.items()}),
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
@given(faults=mixes, seed=st.integers(0, 1000), tokens=st.integers(10, 160))
def test_no_mix_of_faults_kills_a_run_or_passes_the_budget(behind, faults, seed, tokens):
    """What the server really computed stays within the budget, whatever it tells of it."""
    server, proxy, profile = behind
    spoil(proxy, faults, seed)
    before = server.tokens
    with model_of(proxy, profile, retries=FEW, budget=Budget(tokens=tokens)) as lm:
        found = rounds(lm, n=3)
        assert all(
            reason in ("stop", "length", "end", "failed", "budget")
            for steps in found
            for _, reason, *_ in steps
        )
        used = lm.usage
    longest_step = 4 + 60  # completion and prompt of one request
    assert server.tokens - before <= tokens + longest_step
    assert used.tokens <= tokens
    # all that the server computed is accounted for, and more where answers got lost
    assert server.tokens - before <= used.tokens or used.tokens >= tokens - longest_step


def test_slow_answers_among_good_ones(behind):
    server, proxy, profile = behind
    spoil(proxy, Faults(slow=0.3), seed=1, delay=3.0)
    before = server.tokens
    with model_of(proxy, profile, timeout=0.4) as lm:
        found = rounds(lm, n=3, times=1)
        assert all(reason != "failed" for steps in found for _, reason, *_ in steps)
        assert server.tokens - before <= lm.usage.tokens
    assert proxy.struck["slow"] > 0


def test_faults_repeat(behind):
    _, proxy, profile = behind
    counts = []
    for _ in range(2):
        spoil(proxy, ROUGH, seed=5)
        with model_of(proxy, profile) as lm:
            rounds(lm, n=2, times=1)
        counts.append(dict(proxy.struck))
    assert counts[0] == counts[1]

"""OpenAILM against a real server: llama.cpp with SmolLM2, directly, in OpenAI's words, spoilt."""

from __future__ import annotations

import math

import pytest
import torch
from support.fault_proxy import FaultProxy, Faults
from support.http_server import Request, json_response
from support.llama_server import LlamaServer

from probkit.extras import available
from probkit.models import OpenAILM
from probkit.models.language import Budget, Continuation, Law, Retries, smollm2_path
from probkit.models.language.protocol import extended

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(smollm2_path() is None, reason="no SmolLM2: probkit fetch smollm2"),
    pytest.mark.skipif(not available("xllamacpp"), reason='pip install "probkit[llm]"'),
]

SKY = "The colour of the sky is"
CHAT = [{"role": "user", "content": "Name a fruit."}]
GREEDY = Law(temperature=0.0)


class OpenAIPathsOnly(FaultProxy):
    """Shows nothing of a server but what OpenAI has too."""

    async def handle(self, request: Request, writer) -> None:
        if request.path.startswith("/v1/"):
            await super().handle(request, writer)
        else:
            writer.write(json_response(404, {"error": {"message": "not found"}}))


@pytest.fixture(scope="module")
def server():
    with LlamaServer(smollm2_path()) as made:
        yield made


@pytest.fixture(scope="module")
def lm(server):
    with OpenAILM(f"{server.url}/v1", api_key_env=None, concurrency=2) as made:
        yield made


@pytest.fixture(scope="module")
def plain(server):
    """The same server by its OpenAI endpoints alone."""
    with OpenAIPathsOnly(server.url) as proxy:
        with OpenAILM(f"{proxy.url}/v1", api_key_env=None, concurrency=2) as made:
            yield made


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_server_is_recognised(lm):
    profile = lm.profile
    assert profile.server == "llama.cpp" and profile.raw.way == "llama.cpp"
    assert profile.chat == profile.raw and profile.end_token == 2 and profile.context == 1024
    can = lm.capabilities
    assert can.logprobs and can.prefill and can.prompt_logprobs and can.seed


def test_its_openai_endpoints_are_probed_as_they_are(plain):
    profile = plain.profile
    assert profile.server == "OpenAI-compatible"
    assert profile.raw.way == "completions" and profile.raw.law_of_logprobs == "raw"
    assert profile.chat.way == "chat" and profile.chat.repeats_prefill
    assert profile.chat.prefill and not profile.raw.scores  # echo is ignored there


def test_first_tokens_agree_with_the_model_in_this_process(lm):
    from probkit.models.language.llama_cpp import LlamaCppLM

    listed = lm.top_log_probs([lm.start(SKY), lm.start(CHAT)])
    with LlamaCppLM(smollm2_path(), context=512, threads=1) as local:
        names = local.vocabulary
        for prompt, found in zip((SKY, CHAT), listed, strict=True):
            row = local.next_log_probs([local.start(prompt)])[0]
            best = row.topk(10)
            gaps = [
                abs(found[names[k]] - value)
                for k, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            assert max(gaps) < 0.01


def test_log_q_is_the_score(lm):
    prefixes = [lm.start(SKY), lm.start(CHAT)]
    steps = lm.generate(prefixes, stop=["."], max_tokens=8, rng=stream(1))
    assert all(math.isfinite(step.log_q) for step in steps)
    torch.testing.assert_close(
        lm.score(prefixes, steps),
        torch.tensor([step.log_q for step in steps], dtype=torch.float64),
        rtol=0,
        atol=0.05 * 8,  # quantised weights, other batches
    )


def test_stop_strings_and_tokens(lm):
    prefix = lm.start("One, two, three, four, five,")
    step = lm.generate([prefix], stop=[" seven"], max_tokens=12, law=GREEDY, rng=stream())[0]
    assert (step.text, step.reason, step.n_tokens) == (" six, seven", "stop", 3)
    assert len(step.tokens) == 3 and step.log_q == 0.0
    longer = extended(prefix, step)
    after = lm.generate([longer], max_tokens=2, law=GREEDY, rng=stream())[0]
    assert after.text == ", eight"
    assert (len(longer.tokens), longer.start) == (len(prefix.tokens) + 3, len(prefix.tokens))


def test_the_end_of_an_answer(lm):
    steps = lm.generate([lm.start(CHAT)] * 2, max_tokens=60, law=GREEDY, rng=stream())
    assert steps[0].reason == "end" and steps[0].n_tokens == len(steps[0].tokens) + 1
    assert lm.profile.end_token not in steps[0].tokens
    assert steps[0].text == steps[1].text


def test_tokens_inside_characters_are_kept(lm):
    """Emoji take several tokens each; the stream of llama.cpp leaves their first ones out."""
    prefix = lm.start("🍎 🍐 🍊 🍋 🍌 🍉 🍇 🍓 🍎 🍐 🍊 🍋 🍌 🍉 🍇 🍓 🍎 🍐 🍊")
    step = lm.generate([prefix], max_tokens=6, rng=stream(3))[0]
    assert len(step.tokens) == step.n_tokens == 6 and math.isfinite(step.log_q)
    again = lm.generate([extended(prefix, step)], max_tokens=2, rng=stream(4))[0]
    assert again.reason == "length"


def test_chats_that_repeat_the_prefill_go_on(lm, plain):
    texts = []
    for each in (lm, plain):
        prefix = each.start(CHAT)._replace(text="A fruit is an app")
        step = each.generate([prefix], max_tokens=3, law=GREEDY, rng=stream())[0]
        texts.append(step.text)
    assert texts[0] == texts[1] and texts[0][0].islower()  # the word is finished, not begun anew


def test_raw_text_goes_on_by_either_way(lm, plain):
    prompt = "One, two, three, four, five,"
    texts = [
        each.generate([each.start(prompt)], max_tokens=6, law=GREEDY, rng=stream())[0].text
        for each in (lm, plain)
    ]
    assert texts[0] == texts[1] == " six, seven, eight,"


def test_equal_seeds(lm):
    prefix = lm.start(SKY)
    runs = [lm.generate([prefix] * 2, max_tokens=6, rng=stream(6)) for _ in range(2)]
    assert [s.text for s in runs[0]] == [s.text for s in runs[1]]
    assert runs[0][0].text != runs[0][1].text


def test_faults_before_a_real_server(server, lm):
    """Spoilt streams are asked for again; what comes out is what comes without faults."""
    prompt = "One, two, three, four, five,"
    clean = lm.generate([lm.start(prompt)] * 2, stop=["."], max_tokens=6, law=GREEDY, rng=stream())
    faults = Faults(dropped=0.15, malformed=0.15, truncated=0.15, limited=0.1, broken=0.1)
    quick = Retries(most=30, first=0.01, longest=0.02)
    with FaultProxy(server.url, faults, seed=2) as proxy:
        with OpenAILM(f"{proxy.url}/v1", api_key_env=None, retries=quick, concurrency=2) as spoilt:
            assert spoilt.profile == lm.profile
            prefixes = [spoilt.start(prompt)] * 2
            steps = spoilt.generate(prefixes, stop=["."], max_tokens=6, law=GREEDY, rng=stream())
            assert [s[:2] for s in steps] == [s[:2] for s in clean]
            assert spoilt.usage.retries > 5 and spoilt.usage.failures == 0


def test_a_budget_before_a_real_server(server, lm):
    budget = Budget(completion_tokens=25)
    with OpenAILM(f"{server.url}/v1", api_key_env=None, budget=budget, profile=lm.profile) as small:
        steps = small.generate([small.start(SKY)] * 4, max_tokens=10, rng=stream())
        assert [s.reason == "budget" for s in steps] == [False, False, True, True]
        assert small.usage.completion_tokens <= 25
    assert isinstance(steps[-1], Continuation) and steps[-1].n_tokens == 0

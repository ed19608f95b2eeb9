"""OpenAILM against servers that hold an exact chain: laws, routes, stop strings, capabilities."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from support.openai_server import SYMBOLS, OpenAIServer, Variant, chain

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import pack, unpack
from probkit.models import OpenAILM
from probkit.models.language import Budget, Continuation, Law, Prefix, Prices, Retries
from probkit.models.language.protocol import LanguageModel, extended
from probkit.testing import unchanged_globals

CHAT = [{"role": "user", "content": "go"}]
QUICK = Retries(most=4, first=0.01, longest=0.02)
VARIANTS = {
    "completions": Variant(),
    "vllm": Variant(vllm=True),
    "echo": Variant(echo=True, tells_stop=True),
    "strict": Variant(strict=True),
    "scaled": Variant(scaled=True),
    "prefill": Variant(completions=False, chat="prefill"),
    "repeat": Variant(completions=False, chat="repeat"),
    "continue": Variant(completions=False, chat="continue"),
    "prefix": Variant(completions=False, chat="prefix"),
    "fresh": Variant(completions=False, chat="fresh"),
    "bare": Variant(templated=True, chat="prefill", logprobs=False, seed=False),
}


@pytest.fixture(scope="module")
def served():
    """Servers and models by variant; each is probed once."""
    made: dict[str, tuple[OpenAIServer, OpenAILM]] = {}

    def get(name: str) -> tuple[OpenAIServer, OpenAILM]:
        if name not in made:
            server = OpenAIServer(VARIANTS[name]).__enter__()
            made[name] = server, model_of(server)
        return made[name]

    yield get
    for server, lm in made.values():
        lm.close()
        server.__exit__()


def model_of(server: OpenAIServer, **options) -> OpenAILM:
    return OpenAILM(
        f"{server.url}/v1", **{"api_key_env": None, "retries": QUICK, "timeout": 20.0} | options
    )


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def after(prompt, text: str) -> Prefix:
    return Prefix(prompt, (), 0, text)


# ------------------------------------------------------------------------ probing


def test_is_a_language_model(served):
    assert isinstance(served("vllm")[1], LanguageModel)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("completions", dict(logprobs=True, prefill=True, seed=True, top_logprobs=5)),
        (
            "vllm",
            dict(logprobs=True, prefill=True, seed=True, prompt_logprobs=True, top_logprobs=5),
        ),
        ("echo", dict(logprobs=True, prefill=True, seed=True, prompt_logprobs=True)),
        ("prefill", dict(logprobs=True, prefill=True, seed=True, prompt_logprobs=False)),
        ("repeat", dict(prefill=True)),
        ("continue", dict(prefill=True)),
        ("prefix", dict(prefill=True)),
        ("fresh", dict(prefill=False, logprobs=True)),
        ("bare", dict(prefill=True, logprobs=False, seed=False, top_logprobs=0)),
    ],
)
def test_probing_finds_what_the_server_can_do(served, name, found):
    capabilities = served(name)[1].capabilities
    assert {key: getattr(capabilities, key) for key in found} == found
    assert not capabilities.logits and not capabilities.kv_fork


def test_the_profile_says_how(served):
    assert served("vllm")[1].profile.raw.stops == "included"
    assert served("vllm")[1].profile.raw.token_ids
    assert served("vllm")[1].profile.raw.scores == "prompt_logprobs"
    assert served("echo")[1].profile.raw.stops == "told"
    assert served("echo")[1].profile.raw.scores == "echo"
    assert served("completions")[1].profile.raw.stops == "dropped"
    assert served("completions")[1].profile.raw.law_of_logprobs == "raw"
    assert served("scaled")[1].profile.raw.law_of_logprobs == "scaled"
    assert served("repeat")[1].profile.chat.repeats_prefill
    assert served("continue")[1].profile.chat.prefill == "continue"
    assert served("prefix")[1].profile.chat.prefill == "prefix"
    assert served("strict")[1].profile.raw.neutral is False
    assert served("completions")[1].profile.raw.neutral is True
    assert served("bare")[1].profile.raw is None
    assert "chat template" in served("bare")[1].report()
    assert "begin a new answer" in served("fresh")[1].report()


def test_probing_happens_once_and_is_counted(served):
    server, lm = served("completions")
    lm.report()
    before, used = len(server.requests), lm.usage
    assert lm.capabilities == lm.capabilities
    assert len(server.requests) == before
    assert used.calls >= 10 and used.completion_tokens > 0
    assert "requests" in lm.report() and "'markov'" in lm.report()


def test_a_profile_saves_the_probing(served):
    server, lm = served("completions")
    with model_of(server, profile=lm.profile) as again:
        before = len(server.requests)
        again.generate([again.start("x|")], max_tokens=3, rng=stream())
        assert len(server.requests) == before + 1
        assert unpack(*pack(again)).profile == lm.profile


def test_defaults_of_the_server_are_switched_off(served):
    server, lm = served("completions")
    lm.generate([lm.start("x|")], max_tokens=3, rng=stream())
    assert server.requests[-1]["top_k"] == -1 and server.requests[-1]["min_p"] == 0.0
    strict, other = served("strict")
    other.generate([other.start("x|")], max_tokens=3, rng=stream())
    assert "top_k" not in strict.requests[-1]


# ------------------------------------------------------------------------ laws


@pytest.mark.parametrize("name", ["completions", "vllm", "echo", "prefill", "repeat", "prefix"])
def test_log_q_is_the_chains_own(served, name):
    lm, exact = served(name)[1], chain()
    prefixes = [after("x|", "abca")] * 12
    for k, step in enumerate(lm.generate(prefixes, max_tokens=5, rng=stream(3))):
        if step.reason == "end" and name != "vllm":
            assert math.isnan(step.log_q)  # the server does not tell that of the end
            continue
        state = Prefix("|", exact.tokenize("abca"), 0, "abca")
        expected = exact.score([state], [step._replace(tokens=())])
        assert step.log_q == pytest.approx(float(expected), abs=1e-9), k
        assert step.log_p == step.log_q


@pytest.mark.parametrize(("name", "temperature"), [("completions", 1.0), ("repeat", 0.5)])
def test_texts_follow_the_law(served, name, temperature):
    """Chi-square of the next symbol against the chain, 4 standard deviations."""
    lm, exact, n = served(name)[1], chain(), 100
    law = Law(temperature=temperature)
    steps = lm.generate([after("x|", "ab")] * n, max_tokens=1, law=law, rng=stream(5))
    known = Prefix("|", exact.tokenize("ab"), 0, "ab")
    expected = {o.text: math.exp(o.log_q) for o in exact.outcomes(1, prefix=known, law=law)}
    assert sum(expected.values()) == pytest.approx(1.0) and len(expected) == len(SYMBOLS) + 1
    counts = Counter(step.text for step in steps)
    chi = sum((counts[t] - n * p) ** 2 / (n * p) for t, p in expected.items())
    dof = len(expected) - 1
    assert chi < dof + 4 * math.sqrt(2 * dof)


def test_temperature_one_beside_another_base(served):
    for name, known in (("vllm", "log_p"), ("scaled", "log_q")):
        _, lm = served(name)
        law, exact = Law(temperature=0.5), chain()
        prefix = after("x|", "ab")
        steps = lm.generate([prefix] * 6, max_tokens=2, law=law, base=Law(), rng=stream(1))
        outcomes = exact.outcomes(2, prefix=Prefix("|", exact.tokenize("ab"), 0, "ab"), law=law)
        for step in steps:
            if step.reason == "end":
                continue
            truth = next(o for o in outcomes if o.text == step.text and o.reason == step.reason)
            assert getattr(step, known) == pytest.approx(getattr(truth, known), abs=1e-9)
            other = {"log_p": "log_q", "log_q": "log_p"}[known]
            assert math.isnan(getattr(step, other))


def test_greedy_has_log_probability_zero(served):
    for name in ("vllm", "completions", "prefill"):
        lm = served(name)[1]
        step = lm.generate([lm.start("x|")], max_tokens=5, law=Law(temperature=0.0), rng=stream())
        assert (step[0].text, step[0].log_q, step[0].reason) == ("abcab", 0.0, "length")


def test_without_logprobs_they_are_nan(served):
    lm = served("bare")[1]
    step = lm.generate([lm.start(CHAT)], max_tokens=3, rng=stream())[0]
    assert math.isnan(step.log_q) and math.isnan(step.log_p) and step.n_tokens >= 1


# ------------------------------------------------------------------------ steps


@pytest.mark.parametrize("name", ["completions", "vllm", "echo", "prefill", "repeat", "bare"])
def test_stop_strings_belong_to_their_step(served, name):
    lm = served(name)[1]
    steps = lm.generate([lm.start("x|")] * 30, stop=["\n", "cc"], max_tokens=6, rng=stream(2))
    reasons = {step.reason for step in steps}
    assert reasons == {"stop", "length", "end"}
    for step in steps:
        ended = step.text.endswith(("\n", "cc"))
        assert ended == (step.reason == "stop")
        assert "\n" not in step.text[:-1] and "cc" not in step.text[:-1]
        assert step.reason != "length" or len(step.text) == 6


def test_server_stops_cost_less_than_clients(served):
    server, lm = served("vllm")
    with model_of(server, stops="client", profile=lm.profile) as other:
        costs, results = [], []
        for each in (lm, other):
            before = each.usage
            steps = each.generate([each.start("x|")] * 8, stop=["\n"], max_tokens=20, rng=stream())
            costs.append((each.usage - before).completion_tokens)
            results.append([(step.text, step.reason, step.tokens) for step in steps])
        assert results[0] == results[1]
        assert costs[0] < costs[1]


def test_a_server_that_does_not_tell_may_be_trusted_with_one_stop_string(served):
    server, lm = served("completions")
    with model_of(server, stops="server", profile=lm.profile) as other:
        steps = other.generate([other.start("x|")] * 20, stop=["\n"], max_tokens=30, rng=stream())
        assert all(s.text.endswith("\n") for s in steps if s.reason == "stop")
        with pytest.raises(CapabilityError, match="which of 2 stop strings"):
            other.generate([other.start("x|")], stop=["a", "b"], max_tokens=3, rng=stream())


def test_tokens_are_carried_and_never_tokenised_again(served):
    server, lm = served("vllm")
    first = lm.start("x|")
    assert first.tokens and first.start == 2 and first.generated == ()
    step = lm.generate([first], max_tokens=3, rng=stream(8))[0]
    assert "".join(SYMBOLS[t] for t in step.tokens) == step.text
    longer = extended(first, step)
    lm.generate([longer], max_tokens=2, rng=stream(9))
    assert server.requests[-1]["prompt"] == list(longer.tokens)


def test_chats_go_through_the_template_as_tokens(served):
    server, lm = served("vllm")
    prefix = lm.start(CHAT)
    assert server.decode(prefix.tokens) == "<user>go|"
    assert lm.generate([prefix], max_tokens=2, rng=stream())[0].reason in ("length", "end")


@pytest.mark.parametrize("name", ["prefill", "repeat", "continue", "prefix"])
def test_partial_answers_of_chats_go_on(served, name):
    lm = served(name)[1]
    greedy = Law(temperature=0.0)
    step = lm.generate([after((("user", "go"),), "ab")], max_tokens=3, law=greedy, rng=stream())
    assert step[0].text == "cab"


def test_a_server_that_begins_anew_is_refused(served):
    lm = served("fresh")[1]
    assert lm.generate([lm.start(CHAT)], max_tokens=3, rng=stream())[0].text
    with pytest.raises(CapabilityError, match="begins a new answer instead"):
        lm.generate([after((("user", "go"),), "ab")], max_tokens=3, rng=stream())


def test_chats_need_a_server_that_takes_them(served):
    lm = served("completions")[1]
    with pytest.raises(CapabilityError, match="takes no chats by the route 'auto'"):
        lm.start(CHAT)


# ------------------------------------------------------------------------ seeds


@pytest.mark.parametrize("name", ["completions", "prefill"])
def test_equal_seeds_give_equal_texts_and_k_does_not_depend_on_n(served, name):
    lm = served(name)[1]
    prefix = lm.start("x|")
    many = lm.generate([prefix] * 5, max_tokens=6, rng=stream(4))
    few = lm.generate([prefix] * 2, max_tokens=6, rng=stream(4))
    assert [s.text for s in many[:2]] == [s.text for s in few]
    assert [s.text for s in lm.generate([prefix] * 5, max_tokens=6, rng=stream(4))] == [
        s.text for s in many
    ]
    assert len({s.text for s in many}) > 1
    assert [s.text for s in lm.generate([prefix] * 5, max_tokens=6, rng=stream(5))] != [
        s.text for s in many
    ]


def test_nothing_global_changes(served):
    lm = served("completions")[1]
    with unchanged_globals():
        lm.generate([lm.start("x|")], max_tokens=3, rng=stream())


# ------------------------------------------------------------------------ scores


@pytest.mark.parametrize("name", ["vllm", "echo"])
def test_scores_are_the_chains(served, name):
    lm, exact = served(name)[1], chain()
    texts = ["a", "bca", "\n\nab"]
    prefixes = [after("x|", "ab"), after("x|", "c"), after("x|", "a\n")]
    steps = [Continuation((), text, 0.0, 0.0, "length", len(text)) for text in texts]
    known = [Prefix("|", exact.tokenize(p.text), 0, p.text) for p in prefixes]
    got = lm.score(prefixes, steps)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact.score(known, steps), rtol=0, atol=1e-9)


def test_the_end_is_scored_once_it_has_been_seen(served):
    lm, exact = model_of(served("vllm")[0], profile=served("vllm")[1].profile), chain()
    with lm:
        end = Continuation((), "a", 0.0, 0.0, "end", 2)
        with pytest.raises(CapabilityError, match="does not tell the token that ends"):
            lm.score([after("x|", "ab")], [end])
        steps = lm.generate([lm.start("x|")] * 30, max_tokens=8, rng=stream(1))
        step = next(s for s in steps if s.reason == "end" and s.text)
        score = lm.score([lm.start("x|")], [step])
        assert float(score) == pytest.approx(step.log_q)
        assert float(score) == pytest.approx(float(exact.score([exact.start("x|")], [step])))


def test_scoring_where_it_is_not_told(served):
    step = Continuation((), "a", 0.0, 0.0, "length", 1)
    with pytest.raises(CapabilityError, match="score needs a language model with prompt_logprobs"):
        served("completions")[1].score([after("x|", "")], [step])
    with pytest.raises(CapabilityError, match="does not tell the token that ends"):
        served("echo")[1].score([after("x|", "")], [step._replace(reason="end")])
    with pytest.raises(ShapeError, match="one step for each prefix, got 1 prefixes and 0 steps"):
        served("echo")[1].score([after("x|", "")], [])


def test_alternatives(served):
    lm, exact = served("completions")[1], chain()
    found = lm.top_log_probs([after("x|", "ab")])[0]
    row = exact.next_log_probs([Prefix("|", exact.tokenize("ab"), 0, "ab")])[0]
    assert found == pytest.approx(
        {**dict(zip(SYMBOLS, row.tolist(), strict=False)), "<end>": float(row[-1])}
    )
    with pytest.raises(CapabilityError, match="this server tells none"):
        served("bare")[1].top_log_probs([after((("user", "go"),), "")])
    with pytest.raises(CapabilityError, match=r"lm.top_log_probs"):
        lm.next_log_probs([])
    assert lm.vocabulary == ()


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(base_url="localhost:8000"), "expected base_url as http://host:port/v1"),
        (dict(base_url="ftp://x"), "expected base_url as http"),
        (dict(base_url="http://me:secret@x/v1"), "without user name, password"),
        (dict(base_url="http://x/v1?key=1"), "without user name, password"),
        (dict(model=""), "expected model as a name or None"),
        (dict(api_key_env="sk-123"), "the key itself is never passed"),
        (dict(concurrency=0), "expected a whole concurrency >= 1, got 0"),
        (dict(timeout=0.0), "expected timeout > 0 in seconds, got 0"),
        (dict(deadline=float("inf")), "expected deadline > 0"),
        (dict(route="grpc"), "expected route as one of auto, completions, chat, got 'grpc'"),
        (dict(stops="never"), "expected stops as one of auto, server, client"),
        (dict(budget=Budget(money=1.0)), "a budget of money needs prices"),
        (dict(extra_body={"api_key": "x"}), "extra_body holds 'api_key'"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(DataError, match=text):
        OpenAILM(**{"base_url": "http://127.0.0.1:1/v1"} | options)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Prices(prompt=-1.0), "Prices: expected a finite prompt >= 0, got -1.0"),
        (lambda: Prices(cached=float("nan")), "Prices: expected a finite cached"),
        (lambda: Retries(most=-1), "Retries: expected a finite most >= 0, got -1"),
        (lambda: Retries(longest=float("inf")), "Retries: expected a finite longest"),
    ],
)
def test_bad_parts(make, text):
    with pytest.raises(DataError, match=text):
        make()


def test_bad_requests(served):
    lm = served("completions")[1]
    with pytest.raises(DataError, match="expected a prompt with text"):
        lm.start("")
    with pytest.raises(DataError, match="max_tokens >= 1"):
        lm.generate([lm.start("x")], max_tokens=0, rng=stream())
    with pytest.raises(CapabilityError, match="needs a language model with logits"):
        lm.generate([lm.start("x")], max_tokens=1, law=Law(allowed=lambda p: p), rng=stream())
    with pytest.raises(DataError, match="fewer than 200 tokens, the context of 'markov', got 300"):
        served("vllm")[1].start("x" * 300)
    assert lm.generate([], max_tokens=1, rng=stream()) == []


def test_an_overlong_text_fails_alone(served):
    lm = served("completions")[1]
    steps = lm.generate([lm.start("x|"), lm.start("y" * 300)], max_tokens=2, rng=stream())
    assert [step.reason for step in steps][1] == "failed"
    assert steps[0].reason in ("length", "end")
    assert str(steps[1]) == str(Continuation((), "", math.nan, math.nan, "failed", 0))
